"""Memory of a whole training step, counted without computing it: peak, and what the decoder keeps.

    python -m benchmarks.memory --out benchmarks/results/memory-counted.json

Every tensor of the step is a fake one (shapes without values), and a dispatch mode counts the bytes
of the storages that are alive after each operation. Weights, adapters and buffers are not counted,
nor the optimizer's state; what an op allocates for itself and frees before it returns is not seen.
The peak comes as the backward pass begins, before there are gradients of adapters. All decoder
blocks share one block's weights, which does not change what is counted.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .count_tables import memory_table
from .measure import MIB
from .registry import Provider, Ranks, choose, excuse, for_models
from .schema import Recorder, Result, Row, new_result
from .session import add_recording, command
from .shapes import MODELS, M, ModelShape, R
from .training import adapted, random_model, set_checkpointing, target_layers

HEAD = "head and loss alone"
SMALL, LARGE = "smollm2-135m", "llama3-8b"
CAUSAL = "sdpa_without_mask"
SHOWN = "secura,peft lora,strong lora,peft dora bf16"


@dataclass(frozen=True)
class MemoryCase:
    """One training step: all linears adapted, ``batch`` × ``sequence`` tokens, bf16."""

    model: str
    sequence: int
    batch: int
    checkpointing: bool = False
    m: int = M
    r: int = R


CASES = tuple(
    replace(case, checkpointing=checkpointing)
    for case in (MemoryCase(SMALL, 2048, 1, m=64), MemoryCase(LARGE, 4096, 2))
    for checkpointing in (False, True)
)


class Alive(TorchDispatchMode):
    """Counts the bytes of storages that operations within it made and that are still alive.

    Args:
        mode: the fake tensors' mode it runs in.
        known: tensors whose storages are not to be counted.

    Attributes:
        now: bytes alive.
        peak: the most there were.
    """

    def __init__(self, mode: FakeTensorMode, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = [mode.from_tensor(tensor) for tensor in known]
        self._bytes = {fake.untyped_storage()._cdata: 0 for fake in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and take note of what it returned."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._bytes:
            return
        self._bytes[key] = storage.nbytes()
        self.now += self._bytes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._bytes.pop(key, 0)


def whole_model(shape: ModelShape, tokens: int) -> nn.Module:
    """A model of all its decoder blocks, which are one block with random bf16 weights."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    model: Any = random_model(shape, 1, torch.device("cpu"), torch.bfloat16, tokens)
    # Fake tensors count as tracing, for which a mask is made that a real step does without.
    AttentionInterface.register(CAUSAL, sdpa_attention_forward)
    model.config._attn_implementation = CAUSAL
    model.model.layers = nn.ModuleList([model.model.layers[0]] * shape.layers)
    model.config.num_hidden_layers = shape.layers
    if kinds := getattr(model.config, "layer_types", None):
        model.config.layer_types = kinds * shape.layers
    return model


def step_memory(model: Any, case: MemoryCase, layers: dict[str, nn.Module]) -> dict[str, float]:
    """``kept_mib`` when the decoder's forward pass has ended, its output too; the ``peak_mib``."""
    known = [tensor for part in (model, *layers.values()) for tensor in _tensors(part)]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    alive, kept = Alive(mode, known), list[int]()
    hook = model.model.register_forward_hook(lambda *_: kept.append(alive.now))
    with adapted(model, layers), mode, alive:
        ids = torch.zeros(case.batch, case.sequence, dtype=torch.long)
        model(input_ids=ids, labels=ids).loss.backward()
    hook.remove()
    for tensor in known:
        tensor.grad = None
    return {"kept_mib": kept[0] / MIB, "peak_mib": alive.peak / MIB}


def head_memory(model: Any, case: MemoryCase) -> dict[str, float]:
    """``peak_mib`` of the head and the loss on given hidden states, forward and backward."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, Alive(mode, _tensors(model)) as alive:
        shape = (case.batch, case.sequence, model.config.hidden_size)
        hidden = torch.zeros(shape, dtype=torch.bfloat16).requires_grad_()
        ids = torch.zeros(shape[:2], dtype=torch.long)
        loss = model.loss_function(model.lm_head(hidden), ids, vocab_size=model.config.vocab_size)
        loss.backward()
    return {"peak_mib": alive.peak / MIB}


def run(options: argparse.Namespace) -> Result:
    """Everything the command line asked for.

    Raises:
        ValueError: a model that is not counted.
    """
    if unknown := set(options.models.split(",")) - {SMALL, LARGE}:
        raise ValueError(f"--models {', '.join(sorted(unknown))}: choose from {SMALL}, {LARGE}")
    result = new_result("memory", "all", torch.device("cpu"), torch.bfloat16, {}, options.commit)
    recorder = Recorder(result, options.out)
    providers = choose(for_models(torch.bfloat16), options.providers)
    for name in options.models.split(","):
        cases = [case for case in CASES if case.model == name]
        model = whole_model(MODELS[name], cases[0].sequence)
        ranks = Ranks(cases[0].m, cases[0].r)
        layers = {one.name: built(one, model, ranks) for one in providers}
        for case in cases:
            set_checkpointing(model, case.checkpointing)
            rows = [Row(asdict(case), HEAD, figures=head_memory(model, case))]
            for provider in providers:
                rows.append(row := Row(asdict(case), provider.name))
                try:
                    with provider.running():
                        row.figures = step_memory(model, case, layers[provider.name])
                except Exception as error:  # a rival's failure must not end the run
                    row.fail(*excuse(error))
            recorder.add(rows)
    recorder.close()
    return result


def built(provider: Provider, model: nn.Module, ranks: Ranks) -> dict[str, nn.Module]:
    """The provider's layers by every name under which the model has them."""
    one = {
        name.replace("layers.0.", "", 1): provider.build(layer, ranks)
        for name, layer in target_layers(model, "all").items()
    }
    return {
        f"model.layers.{number}.{name.removeprefix('model.')}": layer
        for number in range(len(model.get_submodule("model.layers")))  # type: ignore[arg-type]
        for name, layer in one.items()
    }


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default=f"{SMALL},{LARGE}", help="default: %(default)s")
    parser.add_argument("--providers", default=SHOWN, help="default: %(default)s")
    add_recording(parser)
    return command(parser, arguments, run, memory_table)


if __name__ == "__main__":
    raise SystemExit(main())
