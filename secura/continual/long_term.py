"""Long-term memory: the dual memory of I-LoRA (Ren et al., arXiv 2402.18865)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from secura._extras import require
from secura.language_models import is_causal
from secura.layers import evaluating

from .state import (
    Unfolded,
    check_run,
    coordinates,
    known,
    placed,
    read,
    trainable,
    write,
)

TrainerCallback = require("transformers", "train").TrainerCallback

FILE = "long_term.safetensors"
"""Name of the long-term values in a Trainer's checkpoint folder."""

_FOR_THE_LOSS = ("labels", "num_items_in_batch", "fused_lm_head")
"""Arguments of a causal language model's forward without which it returns plain logits."""

_WHAT = "the long-term memory"
_hooks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


class LongTermMemory(TrainerCallback):  # type: ignore[misc, valid-type]
    """Train a causal language model close to a moving average of itself.

    The long-term values are an exponential moving average of the trainable parameters, in fp32:
    they start where the parameters are when training begins, and after each optimizer step become
    ``ema · long-term + (1 − ema) · parameter``. The loss gains ``weight · MSE``, the mean squared
    difference between the logits of the model in training and those of the model with the long-term
    values, on the same inputs, over the vocabulary and the positions whose next token has a label
    other than -100. With gradient accumulation it is a mean over the whole step, as the model's own
    loss is.

    The long-term model runs without gradient and without dropout, so the masks of the model in
    training and every random state are those of a run without this callback. It costs a forward
    pass. TRL's ``SFTTrainer`` builds no logits, which costs another, with gradient. (The authors'
    released code compares hidden states instead, on replayed examples alone.)

    A checkpoint of the Trainer gets a file ``long_term.safetensors``, which a run that resumes from
    it reads back. It is looked for in ``output_dir/checkpoint-<step>``, since a callback is not
    told of another folder.

    A second run of the same parameters with the same object goes on from its values, as the next
    task is to. Where ``train()`` ends in an exception, the model goes on adding to its loss:
    training it with a ``LongTermMemory`` again replaces that, :meth:`detach` ends it.

    Args:
        ema: share of the long-term values that a step keeps, from 0 to 1.
        weight: of the MSE, 0 or more. 0 costs no forward pass: the average alone is kept.
        start: file of :meth:`save` to go on from, such as the task before's; None starts at the
            parameters, unless it trained them before.

    Attributes:
        values: the long-term values by parameter name, fp32; empty before training.

    Raises:
        ValueError: for settings out of their range. When training begins: for a run that cannot be
            served (TRL's trainers but ``SFTTrainer``, which make a loss of their own, among them),
            an encoder-decoder or a masked language model, a checkpoint without the long-term
            values, or values of before a fold or an anchor. At a step: for a model that returns no
            loss to add to, or logits that go with other labels (a classifier's), and where other
            parameters are trained than when training began.
    """

    def __init__(
        self,
        ema: float = 0.99,
        weight: float = 1.0,
        start: str | os.PathLike[str] | None = None,
    ) -> None:
        if not 0 <= ema <= 1:
            raise ValueError(f"ema={ema} must be from 0 to 1")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight={weight} must be a finite number, 0 or more")
        self.ema = ema
        self.weight = weight
        self.start = start
        self.values: dict[str, Tensor] = {}
        self._made_in = ""
        self._model: Any = None  # a weak reference
        self._unfolded: Unfolded | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Take the values up, from the model or from a checkpoint, and add to the loss."""
        assert model is not None
        self._unfolded = check_run(model)
        dft = getattr(args, "loss_type", None) == "dft"
        if args.torch_compile or args.n_gpu > 1 or args.label_smoothing_factor or dft:
            raise ValueError(
                "LongTermMemory adds to the model's own loss, with one device a process: train "
                "without torch_compile, DataParallel, label_smoothing_factor and loss_type='dft'"
            )
        if self.weight and _makes_its_loss(args):
            raise ValueError(
                "LongTermMemory adds to the model's own loss, which of TRL's trainers SFTTrainer "
                f"alone trains on: with a {type(args).__name__} take EWC, replay or weight=0"
            )
        if self.weight and not is_causal(model):
            raise ValueError(
                "LongTermMemory is for causal language models: an encoder-decoder or a masked "
                "language model scores other positions. Take weight=0, which keeps the average"
            )
        if state.global_step:
            self._read(_file(args, state), model)
        elif self.start is not None:
            self._take(Path(self.start), model, f"the long-term memory in {self.start}")
        elif self._trained(model):
            if self._made_in != coordinates(model):
                raise ValueError(
                    "the long-term values are of before the adapter was folded or anchored anew, "
                    "and mean nothing beside it: take a new LongTermMemory"
                )
        else:
            self.values = {n: p.detach().float().clone() for n, p in trainable(model).items()}
            self._made_in = coordinates(model)
        self._model = ref(model)
        self.detach(model)
        if self.weight:
            _hooks[model] = model.register_forward_hook(self._add_to_loss, with_kwargs=True)

    @torch.no_grad()
    def on_step_end(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Move the long-term values towards the parameters."""
        assert model is not None
        if self._unfolded is not None:
            self._unfolded.check(model)
        for name, value in known(self.values, model, _WHAT).items():
            self.values[name].mul_(self.ema).add_(value.float(), alpha=1 - self.ema)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the values beside the checkpoint's own files."""
        if state.is_world_process_zero:
            write(self.values, _file(args, state), self._made_in)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Stop adding to the loss; where the best checkpoint was loaded, take its values."""
        assert model is not None
        self.detach(model)
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._read(Path(state.best_model_checkpoint, FILE), model)

    def _trained(self, model: nn.Module) -> bool:
        """Whether the values are of these parameters of this very model."""
        known = self._model is not None and self._model() is model
        return known and self.values.keys() == trainable(model).keys()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None}

    @staticmethod
    def detach(model: nn.Module) -> None:
        """Stop adding to the model's loss, whichever callback began it."""
        handle = _hooks.pop(model, None)
        if handle is not None:
            handle.remove()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the values as safetensors, whole or not at all."""
        write(self.values, path, self._made_in)

    def copy_to(self, model: nn.Module) -> None:
        """Make the long-term values the model's.

        Raises:
            ValueError: before any training, for a model with other trainable parameters, or one
                that was folded or anchored anew since.
        """
        _copy(placed(self.values, model, _WHAT, self._made_in), model)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model with the long-term values, to evaluate or save; after the block, as before.

        Raises:
            ValueError: as :meth:`copy_to`.
        """
        before = [(value, value.detach().clone()) for value in trainable(model).values()]
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for value, own in before:
                    value.copy_(own)

    def _read(self, file: Path, model: nn.Module) -> None:
        if not file.is_file():
            raise ValueError(
                f"{file} is not there: the checkpoint was written without a LongTermMemory, was "
                "cut short, or lies in another folder than output_dir. Go on from a checkpoint "
                "that has the file, or begin anew"
            )
        self._take(file, model, "the checkpoint's long-term memory")

    def _take(self, file: Path, model: nn.Module, what: str) -> None:
        tensors, made_in = read(file)
        self.values = placed(tensors, model, what, made_in)
        self._made_in = made_in

    def _add_to_loss(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of the model: its output with ``weight · MSE`` in the loss."""
        if not (model.training and torch.is_grad_enabled()):
            return output
        labels = kwargs.get("labels")
        if getattr(output, "loss", None) is None or labels is None:
            raise ValueError(
                "LongTermMemory adds to the loss that the model computes from labels=, and this "
                "forward has none: train with the model's own loss, and with return_dict"
            )
        inputs = {name: value for name, value in kwargs.items() if name not in _FOR_THE_LOSS}
        target = _scored(self._long_term_logits(model, args, inputs), labels)
        logits = output.get("logits")
        if logits is None:
            logits = _logits_again(model, args, inputs)
        errors = (_scored(logits, labels) - target).square().mean(-1)
        scored = labels[:, 1:] != -100
        items = kwargs.get("num_items_in_batch")
        if items is None:
            items = scored.sum().clamp(min=1)
        output.loss = output.loss + self.weight * errors.sum() / items
        if output.get("log_probs") is not None:
            spread = errors.new_zeros(scored.shape).masked_scatter(scored, errors)
            output.log_probs = output.log_probs - self.weight * spread
        return output

    @torch.no_grad()
    def _long_term_logits(self, model: nn.Module, args: Any, inputs: dict[str, Any]) -> Tensor:
        known(self.values, model, _WHAT)
        parameters = dict(model.named_parameters())  # of which some may be frozen by now
        values = {name: value.to(parameters[name].dtype) for name, value in self.values.items()}
        with evaluating(model):
            return torch.func.functional_call(model, values, args, inputs).logits


def _makes_its_loss(args: Any) -> bool:
    """Whether a run's arguments are of a trainer that makes a loss of log-probabilities itself."""
    of_trl = [kind for kind in type(args).__mro__ if kind.__module__.startswith("trl.")]
    return bool(of_trl) and of_trl[0].__name__ != "SFTConfig"


def _logits_again(model: nn.Module, args: Any, inputs: dict[str, Any]) -> Tensor:
    """A second forward, around the model's hooks, for a loss that was made without logits."""
    devices = {value.device for value in model.parameters() if value.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        return model.forward(*args, **inputs).logits


def _scored(logits: Tensor, labels: Tensor) -> Tensor:
    """Of ``logits [B, T, V]``, those whose next token has a label: ``[S, V]`` fp32."""
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"LongTermMemory is for causal language models, whose logits [B, T, V] go with labels "
            f"[B, T]: here they are {list(logits.shape)} and {list(labels.shape)}"
        )
    return logits[:, :-1][labels[:, 1:] != -100].float()


@torch.no_grad()
def _copy(values: dict[str, Tensor], model: nn.Module) -> None:
    for name, value in trainable(model).items():
        value.copy_(values[name])


def _file(args: Any, state: Any) -> Path:
    return Path(args.output_dir, f"checkpoint-{state.global_step}", FILE)


__all__ = ["FILE", "LongTermMemory"]
