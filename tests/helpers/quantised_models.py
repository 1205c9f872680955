"""Tiny Llamas in every format of quantised weights, and what each stands for."""

from __future__ import annotations

import importlib

import tiny
import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM
from transformers.integrations import finegrained_fp8

from secura import bases


def projections(module, name=""):
    return isinstance(module, nn.Linear) and "lm_head" not in name


def bitsandbytes(folder, dtype=torch.float32, **bits):
    return LlamaForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**bits), device_map="cpu", dtype=dtype
    ).eval()


def four_bits(folder):
    """Where a CPU multiplies bf16, bitsandbytes evaluates in it: here as on every other."""
    model = bitsandbytes(folder, load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def torchao(folder, config, **settings):
    quantization = importlib.import_module("torchao.quantization")
    model = tiny.wide()
    quantization.quantize_(model, getattr(quantization, config)(**settings), projections)
    return model


def int4(folder):
    granularity = importlib.import_module("torchao.quantization").PerGroup(32)
    return torchao(folder, "IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=granularity)


def replaced(make):
    """A Llama whose projections are ``make(linear)``."""
    model = tiny.wide()
    for name, module in list(model.named_modules()):
        if projections(module, name):
            model.set_submodule(name, make(module))
    return model


def hqq(folder):
    quantize = importlib.import_module("hqq.core.quantize")
    settings = quantize.BaseQuantizeConfig(nbits=4, group_size=32)
    return replaced(
        lambda linear: quantize.HQQLinear(
            linear, settings, compute_dtype=torch.float32, device="cpu"
        )
    )


def fp8(folder):
    def make(linear):
        layer = finegrained_fp8.FP8Linear(
            linear.in_features, linear.out_features, block_size=(48, 32)
        )
        scale = torch.rand_like(layer.weight_scale_inv) / 16 + 1 / 16
        layer.weight_scale_inv.data = scale
        layer.weight.data = (linear.weight.data / scale.mean()).to(torch.float8_e4m3fn)
        return layer.requires_grad_(False)

    return replaced(make)


KINDS = {
    "bitsandbytes 4 bit": four_bits,
    "bitsandbytes 8 bit": lambda folder: bitsandbytes(folder, load_in_8bit=True),
    "torchao int8": lambda folder: torchao(folder, "Int8WeightOnlyConfig"),
    "torchao fp8": lambda folder: torchao(folder, "Float8WeightOnlyConfig"),
    "torchao int4": int4,
    "hqq 4 bit": hqq,
    "finegrained fp8": fp8,
}
ROUNDS_INPUTS = ("bitsandbytes 8 bit",)
"""LLM.int8 rounds each row of x to 8 bits; bitsandbytes leaves that out where a CPU trains."""


def fp8_product(x, weight, scale, block_size, bias, *_):
    scale = torch.kron(scale, torch.ones(block_size))[: weight.shape[0], : weight.shape[1]]
    return nn.functional.linear(x, weight.float() * scale, bias)


def dense_twin(model):
    """A plain Llama with the weights that the quantised one stands for."""
    plain = tiny.wide()
    for name, module in plain.named_modules():
        if projections(module, name):
            module.weight.data = bases.weight(model.get_submodule(name)).float().clone()
    return plain
