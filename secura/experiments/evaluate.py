"""Scores of a causal language model on examples and on plain text.

Answers are written by lm-eval's `HFLM`. Likelihoods are computed here, a prompt once with all its
choices in one row of tokens, each of which sees the prompt and itself: lm-eval repeats the prompt
for every choice and forms the logits of every position, which takes more than twice as long.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secura._extras import require
from secura.experiments.answers import METRICS
from secura.experiments.examples import Example

_TOKENS = 1024  # read at once, padding included: bounds what logits and attention take
_ANSWERS = 16  # written at once: all go on until the longest ends
_LOGITS = 256  # rows of the vocabulary's width whose softmax is held at once


class Scorer:
    """Scores one model, which it leaves as it was: weights, gradients, train or eval mode.

    Args:
        model: a transformers causal language model with eager or SDPA attention, or a PEFT model
            of one; it is scored where it is, with the adapters that are active.
        tokenizer: its tokenizer; it is not changed.
        batch_size: examples at once, fewer where they are long.
        dtype: ``"bf16"`` for autocast to bfloat16, ``"fp32"`` for the model's own dtype.

    Raises:
        ValueError: for another dtype or a batch size below 1.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, batch_size: int = 16, dtype: str = "fp32"
    ) -> None:
        if dtype not in ("fp32", "bf16"):
            raise ValueError(f"dtype={dtype!r} must be 'fp32' or 'bf16'")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.model: Any = model
        self.tokenizer = copy.deepcopy(tokenizer)
        self.batch_size = batch_size
        self.dtype = dtype

    def score(
        self,
        examples: Sequence[Example],
        metric: str,
        max_new_tokens: int = 0,
        on_batch: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """The metric over `examples`, and the loss of their right completions.

        Args:
            examples: at least one.
            metric: ``"accuracy"`` for multiple choice; ``"exact_match"``, ``"rouge_l"`` or
                ``"bleu"`` for answers that are written.
            max_new_tokens: of a written answer. It ends sooner where the model ends it or a line
                ends; where a right answer has several lines, where the next prompt would begin.
            on_batch: called after each batch.

        Returns:
            - ``loss``: mean cross-entropy of the right completions, nats a token; NaN where a
              logit is.
            - ``n``: the examples.
            - for ``"accuracy"``: ``accuracy``, the share (0 to 1) whose right choice has the
              highest log-likelihood, and ``accuracy_norm``, the same a byte of the choice;
              ``margin`` and ``margin_norm``, mean log-likelihood of the right choice less that of
              the best wrong one, in nats and in nats a byte. Ties and NaN count as wrong.
            - for ``"exact_match"``: ``exact_match``, the share of right answers, see
              :func:`secura.experiments.answers.is_match`.
            - for ``"rouge_l"``: ``rouge_l``, mean F-measure of the longest common subsequence of
              stemmed words, 0 to 1.
            - for ``"bleu"``: ``bleu`` and ``chrf`` over all answers, sacreBLEU's figures over 100.

        Raises:
            ValueError: no examples, an unknown metric, an example without choices to choose
                between or without tokens, or no `max_new_tokens` for an answer to be written.
        """
        _check(examples, metric, max_new_tokens)
        done = on_batch or _nothing
        if metric == "accuracy":
            return self._choose(examples, done)
        right = [[example.completion] for example in examples]
        loss = _mean_loss(self._likelihoods([e.prompt for e in examples], right, done))
        answers = self._write(examples, max_new_tokens, done)
        return METRICS[metric](examples, answers) | {"loss": loss, "n": len(examples)}

    def loss(self, examples: Sequence[Example]) -> float:
        """Mean cross-entropy of the right completions, nats a token; NaN where a logit is.

        Raises:
            ValueError: no examples, or one without tokens.
        """
        prompts = [example.prompt for example in examples]
        right = [[example.completion] for example in examples]
        return _mean_loss(self._likelihoods(prompts, right, _nothing))

    def perplexity(self, texts: Sequence[str], max_tokens: int) -> dict[str, float]:
        """How well plain text is predicted, all but the first token of each.

        Args:
            texts: those of a single token are left out.
            max_tokens: how much of each text counts, its first token included.

        Returns:
            ``loss`` (nats a token), ``perplexity`` (its exponential), ``tokens`` (those predicted)
            and ``n`` (texts).

        Raises:
            ValueError: no text of two tokens.
        """
        ids = [self.tokenizer(text)["input_ids"][:max_tokens] for text in texts]
        rows = [_Row(text[:1], (text[1:],)) for text in ids if len(text) > 1]
        if not rows:
            raise ValueError("no text has two tokens, so there is nothing to predict")
        scored = self._score_rows(rows, _nothing)
        loss = _mean_loss(scored)
        tokens = sum(likelihood.tokens for (likelihood,) in scored)
        perplexity = torch.tensor(loss, dtype=torch.float64).exp().item()
        return {"loss": loss, "perplexity": perplexity, "tokens": tokens, "n": len(rows)}

    def _choose(self, examples: Sequence[Example], done: Callable[[], None]) -> dict[str, float]:
        choices = [example.choices for example in examples]
        scored = self._likelihoods([example.prompt for example in examples], choices, done)
        margins, by_byte = [], []
        for example, likelihoods in zip(examples, scored, strict=True):
            values = torch.tensor([likelihood.nats for likelihood in likelihoods])
            sizes = torch.tensor([len(choice.strip().encode()) for choice in example.choices])
            margins.append(_margin(values, example.answer))
            by_byte.append(_margin(values / sizes, example.answer))
        right = [[row[e.answer]] for row, e in zip(scored, examples, strict=True)]
        return {
            "accuracy": fmean(margin > 0 for margin in margins),
            "accuracy_norm": fmean(margin > 0 for margin in by_byte),
            "margin": fmean(margins),
            "margin_norm": fmean(by_byte),
            "loss": _mean_loss(right),
            "n": len(examples),
        }

    def _likelihoods(
        self,
        prompts: Sequence[str],
        completions: Sequence[Sequence[str]],
        done: Callable[[], None],
    ) -> list[list[_Likelihood]]:
        rows = [
            _Row(
                self.tokenizer(prompt)["input_ids"],
                tuple(self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]),
            )
            for prompt, texts in zip(prompts, completions, strict=True)
        ]
        for prompt, row in zip(prompts, rows, strict=True):
            if not row.prompt or not all(row.completions):
                raise ValueError(f"a prompt or a completion has no tokens, at {prompt[-80:]!r}")
        return self._score_rows(rows, done)

    def _score_rows(
        self, rows: Sequence[_Row], done: Callable[[], None]
    ) -> list[list[_Likelihood]]:
        if not rows:
            raise ValueError("there are no examples to score")
        order = sorted(range(len(rows)), key=lambda index: -rows[index].length)
        scored: dict[int, list[_Likelihood]] = {}
        with torch.no_grad(), _evaluating(self.model):
            while order:
                size = min(self.batch_size, max(1, _TOKENS // rows[order[0]].length))
                batch, order = order[:size], order[size:]
                losses = self._losses([rows[index] for index in batch])
                for index in batch:
                    sizes = [len(completion) for completion in rows[index].completions]
                    own, losses = losses[: sum(sizes)], losses[sum(sizes) :]
                    scored[index] = [
                        _Likelihood(-part.sum().item(), len(part)) for part in own.split(sizes)
                    ]
                done()
        return [scored[index] for index in range(len(rows))]

    def _losses(self, rows: Sequence[_Row]) -> Tensor:
        """Cross-entropy of every completion's tokens, row by row, fp64 on the CPU."""
        packed = _pack(rows, self.model.dtype, self.model.device)
        head = self.model.get_output_embeddings()
        picked = head.register_forward_pre_hook(
            lambda _, inputs: (inputs[0][packed.rows, packed.columns],)
        )
        try:
            with self._autocast():
                logits = self.model(
                    input_ids=packed.input_ids,
                    attention_mask=packed.mask,
                    position_ids=packed.positions,
                    use_cache=False,
                ).logits
        finally:
            picked.remove()
        pairs = zip(logits.split(_LOGITS), packed.targets.split(_LOGITS), strict=True)
        parts = [F.cross_entropy(part.float(), ids, reduction="none") for part, ids in pairs]
        return torch.cat(parts).double().cpu()

    def _write(
        self, examples: Sequence[Example], max_new_tokens: int, done: Callable[[], None]
    ) -> list[str]:
        """Greedy answers, without what separates them from the prompt."""
        instance = require("lm_eval.api.instance", "experiments").Instance
        several_lines = any("\n" in example.completion.strip() for example in examples)
        end = "\n" + examples[0].prompt.split(maxsplit=1)[0] if several_lines else "\n"
        settings = {"until": [end], "max_gen_toks": max_new_tokens}
        requests = [
            instance("generate_until", {}, (example.prompt, settings), index)
            for index, example in enumerate(examples)
        ]
        order = sorted(range(len(requests)), key=lambda index: -len(examples[index].prompt))
        answers: dict[int, str] = {}
        with torch.no_grad(), _evaluating(self.model):
            size = min(self.batch_size, _ANSWERS)
            harness = _harness(self.model, self.tokenizer, size, self.dtype)
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                texts = harness.generate_until([requests[i] for i in batch], disable_tqdm=True)
                answers |= {i: text.strip() for i, text in zip(batch, texts, strict=True)}
                done()
        return [answers[index] for index in range(len(examples))]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.dtype == "bf16")


@dataclass(frozen=True)
class _Row:
    """Token ids of a prompt and of what may follow it."""

    prompt: Sequence[int]
    completions: tuple[Sequence[int], ...]

    @property
    def length(self) -> int:
        """Tokens the model reads: all but the last of each completion."""
        return len(self.prompt) + sum(len(ids) - 1 for ids in self.completions)


@dataclass(frozen=True)
class _Likelihood:
    """Log-likelihood of a completion, and its tokens."""

    nats: float
    tokens: int


@dataclass(frozen=True)
class _Packed:
    """A batch: `input_ids` and `positions` `[B, T]`, `mask` `[B, 1, T, T]` (added to the scores).

    The logits at `rows[i], columns[i]` predict `targets[i]`, all `[S]`.
    """

    input_ids: Tensor
    positions: Tensor
    mask: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor


def _pack(rows: Sequence[_Row], dtype: torch.dtype, device: torch.device) -> _Packed:
    """Each prompt with its completions behind it, which see the prompt and not each other."""
    length = max(row.length for row in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros_like(input_ids)
    segments = torch.full_like(input_ids, -1)
    scored: list[tuple[int, int, int]] = []
    for index, row in enumerate(rows):
        end = len(row.prompt)
        input_ids[index, :end] = torch.tensor(row.prompt)
        positions[index, :end] = torch.arange(end)
        segments[index, :end] = 0
        for segment, ids in enumerate(row.completions, start=1):
            place = slice(end, end + len(ids) - 1)
            input_ids[index, place] = torch.tensor(ids[:-1], dtype=torch.long)
            positions[index, place] = torch.arange(len(ids) - 1) + len(row.prompt)
            segments[index, place] = segment
            columns = [len(row.prompt) - 1, *range(place.start, place.stop)]
            scored += [(index, column, target) for column, target in zip(columns, ids, strict=True)]
            end = place.stop
    seen = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    seen = seen.tril() | torch.eye(length, dtype=torch.bool)
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    at = torch.tensor(scored, device=device).unbind(1)
    return _Packed(input_ids.to(device), positions.to(device), mask[:, None].to(device), *at)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _harness(model: nn.Module, tokenizer: Any, batch_size: int, dtype: str) -> Any:
    """lm-eval's view of the model, without its notes that the model was made by someone else."""
    hflm = require("lm_eval.models.huggingface", "experiments").HFLM
    log = logging.getLogger(hflm.__module__)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return hflm(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            mixed_precision_dtype="bfloat16" if dtype == "bf16" else None,
        )
    finally:
        log.setLevel(level)


def _check(examples: Sequence[Example], metric: str, max_new_tokens: int) -> None:
    if metric == "accuracy":
        if any(len(example.choices) < 2 for example in examples):
            raise ValueError("accuracy needs examples with at least two choices")
    elif metric not in METRICS:
        raise ValueError(f"metric={metric!r} must be one of accuracy, {', '.join(METRICS)}")
    elif max_new_tokens < 1:
        raise ValueError(f"{metric} needs max_new_tokens, how long an answer may be")


def _margin(values: Tensor, answer: int) -> float:
    wrong = torch.cat([values[:answer], values[answer + 1 :]])
    return (values[answer] - wrong.max()).item()


def _mean_loss(scored: Sequence[Sequence[_Likelihood]]) -> float:
    likelihoods = [likelihood for row in scored for likelihood in row]
    total = math.fsum(likelihood.nats for likelihood in likelihoods)
    return -total / sum(likelihood.tokens for likelihood in likelihoods)


def _nothing() -> None:
    pass


__all__ = ["Scorer"]
