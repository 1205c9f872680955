"""SECURA against LoRA, DoRA and the released code's way, run as modules (see README.md here)."""
