"""What methods learn, keep and forget: ``python -m benchmarks.retention {run,report}``."""
