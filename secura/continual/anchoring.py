"""The anchored core in a sequence of tasks: statistics that add up, and decay towards the anchor.

See :func:`secura.anchor`.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping
from itertools import chain, zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset

from secura._extras import require
from secura.anchoring import AnchorReport, anchor, check_anchorable, check_reading, u_adapters
from secura.curvature import (
    BATCH_SIZE,
    LENGTH,
    TOKENS,
    Texts,
    check_reads,
    largest,
    listed,
    pieces_of,
)
from secura.folding import check_sole_copy, fold
from secura.sharding import is_distributed, is_dtensor
from secura_kernels.ops.common import round_stochastically

from .state import Unfolded, without_dropout

TrainerCallback = require("transformers", "train").TrainerCallback


class AnchorCallback(TrainerCallback):  # type: ignore[misc, valid-type]
    """At the end of a task, fold what was learned and add the task's texts to the anchor.

    The next task then starts at U = 0, in coordinates in which what the earlier tasks taught costs
    as old text does. It comes after the last checkpoint, which has neither the fold nor the
    statistics: save the model after ``train()``.

    Example:
        >>> secura.anchor(model, tokenizer=tokenizer)
        >>> for task in tasks:
        ...     Trainer(model, train_dataset=task, callbacks=[AnchorCallback()]).train()

    Args:
        texts: of the task: strings or 1-D tensors of token ids; None takes those it trained on,
            replayed ones too, and where preferences are trained (DPO, KTO) the rejected ones, which
            the next task would then keep: give the chosen. Of those padding is left out where an
            ``attention_mask`` comes with it, or the config names its token.
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
            a model with no ``core="u"``, with one on experts, or that reads something else than
            ``input_ids``, for texts and batches that cannot be read, and with None for a stream
            that is seen to be read once. At its end as :func:`secura.anchor`, and for a stream
            that is used up; nothing is folded then.

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
        with without_dropout(model):
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


class AnchorDecayCallback(TrainerCallback):  # type: ignore[misc, valid-type]
    """Before every optimizer step, ``U ← (1 − learning rate · anchor_decay) U``.

    On an anchored core that is a K-FAC penalty against leaving old knowledge, decoupled as AdamW's
    decay is, whatever the optimizer; other parameters and cores that are frozen are left alone, and
    a ``weight_decay`` comes on top. Without an anchor it is plain weight decay on U. A U in bf16,
    which TRL makes of every adapter on a quantised base, is rounded stochastically, so that it
    decays in the mean.

    Args:
        anchor_decay: 0 or more; over 300 steps at a rate of 1e-3, 1 takes a quarter off what U
            would be. None takes what divides U by e over the whole run, whatever its length: 1 over
            the sum of its rates (the highest counted twice), 30 for the 128 steps at 5e-4 that were
            measured.

    Attributes:
        decay: what acts: ``anchor_decay``, or once training began what was taken for None.

    Raises:
        ValueError: for a value below 0 or not finite. When training begins: for a model with no
            ``core="u"``, one that is frozen or in fp16, one that folds while training, since the
            decay does not reach what was folded, or an optimizer that keeps a second copy of the
            cores (schedule-free); with None, for a schedule that does not tell its rates
            beforehand, or whose highest is 0. At a step: where it was folded, for an optimizer
            that holds copies of the cores (ZeRO), and where the rate times ``anchor_decay`` is 1
            or more, which turns U's sign instead of making it smaller.
    """

    def __init__(self, anchor_decay: float | None = None) -> None:
        if anchor_decay is not None and not (anchor_decay >= 0 and math.isfinite(anchor_decay)):
            raise ValueError(f"anchor_decay={anchor_decay} must be a finite number, 0 or more")
        self.anchor_decay = self.decay = anchor_decay
        self._unfolded: Unfolded | None = None
        self._step = 0

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: nn.Module | None = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """Refuse a model with no such core, or one that folds, before a step is paid for."""
        assert model is not None
        cores = _cores(model)
        if self.anchor_decay != 0:
            _check_trained(model)
            check_sole_copy(optimizer, "anchor_decay")
        if self.anchor_decay is None:
            self.decay = _decay_of_run(optimizer, lr_scheduler, state.max_steps, cores)
        self._unfolded = Unfolded(model) if self.decay else None

    @torch.no_grad()
    def on_pre_optimizer_step(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Decay every core that the optimizer trains, at the rate of its group."""
        assert model is not None
        if self.decay is None:
            raise ValueError("anchor_decay=None is read off a Trainer's run: give it a number")
        if self._unfolded is not None:
            self._unfolded.check(model)
        cores = _cores(model)
        pairs = [(group["lr"], one) for group in optimizer.param_groups for one in group["params"]]
        found = [(rate, one) for rate, one in pairs if id(one) in cores]
        if not found:
            raise ValueError(
                "the optimizer trains none of the model's cores U themselves (they are frozen, or "
                "it holds copies, as ZeRO's does), so anchor_decay would do nothing: leave it out"
            )
        check_decay(self.decay, max(float(rate) for rate, _ in found))
        self._step = self._step + 1 if state is None else state.global_step
        for place, (rate, core) in enumerate(found):
            _shrink(core, 1 - rate * self.decay, self._step * len(found) + place)


def _check_trained(model: nn.Module) -> None:
    """Raise ``ValueError`` where no core is trained, or a decay would be lost in its dtype."""
    cores: list[Any] = [adapter.U for adapter, _ in u_adapters(model).values()]
    if not any(core.requires_grad for core in cores):
        raise ValueError(
            "no core U of the model is trained: load the adapter with is_trainable=True"
        )
    if any(core.dtype == torch.float16 for core in cores):
        raise ValueError(
            "a core U is in float16, in which a decay is rounded away: keep adapters in fp32, as "
            "autocast_adapter_dtype=True does"
        )


def _cores(model: nn.Module) -> set[int]:
    """The ``id`` of each core U that is trained itself, now."""
    cores: list[Any] = [adapter.U for adapter, _ in u_adapters(model).values()]
    return {id(core) for core in cores if core.requires_grad}


def _decay_of_run(optimizer: Any, scheduler: Any, steps: int, cores: set[int]) -> float:
    """The decay that divides U by e over ``steps`` steps: of the group with the highest rates.

    The highest rate is counted twice, so that a run of few steps keeps some of U too.
    """
    schedule = getattr(scheduler, "scheduler", scheduler)  # accelerate's holds torch's
    if not isinstance(schedule, LambdaLR):
        raise ValueError(
            f"a {type(schedule).__name__} does not tell its learning rates beforehand, by which "
            "anchor_decay would be set: give it a number"
        )
    found = [
        [base * factor(step) for step in range(steps)]
        for group, base, factor in zip(
            optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        )
        if any(id(one) in cores for one in group["params"])
    ]
    totals = [float(sum(rates) + max(rates)) for rates in found if rates]
    if totals and max(schedule.base_lrs) <= 0:
        raise ValueError(
            "the schedule's learning rates are all 0 (Adafactor makes its own, say), so none tells "
            "anchor_decay: give it a number"
        )
    total = max(totals, default=0.0)  # 0 in a run that does not end its warm-up
    return 1 / total if total > 0 else 0.0


def check_decay(anchor_decay: float, rate: float) -> None:
    """Raise ``ValueError`` where a step at ``rate`` would turn U's sign, or let it grow."""
    if rate * anchor_decay >= 1:
        raise ValueError(
            f"anchor_decay={anchor_decay:g} at a learning rate of {rate:g} would multiply U by "
            f"{1 - rate * anchor_decay:g} a step: their product has to be below 1, and is 0.015 in "
            "the recipe that was measured (30 at 5e-4, AdamW)"
        )


def _shrink(core: Tensor, factor: float, seed: int) -> None:
    """``core ← factor · core``, in place; in bf16 rounded stochastically, from ``seed``.

    To nearest nothing would move: half a unit of bf16's last place is 0.002 to 0.004 of a number.
    """
    if core.dtype != torch.bfloat16:
        core.mul_(factor)
        return
    own: Any = core
    here: Tensor = own.to_local() if is_dtensor(core) else own
    wide = (here.float() * factor).reshape(1, -1)  # of experts, or a part of FSDP1's
    here.copy_(round_stochastically(wide, seed).view_as(here))


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


__all__ = ["AnchorCallback", "AnchorDecayCallback", "check_decay"]
