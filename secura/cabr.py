"""CABR: the state of one adapted layer and what it computes, whichever module wraps it."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from secura_kernels import (
    Layer,
    Restrain,
    effective_weight,
    important_channels,
    secura_add,
    secura_linear,
    with_norms,
)
from secura_kernels.api import additive_product
from secura_kernels.cur import check_fits
from secura_kernels.dispatch import without_autocast
from secura_kernels.held import Held
from secura_kernels.ops.project.op import project
from secura_kernels.shared import stream_of

from . import bases, products, tensor_parallel
from .choosing import choose
from .config import AdapterConfig
from .core import OF_NO_WEIGHT, Core, WeightVersion
from .integrity import FINGERPRINT_SIZE, no_checksum, version
from .sharding import on_rank_0_alone


class CABR(Core):
    """ΔW = s · C A B R on one frozen linear layer, with S-MagNorm (docs/design.md).

    The module holds no weight of the base: methods take the base layer. C and R are gathered from
    it, and z = x Rᵀ from its output. On a base whose weight is on the meta device, rows, columns
    and A are chosen when ``load_state_dict`` brings it, else at the first forward.

    Args:
        config: the adapter's settings.
        base: the linear layer; read, never written.
        r: CUR rank m of this layer; None takes the config's.
        dtype: of A, B and bias. ``core`` stays fp32 whatever the module is cast to.

    Attributes:
        A: ``[m, r]`` parameter, or None with ``core="u"``.
        B: ``[r, m]`` parameter, 0 at first, or None with ``core="u"``.
        U: ``[m, m]`` parameter, 0 at first, or None with ``core="ab"``.
        left: ``[m, m]`` fp32 or None, κ L of an anchor: the core is then left · U · right.
        right: ``[m, m]`` fp32 or None, S of an anchor.
        damping: 0-dim fp32, λ of an anchor, 0 without one; None with ``core="ab"``.
        bias: ``[N]`` parameter, or None.
        rows: ``[m]`` int64, R = W[rows].
        cols: ``[m]`` int64, C = W[:, cols].
        core: ``[m, m]`` fp32, U_acc, what was folded.
        fingerprint: ``[8, 8]`` fp32, of the base weight.

    Raises:
        TypeError: for a base that is no linear layer.
        ValueError: for a rank that does not fit, or a weight that cannot be decomposed.
    """

    columns: Tensor | None
    gram: Tensor | None
    base_norms: Tensor | None
    important: Tensor | None
    here: Tensor | None
    r_here: Tensor | None
    kept_rows: Tensor | None
    wants_whole = _base_trained = False
    held: Held | None = None

    def __init__(
        self,
        config: AdapterConfig,
        base: nn.Module,
        *,
        r: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        bases.check_linear(base)
        bases.check_at_hand(base)
        m = config.r if r is None else r
        inner = config.inner_r or 2 * m
        self.config = config
        self.scaling = float(config.scaling)
        self.out_features, self.in_features = bases.shape(base)
        check_fits(m, self.out_features, self.in_features)
        sent, later = on_rank_0_alone(), bases.comes_later(base)
        stored = next(chain(base.parameters(), base.buffers()))
        here: Any = {"device": "cpu" if sent and later else stored.device}
        wide = {"dtype": torch.float32, **here}
        self.A = self.B = self.U = None
        if config.core == "u":
            self.U = nn.Parameter(torch.empty(m, m, dtype=dtype, **here))
        else:
            self.A = nn.Parameter(torch.empty(m, inner, dtype=dtype, **here))
            self.B = nn.Parameter(torch.empty(inner, m, dtype=dtype, **here))
        bias = torch.empty(self.out_features, dtype=dtype, **here)
        self.bias = nn.Parameter(bias) if config.train_bias else None
        for name in ("rows", "cols"):
            self.register_buffer(name, torch.empty(m, dtype=torch.int64, **here))
        self.register_buffer("core", torch.empty(m, m, **wide))
        for name in self.ANCHOR:
            self.register_buffer(name, None)
        if config.core == "u":
            self.damping = torch.zeros((), **wide)
        self.register_buffer("fingerprint", torch.empty(FINGERPRINT_SIZE, FINGERPRINT_SIZE, **wide))
        self.register_buffer("checksum", no_checksum(stored))
        self.folded, self._core_version = False, 0
        self._rounding_seed: int | None = None
        for name in ("columns", "gram", "base_norms", "important", "here", "r_here", "kept_rows"):
            self.register_buffer(name, None, persistent=False)
        self.waits = later and not sent
        if not self.waits:
            choose(self, base)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """The adapted layer's output ``[..., N]`` for ``x [..., K]``.

        Raises:
            TypeError: for integer or complex inputs, or a dtype that is not the weight's.
            ValueError: for another last dimension, a base weight that is not at hand, or with
                ``norm="weight"`` a dense base that is more than a frozen product.
        """
        weight = products.product_weight(base)
        if weight is None:
            return self.beside(base, x)
        if x.dtype != weight.dtype or x.shape[-1] != self.in_features:
            self._check_input(weight, x)
        self.refresh(base, weight)
        layer = self.kernel_layer(base, weight, self.held and self._holding(weight))
        mask = self.dropout_mask(x) if self.config.dropout else None
        return secura_linear(x, layer, *self.factors(), delta_bias=self.bias, z_scale=mask)

    def beside(self, base: nn.Module, x: Tensor, y0: Tensor | None = None) -> Tensor:
        """The layer where the base is more than a frozen dense product: it makes y0 itself.

        ``y0 [..., N]`` is what it made of ``x [..., K]`` already, if it did.
        """
        if bases.is_split(base):
            return tensor_parallel.forward(self, base, x, y0)
        dense = bases.dense_weight(base)
        makes = not self.config.replaces_product and not products.multiplies_input(base)
        self._check_input(None if makes and products.may_cast(base) else dense, x)
        if y0 is None and bases.is_computed(base) and not self.config.replaces_product:
            y0 = products.base_output(base, x, self.name)  # which may be what makes the weight
        self.refresh_beside(base)
        trained: Any = {"delta_bias": self.bias, "z_scale": self.dropout_mask(x)}
        if self.columns is None and bases.is_elsewhere(base):
            self._keep_columns(base)
        weight = bases.weight(base, values=False) if self.columns is None else None
        held = self.held and self._holding(bases.weight_between(base))
        if not self.config.replaces_product:
            y0 = products.base_output(base, x, self.name) if y0 is None else y0
            layer = self.kernel_layer(base, weight, held)
            if self._base_trained and torch.is_grad_enabled():
                layer = layer._replace(**products.trained_tensors(base, self.name))
            return secura_add(y0, layer, *self.factors(), z=self.own_z(base, x, y0), **trained)
        if dense is not None and (skipped := products.why_not_product(base)):
            if not products.only_places(base):
                raise ValueError(
                    f"{self.name}: norm='weight' and stochastic_rounding replace the layer's "
                    f"product, so {skipped} would be skipped: use norm='channel' without rounding"
                )
            x = x.to(dense.device)
        layer = self.kernel_layer(base, bases.weight(base, values=False), held)
        return secura_linear(x, layer, *self.factors(), **trained)

    def own_z(self, base: nn.Module, x: Tensor, y0: Tensor) -> Tensor | None:
        """``z = x Rᵀ [..., m]`` in y0's dtype, or None where it is to be read off ``y0 [..., N]``.

        A y0 in 16 bits has lost as many bits of z as its bias is larger, and that of a quantised
        base may have been computed in 16; where something may have changed x on its way into the
        base, y0 alone knows.
        """
        if getattr(base, "bias", None) is None or not products.multiplies_input(base):
            return None
        r, dense = self.kept_rows, bases.dense_weight(base)
        if dense is not None and y0.dtype.itemsize > 2:
            return None
        if r is None:
            if dense is None or bases.is_elsewhere(base):
                r = self._keep_rows(bases.weight(base))
            elif dense.is_meta:  # offloaded between its forwards
                return None
            else:
                r = bases.weight(base, values=False).index_select(0, self.rows)
        with torch.no_grad(), without_autocast(r.device.type):
            return x.to(r.device, y0.dtype) @ r.to(y0.dtype).t()

    def core_and_update(self, base: Any) -> Tensor:
        """``U_acc + s · A B [m, m]``, fp32 or wider, for a forward."""
        self.refresh_beside(base)
        return self.update() + self.core if self.folded else self.update()

    def refresh_beside(self, base: nn.Module) -> None:
        """Compute again what follows from the base weight, if that changed.

        In every pass if the base is trained, or its weight is computed from other tensors, whose
        version it does not show.
        """
        if torch.is_grad_enabled():  # without, FSDP1 shows frozen weights as if they were trained
            self._base_trained = products.is_trained(base)
        changes = self._base_trained or bases.is_computed(base)
        self.stale |= changes
        self.refresh(base)
        self.stale |= changes

    def _holding(self, weight: Tensor | None) -> Held | None:
        """What is held over micro-batches, in a pass that a backward pass may follow.

        ``weight`` is W where it stays what it is from one pass to the next.
        """
        held = self.held
        assert held is not None
        if torch.compiler.is_compiling():
            return None
        whole = DistributedDataParallel._active_ddp_module
        if whole is not None and whole.static_graph:
            raise ValueError(
                "static_graph of DistributedDataParallel takes a gradient that is held for one "
                "that never comes: leave out static_graph, or secura.accumulate"
            )
        if not torch.is_grad_enabled():
            return None
        if is_in_torch_dispatch_mode() or getattr(self, "_is_replica", False):
            return None
        if self.core.is_cuda and not held.in_graphs and torch.cuda.is_current_stream_capturing():
            return None
        tensors = (self.A, self.B, self.U, self.core, self.left, self.right)
        values = self.scaling, stream_of(self.core), *map(_state, (*tensors, weight))
        return held.of(tensors, values)

    def kernel_layer(
        self, base: nn.Module, weight: Tensor | None, held: Held | None = None
    ) -> Layer:
        """What of the adapted layer is not trained; ``weight`` is W, or None with ``columns``."""
        config = self.config
        own: Any = self._buffers  # an attribute of a module takes a microsecond: there are many
        return Layer(
            weight=weight,
            bias=bases.bias(base),
            rows=own["rows"],
            cols=own["cols"],
            options=config.norm_options,
            scaling=self.scaling,
            core=own["core"] if self.folded else None,
            core_is_base=config.norm_reference == "folded",
            gram=own["gram"],
            base_norms=own["base_norms"],
            restrain=self._restrain() if config.restrain else None,
            save=config.norm_save,
            columns=own["columns"],
            rounding_seed=self._rounding_seed,
            shares_input=config.share_inputs,
            held=held,
        )

    def additive_product(self, base: nn.Module) -> tuple[Tensor, Tensor | None]:
        """``(Q [N, m], base_scale [N] or None)`` of ``none`` and ``channel``."""
        bases.check_whole(base)
        self.refresh_beside(base)
        layer = self.kernel_layer(base, bases.weight(base, values=False))
        return additive_product(layer, *self.whole_factors())

    def dropout_mask(self, x: Tensor) -> Tensor | None:
        """``[..., m]`` of 0 and 1/(1 − p) while training with dropout, else None."""
        if not (self.training and self.config.dropout):
            return None
        ones = x.new_ones(*x.shape[:-1], self.rows.numel())
        return nn.functional.dropout(ones, self.config.dropout)

    @torch.no_grad()
    def delta_of(self, base: nn.Module) -> Tensor:
        """``ΔW = C (U_acc + s · A B) R  [N, K]``, fp32, before any norm."""
        bases.check_whole(base)
        weight = bases.weight(base)
        u = self.whole_update() + self.core
        p = project(weight, self.cols, u, u.dtype, None)
        with without_autocast(weight.device.type):
            return p @ weight.index_select(0, self.rows).to(p.dtype)

    @torch.no_grad()
    def effective_of(self, base: nn.Module, *, allow_inexact: bool = False) -> Tensor:
        """The weight ``[N, K]``, in W's dtype, with which a plain layer computes the same.

        Args:
            base: the linear layer.
            allow_inexact: for ``norm="activation"``, return W + ΔW as the released code merges.

        Raises:
            ValueError: for ``norm="activation"`` unless ``allow_inexact``.
        """
        bases.check_whole(base)
        if self.config.norm == "activation":
            if not (allow_inexact or self.config.allow_inexact_merge):
                raise ValueError(
                    "norm='activation' is not linear in x, so no merged weight is exact: keep the "
                    "adapter, or merge W + ΔW, as the released code does, with "
                    "allow_inexact_merge=True in its config (secura.SECURALinear's methods take "
                    "allow_inexact=True too)"
                )
            weight = bases.weight(base)
            return (weight + self.delta_of(base)).to(weight.dtype)
        self.refresh_beside(base)
        return effective_weight(self.kernel_layer(base, bases.weight(base)), *self.whole_factors())

    def _restrain(self) -> Restrain | None:
        config, important = self.config, self.important
        if important is None:
            return None
        return Restrain(
            important, config.restrain_percent, config.restrain_edge, config.restrain_decay
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _keep_columns(self, base: nn.Module) -> None:
        """Keep C of a weight that is only whole within its own layer's forward."""
        self.columns = bases.weight(base).index_select(1, self.cols)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _keep_rows(self, weight: Tensor) -> Tensor:
        """Keep R of ``weight [N, K]``, which is not at hand in every forward."""
        self.kept_rows = weight.index_select(0, self.rows)
        return self.kept_rows

    @torch.inference_mode(False)
    @torch.no_grad()
    def derive(self, base: nn.Module) -> None:
        """Form what follows from the base weight and the indices but is not worth saving."""
        config, split = self.config, bases.is_split(base)
        if split:
            tensor_parallel.check(self, base)
        if config.stochastic_rounding:  # the same wherever the adapter is, another in each layer
            own = torch.cat((self.rows, self.cols))
            places = torch.arange(1, len(own) + 1, device=own.device)
            self._rounding_seed = config.seed + int((own * places).sum())
        needs_columns = split or config.keep_columns or bases.dense_weight(base) is None
        if config.norm != "channel" and not config.restrain and not needs_columns:
            self.columns, self.kept_rows, self.stale = None, None, False
            return
        # a graph asks for no version, so the next pass outside of one forms these anew
        compiling = torch.compiler.is_compiling()
        self._derived_from = OF_NO_WEIGHT if compiling else WeightVersion.of(base)
        weight = bases.weight(base, values=False)
        columns = weight.index_select(1, self.cols) if needs_columns else None
        if config.restrain:
            self.important = important_channels(weight, self.rows.numel())
        if config.norm == "channel":
            layer = with_norms(self.kernel_layer(base, weight)._replace(columns=columns))
            self.gram, self.base_norms = layer.gram, layer.base_norms
        self.columns, self.kept_rows = columns, None
        reads_z = not config.replaces_product and products.multiplies_input(base)
        if bases.dense_weight(base) is None and bases.bias(base) is not None and reads_z:
            self._keep_rows(weight)
        if split:
            tensor_parallel.keep_rows(self, base, weight)
        self.stale = False  # last: another thread may be at a forward

    def _check_input(self, weight: Tensor | None, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(f"SECURA layers take floating inputs, not {x.dtype}")
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"the input's last dimension is {x.shape[-1]}, the layer's in_features "
                f"{self.in_features}"
            )
        if weight is None or weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
            return
        raise TypeError(
            f"the input is {x.dtype} and the base weight {weight.dtype}: cast one of them, or run "
            "under torch.autocast"
        )


def _state(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """What tells that a tensor was written to, given other numbers (``.data``) or frozen."""
    if tensor is None:
        return None
    return version(tensor), tensor.untyped_storage()._cdata, tensor.requires_grad


__all__ = ["CABR"]
