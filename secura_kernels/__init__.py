"""SECURA's products and norm as functional ops: tensors in, tensors out; torch and triton alone."""

from . import flops
from .activation import activation_norm
from .activation_dense import activation_linear
from .additive import lowrank_add, lowrank_linear
from .channel import channel_product, row_norms
from .columns import project
from .cur import important_channels, init_a, projection, select
from .gain import NormOptions, Restrain, resolve_norm
from .linear import Layer, secura_linear, update
from .merge import effective_weight
from .weight import normed_weight, weight_norm_linear

__all__ = [
    "Layer",
    "NormOptions",
    "Restrain",
    "activation_linear",
    "activation_norm",
    "channel_product",
    "effective_weight",
    "important_channels",
    "init_a",
    "lowrank_add",
    "lowrank_linear",
    "normed_weight",
    "project",
    "projection",
    "resolve_norm",
    "row_norms",
    "secura_linear",
    "select",
    "update",
    "weight_norm_linear",
]

flops.register()
