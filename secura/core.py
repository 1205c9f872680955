"""The core of an adapter: what of it is trained, what was folded, and its anchor."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from secura_kernels.layer import update

from . import bases
from .choosing import choose_late
from .sharding import gathered, put
from .state import AdapterState, factors


class WeightVersion(tuple[int, int, int]):
    """What :func:`secura.bases.mark` says of a weight; a copy matches none.

    Keeps a weak reference to the storage, so that no new storage gets its number while this object
    lives; without a storage, one to the weight.
    """

    _storage: StorageWeakRef | None = None
    _weight: weakref.ref[Tensor] | None = None

    @classmethod
    def of(cls, base: nn.Module) -> WeightVersion | None:
        """That of the base's weight as it is now; None where it has no mark."""
        mark = bases.mark(base)
        if mark is None:
            return None
        found, weight = cls(mark), base.weight
        assert isinstance(weight, Tensor)
        if mark == bases.UNKNOWN:
            return found
        if mark[2]:
            found._storage = StorageWeakRef(bases.innermost(weight).untyped_storage())
        else:
            found._weight = weakref.ref(weight)
        return found

    def is_gone(self) -> bool:
        """Return whether the weight was freed, so that a new one may have its number."""
        return self._weight is not None and self._weight() is None

    def __reduce__(self) -> tuple[Any, ...]:
        return WeightVersion, (bases.UNKNOWN,)


OF_NO_WEIGHT = WeightVersion(bases.UNKNOWN)


class Core(AdapterState):
    """``U_acc + s · U [m, m]`` between C and R, whatever they are columns and rows of.

    :class:`secura.cabr.CABR` has one on a linear layer, :class:`secura.experts.Experts` one for
    each weight of a stack.

    Attributes:
        folds: whether it was folded in this process, or :class:`secura.FoldCallback` will.
    """

    folds = False
    _derived_from: WeightVersion | None = None

    def factors(self) -> tuple[Tensor, Tensor | None]:
        """``(A, B)``, ``(U, None)``, or with an anchor ``(left · U, right)``."""
        own: Any = self._parameters
        if "A" in own and "B" in own:
            return own["A"], own["B"]
        fixed = self._buffers
        return factors(self.A, self.B, self.U, fixed["left"], fixed["right"])

    def update(self) -> Tensor:
        """The trained core times s, ``[m, m]``, fp32 or wider, autocast or not."""
        return update(*self.factors(), self.scaling)

    def whole_factors(self) -> tuple[Tensor, Tensor | None]:
        """:meth:`factors`, gathered where the parameters are sharded.

        Raises:
            RuntimeError: they are parts of FSDP1's, outside of a forward.
        """
        a, b, u = (gathered(tensor) for tensor in (self.A, self.B, self.U))
        if any(part is not None and part.dim() != self.core.dim() for part in (a, b, u)):
            raise RuntimeError(
                f"{self.name}: FSDP1 holds a part of the adapter's parameters here: call "
                "secura.fold, secura.anchor or secura.unanchor with the whole model"
            )
        return factors(a, b, u, self.left, self.right)

    def whole_update(self) -> Tensor:
        """:meth:`update`, gathered where the parameters are sharded."""
        return update(*self.whole_factors(), self.scaling)

    @torch.no_grad()
    def fold_core(self) -> None:
        """U_acc ← U_acc + s · A B, B ← 0: the additive weight stays, W is not touched.

        With ``core="u"`` it is s · U that is added, and U that starts at 0 again. Where parameters
        are sharded, every process has to call this: it gathers them.

        Raises:
            RuntimeError: U_acc was cast to 16 bits, or B (U) is made of other tensors.
        """
        self.check_written()
        if self.core.dtype.itemsize < 4:
            raise RuntimeError(
                f"{self.name}: U_acc was cast to {self.core.dtype}, in which folds would be lost: "
                "FSDP1's mixed precision casts buffers, so give its MixedPrecision "
                "buffer_dtype=torch.float32"
            )
        self.folds = True
        self.core.add_(self.whole_update())
        self.trained.zero_()
        self.note_core(folded=True)  # most likely, and looking would wait for the device

    def check_written(self) -> None:
        """Raise ``RuntimeError`` where what would be written into B, or U, is lost."""
        name = "B" if self.U is None else "U"
        if bases.is_computed(self, name):
            raise RuntimeError(
                f"{self.name}: {name} is made of other tensors (a parametrization, pruning), so "
                "nothing can be written to it: take that off first, "
                f"torch.nn.utils.parametrize.remove_parametrizations(adapter, {name!r}) say"
            )

    def take_fixed(self, other: Core) -> None:
        """Take over what is not trained of ``other``, on the same weight: core, anchor, scaling."""
        self.scaling = other.scaling
        if other.waits:  # for the weight, after which both choose the same
            return
        for name in self._FIXED:
            tensor = getattr(other, name)
            self._buffers[name] = None if tensor is None else tensor.clone()
        self._note_loaded()

    @torch.no_grad()
    def set_anchor(self, left: Tensor, right: Tensor, u: Tensor, damping: float) -> None:
        """Take over κ L, S and Ũ, each ``[m, m]``, and λ of :func:`secura.anchor`."""
        assert self.U is not None
        self.check_written()
        self.left, self.right = left.to(self.core), right.to(self.core)
        self.damping = self.core.new_tensor(damping)
        put(self, "U", u)
        self.config.anchored, self.config.anchor_damping = True, damping

    @torch.no_grad()
    def drop_anchor(self) -> None:
        """``U ← κ L Ũ S``: the same core in plain coordinates."""
        self.check_written()
        whole = update(*factors(None, None, gathered(self.U), self.left, self.right), 1.0)
        self.left = self.right = None
        self.damping = self.core.new_zeros(())
        put(self, "U", whole)
        self.config.anchored = False

    def extra_repr(self) -> str:
        """The adapter in one line."""
        config = self.config
        inner = "core='u'" if self.A is None else f"inner_r={self.A.shape[-1]}"
        inner += "" if self.left is None else ", anchored"
        parts = [f"r={self.rows.shape[-1]}", inner, f"norm={config.norm!r}"]
        if config.norm != "none":
            parts.append(f"form={config.norm_form or 'default'}")
        return ", ".join([*parts, f"scaling={self.scaling:g}", f"bias={self.bias is not None}"])

    def refresh(self, base: Any, weight: Any = None) -> None:
        """Bring up to date what follows from the base, whose frozen ``weight`` may be given."""
        if self.waits:
            choose_late(self, base)
        if self.assigned:
            self.check_assigned(base)
        if not torch.compiler.is_compiling():  # which cannot ask for a version
            core: Any = self._buffers["core"]
            # version(core), without the call
            if self._core_version != (0 if core.is_inference() else core._version):
                self.note_core()
            if (known := self._derived_from) is not None:
                now: Any = None
                if type(weight) is not Tensor:
                    now = bases.mark(base)
                elif not weight.is_inference():
                    # bases.mark(base), without the calls
                    now = weight._version, weight.data_ptr(), weight.untyped_storage()._cdata
                if now is not None and (now != known or now == bases.UNKNOWN or known.is_gone()):
                    self.stale = True
        if self.stale:
            self.derive(base)

    def derive(self, base: Any) -> None:
        """Form what follows from the base weight and the indices but is not worth saving."""
        raise NotImplementedError

    def delta_of(self, base: Any) -> Tensor:
        """``ΔW``, as the weight's shape is, fp32, before any norm."""
        raise NotImplementedError

    def effective_of(self, base: Any, *, allow_inexact: bool = False) -> Tensor:
        """The weight with which the base computes what the adapter makes of it."""
        raise NotImplementedError


__all__ = ["OF_NO_WEIGHT", "Core", "WeightVersion"]
