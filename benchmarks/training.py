"""What whole-model benchmarks share: random models, and layers put in place of their own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .assets import load_model
from .shapes import ALL, QV, ModelShape

TARGETS = {"q,v": QV, "all": ALL}


def random_model(
    shape: ModelShape, blocks: int, device: torch.device, dtype: torch.dtype, tokens: int
) -> nn.Module:
    """A frozen causal language model of a shape, its weights drawn at random on the device.

    Args:
        shape: the dimensions.
        blocks: decoder blocks to build.
        device: where.
        dtype: of every weight.
        tokens: positions it must reach.

    Raises:
        ImportError: without transformers.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[shape.architecture](
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        max_position_embeddings=max(tokens, 2048),
        tie_word_embeddings=False,
        use_cache=False,
    )
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False).train()


def packaged_or_tiny(preset: str, dtype: torch.dtype) -> Any:
    """SmolLM2-135M for ``quick``, else a model of two small layers, random and always the same."""
    if preset == "quick":
        return load_model("smollm2-135m", dtype)[0]
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype)


def target_layers(model: nn.Module, targets: str) -> dict[str, nn.Linear]:
    """The linear layers to adapt, by full name; ``targets`` is a key of ``TARGETS``."""
    names = TARGETS[targets]
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in names
    }


def set_checkpointing(model: Any, on: bool) -> None:
    """Switch gradient checkpointing of the decoder blocks, the non-reentrant kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()


@contextmanager
def adapted(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within, ``layers`` stand in the place of the model's own of the same names."""
    originals = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        yield
    finally:
        for name, layer in originals.items():
            model.set_submodule(name, layer)


def flop_per_token(shape: ModelShape, blocks: int, sequence: int) -> float:
    """Operations one token's training step needs where the weights are frozen.

    Two products with each weight (forward, ∂x) and causal attention forward and backward; the
    adapters' own and anything recomputed are not counted.
    """
    linear = blocks * sum(part.k * part.n * part.per_block for part in shape.projections())
    linear += shape.hidden * shape.vocab
    attention = blocks * 6 * sequence * shape.heads * shape.head_dim
    return 4.0 * linear + attention
