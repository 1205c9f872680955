"""SECURA's adapted layer as functions: tensors in, tensors out; torch and triton alone."""

from . import layers as layers
from .api import effective_weight, secura_add, secura_linear
from .cur import important_channels, init_a, select
from .layer import Layer
from .norm import NormOptions, Restrain
from .ops.channel.op import with_norms

__all__ = [
    "Layer",
    "NormOptions",
    "Restrain",
    "effective_weight",
    "important_channels",
    "init_a",
    "secura_add",
    "secura_linear",
    "select",
    "with_norms",
]
