"""What an adapter file is checked for: whose weight it belongs to, and that it is whole."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FINGERPRINT_SIZE = 8
"""A fingerprint is ``[FINGERPRINT_SIZE, FINGERPRINT_SIZE]``."""

TOLERANCE = 0.01
"""Relative distance up to which two weights count as the same; a cast to bf16 makes 0.002."""

_CHUNK_ROWS = 1024


def fingerprint(weight: Tensor) -> Tensor:
    """A sketch of ``weight [N, K]``: ``S₁ᵀ W S₂ [8, 8]`` in fp32, with fixed random signs S.

    Experts ``[E, N, K]`` count as ``[E · N, K]``.

    Its squared norm estimates ``64 ‖W‖²``, and that of a difference of two sketches 64 times the
    squared distance of their weights, so it can tell another weight from the same one in another
    dtype. One pass over W.
    """
    weight = weight.flatten(0, -2)
    n, k = weight.shape
    right = _signs(k, 1, weight.device)
    left = _signs(n, 2, weight.device)
    mixed = torch.zeros(FINGERPRINT_SIZE, k, dtype=torch.float32, device=weight.device)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        for start in range(0, n, _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            mixed.addmm_(left[part].t(), weight[part].float())
        return mixed @ right


def fingerprint_of_product(p: Tensor, rows: Tensor) -> Tensor:
    """The fingerprint ``[8, 8]`` of the product ``P R``, from ``P [N, m]`` and ``R [m, K]``."""
    left = _signs(p.shape[0], 2, p.device).to(p.dtype)
    right = _signs(rows.shape[1], 1, rows.device).to(p.dtype)
    return (left.t() @ p) @ (rows.to(p.dtype) @ right)


def distance(first: Tensor, second: Tensor) -> float:
    """Estimated ``‖W₁ − W₂‖ / ‖W₂‖`` of the weights behind two fingerprints."""
    first, second = first.double().cpu(), second.double().cpu()
    scale = float(second.norm())
    gap = float((first - second).norm())
    return gap / scale if scale else (0.0 if gap == 0 else math.inf)


def checksum(tensors: Mapping[str, Tensor], settings: str = "") -> Tensor:
    """A 64-bit sum of tensors (upper half) and settings (lower half), as a 0-dim int64 tensor.

    The upper half is of names, shapes and values: the same values in a wider dtype sum up alike.
    """
    values = hashlib.blake2b(digest_size=4)
    for name, tensor in sorted(tensors.items()):
        values.update(f"{name}{tuple(tensor.shape)}".encode())
        kept = tensor.detach().cpu()
        values.update(_bytes(kept.double() if kept.is_floating_point() else kept.long()))
    rest = hashlib.blake2b(settings.encode(), digest_size=4)
    total = int.from_bytes(values.digest() + rest.digest(), "big", signed=True)
    return torch.tensor(total, device="cpu")


def verify_checksum(layer: str, state: Mapping[str, Tensor], settings: str) -> None:
    """Raise ``ValueError`` where a layer's tensors or settings are not those that were saved.

    Tensors without a checksum, with 0 in its place, or cast after they were saved (``core`` and
    ``fingerprint`` are always saved in fp32) are not checked.
    """
    own = {name: tensor for name, tensor in state.items() if name != "checksum"}
    stored = int(state.get("checksum", 0))
    if not stored or was_cast(own):
        return
    found = int(checksum(own, settings))
    if stored == found:
        return
    if stored >> 32 == found >> 32:
        raise ValueError(
            f"{layer}: the adapter was saved with other settings than its adapter_config.json (or "
            "the config given) has, or for a weight of another shape than this layer's: the "
            "scaling, the norm, restrain or the tokens were changed, or this is another model. "
            "Restore it, or load it on the model it was trained on; set_scale() changes the "
            "scaling of an adapter once it is loaded"
        )
    raise ValueError(
        f"{layer}: the adapter's tensors do not match their checksum: the file (or its "
        "adapter_config.json) was damaged or changed after it was saved; save or download it "
        "again, or, where you changed them on purpose (an average, say), leave out the tensors "
        "named checksum"
    )


def no_checksum(beside: Tensor) -> Tensor:
    """The 0 of a layer that has no checksum, on the device of ``beside``, for meta the CPU."""
    device = "cpu" if beside.is_meta else beside.device
    return torch.zeros((), dtype=torch.int64, device=device)


def version(tensor: Tensor) -> int:
    """How often ``tensor`` was written to; 0 for one of inference mode, which is not counted."""
    return 0 if tensor.is_inference() else tensor._version


_CASTS = (torch.float16, torch.bfloat16, torch.float64)


def was_cast(state: Mapping[str, Tensor]) -> bool:
    """Whether an adapter's tensors were cast to another dtype after they were saved.

    Told by those that are fp32 in every file, all of them; integers are no cast, but damage.
    """
    ends = ("core", "fingerprint")
    fixed = [tensor for name, tensor in state.items() if name.rpartition(".")[2] in ends]
    return bool(fixed) and all(tensor.dtype in _CASTS for tensor in fixed)


def file_checksum(tensors: Iterable[Tensor]) -> str:
    """A checksum over all tensors of an adapter file, whatever their names and order."""
    parts = []
    for tensor in tensors:
        part = hashlib.blake2b(f"{tuple(tensor.shape)}{tensor.dtype}".encode(), digest_size=16)
        part.update(_bytes(tensor))
        parts.append(part.hexdigest())
    return hashlib.blake2b("".join(sorted(parts)).encode(), digest_size=16).hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """A tensor's bytes."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file, as ``safetensors.safe_open`` does.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} was cut short or is no safetensors file ({error}): save or download it again"
        ) from error


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: it cannot be read.
    """
    with opened(path) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def check_file(path: Path) -> None:
    """Raise ``ValueError`` where a file that is there cannot be read as safetensors."""
    if path.is_file():
        with opened(path):
            pass


def check_state(
    layer: str,
    state: Mapping[str, Tensor],
    shape: tuple[int, int],
    own_fingerprint: Tensor | None,
    expected: Mapping[str, Tensor] | None = None,
) -> None:
    """Check what is about to be loaded into one layer, before anything is.

    Args:
        layer: the layer's name, for messages.
        state: tensors by attribute name (``A``, ``rows``, …), without ``checksum``.
        shape: ``(N, K)`` of the base weight.
        own_fingerprint: of the base weight the adapter is loaded on, or None to skip that check.
        expected: the tensors they take the place of, or None to skip that check.

    Raises:
        ValueError: for a file that was damaged or written for another weight.
    """
    if expected is not None:
        found, taken = _shapes(state), _shapes(expected)
        if found != taken:
            names = sorted(n for n in found | taken if found.get(n) != taken.get(n))
            raise ValueError(
                f"{layer}: the file has {', '.join(f'{n} {found.get(n)}' for n in names)}, this "
                f"layer takes {', '.join(f'{n} {taken.get(n)}' for n in names)}: the file was "
                "damaged, or saved with other settings (r, inner_r, train_bias) than these"
            )
    for name, limit in (("rows", shape[0]), ("cols", shape[1])):
        index = state.get(name)
        if index is not None and (
            index.is_floating_point()
            or bool((index < 0).any() | (index >= limit).any())
            or index.unique().numel() != index.numel()
        ):
            raise ValueError(
                f"{layer}: {name} must be distinct integers in [0, {limit}): the file was damaged "
                "or belongs to a layer of another shape"
            )
    for name in ("A", "B", "U", "left", "right", "damping", "core", "bias"):
        if name in state and not bool(torch.isfinite(state[name]).all()):
            raise ValueError(f"{layer}: {name} holds NaN or inf: the adapter file is damaged")
    if own_fingerprint is None or "fingerprint" not in state:
        return
    gap = distance(state["fingerprint"], own_fingerprint)
    if not gap <= TOLERANCE:
        raise ValueError(
            f"{layer}: this adapter was trained on another base weight (they differ by about "
            f"{gap:.1%}), and its C and R would be taken from the wrong one. Load it on the model "
            "it was trained on, or use it all the same with check_base=False in the config "
            "(--no_check_base on the command line)"
        )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _signs(count: int, salt: int, device: torch.device) -> Tensor:
    """``[count, FINGERPRINT_SIZE]`` of ±1 from an integer hash, the same everywhere."""
    mask = 0xFFFFFFFF
    value = torch.arange(count * FINGERPRINT_SIZE, device=device) + salt * 0x9E3779B9
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        value = ((value ^ (value >> shift)) * factor) & mask
    value ^= value >> 16
    return (1 - 2 * (value & 1)).float().view(count, FINGERPRINT_SIZE)


__all__ = [
    "FINGERPRINT_SIZE",
    "check_file",
    "check_state",
    "checksum",
    "distance",
    "file_checksum",
    "fingerprint",
    "fingerprint_of_product",
    "no_checksum",
    "opened",
    "read_file",
    "verify_checksum",
    "version",
    "was_cast",
]
