"""What a stage's cells share: model, tokenizer, rows to train on and to score, base states."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.assets import ASSETS, cache_dir, model_dir
from benchmarks.files import replacing
from benchmarks.retention import data
from benchmarks.retention.cells import Settings
from benchmarks.retention.data import Example
from benchmarks.retention.record import Measure, Probe, Score
from benchmarks.retention.rows import Row, task_row, text_row
from benchmarks.retention.score import Evaluator, autocast, summed


@dataclass(frozen=True)
class Group:
    """Rows that are scored together, with the base model's states of them, `[S, d]`."""

    rows: list[Row]
    base: Tensor

    def first(self, share: float) -> Group:
        """The first rows of it."""
        rows = self.rows[: max(1, ceil(share * len(self.rows)))]
        return Group(rows, self.base[: sum(row.targets for row in rows)])


@dataclass
class Material:
    """Loads on demand and keeps what several cells use.

    Args:
        settings: the stage's.
        device: where models run.
        bf16: whether under autocast to bfloat16; their weights are fp32 all the same.
    """

    settings: Settings
    device: torch.device
    bf16: bool = False
    _train: dict[tuple[str, int, int], list[list[Row]]] = field(default_factory=dict, repr=False)
    _samples: dict[int, list[Tensor]] = field(default_factory=dict, repr=False)

    @cached_property
    def folder(self) -> Path:
        """The model's folder."""
        name = self.settings.model
        return model_dir(name) if name in ASSETS else Path(name).expanduser()

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @cached_property
    def base(self) -> Any:
        """The untouched model, fp32 and frozen, which is never trained."""
        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        if getattr(model.config, "final_logit_softcapping", None):
            raise ValueError(
                f"{self.settings.model} caps its logits, which scoring does not do: give another "
                "with --set model=NAME"
            )
        return model.to(self.device).requires_grad_(False).eval()

    def fresh_model(self) -> Any:
        """A copy of the base model, in training mode."""
        return copy.deepcopy(self.base).train()

    @property
    def longest(self) -> int:
        """The most tokens of a row that is trained on."""
        return max(self.settings.max_tokens, self.settings.sample_tokens)

    @cached_property
    def evaluator(self) -> Evaluator:
        """What scores models beside the base."""
        return Evaluator(self.base.get_output_embeddings().weight, bf16=self.bf16)

    def batches(self, task: str, seed: int, steps: int) -> list[list[Row]]:
        """The rows of each step: the same for every method, those of a batch alike in length.

        Raises:
            ValueError: fewer examples than a batch are short enough.
        """
        key = (task, seed, steps)
        if key not in self._train:
            self._train[key] = self._make_batches(task, seed, steps)
        return self._train[key]

    def _make_batches(self, task: str, seed: int, steps: int) -> list[list[Row]]:
        size = self.settings.batch_size
        wanted = steps * size
        rows: list[Row] = []
        examples = data.shuffled(data.load_task(task).train, seed)
        short = self._short(examples, wanted)
        if len(short) < size:
            raise ValueError(
                f"task {task!r} has {len(short)} examples of at most {self.settings.max_tokens} "
                "tokens, fewer than a batch: give more with --set max_tokens=NUMBER"
            )
        epoch = 0
        while len(rows) < wanted:
            rows += data.shuffled(short, seed + 1000 * epoch)[: wanted - len(rows)]
            epoch += 1
        rows.sort(key=lambda row: row.length)
        batches = [rows[start : start + size] for start in range(0, wanted, size)]
        return data.shuffled(batches, seed)

    @cached_property
    def groups(self) -> dict[str, dict[str, Group]]:
        """Held-out examples of each task and texts of each kind."""
        settings = self.settings
        rows: dict[str, dict[str, list[Row]]] = {"tasks": {}, "texts": {}}
        for task in settings.tasks:
            rows["tasks"][task] = self._short(data.load_task(task).held_out, settings.held_out)
        for kind in settings.texts:
            ids = self.tokenizer(list(data.load_texts(kind)[: 4 * settings.text_count]))
            texts = [text[: settings.text_tokens] for text in ids["input_ids"] if len(text) > 8]
            rows["texts"][kind] = [text_row(text) for text in texts[: settings.text_count]]
        return {
            group: {name: Group(found, self._states(found)) for name, found in each.items()}
            for group, each in rows.items()
        }

    def measure(self, model: Any, step: int, *, part: bool) -> list[Measure]:
        """Every task and text, scored beside the base model: a part of them, or that part and all.

        Scores of the part and of all after the same step tell how the two compare.
        """
        parts: dict[str, dict[str, Score]] = {"tasks": {}, "texts": {}}
        wholes: dict[str, dict[str, Score]] = {"tasks": {}, "texts": {}}
        for kind, groups in self.groups.items():
            for name, whole in groups.items():
                some = whole.first(self.settings.part)
                group = some if part else whole
                targets = self.evaluator.score(model, group.rows, group.base)
                parts[kind][name] = summed(targets[: len(some.base)])
                wholes[kind][name] = summed(targets)
        found = [Measure(step, True, **parts)]
        return found if part else [*found, Measure(step, False, **wholes)]

    @cached_property
    def questions(self) -> dict[str, tuple[list[Example], list[Row], tuple[float, float]]]:
        """Each probe's questions, their rows, and the base model's shares of right ones."""
        found = {}
        for name in self.settings.probes if self.settings.probe_questions else ():
            examples = list(data.load_probe(name)[: self.settings.probe_questions])
            rows = [task_row(example, self.tokenizer, choices=True) for example in examples]
            path = self._cached("probe", rows, "json")
            with _made(path) as scratch:
                if scratch:
                    shares = self.evaluator.choose(self.base, examples, rows)
                    scratch.write_text(json.dumps(shares), encoding="utf-8")
            base = tuple(json.loads(path.read_text(encoding="utf-8")))
            found[name] = (examples, rows, base)
        return found

    def probe(self, model: Any) -> dict[str, Probe]:
        """Every probe, asked of the tuned model."""
        return {
            name: Probe(len(examples), *self.evaluator.choose(model, examples, rows), *base)
            for name, (examples, rows, base) in self.questions.items()
        }

    def exact_match(self, model: Any) -> float | None:
        """Share of held-out GSM8K problems that the model solves; None where none are asked."""
        if not self.settings.answers:
            return None
        examples = data.load_task("gsm8k").held_out[: self.settings.answers]
        return self.evaluator.exact_match(model, examples, self.tokenizer)

    def samples(self, seed: int) -> list[Tensor]:
        """Texts `[T]` that the base model writes from its start token, drawn by the seed."""
        if seed not in self._samples:
            key = (self.settings.samples, self.settings.sample_tokens, seed)
            path = self._cached("samples", key)
            with _made(path) as scratch:
                if scratch:
                    ids = self._write_samples(seed)
                    save_file({f"{i:04d}": text for i, text in enumerate(ids)}, scratch)
            self._samples[seed] = [text for _, text in sorted(load_file(path).items())]
        return self._samples[seed]

    def _write_samples(self, seed: int) -> list[Tensor]:
        tokenizer, length = self.tokenizer, self.settings.sample_tokens
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else 0
        prompt = torch.full((self.settings.samples, 1), start, device=self.device)
        torch.manual_seed(seed)
        with torch.no_grad(), autocast(self.device, self.bf16):
            written = self.base.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                max_new_tokens=length - 1,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts = []
        for row in written.cpu():
            ends = (row[1:] == tokenizer.eos_token_id).nonzero()
            end = int(ends[0]) + 2 if len(ends) else len(row)
            if end > 2:
                texts.append(row[:end].clone())
        return texts

    def anchor_texts(self) -> list[Tensor]:
        """News articles `[T]` that no score reads, as many and as long as the samples."""
        texts = list(data.anchor_texts()[: self.settings.samples])
        ids = self.tokenizer(texts)["input_ids"]
        return [torch.tensor(text[: self.settings.sample_tokens]) for text in ids if len(text) > 2]

    @cached_property
    def checksum(self) -> str:
        """Of every row that is scored."""
        every = [[g.rows for g in groups.values()] for groups in self.groups.values()]
        return _digest(every, [rows for _, rows, _ in self.questions.values()])

    def _short(self, examples: Sequence[Example], count: int) -> list[Row]:
        """The first rows of at most `max_tokens` tokens."""
        found: list[Row] = []
        for example in examples:
            row = task_row(example, self.tokenizer)
            if row.length < self.settings.max_tokens:  # the last token is not read
                found.append(row)
            if len(found) == count:
                break
        if not found:
            raise ValueError(
                f"no example has at most max_tokens={self.settings.max_tokens} tokens: give more "
                "with --set max_tokens=NUMBER"
            )
        return found

    def _states(self, rows: list[Row]) -> Tensor:
        path = self._cached("states", rows)
        with _made(path) as scratch:
            if scratch:
                save_file({"states": self.evaluator.states(self.base, rows).cpu()}, scratch)
        return load_file(path)["states"]

    def _cached(self, kind: str, key: Any, suffix: str = "safetensors") -> Path:
        """A file for what follows from the model, this device, its dtype and a key."""
        about = [str(self.folder), self.device.type, self.bf16]
        folder = cache_dir() / "retention"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{kind}-{_digest(about, key)}.{suffix}"

    def describe(self) -> dict[str, Any]:
        """The model and the texts, for a record."""
        name = self.settings.model
        about = ASSETS[name].describe() if name in ASSETS else name
        return {"model": about, "rows_sha256": self.checksum, "bf16": self.bf16}


@contextmanager
def _made(path: Path) -> Iterator[Path | None]:
    """Where to write a file that is missing, by one process at a time; None where it is there."""
    if path.is_file():
        yield None
        return
    with FileLock(path.with_suffix(".lock")):
        if path.is_file():
            yield None
        else:
            with replacing(path) as scratch:
                yield scratch


def _digest(*parts: Any) -> str:
    text = json.dumps(parts, default=lambda value: asdict(value))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


__all__ = ["Group", "Material"]
