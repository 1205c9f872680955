"""The demo: SECURA and LoRA learn GSM8K side by side on a CPU, every figure measured.

Run it with `python -m benchmarks.demo`, or call `benchmarks.demo.run.main`.
"""
