"""The curvature of what a model knows in the span of its adapters, read off old text.

Texts are cut into pieces and batched by length, so that none is padded; without texts the model
writes some. One pass forward and backward over them sums z zᵀ and h hᵀ of every adapted layer
(formulas in :mod:`secura.anchoring`), each process over its share.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import bases
from .cabr import CABR
from .sharding import is_distributed

Texts = Sequence[str] | Sequence[Tensor] | Sequence[Sequence[int]]

TOKENS, LENGTH, BATCH_SIZE = 8192, 128, 8
"""Of old text that is read at most, of a piece of it, and pieces at once, unless asked for."""


class Statistics(NamedTuple):
    """What one layer's tokens sum up to, and its own C and R, ``[m, m]`` each, fp32.

    Attributes:
        sigma: the sum of z zᵀ.
        gamma: the sum of h hᵀ.
        columns: CᵀC.
        rows: R Rᵀ.
    """

    sigma: Tensor
    gamma: Tensor
    columns: Tensor
    rows: Tensor

    @property
    def seen(self) -> bool:
        """Whether a token and a gradient reached the layer."""
        return bool(self.sigma.any() and self.gamma.any())


def curvature(
    model: nn.Module,
    adapters: Mapping[str, tuple[CABR, Any]],
    texts: list[Any] | None,
    tokenizer: Any,
    *,
    tokens: int,
    length: int,
    batch_size: int,
    seed: int,
) -> tuple[dict[str, Statistics], int]:
    """Each layer's sums over old text, and how many tokens were read, over all processes.

    Args:
        model: gives ``logits`` for ``input_ids``; gradients have to reach the adapted layers.
        adapters: the adapters and the layers they are on, by name.
        texts, tokenizer, tokens, length, batch_size, seed: see :func:`secura.anchor`.

    Raises:
        ValueError: no text, one of fewer than two tokens, a model that gives no logits for
            ``input_ids`` or cannot sample, or logits that are not finite.
    """
    check_reads(model)
    for _, layer in adapters.values():
        bases.check_whole(layer.adapted)
    device = next(iter(adapters.values()))[0].rows.device
    rank, world = _processes()
    generator = torch.Generator(device).manual_seed(seed + 1_000_003 * rank)
    length = min(length, tokens, _limit(model))
    finite = True
    if texts is None:
        count = max(1, tokens // (length * world))
        pieces, finite = _sample(model, tokenizer, count, length, batch_size, generator)
        _check_finite(finite, device)
        own = every = _batches(pieces, batch_size)
    else:
        every = _batches(pieces_of(model, texts, tokenizer, tokens, length), batch_size)
        own = every[rank::world]
    sums, handles, watches = {}, [], []
    try:
        for name, (adapter, layer) in adapters.items():
            sums[name] = Statistics(*(torch.zeros_like(adapter.core) for _ in range(4)))
            watches.append(_Watch(adapter, sums[name]))
            handles.append(layer.register_forward_hook(watches[-1]))
        # all processes read as often, for sharded ones wait for one another, and fail together
        for index in range(largest(len(own), device)):
            for watch in watches:
                watch.counts = index < len(own)
            batch = own[index] if index < len(own) else every[0]
            finite &= _read(model, batch.to(device), generator)
            if not finite and world == 1:
                break
    finally:
        for handle in handles:
            handle.remove()
    _check_finite(finite, device)
    read = torch.tensor(sum(batch.numel() for batch in own), device=device)
    if world > 1:
        torch.distributed.all_reduce(read)
        for one in sums.values():
            _add_up(one)
    return sums, int(read)


def _check_finite(finite: bool, device: torch.device) -> None:
    """Raise ``ValueError`` on all processes where the logits of one were not finite."""
    if largest(int(not finite), device):
        raise ValueError("the model's logits hold NaN or inf on old text: nothing was anchored")


def _add_up(sums: Statistics) -> None:
    """Add the sums of all processes; C and R are those of any that a token reached."""
    reached = sums.rows.any().float()
    for tensor in (*sums, reached):
        torch.distributed.all_reduce(tensor)
    for tensor in (sums.columns, sums.rows):
        tensor.div_(reached.clamp_min(1))


def is_causal(model: Any) -> bool:
    """Whether a model writes from left to right: no encoder-decoder, no masked language model."""
    auto: Any = sys.modules.get("transformers.models.auto.modeling_auto")
    masked = getattr(auto, "MODEL_FOR_MASKED_LM_MAPPING_NAMES", {}).values()
    return not getattr(_config(model), "is_encoder_decoder", False) and _kind(model) not in masked


def _kind(model: Any) -> str:
    """The name of the model's class, beneath PEFT's."""
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__


def _limit(model: Any) -> int:
    """How many tokens the model's positions allow at once."""
    limit = getattr(_config(model), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 1 else 1 << 30


def _config(model: Any) -> Any:
    """The configuration of the language model in ``model``, or None."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


_READS = "an anchor is for models that take input_ids alone and give logits"


@torch.no_grad()
def check_reads(model: Any) -> None:
    """Raise ``ValueError`` where a model, in eval mode, cannot read two tokens of ``input_ids``."""
    ids = torch.tensor([[0, 1]], device=next(model.parameters()).device)
    try:
        out = model(input_ids=ids)
    except Exception as error:  # whatever a forward of another kind says
        raise ValueError(f"{_READS}: {_kind(model)} says {error}") from error
    if not isinstance(getattr(out, "logits", None), Tensor):
        raise ValueError(
            f"{_READS}: {_kind(model)} gives a {type(out).__name__} without (return_dict=False in "
            "its config, or a model without a head)"
        )
    if out.logits.shape[-1] < 2:
        raise ValueError(
            f"{_READS}: {_kind(model)} gives one number, a reward or a regression, of which no "
            "label can be drawn"
        )


def _read(model: Any, ids: Tensor, generator: Any) -> bool:
    """One pass forward and backward over ``ids [B, T]``, with labels drawn from the model.

    Returns:
        Whether its logits are finite; if not, the pass is made all the same, for the others' sake.
    """
    logits = model(input_ids=ids).logits
    labels, finite = _draw(logits.detach(), generator)
    flat = logits.float().flatten(0, -2)
    F.cross_entropy(flat, labels.flatten(), reduction="sum").backward()
    for parameter in model.parameters():
        parameter.grad = None
    return finite


def listed(texts: Texts) -> list[Any]:
    """Texts as a list: a string or a tensor alone is one text.

    Raises:
        ValueError: they are a mapping, whose names would be read, or a file's name.
    """
    if isinstance(texts, Mapping):
        raise ValueError(
            f"texts are a mapping with {', '.join(map(str, texts))}: give one column of texts, "
            "such as dataset['train']['text'] or tokenizer(texts)['input_ids']"
        )
    if isinstance(texts, os.PathLike) or (isinstance(texts, str) and os.path.isfile(texts)):
        raise ValueError(f"{os.fspath(texts)} is a file: read it, and give the texts in it")
    return [texts] if isinstance(texts, str | Tensor) else list(texts)


def pieces_of(
    model: Any, texts: list[Any], tokenizer: Any, tokens: int, length: int
) -> list[Tensor]:
    """Texts cut into pieces of 2 to ``length`` token ids, ``tokens`` in all at most.

    Padding at the ends of token ids is left out, where the tokenizer or the model's config names
    its token; where that begins or ends texts too, one of it is kept.

    Raises:
        ValueError: no text, one of fewer than two tokens or of ids that the model does not know, or
            something else than text.
    """
    known: Any = getattr(_config(model), "vocab_size", None)
    pad = next(iter(_tokens(model, tokenizer, "pad")), None)
    kept = int(pad in _tokens(model, tokenizer, "bos") + _tokens(model, tokenizer, "eos"))
    if not texts:
        raise ValueError("there is no text to anchor by: give some, or texts=None to sample")
    ids = []
    for number, text in enumerate(texts):
        quoted = ""
        if isinstance(text, str):
            quoted = f" ({text.strip()[:40]!r})"
            text = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64, device="cpu")
        elif isinstance(text, list | tuple) and all(type(token) is int for token in text):
            text = torch.tensor(text, dtype=torch.int64, device="cpu")
        if isinstance(text, Mapping):
            raise ValueError(
                f"text {number} is a row with {', '.join(text)}: give one column, such as "
                "dataset['input_ids']"
            )
        if not isinstance(text, Tensor) or text.is_floating_point() or text.dim() != 1:
            raise ValueError(
                f"text {number} is neither a string nor token ids (a list or 1-D tensor)"
            )
        if pad is not None:
            places = (text != pad).nonzero().flatten()
            first, last = (int(places[0]), int(places[-1])) if len(places) else (0, -1 - kept)
            text = text[max(0, first - kept) : last + 1 + kept]
        outside = [] if known is None else text[(text < 0) | (text >= known)].tolist()
        if outside:
            raise ValueError(
                f"text {number} has the token id {outside[0]}, and the model knows 0 to "
                f"{known - 1}: give input_ids, not labels, of this model's tokenizer"
            )
        if text.numel() < 2:
            raise ValueError(
                f"text {number}{quoted} has {text.numel()} token(s): there is nothing to predict "
                "in fewer than two"
            )
        ids.append(text.long().cpu())
    pieces, left = [], tokens
    for begin in range(0, max(text.numel() for text in ids), length):
        for text in ids:
            piece = text[begin : begin + min(length, left)]
            if piece.numel() >= 2:
                pieces.append(piece)
                left -= piece.numel()
    return pieces


@torch.no_grad()
def _sample(
    model: Any, tokenizer: Any, count: int, length: int, batch_size: int, generator: Any
) -> tuple[list[Tensor], bool]:
    """``count`` texts of ``length`` tokens that the model writes from its start token.

    An end token does not end a text: what the model writes after one belongs to what it knows.

    Returns:
        The texts, and whether the model's logits were finite.
    """
    if not is_causal(model):
        raise ValueError(
            f"the model cannot sample: a {_kind(model)} writes no text from left to right; give "
            "texts to anchor by"
        )
    token = _start_token(model, tokenizer)
    pieces: list[Tensor] = []
    finite = True
    while len(pieces) < count:
        batch = min(4 * batch_size, count - len(pieces))
        ids = torch.full((batch, 1), token, device=generator.device)
        past = None
        for _ in range(length - 1):
            here = ids if past is None else ids[:, -1:]
            try:
                out = model(input_ids=here, past_key_values=past, use_cache=True)
            except TypeError as error:
                raise ValueError(
                    "the model cannot sample: its forward takes no past_key_values and use_cache "
                    f"({error}); give texts to anchor by"
                ) from error
            past, logits = getattr(out, "past_key_values", None), out.logits
            if logits.dim() != 3:
                raise ValueError(
                    "the model cannot sample: its logits are of a whole text, as a classifier's "
                    "are; give texts to anchor by"
                )
            drawn, is_finite = _draw(logits[:, -1:], generator)
            ids, finite = torch.cat([ids, drawn], dim=1), finite and is_finite
        if not finite and _processes()[1] == 1:
            return pieces, finite
        pieces += list(ids.cpu())
    return pieces, finite


def _tokens(model: Any, tokenizer: Any, kind: str) -> list[int]:
    """The ids that tokenizer and model give a ``"bos"``, ``"eos"`` or ``"pad"``."""
    owners = (tokenizer, _config(model))
    found: list[Any] = [getattr(owner, f"{kind}_token_id", None) for owner in owners]
    flat = (one if isinstance(one, list) else [one] for one in found)
    return [int(token) for one in flat for token in one if token is not None]


def _start_token(model: Any, tokenizer: Any) -> int:
    ends = _tokens(model, None, "eos") + _tokens(model, tokenizer, "eos")
    for token in _tokens(model, tokenizer, "bos") + ends:
        return token
    raise ValueError(
        "the model cannot sample: neither its config nor a tokenizer names a start token; give "
        "texts to anchor by"
    )


def _draw(logits: Tensor, generator: Any) -> tuple[Tensor, bool]:
    """Draw a token ``[B, T]`` from each of ``logits [B, T, V]``; token 0 if one is not finite.

    Returns:
        The tokens, and whether the logits are finite.
    """
    shares = logits.float().softmax(-1)
    if not bool(torch.isfinite(shares).all()):
        return shares.new_zeros(logits.shape[:-1], dtype=torch.int64), False
    flat = shares.flatten(0, -2)
    return torch.multinomial(flat, 1, generator=generator).view(logits.shape[:-1]), True


def _batches(pieces: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """The pieces as ``[B, T]``, each batch of one length."""
    alike: dict[int, list[Tensor]] = {}
    for piece in pieces:
        alike.setdefault(piece.numel(), []).append(piece)
    return [
        torch.stack(same[begin : begin + batch_size])
        for same in alike.values()
        for begin in range(0, len(same), batch_size)
    ]


def largest(count: int, device: torch.device) -> int:
    """The largest ``count`` of all processes."""
    most = torch.tensor(count, device=device)
    if _processes()[1] > 1:
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


class _Watch:
    """A forward hook that adds a layer's z zᵀ and h hᵀ to its sums once its gradient is there.

    Where nothing ``counts``, it adds nothing.
    """

    def __init__(self, adapter: CABR, sums: Statistics) -> None:
        self.adapter, self.sums, self.counts = adapter, sums, True

    def __call__(self, layer: Any, inputs: tuple, out: Tensor) -> None:
        if not out.requires_grad:
            return
        base = layer.adapted
        with torch.no_grad(), torch.autocast(out.device.type, enabled=False):
            weight = bases.weight(base)
            rows = weight.index_select(0, self.adapter.rows)
            columns = weight.index_select(1, self.adapter.cols)
            if not bool(self.sums.rows.any()):  # later, the weight may be elsewhere
                self.sums.rows.copy_(rows.float() @ rows.float().t())
                self.sums.columns.copy_(columns.float().t() @ columns.float())
            z = (_flat(inputs[0]).to(weight.dtype) @ rows.t()).float()
            squares = z.t() @ z

        def add(gradient: Tensor) -> None:
            if not self.counts:
                return
            with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
                h = (_flat(gradient).to(columns.dtype) @ columns).float()
                self.sums.sigma.add_(squares)
                self.sums.gamma.add_(h.t() @ h)

        out.register_hook(add)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1])


def _processes() -> tuple[int, int]:
    """``(rank, processes)``."""
    if not is_distributed():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


__all__ = [
    "BATCH_SIZE",
    "LENGTH",
    "TOKENS",
    "Statistics",
    "Texts",
    "check_reads",
    "curvature",
    "is_causal",
    "largest",
    "listed",
    "pieces_of",
]
