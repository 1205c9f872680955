"""An adapted model through all that is done to one, in any order, held against fp64 equations.

A walk draws adapters' settings and moves from its seed. What every adapter should hold is kept
beside the model and changed by the equations; after each move the model's logits have to be those
of a plain model that computes from what is kept, and its tensors what is kept.
"""

from __future__ import annotations

import copy
import random
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import secura
from secura_kernels import Layer, naive

MOVES = 80
TRAINED = ("A", "B", "U", "bias")
HELD = (*TRAINED, "left", "right", "core", "rows", "cols")
TARGETS = (("q_proj", "v_proj"), ("q_proj", "k_proj"), ("gate_proj", "down_proj"))


@dataclass
class Kept:
    """What an adapter should hold: fp64 tensors by name of each layer, and its scaling."""

    config: Any
    layers: dict[str, dict[str, Tensor]]
    scaling: float


class Adapted(nn.Module):
    """A linear layer that adds what the acting adapters add, by their equations."""

    def __init__(self, base: nn.Linear, name: str, walk: Walk) -> None:
        super().__init__()
        self.base, self.name, self.walk = base, name, walk

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        out = plain = self.base(x)
        for kept in self.walk.acting():
            if self.name in kept.layers:
                out = out + self._adapted(x, kept, kept.layers[self.name]) - plain
        return out

    def _adapted(self, x: Tensor, kept: Kept, own: dict[str, Tensor]) -> Tensor:
        layer = Layer(
            self.base.weight,
            self.base.bias,
            own["rows"],
            own["cols"],
            kept.config.norm_options,
            kept.scaling,
            own["core"],
            core_is_base=kept.config.norm_reference == "folded",
        )
        a, b = factors(own)
        return naive.secura_linear(x, layer, a, b, delta_bias=own.get("bias"))


def factors(own: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """A and B, or the core itself."""
    if "U" not in own:
        return own["A"], own["B"]
    return (own["left"] @ own["U"] @ own["right"] if "left" in own else own["U"]), None


class Walk:
    """One model, its moves, and what it should hold.

    A move that cannot be made now is :data:`NotImplemented`.
    """

    def __init__(self, norm: str, seed: int, folder: Path) -> None:
        self.norm, self.draw, self.folder = norm, random.Random(seed), folder
        self.kept: dict[str, Kept] = {}
        self.active, self.merged, self.disabled = ["default"], False, False
        self.base_trained = False  # of which an adapter's file holds nothing
        self.saved: list[tuple[Path, dict[str, Kept]]] = []
        self.model: Any = get_peft_model(tiny.llama(), self.config()).eval()
        self.plain = self.by_equations()
        self.note("default")

    def go(self, count: int) -> None:
        """Make moves, looking at the model after each."""
        names = sorted(name for name in dir(self) if name.startswith("move_"))
        made: list[str] = []
        while len(made) < count:
            name = self.draw.choice(names)
            made.append(name.removeprefix("move_"))
            try:
                if getattr(self, name)() is NotImplemented:
                    made.pop()
                else:
                    self.look()
            except AssertionError as error:
                raise AssertionError(f"after {', '.join(made)}: {error}") from error

    def by_equations(self) -> Any:
        """The base model in fp64, whose linear layers ask what is kept."""
        plain = tiny.llama().double().requires_grad_(False)
        for name, part in list(plain.named_modules()):
            if isinstance(part, nn.Linear):
                plain.set_submodule(name, Adapted(part, name, self))
        return plain

    def config(self) -> Any:
        """Settings of an adapter, drawn."""
        one_of = self.draw.choice
        chosen: dict[str, Any] = {
            "norm": self.norm,
            "r": one_of([2, 5]),
            "core": one_of(["ab", "u"]),
            "scaling": one_of([1.0, 0.5]),
            "train_bias": one_of([True, False]),
            "keep_columns": one_of([True, False]),
            "target_modules": list(one_of(TARGETS)),
        }
        if self.norm != "none":
            chosen |= {
                "norm_combine": one_of(["gated", "averaged"]),
                "norm_reference": one_of(["pretrained", "folded"]),
                "norm_eps": 1e-2,
            }
        return tiny.config(**chosen)

    def ids(self, count: int = 1) -> Tensor:
        """Texts, drawn."""
        return tiny.tokens(count, 6, self.draw.randrange(1000))

    def acting(self) -> list[Kept]:
        """The adapters that act."""
        return [] if self.disabled else [self.kept[name] for name in self.active]

    def parts(self, name: str) -> dict[str, Any]:
        """The model's modules of an adapter, by their layers' names."""
        layers = tiny.layers(self.model).items()
        own = ((at, layer.secura_adapter) for at, layer in layers)
        return {at.removeprefix("base_model.model."): a[name] for at, a in own if name in a}

    def note(self, name: str) -> None:
        """Keep what the adapter holds now."""
        layers = {}
        for at, part in self.parts(name).items():
            tensors = {key: getattr(part, key) for key in HELD}
            layers[at] = {
                key: value.detach().clone() if key in ("rows", "cols") else value.detach().double()
                for key, value in tensors.items()
                if value is not None
            }
        part = next(iter(self.parts(name).values()))
        self.kept[name] = Kept(copy.copy(self.model.peft_config[name]), layers, part.scaling)

    def look(self, model: Any = None) -> None:
        """The model, or one that is to compute the same, is what is kept."""
        ids = self.ids(2)
        found = tiny.logits(self.model if model is None else model, ids).double()
        torch.testing.assert_close(found, tiny.logits(self.plain, ids), rtol=1e-4, atol=1e-4)
        for name, kept in self.kept.items() if model is None else ():
            parts = self.parts(name)
            assert parts.keys() == kept.layers.keys()
            for at, tensors in kept.layers.items():
                assert parts[at].scaling == kept.scaling
                for key, value in tensors.items():
                    ours = getattr(parts[at], key).detach().to(value.dtype)
                    torch.testing.assert_close(ours, value, rtol=1e-4, atol=1e-5)

    def move_write(self) -> Any:
        """Put numbers in B (or U), in place or by other storage."""
        if self.merged:
            return NotImplemented
        name, swap = self.draw.choice(sorted(self.kept)), self.draw.random() < 0.5
        generator = torch.Generator().manual_seed(self.draw.randrange(1000))
        for part in self.parts(name).values():
            value = torch.randn(part.trained.shape, generator=generator).to(part.trained.dtype)
            if swap:
                part.trained.data = value
            else:
                part.trained.data.copy_(value)
        return self.note(name)

    def move_train(self) -> Any:
        """Take optimizer steps of some micro-batches, with the gradients of the equations."""
        if self.merged:
            return NotImplemented
        base = self.norm != "weight" and self.draw.random() < 0.3
        self.model.train()
        own = [p for p in self.model.parameters() if p.requires_grad]
        trained = self.unfreeze() if base else []
        self.base_trained |= base
        optimizer = torch.optim.SGD([*own, *(ours for ours, _ in trained)], lr=0.05)
        held, micro = self.draw.random() < 0.5, self.draw.choice([1, 2, 3])
        with secura.accumulate(self.model, optimizer) if held else nullcontext() as accumulation:
            for _ in range(2):
                self.step(optimizer, micro, trained, accumulation)
        for both in trained:
            for value in both:
                value.requires_grad_(False).grad = None
        self.model.train(self.draw.random() < 0.5)
        return None

    def unfreeze(self) -> list[tuple[Tensor, Tensor]]:
        """Train a layer's own weight and bias too: the model's and the plain one's."""
        at = next(iter(self.kept[self.active[0]].layers))
        ours = self.model.get_submodule(f"base_model.model.{at}").base_layer
        theirs = self.plain.get_submodule(at).base
        pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
        return [(a.requires_grad_(True), b.requires_grad_(True)) for a, b in pairs]

    def step(self, optimizer: Any, micro: int, trained: Any, accumulation: Any) -> None:
        """Compare the gradients of all micro-batches, step, and keep what came of it."""
        pairs = list(trained)
        for name in self.active:
            for at, part in self.parts(name).items():
                own = self.kept[name].layers[at]
                for key in TRAINED:
                    if key in own:
                        own[key].requires_grad_(True)
                        pairs.append((getattr(part, key), own[key]))
        optimizer.zero_grad()
        for index in range(micro):
            ids = self.ids()
            if accumulation is not None:
                accumulation.last = index == micro - 1
            self.model(input_ids=ids, labels=ids).loss.backward()
            self.plain(input_ids=ids, labels=ids).loss.backward()
        for ours, theirs in pairs:
            found = torch.zeros_like(ours) if ours.grad is None else ours.grad
            most = 3e-3 * max(theirs.grad.abs().max().item(), 1e-3)
            torch.testing.assert_close(found.double(), theirs.grad, rtol=0, atol=most)
            theirs.grad = None
        optimizer.step()
        for ours, theirs in trained:
            theirs.data.copy_(ours)
        for name in self.active:
            self.note(name)

    def move_fold(self) -> Any:
        """What was learned goes to the core."""
        if self.merged:
            return NotImplemented
        secura.fold(self.model)
        for kept in self.acting():
            for own in kept.layers.values():
                a, b = factors(own)
                own["core"] = own["core"] + kept.scaling * (a if b is None else a @ b)
                zeroed = "U" if "U" in own else "B"
                own[zeroed] = torch.zeros_like(own[zeroed])
        return None

    def move_merge(self) -> Any:
        """The base weights hold the active adapters."""
        if self.merged or self.norm == "activation":
            return NotImplemented
        self.model.eval().merge_adapter()
        self.merged = True
        return None

    def move_unmerge(self) -> Any:
        """They hold none any more."""
        if not self.merged:
            return NotImplemented
        self.model.unmerge_adapter()
        self.merged = False
        return None

    def move_disable(self) -> None:
        """For a while; a merged adapter is unmerged by it."""
        self.disabled = True
        with self.model.disable_adapter():
            self.look(self.model)
        self.disabled = self.merged = False

    def move_add(self) -> Any:
        """One more adapter."""
        if self.merged or len(self.kept) > 2:
            return NotImplemented
        name = f"added{self.draw.randrange(10**6)}"
        self.model.add_adapter(name, self.config())
        tiny.perturb(self.model, 1, name)
        return self.note(name)

    def move_switch(self) -> Any:
        """To another adapter, or to a sum of two."""
        if self.merged or len(self.kept) < 2:
            return NotImplemented
        count = self.draw.choice([1, 2]) if self.norm == "none" else 1
        self.active = self.draw.sample(sorted(self.kept), count)
        self.model.set_adapter(self.active[0])
        self.model.base_model.set_adapter(self.active)
        return None

    def move_delete(self) -> Any:
        """One of three that is not active."""
        others = sorted(self.kept.keys() - set(self.active))
        if self.merged or len(self.kept) < 3 or not others:
            return NotImplemented
        name = self.draw.choice(others)
        self.model.delete_adapter(name)
        del self.kept[name]
        return None

    def move_scale(self) -> Any:
        """An adapter that was not folded acts more or less strongly."""
        kept = self.kept[self.active[0]]
        if self.merged or any(bool(own["core"].any()) for own in kept.layers.values()):
            return NotImplemented
        times = self.draw.choice([0.5, 2.0])
        for layer in tiny.layers(self.model).values():
            layer.set_scale(self.active[0], times)
        kept.scaling = times * kept.config.scaling
        return None

    def move_anchor(self) -> Any:
        """The same function in other coordinates."""
        if self.merged or {kept.config.core for kept in self.acting()} != {"u"}:
            return NotImplemented
        secura.anchor(self.model, list(self.ids(3)))
        self.look(self.model)
        for name in self.active:
            self.note(name)
        return None

    def move_copy(self) -> None:
        """Go on with a copy of the model."""
        self.model = copy.deepcopy(self.model)

    def move_unload(self) -> Any:
        """A copy becomes a plain model that computes the same."""
        if self.norm == "activation":
            return NotImplemented
        self.look(copy.deepcopy(self.model).merge_and_unload())
        return None

    def move_save(self) -> Any:
        """All adapters, to a folder."""
        if self.base_trained or len(self.saved) > 2:
            return NotImplemented
        folder = self.folder / str(len(self.saved))
        self.model.save_pretrained(folder)
        self.saved.append((folder, copy.deepcopy(self.kept)))
        return None

    def move_load(self) -> Any:
        """Go on with a model of saved adapters, which have their configs' scalings."""
        if not self.saved:
            return NotImplemented
        folder, kept = self.draw.choice(self.saved)
        first, *others = kept
        places = {name: folder if name == "default" else folder / name for name in kept}
        how: Any = {"is_trainable": True, "low_cpu_mem_usage": self.draw.random() < 0.5}
        self.model = PeftModel.from_pretrained(tiny.llama(), places[first], first, **how).eval()
        for name in others:
            self.model.load_adapter(places[name], name, **how)
        self.plain, self.base_trained = self.by_equations(), False
        self.kept, self.active, self.merged = copy.deepcopy(kept), [first], False
        for one in self.kept.values():
            one.scaling = float(one.config.scaling)
        return None


@pytest.mark.filterwarnings("ignore:adapter .* acts with scaling")
# the other seeds found something once
@pytest.mark.parametrize(
    ("norm", "seed"),
    [
        *product(tiny.NORMS, range(2)),
        *(("none", 8), ("none", 9), ("none", 24), ("none", 37), ("channel", 14)),
    ],
)
def test_any_order_of_moves(norm, seed, tmp_path):
    Walk(norm, seed, tmp_path).go(MOVES)
