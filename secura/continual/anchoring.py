"""The anchored core in a sequence of tasks: each one's statistics are added at its end.

See :func:`secura.anchor`.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from itertools import chain, zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from secura._extras import require
from secura.anchoring import (
    AnchorReport,
    anchor,
    check_anchorable,
    check_precision,
    check_reading,
    u_adapters,
)
from secura.folding import fold
from secura.language_models import check_reads
from secura.layers import evaluating
from secura.sharding import is_distributed, largest
from secura.texts import BATCH_SIZE, LENGTH, TOKENS, Texts, listed, pieces_of

TrainerCallback = require("transformers", "train").TrainerCallback


class AnchorCallback(TrainerCallback):  # type: ignore[misc, valid-type]
    """At the end of a task, fold what was learned and add the task's texts to the anchor.

    The next task then starts at U = 0, in coordinates in which what the earlier tasks taught costs
    about as old text does. It comes after the last checkpoint, which has neither the fold nor the
    statistics: save the model after ``train()``.

    Example:
        >>> secura.anchor(model, tokenizer=tokenizer)
        >>> for task in tasks:
        ...     Trainer(model, train_dataset=task, callbacks=[AnchorCallback()]).train()

    Args:
        texts: of the task: strings or 1-D tensors of token ids; None takes those it trained on,
            without padding where there is an ``attention_mask`` or the config names the padding
            token. Among them are replayed ones and, in DPO and KTO, rejected answers, which the
            next task would then keep: give the chosen ones there.
        tokenizer: for strings.
        fold: whether the core is folded first.
        tokens: how many to read at most.
        length: tokens of a piece; texts are cut into such.
        batch_size: pieces read at once.
        seed: of the sampled labels.

    Attributes:
        report: of the last anchoring.

    Raises:
        ValueError: strings without a tokenizer, or a number out of range. When training begins, for
            a model with no ``core="u"``, with one on experts, with one in 16 bits where it is not
            folded, or that reads something else than ``input_ids``, for texts and batches that
            cannot be read, and with None for a stream that is seen to be read once. At its end as
            :func:`secura.anchor`, and for a stream that is used up; nothing is folded then.

    A core that was not anchored before is warned of.
    """

    def __init__(
        self,
        texts: Texts | None = None,
        *,
        tokenizer: Any = None,
        fold: bool = True,
        tokens: int = TOKENS,
        length: int = LENGTH,
        batch_size: int = BATCH_SIZE,
        seed: int = 0,
    ) -> None:
        self.texts = None if texts is None else listed(texts)
        check_reading(self.texts, tokenizer, tokens=tokens, length=length, batch_size=batch_size)
        self.tokenizer, self.fold, self.tokens = tokenizer, fold, tokens
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.report: AnchorReport | None = None

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: nn.Module | None = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Refuse a model or texts that it cannot be anchored by before a step is paid for."""
        assert model is not None
        adapters = u_adapters(model)
        check_anchorable(adapters)
        for name, (adapter, _) in adapters.items() if not self.fold else ():
            check_precision(name, adapter)
        with evaluating(model):
            check_reads(model)
        if self.texts is not None:  # token ids are texts too
            self.texts = pieces_of(model, self.texts, self.tokenizer, self.tokens, self.length)
        elif _is_read_once(train_dataloader):
            raise ValueError(
                "the training rows are a stream that can be read once, and are to be read again at "
                "the task's end: give AnchorCallback the task's texts"
            )
        elif (batch := _first(train_dataloader)) is not None:
            _texts_of(batch)
        if any(adapter.left is None for adapter, _ in adapters.values()):
            warnings.warn(
                "AnchorCallback adds the task's texts to an anchor, and a core has none yet: it "
                "will be held to this task, and to nothing that the model knew before. Call "
                "secura.anchor(model) before training",
                stacklevel=2,
            )

    def on_train_end(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: nn.Module | None = None,
        train_dataloader: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Fold, and add the statistics; what the optimizer knew of the cores is forgotten."""
        assert model is not None
        texts = self.texts
        if texts is None:
            own = _read(train_dataloader, self.tokens, next(model.parameters()).device)
            texts = _of_all(own)
            if not texts:
                raise ValueError(_GONE)
        if self.fold:
            fold(model)
        self.report = anchor(
            model,
            texts,
            tokenizer=self.tokenizer,
            tokens=self.tokens,
            length=self.length,
            batch_size=self.batch_size,
            seed=self.seed,
            add=True,
        )
        known: Any = getattr(optimizer, "state", None)
        for adapter, _ in u_adapters(model).values() if isinstance(known, dict) else ():
            known.pop(adapter.U, None)


def _first(dataloader: Any) -> Any:
    """A batch of the first example, random states left alone; None where none can be had."""
    state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=()):
        try:
            return dataloader.collate_fn([dataloader.dataset[0]])
        except Exception:  # a stream has no first example; of one, perhaps, no batch is made
            return None
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])


def _is_read_once(dataloader: Any) -> bool:
    """Whether a loader's data set hands out one iterator, which is used up after an epoch.

    One that hands out itself may begin anew. That of a generator over a stream is not seen here.
    """
    dataset = getattr(dataloader, "dataset", None)
    dataset = getattr(dataset, "dataset", dataset)  # accelerate's holds it
    if not isinstance(dataset, IterableDataset):
        return False
    first = iter(dataset)
    return first is not dataset and first is iter(dataset)


def _texts_of(batch: Any) -> list[Tensor]:
    """The rows of a batch, padding left out; of a packed row as many as its positions tell.

    Raises:
        ValueError: it has no ``input_ids``, or a mask of another shape.
    """
    names = list(batch) if isinstance(batch, Mapping) else None
    if names is None or "input_ids" not in names:
        found = type(batch).__name__ if names is None else ", ".join(map(str, names))
        raise ValueError(
            f"a batch has {found} and no input_ids to anchor by: give AnchorCallback the task's "
            "texts"
        )
    rows, mask, places = (
        batch.get(name) for name in ("input_ids", "attention_mask", "position_ids")
    )
    if mask is not None and mask.shape != rows.shape:
        raise ValueError(
            f"a batch has an attention_mask {list(mask.shape)} beside input_ids "
            f"{list(rows.shape)}, which does not tell its texts apart: give AnchorCallback the "
            "task's texts"
        )
    mask = torch.ones_like(rows) if mask is None else mask
    places = torch.ones_like(rows) if places is None or places.shape != rows.shape else places
    texts: list[Tensor] = []
    for ids, read, place in zip(rows, mask.bool(), places, strict=True):
        starts = (place[read] == 0).nonzero().flatten().cpu()
        texts += [text for text in ids[read].cpu().tensor_split(starts) if len(text) > 1]
    return texts


def _of_all(texts: list[Tensor]) -> list[Tensor]:
    """The texts of all processes, of which each has read its own, one of each in turn."""
    if not is_distributed():
        return texts
    of_each: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_each, [text.tolist() for text in texts])
    turns = chain.from_iterable(zip_longest(*of_each))
    return [torch.tensor(text) for text in turns if text is not None]


_GONE = (
    "the training rows could not be read again at the task's end, so nothing was folded or "
    "anchored: give AnchorCallback the task's texts"
)


def _read(dataloader: Any, tokens: int, device: torch.device) -> list[Tensor]:
    """The texts of a data loader's examples, up to ``tokens`` token ids and what a batch has more.

    Processes take equally many batches, which one may hand out to all of them.
    """
    texts: list[Tensor] = []
    left, batches = tokens, iter(dataloader)
    while largest(left, device) > 0:
        try:
            batch = next(batches, None)
        except ValueError as error:  # accelerate's, of a stream that is used up
            raise ValueError(f"{_GONE} ({error})") from error
        if batch is None or left <= 0:
            left = 0
            continue
        found = _texts_of(batch)
        texts += found
        left -= sum(map(len, found))
    return texts


__all__ = ["AnchorCallback"]
