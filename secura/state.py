"""What an adapter's module does when its tensors are saved, loaded, assigned or cast."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from secura_kernels.layer import update

from . import bases
from .config import AdapterConfig
from .integrity import (
    check_state,
    checksum,
    fingerprint,
    fingerprint_of_product,
    no_checksum,
    verify_checksum,
    version,
)

_SAME = 1e-5
_ALIKE = 0.6


class _Checked(NamedTuple):
    """Tensors that passed ``check_loadable``, so that they are not checked again when loaded.

    Attributes:
        tensors: by name.
        versions: how often each had been written to.
        whole: whether none lacked.
        with_base: whether they are the base's.
    """

    tensors: dict[str, Tensor]
    versions: dict[str, int]
    whole: bool
    with_base: bool

    def covers(self, other: _Checked) -> bool:
        """Return whether this checked the same, unchanged tensors at least as strictly."""
        same = self.tensors.keys() == other.tensors.keys() and all(
            tensor is self.tensors[name] for name, tensor in other.tensors.items()
        )
        asked = other.whole <= self.whole and other.with_base <= self.with_base
        return same and asked and self.versions == other.versions


class AdapterState(nn.Module):
    """The tensors of one adapter: whole, checked before they are loaded, ``core`` always fp32.

    Tensors that ``load_state_dict`` brings are checked there. Those that a loader assigns one by
    one (transformers') are checked at ``eval()``, a cast, or their first use.

    Attributes:
        waits: whether rows and columns are yet to be chosen, for the base weight is not there.
        assigned: whether tensors were assigned that are yet to be checked.
        awaits_file: whether the adapter's file is yet to come, before which every use is an error.
        stale: whether what follows from the base weight is yet to be formed anew.
    """

    A: nn.Parameter | None
    B: nn.Parameter | None
    U: nn.Parameter | None
    left: Tensor | None
    right: Tensor | None
    damping: Tensor | None
    bias: nn.Parameter | None
    rows: Tensor
    cols: Tensor
    core: Tensor
    fingerprint: Tensor
    checksum: Tensor
    config: AdapterConfig
    scaling: float
    folded: bool
    out_features: int
    in_features: int

    ANCHOR = ("left", "right", "damping")
    """Names of the tensors of an anchor: κ L, S, and λ, a number; 0 says that there is none."""

    STATE = (
        *("A", "B", "U", *ANCHOR),
        *("bias", "rows", "cols", "core", "fingerprint", "checksum"),
    )
    """Names of the tensors an adapter file may hold for one layer."""

    CHOSEN = ("A", "B", "U", "damping", "bias", "rows", "cols", "core", "fingerprint", "checksum")
    """Those that an adapter starts with, once the base weight is there."""

    name = "layer"
    _KEEP_FP32 = ("core", "fingerprint", *ANCHOR, "gram", "base_norms")
    _FIXED = ("rows", "cols", "core", "fingerprint", *ANCHOR)
    waits = base_loaded = False
    assigned = awaits_file = False
    _before_meta: dict[str, Tensor] | None = None
    _passed: _Checked | None = None
    stale = True
    _core_version = -1
    loaded_version: int | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("rows", "cols", "core"):
            self.assigned, self.awaits_file = True, False

    @property
    def trained(self) -> nn.Parameter:
        """The parameter that starts at 0, and starts there again after a fold: B or U."""
        return cast(nn.Parameter, self.B if self.U is None else self.U)

    def expect_anchor(self) -> None:
        """Make room for the κ L, S and λ that a file is about to bring."""
        core = self.core
        identity = torch.eye(len(core), dtype=core.dtype, device=core.device)
        self.left, self.right = identity, identity.clone()
        self.damping = self.core.new_tensor(self.config.anchor_damping)

    def await_file(self) -> None:
        """Make every use an error until the adapter's tensors are loaded."""
        self.assigned = self.awaits_file = True

    @torch.inference_mode(False)
    def check_assigned(self, base: nn.Module) -> None:
        """Take over tensors that were assigned without ``load_state_dict``.

        Raises:
            ValueError: they are missing, damaged, or another weight's.
        """
        if self.awaits_file:
            raise ValueError(
                f"{self.name}: nothing of the adapter's file reached this layer: the file was "
                "damaged, or is of a model whose layers have other names (compiled, or part of "
                "another); PeftModel.from_pretrained says which. Where its settings alone were "
                "given, give get_peft_model a SecuraConfig of your own"
            )
        self._check_assigned_sum()
        weight, state = bases.weight(base), self.state_tensors()
        state.pop("checksum")
        own = fingerprint(weight) if self.config.check_base else None
        check_state(self.name, state, (self.out_features, self.in_features), own)
        self._check_not_merged(self.name, state, weight, own)
        self._note_loaded()

    @torch.inference_mode(False)
    def _check_assigned_sum(self) -> None:
        if self.assigned and not self.awaits_file and not self.rows.is_meta:
            own = self.state_tensors()
            verify_checksum(self.name, _summed(own), self._settings(own))
            self.checksum = torch.zeros_like(self.checksum)

    def _note_loaded(self) -> None:
        self.note_core()
        # what was loaded before the base weight came is compared with it at the first use
        self.stale, self.assigned, self.awaits_file = True, self.waits, False
        self.waits, self.loaded_version = False, version(self.trained)

    def note_core(self, folded: bool | None = None) -> None:
        """Note that ``core`` was changed, and whether it holds anything: looked at if not given."""
        core = self.core
        if folded is None and self.left is None:  # written in place, it may be
            self._check_plain(self.name, self.damping)
        self.folded = (not core.is_meta and bool(core.any())) if folded is None else folded
        self._core_version = version(core)
        self.stale |= self.config.norm == "channel" and self.config.norm_reference == "folded"

    def _apply(self, fn: Any, recurse: bool = True) -> AdapterState:
        self._check_assigned_sum()
        kept = {name: getattr(self, name) for name in self._KEEP_FP32}
        fixed, was_meta = {name: getattr(self, name) for name in self._FIXED}, self.rows.is_meta
        super()._apply(fn, recurse)
        if self.rows.is_meta != was_meta:
            self.stale = True
            if was_meta:
                self._come_back(())
            elif not self.waits:
                self._before_meta = fixed
        for name, tensor in kept.items():
            moved = getattr(self, name)
            if tensor is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._FIXED if self._before_meta else ():  # they come back by themselves
            destination.pop(prefix + name, None)
        if not self.waits:  # else what is here is what a copy in place is to reach
            self._add_checksum(destination, prefix)

    def _come_back(self, loaded: Collection[str]) -> None:
        """Put in place again what the move to the meta device took, but for what was ``loaded``."""
        kept, self._before_meta = self._before_meta, None
        for name, tensor in (kept or {}).items():
            if name not in loaded and tensor is not None:
                self._buffers[name] = tensor.to(self.trained.device)

    def renew(self, state_dict: Any, prefix: str, weight: Tensor | None) -> None:
        """Replace fingerprint and checksum of a saved state by those for ``weight [N, K]``."""
        if self.waits or prefix + "fingerprint" not in state_dict:
            return
        if weight is not None:
            state_dict[prefix + "fingerprint"] = fingerprint(weight)
        self._add_checksum(state_dict, prefix)

    def _add_checksum(self, state_dict: Any, prefix: str) -> None:
        """Add this layer's checksum, or none where its tensors are not all here."""
        state_dict.pop(prefix + "checksum", None)
        own = self._own(state_dict, prefix)
        kinds = ((type(tensor.detach()), tensor.is_meta, tensor.numel()) for tensor in own.values())
        if all(kind is Tensor and size and not meta for kind, meta, size in kinds):
            state_dict[prefix + "checksum"] = checksum(_summed(own), self._settings(own))

    def _settings(self, own: Mapping[str, Tensor]) -> str:
        """What a sum over the tensors ``own`` counts in: settings, and the weight's shape."""
        core = own.get("core")
        settings = self.config.checksum_settings(core is not None and bool(core.any()))
        return f"{settings} of [{self.out_features}, {self.in_features}]"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.check_loadable(state_dict, prefix)
        self._passed = None
        loaded = self._own(state_dict, prefix)
        if self.U is not None and prefix + "left" in state_dict:
            if self.left is None:
                self.expect_anchor()
            self._take_damping(state_dict, prefix)
        elif self.damping is not None and prefix + "U" in state_dict:
            none = state_dict[prefix + "U"].new_zeros((), dtype=torch.float32)
            state_dict.setdefault(prefix + "damping", none)
        beside = next(iter(loaded.values()), self.checksum)
        state_dict[prefix + "checksum"] = no_checksum(beside)
        if self.trained.is_meta:
            args[0]["assign_to_params_buffers"] = True
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in self._KEEP_FP32:  # tensors that were cast may have been put in their place
            tensor = getattr(self, name)
            if tensor is not None and tensor.is_floating_point() and tensor.dtype.itemsize < 4:
                self._buffers[name] = tensor.float()
        if self._before_meta and not self.trained.is_meta:
            self._come_back(loaded)
            came = {prefix + name for name in self._FIXED}
            args[2][:] = [name for name in args[2] if name not in came]
        if loaded and self.waits <= ({"rows", "cols"} <= loaded.keys()):
            self._note_loaded()

    def _take_damping(self, state_dict: Any, prefix: str) -> None:
        """Have the config say what the anchor in ``state_dict`` was damped with, if that does."""
        self.config.anchored = True
        own = self.core.new_tensor(self.config.anchor_damping)
        damping = state_dict.setdefault(prefix + "damping", own)
        if not damping.is_meta:
            self.config.anchor_damping = in_digits(damping)

    def check_loadable(
        self,
        state_dict: Any,
        prefix: str,
        base: nn.Module | None = None,
        *,
        whole: bool = False,
    ) -> None:
        """Raise ``ValueError`` if what ``state_dict`` holds under ``prefix`` must not be loaded.

        Args:
            state_dict: the tensors.
            prefix: of this layer's names in it.
            base: the layer the adapter sits on, to compare with the one it was trained on; None
                where ``state_dict`` brings the base's weight along.
            whole: whether every tensor has to be there.
        """
        state, layer = self._own(state_dict, prefix), prefix.rstrip(".")
        versions = {name: version(tensor) for name, tensor in state.items()}
        passes = _Checked(dict(state), versions, whole, base is not None)
        if not state or (self._passed and self._passed.covers(passes)):
            return
        self._passed = None
        if self.left is None and "U" in state and "left" not in state:
            self._check_plain(layer, state.get("damping"))
        verify_checksum(layer, _summed(state), self._settings(state))
        state.pop("checksum", None)
        if self.left is not None and "U" in state and "left" not in state:
            raise ValueError(
                f"{layer}: the file's U has no anchor, and the adapter's here has one, beside "
                "which it would mean something else: secura.unanchor(model) before loading"
            )
        expected = self.state_tensors()
        expected.pop("checksum")
        if self.U is not None and self.left is None:  # an anchor comes with the file
            expected |= {name: self.core for name in ("left", "right") if name in state}
        if "damping" not in state:  # of a file that was written before there was one
            expected.pop("damping", None)
        if not whole:
            expected = {name: tensor for name, tensor in expected.items() if name in state}
        own = weight = None
        if base is not None and self.config.check_base and "fingerprint" in state:
            weight = bases.weight_here(base)
            own = self.fingerprint if weight is None else fingerprint(weight)
            own = None if own.is_meta or self.waits else own
        check_state(layer, state, (self.out_features, self.in_features), own, expected)
        if own is not None and weight is not None:
            self._check_not_merged(layer, state, weight, own)
        self._passed = passes

    def _check_plain(self, layer: str, damping: Tensor | None) -> None:
        """Refuse an anchored Ũ without L and S, given the λ that came along with it."""
        if damping is not None and not damping.is_meta and bool(damping):
            raise ValueError(
                f"{layer}: the U that is loaded was trained with an anchor, and its L and S are "
                "not there: a sharded checkpoint loads what there is room for, so make the adapter "
                "anew and call secura.anchor(model) before it is loaded, as the run did at first"
            )

    def _check_not_merged(
        self, layer: str, state: dict[str, Tensor], weight: Tensor, own: Tensor | None
    ) -> None:
        """Refuse a weight that is the adapter's own plus what the adapter adds to it."""
        trained = {"A", "B"} if self.U is None else {"U"}
        if own is None or not trained | {"rows", "cols", "core"} <= state.keys():
            return
        saved = state["fingerprint"].to(own)
        gap = own - saved
        if gap.norm() <= _SAME * saved.norm():
            return
        here = weight.device
        a, b, u, left, right = (
            state[name].detach().to(here) if name in state else None
            for name in ("A", "B", "U", "left", "right")
        )
        core, rows, cols = (state[name].to(here) for name in ("core", "rows", "cols"))
        u = update(*factors(a, b, u, left, right), self.config.scaling) + core
        change = self._fingerprint_of_change(weight, u, rows, cols)
        alike = torch.cosine_similarity(gap.flatten().double(), change.flatten().double(), dim=0)
        if alike > _ALIKE:
            raise ValueError(
                f"{layer}: the base weight holds what this adapter adds already: it was merged "
                "into this model, and would act twice. Load it on the model it was trained on, or "
                "use it all the same with check_base=False in the config (--no_check_base on the "
                "command line)"
            )

    def _fingerprint_of_change(
        self, weight: Tensor, u: Tensor, rows: Tensor, cols: Tensor
    ) -> Tensor:
        """The fingerprint ``[8, 8]`` of ``W[:, cols] u W[rows]``."""
        return fingerprint_of_product(
            weight.index_select(1, cols).to(u.dtype) @ u, weight.index_select(0, rows)
        )

    def state_tensors(self) -> dict[str, Tensor]:
        """The tensors that this adapter saves, by their names in :attr:`STATE`."""
        own = {name: getattr(self, name) for name in self.STATE}
        return {name: tensor for name, tensor in own.items() if tensor is not None}

    def _own(self, state_dict: Any, prefix: str) -> dict[str, Tensor]:
        own = {n: state_dict[prefix + n] for n in self.STATE if prefix + n in state_dict}
        if self.waits:  # then torch's set_model_state_dict hands back what is here, still empty
            own = {name: value for name, value in own.items() if value is not getattr(self, name)}
        return own


def _summed(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of an adapter's tensors that its sum counts: λ where there is an anchor alone."""
    plain = "left" not in own
    return {name: tensor for name, tensor in own.items() if not (plain and name == "damping")}


def in_digits(number: Tensor) -> float:
    """A 0-dim fp32 tensor as the number that was written: 0.01, where fp32 has 0.00999999978."""
    return float(f"{float(number):.7g}")


def factors(
    a: Tensor | None,
    b: Tensor | None,
    u: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Two factors of a core ``[m, m]``, the second None where the first is the core itself.

    ``(A, B)`` of ``core="ab"``; ``(U, None)`` of ``core="u"``, with an anchor ``(left U, right)``.
    """
    if u is None:
        assert a is not None
        return a, b
    return (u, None) if left is None else (update(left, u, 1.0), right)


__all__ = ["AdapterState", "factors", "in_digits"]
