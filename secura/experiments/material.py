"""What every cell of a run shares: base model, tokenizer, tasks, probes and general text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from secura._extras import require
from secura.cli import models
from secura.cli.errors import UserError, one_line
from secura.experiments import smoke, tasks
from secura.experiments.examples import Example, TaskData
from secura.experiments.grid import Cell
from secura.experiments.presets import Settings


@dataclass
class Material:
    """Loads on demand and keeps what several cells use.

    Args:
        settings: the run's.
        processes: that share a batch.
    """

    settings: Settings
    processes: int = 1
    _tasks: dict[tuple[str, int], TaskData] = field(default_factory=dict, repr=False)

    def check(self) -> None:
        """Look at what can be wrong before anything is computed.

        Raises:
            ValueError: a task that does not exist or is given data but not used, a model without
                one of the targeted layers, a batch that the processes cannot share, or several GPUs
                for one process.
            MissingExtraError: what scores is not installed.
            UserError: there is no such model.
        """
        if self.settings.batch_size % self.processes:
            raise ValueError(
                f"batch_size={self.settings.batch_size} cannot be shared by {self.processes} "
                "processes evenly: choose another number of processes"
            )
        torch = require("torch", "experiments")
        if self.processes == 1 and torch.cuda.device_count() > 1:
            raise ValueError(
                f"{torch.cuda.device_count()} GPUs and one process: start as many processes with "
                "accelerate launch, or show it one GPU with CUDA_VISIBLE_DEVICES=0"
            )
        for scorer in ("lm_eval", "rouge_score", "sacrebleu"):
            require(scorer, "experiments")
        for name in self.scored:
            if name not in smoke.METRICS:
                tasks.get_task(name)
        if unused := sorted(self.datasets.keys() - set(self.scored)):
            raise ValueError(f"datasets names {', '.join(unused)}, which the run does not use")
        names = [name for name, _ in self._skeleton().named_modules()]
        for target in self.settings.target_modules:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                last = sorted({name.rpartition(".")[2] for name in names if "layers.0." in name})
                raise ValueError(
                    f"the model {self.settings.model!r} has no layer {target!r}; its layers are "
                    f"{', '.join(last)}: choose some with --target_modules"
                )

    def _skeleton(self) -> Any:
        """The model without its weights."""
        if self.settings.model == smoke.MODEL:
            return smoke.load_model()
        transformers = require("transformers", "experiments")
        folder = models.resolve_model(self.settings.model)
        try:
            config = transformers.AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(f"model {self.settings.model!r}: {one_line(error)}") from error
        with require("torch", "experiments").device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)

    @cached_property
    def datasets(self) -> dict[str, str]:
        """Data sets in place of the packaged ones, by task."""
        return tasks.parse_datasets(self.settings.datasets)

    @property
    def device(self) -> str:
        """A GPU where there is one."""
        return "cuda" if require("torch", "experiments").cuda.is_available() else "cpu"

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, which pads with its end token where it has no padding token."""
        if self.settings.model == smoke.MODEL:
            return smoke.load_tokenizer()
        tokenizer = models.load_tokenizer(self.settings.model)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load_model(self, folder: str | None = None) -> Any:
        """A fresh base model, where it is to run, its frozen weights in the run's dtype.

        With `folder`, whose weights it takes instead, they are fp32, as they were trained.
        """
        torch = require("torch", "experiments")
        if self.settings.model == smoke.MODEL and folder is None:
            return smoke.load_model().to(self.device)
        # scaled_dot_product_attention is the slower one in bf16 on CPUs
        eager = {} if self.device == "cuda" else {"attn_implementation": "eager"}
        half = self.settings.dtype == "bf16" and folder is None
        dtype = torch.bfloat16 if half else torch.float32
        model = models.load_model(folder or self.settings.model, dtype=dtype, **eager)
        return model.to(self.device)

    def task(self, name: str, seed: int) -> TaskData:
        """A task's examples; validation examples are the last of `train`."""
        key = (name, seed)
        if key not in self._tasks:
            settings = self.settings
            counts = (
                settings.train_examples + settings.validation_examples,
                settings.test_examples,
            )
            if name in settings.probes:
                counts = (0, settings.probe_examples)
            if name in smoke.METRICS:
                self._tasks[key] = smoke.load_task(name, *counts, seed)
            else:
                hub = self.datasets.get(name)
                self._tasks[key] = tasks.load_task(name, *counts, seed=seed, hub=hub)
        return self._tasks[key]

    def metric(self, name: str) -> tuple[str, int]:
        """How a task is scored, and the longest answer to generate, in tokens."""
        if name in smoke.METRICS:
            return smoke.METRICS[name], 8
        task = tasks.TASKS[name]
        return task.metric, min(task.max_new_tokens, self.settings.answer_tokens)

    @cached_property
    def text(self) -> list[str]:
        """General text, for its cross-entropy."""
        load = smoke.load_text if self.settings.model == smoke.MODEL else tasks.load_text
        return load(self.settings.text_examples)

    @property
    def scored(self) -> tuple[str, ...]:
        """Every task and probe, in order."""
        return tuple(dict.fromkeys((*self.settings.tasks, *self.settings.probes)))

    def describe(self, cell: Cell) -> dict[str, Any]:
        """Where the data of a cell come from, how much of them is used, and their checksums."""
        described = {}
        for name in self.scored:
            data = self.task(name, cell.seed)
            about = {} if name in smoke.METRICS else tasks.describe(name, self.datasets.get(name))
            described[name] = about | {
                "train": len(data.train),
                "test": len(data.test),
                "sha256": data.checksum,
            }
        return described

    def train_features(self, name: str, seed: int) -> tuple[list[dict], tuple[Example, ...]]:
        """The tokenised examples of a task that are trained on, and its validation examples.

        There are no more than the steps take, so that what is replayed later was seen.

        Raises:
            ValueError: fewer than a batch are short enough.
        """
        examples = self.task(name, seed).train
        held = self.settings.validation_examples
        features = to_features(examples[:-held], self.tokenizer, self.settings.max_tokens)
        if len(features) < self.settings.batch_size:
            raise ValueError(
                f"task {name!r} has {len(features)} training examples of at most "
                f"{self.settings.max_tokens} tokens, of {len(examples)} less {held} for "
                "validation, fewer than a batch: raise max_tokens, or give it more data"
            )
        return features[: self.settings.steps * self.settings.batch_size], examples[-held:]


def to_features(
    examples: Sequence[Example], tokenizer: Any, max_tokens: int
) -> list[dict[str, list[int]]]:
    """Token ids and labels, the prompt's being ignored; longer examples are left out."""
    features = []
    for example in examples:
        prompt = tokenizer(example.prompt)["input_ids"]
        completion = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
        ids = [*prompt, *completion, tokenizer.eos_token_id]
        if len(ids) <= max_tokens:
            labels = [-100] * len(prompt) + ids[len(prompt) :]
            features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return features


__all__ = ["Material", "to_features"]
