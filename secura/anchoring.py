"""The anchored core: U trained in coordinates in which every direction costs the same on old text.

R's rows and C's columns are the base weight's own, so both K-FAC factors of what the model knows
are ``[m, m]`` in their span, of tensors the layer has at hand:

    z = x Rᵀ            Σ = E[z zᵀ]       x: the layer's inputs on old text
    h = Cᵀ ∂ℓ/∂y        Γ = E[h hᵀ]       labels sampled from the model: the true Fisher
    S = (Σ + λ tr Σ/m)^−½     L = (Γ + λ tr Γ/m)^−½     U = κ L Ũ S,   Ũ trained, 0 at first

To second order a change U costs ``½ tr(Γ U Σ Uᵀ) = ½ κ² ‖Ũ‖²`` on old text (λ aside): every
direction of Ũ the same. κ makes ``‖C κL‖ ‖S R‖ = ‖C‖ ‖R‖``, so that one learning rate serves all
layers. Weight decay on Ũ is then a K-FAC penalty against leaving old knowledge, see
:class:`secura.continual.AnchorDecayCallback`.

Each set of texts counts the same: Σ and Γ are divided by their mean eigenvalue before they are
added up. ``κ L`` and S are kept (2 m² numbers a layer), from which both sums follow.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import bases
from .adapter import CABR, gathered
from .config import check_damping
from .folding import reshard, secura_layers


@dataclass(frozen=True)
class AnchorReport:
    """What an anchoring pass did.

    Attributes:
        layers: adapted layers that were anchored.
        tokens: of old text that were read, over all processes.
        seconds: the pass took, sampling included.
        sampled: whether the model wrote the text itself.
        unseen: names of layers that no token reached (an expert, say): their core is anchored by
            nothing, and moves as an unanchored one does.
    """

    layers: int
    tokens: int
    seconds: float
    sampled: bool
    unseen: tuple[str, ...] = ()


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


def anchor(
    model: nn.Module,
    texts: Sequence[str] | Sequence[Tensor] | None = None,
    *,
    tokenizer: Any = None,
    damping: float | None = None,
    tokens: int = 8192,
    length: int = 128,
    batch_size: int = 8,
    seed: int = 0,
    add: bool = False,
) -> AnchorReport:
    """Anchor the active adapters with ``core="u"`` by old text, before they are trained.

    One pass forward and backward over at most ``tokens`` tokens. What the model computes stays as
    it is: where U is not 0, Ũ is solved for. Call it before the optimizer is made.

    Example:
        >>> model = get_peft_model(base, SecuraConfig(core="u", norm="none"))
        >>> secura.anchor(model, tokenizer=tokenizer)  # by the model's own samples

    Args:
        model: a PEFT model or any other that holds :class:`secura.SECURALinear`, with a forward
            that takes ``input_ids [B, T]`` and gives an object with ``logits``. Under DDP or FSDP2
            every process calls this, with the same arguments: each reads its share.
        texts: what the model is to keep: strings, or token ids, a 1-D integer tensor a text. None
            samples from the model itself, from its start token.
        tokenizer: for texts that are strings; also asked for the start token.
        damping: λ; None takes the config's ``anchor_damping`` (1e-2).
        tokens: how many to read at most. The first ``length`` tokens of every text come first,
            then the next of every text.
        length: tokens of a piece; texts are cut into such pieces.
        batch_size: pieces read at once.
        seed: of the sampled texts and labels; torch's own random state is left alone.
        add: whether the statistics of the anchor that is there count too, as they do at the end
            of a task; they have to have been made with the same damping.

    Raises:
        ValueError: no adapter to anchor, no text, a text of fewer than two tokens, strings without
            a tokenizer, a model that cannot sample, or statistics that are not finite; adapters
            are left as they were then, every one of them.
        RuntimeError: while an adapter is merged.
    """
    start = time.perf_counter()
    adapters = anchored_adapters(model)
    if damping is not None:
        check_damping(damping)
    for name, value, least in (
        ("tokens", tokens, 2),
        ("length", length, 2),
        ("batch_size", batch_size, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
    device = next(iter(adapters.values()))[0].rows.device
    rank, world = _processes()
    generator = torch.Generator(device).manual_seed(seed + 1_000_003 * rank)
    with _still(model):
        if texts is None:
            share = math.ceil(tokens / (length * world))
            pieces = _sample(model, tokenizer, share, length, batch_size, generator)
        else:
            pieces = _pieces(texts, tokenizer, tokens, length)
        batches = _batches(pieces, batch_size)
        if texts is not None and len(batches) >= world:  # as many for each: sharded ones wait
            batches = batches[rank : len(batches) - len(batches) % world : world]
        sums, read = _read(model, adapters, batches, generator)
    sums, read = _over_processes(sums, read, device)
    unseen = tuple(name for name, one in sums.items() if not bool(one.sigma.any()))
    made = {}
    for name, (adapter, _) in adapters.items():
        made[name] = _solve(name, adapter, sums[name], damping, add)
    for name, (adapter, _) in adapters.items():
        adapter.set_anchor(*made[name])
        if damping is not None:
            adapter.config.anchor_damping = float(damping)
    return AnchorReport(len(adapters), read, time.perf_counter() - start, texts is None, unseen)


@torch.no_grad()
def unanchor(model: nn.Module) -> int:
    """Put ``U = κ L Ũ S`` in the place of Ũ and drop L and S; what is computed stays as it is.

    The adapter's file is then a third as large. It can be trained on, in plain coordinates.

    Returns:
        How many layers had an anchor.
    """
    found = [one for one, _ in anchored_adapters(model).values() if one.left is not None]
    for adapter in found:
        adapter.drop_anchor()
    return len(found)


def anchored_adapters(model: nn.Module) -> dict[str, tuple[CABR, nn.Module]]:
    """The active adapters with ``core="u"`` and the layers they are on, by name.

    Raises:
        ValueError: there is none.
        RuntimeError: one is merged.
    """
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for layer in secura_layers(model):
        for adapter in layer.active_cabr():
            if adapter.config.core != "u":
                continue
            if layer.merged:
                raise RuntimeError("an adapter is merged into the base weight: unmerge it first")
            found[names[adapter]] = (adapter, layer)
    if not found:
        raise ValueError(
            "the model has no active adapter with core='u': only that core is anchored, so make "
            "the adapter with SecuraConfig(core='u')"
        )
    return found


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Eval mode, with gradients through the cores; modes, flags and gradients as before after."""
    training = [module for module in model.modules() if module.training]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    cores: list[Any] = [one.U for one, _ in anchored_adapters(model).values()]
    frozen = [core for core in cores if not core.requires_grad]
    model.eval()
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        for core in frozen:
            core.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for core in frozen:
            core.requires_grad_(False)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module in training:
            module.training = True
        reshard(model)


def _pieces(texts: Any, tokenizer: Any, tokens: int, length: int) -> list[Tensor]:
    """Texts cut into pieces of 2 to ``length`` token ids, ``tokens`` in all at most."""
    if isinstance(texts, str | Tensor):
        texts = [texts]
    texts = list(texts)
    if not texts:
        raise ValueError("there is no text to anchor by: give some, or texts=None to sample")
    ids = []
    for number, text in enumerate(texts):
        if isinstance(text, str):
            if tokenizer is None:
                raise ValueError("texts are strings: give the tokenizer, or token ids")
            text = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)
        if not isinstance(text, Tensor) or text.is_floating_point() or text.dim() != 1:
            raise ValueError(f"text {number} is neither a string nor a 1-D tensor of token ids")
        if text.numel() < 2:
            raise ValueError(
                f"text {number} has {text.numel()} token(s): there is nothing to predict in fewer "
                "than two"
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
) -> list[Tensor]:
    """``count`` texts of ``length`` tokens that the model writes from its start token."""
    token = _start_token(model, tokenizer)
    pieces: list[Tensor] = []
    while len(pieces) < count:
        batch = min(4 * batch_size, count - len(pieces))
        ids = torch.full((batch, 1), token, device=generator.device)
        past = None
        for _ in range(length - 1):
            here = ids if past is None else ids[:, -1:]
            out = model(input_ids=here, past_key_values=past, use_cache=True)
            past = getattr(out, "past_key_values", None)
            ids = torch.cat([ids, _draw(out.logits[:, -1:], generator)], dim=1)
        pieces += list(ids.cpu())
    return pieces


def _start_token(model: Any, tokenizer: Any) -> int:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for owner, name in ((tokenizer, "bos"), (config, "bos"), (config, "eos"), (tokenizer, "eos")):
        token: Any = getattr(owner, f"{name}_token_id", None)
        token = token[0] if isinstance(token, list) and token else token
        if token is not None:
            return int(token)
    raise ValueError(
        "the model cannot sample: neither its config nor a tokenizer names a start token; give "
        "texts to anchor by"
    )


def _draw(logits: Tensor, generator: Any) -> Tensor:
    """A token ``[B, T]`` from each of ``logits [B, T, V]``.

    Raises:
        ValueError: they hold NaN or inf.
    """
    shares = logits.float().softmax(-1)
    if not bool(torch.isfinite(shares).all()):
        raise ValueError("the model's logits hold NaN or inf on old text: nothing was anchored")
    flat = shares.flatten(0, -2)
    return torch.multinomial(flat, 1, generator=generator).view(logits.shape[:-1])


def _batches(pieces: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """The pieces as ``[B, T]``, each of one length, so that none is padded."""
    alike: dict[int, list[Tensor]] = {}
    for piece in pieces:
        alike.setdefault(piece.numel(), []).append(piece)
    return [torch.stack(part) for same in alike.values() for part in _parts(same, batch_size)]


def _parts(items: list[Tensor], size: int) -> list[list[Tensor]]:
    return [items[begin : begin + size] for begin in range(0, len(items), size)]


def _read(
    model: Any,
    adapters: dict[str, tuple[CABR, nn.Module]],
    batches: Sequence[Tensor],
    generator: Any,
) -> tuple[dict[str, Statistics], int]:
    """Each layer's sums over ``batches`` of ``[B, T]`` ids, and how many tokens those have."""
    sums, handles = {}, []
    for name, (adapter, layer) in adapters.items():
        sums[name] = Statistics(*(torch.zeros_like(adapter.core) for _ in range(4)))
        handles.append(layer.register_forward_hook(_Watch(adapter, sums[name])))
    try:
        for batch in batches:
            ids = batch.to(generator.device)
            logits = model(input_ids=ids).logits
            labels = _draw(logits.detach(), generator)
            flat = logits.float().flatten(0, -2)
            F.cross_entropy(flat, labels.flatten(), reduction="sum").backward()
            for parameter in model.parameters():
                parameter.grad = None
    finally:
        for handle in handles:
            handle.remove()
    return sums, sum(ids.numel() for ids in batches)


class _Watch:
    """A forward hook that adds a layer's z zᵀ and h hᵀ to its sums once its gradient is there."""

    def __init__(self, adapter: CABR, sums: Statistics) -> None:
        self.adapter, self.sums = adapter, sums

    def __call__(self, layer: Any, inputs: tuple, out: Tensor) -> None:
        if not out.requires_grad:
            return
        base = layer.base_layer if hasattr(layer, "base_layer") else layer.base
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
            with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
                h = (_flat(gradient).to(columns.dtype) @ columns).float()
                self.sums.sigma.add_(squares)
                self.sums.gamma.add_(h.t() @ h)

        out.register_hook(add)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1])


def _processes() -> tuple[int, int]:
    """``(rank, processes)``."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def _over_processes(
    sums: dict[str, Statistics], read: int, device: torch.device
) -> tuple[dict[str, Statistics], int]:
    if _processes()[1] == 1:
        return sums, read
    count = torch.tensor(read, device=device)
    for tensor in (*(side for one in sums.values() for side in one[:2]), count):
        torch.distributed.all_reduce(tensor)
    return sums, int(count)


def _per_mean(name: str, sums: Statistics) -> tuple[Tensor, Tensor]:
    """Σ and Γ divided by their mean eigenvalue, fp64 ``[m, m]``; the identity where one is 0."""
    scaled = []
    for tensor in (sums.sigma, sums.gamma):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{name}: the statistics of old text hold NaN or inf: nothing was anchored"
            )
        wide = tensor.double()
        mean = wide.diagonal().mean()
        scaled.append(wide / mean if mean > 0 else torch.eye(len(wide)).to(wide))
    return scaled[0], scaled[1]


def _solve(
    name: str,
    adapter: CABR,
    sums: Statistics,
    damping: float | None,
    add: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(κ L, S, Ũ)`` of one layer, all ``[m, m]``; Ũ computes what U did."""
    lam = adapter.config.anchor_damping if damping is None else float(damping)
    sigma, gamma = _per_mean(name, sums)
    if add and adapter.left is not None and adapter.right is not None:
        before = adapter.config.anchor_damping
        old = _undamped(adapter.right, before)
        count = old.diagonal().mean()
        sigma = sigma + old
        gamma = gamma + _undamped(adapter.left, before, mean=count)
    right, left = _root(sigma, lam), _root(gamma, lam)
    ratio = _stretch(sums.columns, left) * _stretch(sums.rows, right)
    left = left / ratio if ratio > 0 else left
    u = gathered(adapter.U).detach().double()
    if adapter.left is not None and adapter.right is not None:
        u = adapter.left.double() @ u @ adapter.right.double()
    if bool(u.any()):
        u = torch.linalg.solve(left, torch.linalg.solve(right, u.t()).t())
    for tensor in (left, right, u):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{name}: the anchor would hold NaN or inf: nothing was "
                "anchored; try a larger damping"
            )
    return left.float(), right.float(), u


def _stretch(gram: Tensor, root: Tensor) -> Tensor:
    """``‖X root‖ / ‖X‖`` from the gram matrix XᵀX; 0 where that is 0."""
    wide = gram.double()
    return ((root @ wide @ root).trace() / wide.trace().clamp_min(1e-300)).clamp_min(0).sqrt()


def _root(matrix: Tensor, damping: float) -> Tensor:
    """``(matrix + λ tr/m)^−½`` of a symmetric ``[m, m]``, fp64."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(0) + damping * matrix.diagonal().mean()
    return (vectors * values.rsqrt()) @ vectors.t()


def _undamped(root: Tensor, damping: float, mean: Tensor | None = None) -> Tensor:
    """The matrix that :func:`_root` was given, brought to the mean eigenvalue ``mean`` if given."""
    wide = root.double()
    inverse = torch.linalg.inv(wide @ wide)
    if mean is not None:
        inverse *= mean * (1 + damping) / inverse.diagonal().mean()
    share = inverse.diagonal().mean() * damping / (1 + damping)
    return inverse - share * torch.eye(len(wide)).to(wide)


__all__ = ["AnchorReport", "anchor", "anchored_adapters", "unanchor"]
