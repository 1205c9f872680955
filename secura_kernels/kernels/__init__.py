"""The Triton kernels and their launchers, imported only where an op resolved to ``"triton"``."""

from __future__ import annotations

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError(
        "secura_kernels.kernels needs triton: `pip install triton` (Linux), or use impl='reference'"
    ) from error
