"""Trainer callbacks that watch a run: its steps and the norms of its gradients."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secura._extras import require
from secura.experiments.store import read_json, write_json

TrainerCallback = require("transformers", "experiments").TrainerCallback
NORMS = "gradient_norms.json"
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_PART = re.compile(r"(lora_[A-Za-z]+|magnitude_vector|secura_[^.]*\.[^.]*\.(?P<secura>\w+))")


class DivergedError(RuntimeError):
    """Training or scores became NaN or infinite."""


class Steps(TrainerCallback):  # type: ignore[misc, valid-type]
    """Calls `on_step` with the number of optimizer steps done.

    It also keeps the trainer from writing a checkpoint at the end, from which nothing resumes.
    """

    def __init__(self, on_step: Callable[[int], None]) -> None:
        self.on_step = on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts."""
        self.on_step(state.global_step)
        if state.global_step >= state.max_steps:
            control.should_save = False


class GradientNorms(TrainerCallback):  # type: ignore[misc, valid-type]
    """Keeps the L2 norm of the gradients at each optimizer step: of all, by part, by layer.

    A part is ``lora_A``, ``A`` and the like; ``weights`` where there is no adapter. With each of
    the trainer's checkpoints they are kept too, and read back when it resumes.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, dict[str, float]]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reads what was kept with the checkpoint the run resumes from."""
        self.steps = []
        if state.global_step:
            kept = read_json(_beside_checkpoint(args, state)) or {}
            self.steps = kept.get("steps", [])[: state.global_step]

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps the norms with the checkpoint."""
        if state.is_world_process_zero:
            write_json(_beside_checkpoint(args, state), {"steps": self.steps})

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Takes the norms of this step.

        Raises:
            DivergedError: they are not finite.
        """
        assert model is not None
        found = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
        squares = torch.stack([grad.float().square().sum() for _, grad in found]).tolist()
        if not math.isfinite(sum(squares)):
            raise DivergedError(f"the gradients became infinite at step {state.global_step + 1}")
        parts: dict[str, float] = defaultdict(float)
        layers: dict[str, float] = defaultdict(float)
        for (name, _), square in zip(found, squares, strict=True):
            parts[part_of(name)] += square
            if match := _LAYER.search(name):
                layers[match[1]] += square
        roots = ({key: value**0.5 for key, value in group.items()} for group in (parts, layers))
        self.steps.append(dict(zip(("parts", "layers"), roots, strict=True)))

    def figures(self) -> dict[str, Any]:
        """Norms by step, by part and step, and by layer, the mean over the steps."""
        parts = sorted({part for step in self.steps for part in step["parts"]})
        layers = sorted({layer for step in self.steps for layer in step["layers"]}, key=int)
        return {
            "gradient_norm": [
                sum(value**2 for value in step["parts"].values()) ** 0.5 for step in self.steps
            ],
            "gradient_norm_by_part": {
                part: [step["parts"].get(part, 0.0) for step in self.steps] for part in parts
            },
            "gradient_norm_by_layer": [
                sum(step["layers"].get(layer, 0.0) for step in self.steps) / len(self.steps)
                for layer in layers
            ],
        }


def part_of(name: str) -> str:
    """What kind of parameter a name is: ``lora_A``, ``A``, ``weights``."""
    match = _PART.search(name)
    if match is None:
        return "weights"
    return match["secura"] or match[1]


def _beside_checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir, f"checkpoint-{state.global_step}", NORMS)


__all__ = ["NORMS", "DivergedError", "GradientNorms", "Steps", "part_of"]
