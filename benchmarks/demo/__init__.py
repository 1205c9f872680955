"""SECURA and LoRA learn GSM8K side by side: ``python -m benchmarks.demo``."""
