"""The demo: SECURA and LoRA learn GSM8K side by side on a CPU, every figure measured.

Run it with `secura demo`, or call `secura.demo.run.main`.
"""
