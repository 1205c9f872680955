"""The models whose layers are measured, by their published dimensions."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

QV = ("q_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", *MLP)
"""Linear layers that are adapted, as transformers names them."""


class Projection(NamedTuple):
    """A linear layer ``K → N`` and how many of them one decoder block has."""

    name: str
    k: int
    n: int
    per_block: int


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a decoder-only model."""

    name: str
    architecture: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def siblings(self) -> list[list[Projection]]:
        """The linear layers of one block, those that are given one tensor in one list."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        given = [
            (self.hidden, {"q": q, "k": kv, "v": kv}),
            (q, {"o": self.hidden}),
            (self.hidden, {"gate": self.intermediate, "up": self.intermediate}),
            (self.intermediate, {"down": self.hidden}),
        ]
        return [[Projection(name, k, n, 1) for name, n in of.items()] for k, of in given]

    def projections(self) -> list[Projection]:
        """The linear layers of one block, those of equal shape taken together."""
        grouped: dict[tuple[int, int], list[str]] = {}
        for one in itertools.chain(*self.siblings()):
            grouped.setdefault((one.k, one.n), []).append(one.name)
        return [Projection("+".join(names), *shape, len(names)) for shape, names in grouped.items()]


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("llama3-8b", "llama", 4096, 14336, 32, 32, 8, 128, 128256),
        ModelShape("llama3-70b", "llama", 8192, 28672, 80, 64, 8, 128, 128256),
        ModelShape("llama3-405b", "llama", 16384, 53248, 126, 128, 8, 128, 128256),
        ModelShape("qwen2-7b", "qwen2", 3584, 18944, 28, 28, 4, 128, 152064),
        ModelShape("qwen2-1.5b", "qwen2", 1536, 8960, 28, 12, 2, 128, 151936),
        ModelShape("gemma2-2b", "gemma2", 2304, 9216, 26, 8, 4, 256, 256000),
        ModelShape("smollm2-135m", "llama", 576, 1536, 30, 9, 3, 64, 49152),
    )
}


@dataclass(frozen=True)
class LayerCase:
    """One adapted layer: ``T`` tokens, ``K → N``, CUR rank ``m`` against LoRA rank ``r``."""

    model: str
    projection: str
    count: int
    T: int
    N: int
    K: int
    m: int
    r: int


class LayerPreset(NamedTuple):
    """Cases of ``benchmarks.layer``; ``headline_t`` is what tables show."""

    cases: list[LayerCase]
    headline_t: int


LAYER_PRESETS = ("quick", "host", "llama3-8b", "block", "full")
RANKS = (8, 16, 64, 128, 256)
TOKENS = (8192, 512, 2048, 4096, 16384)
TOKENS_OF_COUNTS = (8192, 2048, 512)
M, R = 128, 16
"""CUR rank and LoRA's, but where they are what is varied."""
FULL_MODELS = ("llama3-8b", "qwen2-7b", "qwen2-1.5b", "gemma2-2b")


def model_cases(model: str, t: int) -> list[LayerCase]:
    """Every projection of a model."""
    return [
        LayerCase(model, projection.name, projection.per_block, t, projection.n, projection.k, M, R)
        for projection in MODELS[model].projections()
    ]


def sibling_cases(model: str, t: int) -> list[list[LayerCase]]:
    """Every projection of a block, those that are given one tensor in one list."""
    return [
        [LayerCase(model, one.name, 1, t, one.n, one.k, M, R) for one in group]
        for group in MODELS[model].siblings()
    ]


def layer_preset(name: str) -> LayerPreset:
    """The cases of one of ``LAYER_PRESETS``, the most important first.

    ``quick`` is one square layer, small enough for a CPU; ``host`` one so small that its time is
    the host's, Python and launches; ``llama3-8b`` every projection of Llama-3-8B at T=8192;
    ``block`` the same, then at T=2048 and 512; ``full`` every model and every T, and ``ranks``,
    m = r on one layer of Llama-3-8B: hours, to be run in parts (``--models``, ``--tokens``).
    """
    if name == "quick":
        cases = [LayerCase("square", "linear", 1, t, 1024, 1024, 32, 16) for t in (2048, 512)]
        return LayerPreset(cases, 2048)
    if name == "host":
        return LayerPreset([LayerCase("tiny", "linear", 1, 16, 64, 64, 16, 16)], 16)
    if name == "full":
        cases = [case for of in FULL_MODELS for t in TOKENS for case in model_cases(of, t)]
        cases += [LayerCase("ranks", "q", 1, 8192, 4096, 4096, rank, rank) for rank in RANKS]
    else:
        tokens = (8192,) if name == "llama3-8b" else TOKENS_OF_COUNTS
        cases = [case for t in tokens for case in model_cases("llama3-8b", t)]
    return LayerPreset(cases, 8192)
