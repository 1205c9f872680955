"""SECURA's adapted layer as functions: tensors in, tensors out; torch and triton alone."""

from .api import effective_weight, secura_add, secura_linear
from .cur import check_fits, important_channels, init_a, select
from .layer import Layer
from .norm import NormOptions, Restrain
from .ops.channel.op import row_norms

__all__ = [
    "Layer",
    "NormOptions",
    "Restrain",
    "check_fits",
    "effective_weight",
    "important_channels",
    "init_a",
    "row_norms",
    "secura_add",
    "secura_linear",
    "select",
]
