# Copyright 2026-present the HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from __future__ import annotations

import math
import warnings
from typing import Any, Optional

import torch
from torch import nn

from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge

from .config import SecuraConfig


class SecuraLayer(BaseTunerLayer):
    # All names of layers that may contain (trainable) adapter weights
    adapter_layer_names = ("secura_A", "secura_B", "secura_U")
    # All names of other parameters that may contain adapter-related parameters
    other_param_names = (
        "r",
        "scaling",
        "norm",
        "norm_scale",
        "secura_dropout",
        "secura_rows",
        "secura_cols",
        "secura_w_norm",
    )

    def __init__(self, base_layer: nn.Module, **kwargs) -> None:
        self.base_layer = base_layer
        self.r = {}
        self.scaling = {}
        self.norm = {}
        self.norm_scale = {}
        self.secura_dropout = nn.ModuleDict({})
        self.secura_A = nn.ParameterDict({})
        self.secura_B = nn.ParameterDict({})
        self.secura_U = nn.ParameterDict({})
        # The indices are saved: another dtype of the base weight could lead to another choice.
        self.secura_rows = BufferDict({}, persistent=True)
        self.secura_cols = BufferDict({}, persistent=True)
        # The norms of the base weight's rows, in float32; they follow from it and are not saved.
        self.secura_w_norm = BufferDict({}, persistent=False)
        # Mark the weight as unmerged
        self._disable_adapters = False
        self.merged_adapters = []
        # The base weight as it was before anything was merged into it
        self._unmerged_weight: Optional[torch.Tensor] = None
        self.kwargs = kwargs

        base_layer = self.get_base_layer()
        if not isinstance(base_layer, nn.Linear):
            raise TypeError(f"Unsupported layer type {type(base_layer)}")
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

    def update_layer(self, adapter_name: str, r: int, config: SecuraConfig, **kwargs: Any) -> None:
        """Internal function to create a SECURA adapter

        Args:
            adapter_name (`str`): Name for the adapter to add.
            r (`int`): CUR rank of the added adapter.
            config (`SecuraConfig`): The adapter configuration for this layer.
        """
        smallest = min(self.in_features, self.out_features)
        if not 0 < r <= smallest:
            raise ValueError(
                f"`r` should be a positive integer of at most {smallest}, the smaller side of the weight, but the "
                f"value passed is {r}"
            )
        inner_r = config.inner_r or min(2 * r, self.in_features)
        if not 0 < inner_r <= self.in_features:
            raise ValueError(f"`inner_r` ({inner_r}) must be between 1 and in_features ({self.in_features})")
        if self.merged:
            raise ValueError("An adapter is merged, so the original weight is not at hand: unmerge it first.")

        self.r[adapter_name] = r
        self.scaling[adapter_name] = config.scaling
        self.norm[adapter_name] = config.norm
        self.norm_scale[adapter_name] = config.norm_scale
        dropout = nn.Dropout(p=config.secura_dropout) if config.secura_dropout > 0.0 else nn.Identity()
        self.secura_dropout.update(nn.ModuleDict({adapter_name: dropout}))

        weight = self.get_base_layer().weight.data
        self.secura_rows[adapter_name] = self._least_important(weight, r, dim=1)
        self.secura_cols[adapter_name] = self._least_important(weight, r, dim=0)
        if config.core == "u":
            self.secura_U[adapter_name] = nn.Parameter(torch.empty(r, r))
        else:
            self.secura_A[adapter_name] = nn.Parameter(torch.empty(r, inner_r))
            self.secura_B[adapter_name] = nn.Parameter(torch.empty(inner_r, r))
        self.reset_secura_parameters(adapter_name, config.init_weights)

        # Move new weights to device
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if config.norm == "channel":
            self.secura_w_norm[adapter_name] = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @staticmethod
    def _least_important(weight: torch.Tensor, r: int, dim: int) -> torch.Tensor:
        """The indices of the `r` smallest norms over `dim`, in ascending order.

        Rows and columns that are zero throughout could carry nothing, so they come last.
        """
        norms = torch.linalg.vector_norm(weight, dim=dim, dtype=torch.float32)
        norms = norms.masked_fill(norms == 0, math.inf)
        return norms.sort(stable=True).indices[:r].sort().values

    @torch.no_grad()
    def reset_secura_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        if adapter_name in self.secura_U:
            zeroed = self.secura_U[adapter_name]
        elif adapter_name in self.secura_B:
            zeroed, A = self.secura_B[adapter_name], self.secura_A[adapter_name]
            # The authors start A from the SVD of W, as U[:r] @ S @ V[:, :inner_r].T, which is this block of W.
            if not A.is_meta:
                A.copy_(self.get_base_layer().weight[: A.shape[0], : A.shape[1]])
        else:
            return
        if init_weights:
            nn.init.zeros_(zeroed)
        else:
            nn.init.normal_(zeroed, std=zeroed.shape[0] ** -0.5)

    def _get_original_weight(self) -> torch.Tensor:
        """The base weight without what is merged into it."""
        weight = self.get_base_layer().weight.data
        return weight if self._unmerged_weight is None else self._unmerged_weight.to(weight)

    def _get_projection(self, adapter: str) -> torch.Tensor:
        """P of `delta_weight = P @ R`, of shape (out_features, r)."""
        if adapter in self.secura_U:
            core = self.secura_U[adapter]
        else:
            core = self.secura_A[adapter] @ self.secura_B[adapter]
        columns = self._get_original_weight()[:, self.secura_cols[adapter]]
        projection = columns.to(core.dtype) @ (self.scaling[adapter] * core)
        if self.norm[adapter] == "channel":
            projection = projection / self._get_gain(adapter, projection).to(projection.dtype)
        return projection

    @torch.no_grad()
    def _get_gain(self, adapter: str, projection: torch.Tensor) -> torch.Tensor:
        """What each output channel's change is divided by, of shape (out_features, 1).

        It depends on the ratio of the norms of the channel's change and of its weight, and is a constant to autograd.
        The norms of `P @ R` follow from `R @ R.T`, so the change itself is not formed.
        """
        # .float() alone would be undone by autocast, which runs matrix products in half precision
        with torch.autocast(projection.device.type, enabled=False):
            projection = projection.float()
            rows = self._get_original_weight()[self.secura_rows[adapter]].float()
            squares = (projection @ (rows @ rows.T) * projection).sum(dim=1)
        change = squares.clamp_min(0).sqrt() / (self.secura_w_norm[adapter].float() + 1e-10)
        return (2 - torch.tanh(self.norm_scale[adapter] * change / 2)).unsqueeze(1)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """
        Compute the delta weight for the given adapter, its norm included.

        Args:
            adapter (`str`):
                The name of the adapter for which the delta weight should be computed.
        """
        if adapter not in self.secura_rows:
            raise ValueError(f"Adapter {adapter} not found.")
        projection = self._get_projection(adapter)
        rows = self._get_original_weight()[self.secura_rows[adapter]]
        return projection @ rows.to(projection.dtype)


class SecuraLinear(nn.Module, SecuraLayer):
    """
    SECURA implemented in a dense layer.

    The change of the weight is `C @ U @ R`, of which `C` holds columns and `R` rows of the weight itself. So `x @ R.T`
    is already there in the base layer's output, in the columns of the same indices: it is read from there, and the
    adapter needs neither `x` nor a product with `R`.
    """

    def __init__(self, base_layer, adapter_name: str, config: SecuraConfig, r: int, **kwargs) -> None:
        super().__init__()
        SecuraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, config=config, **kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """
        Merge the active adapter weights into the base weights

        The base weight as it was is kept until `unmerge`: the adapters are made of its rows and columns.

        Args:
            safe_merge (`bool`, *optional*):
                If `True`, check the merged weights for NaNs before they take the place of the base weights. Defaults
                to `False`.
            adapter_names (`List[str]`, *optional*):
                The list of adapter names that should be merged. If `None`, all active adapters will be merged.
                Defaults to `None`.
        """
        adapter_names = check_adapters_to_merge(self, adapter_names)
        base_layer = self.get_base_layer()
        for active_adapter in adapter_names:
            if active_adapter not in self.secura_rows:
                continue
            orig_weight = base_layer.weight.data
            delta_weight = self.get_delta_weight(active_adapter)
            weight = (orig_weight.to(delta_weight.dtype) + delta_weight).to(orig_weight.dtype)
            if safe_merge and not torch.isfinite(weight).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {active_adapter} seems to be broken"
                )
            if self._unmerged_weight is None:
                self._unmerged_weight = orig_weight
            base_layer.weight.data = weight
            self.merged_adapters.append(active_adapter)

    def unmerge(self) -> None:
        """
        This method unmerges all merged adapter layers from the base weights, which are bit for bit as before.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        self.get_base_layer().weight.data = self._get_original_weight()
        self._unmerged_weight = None
        self.merged_adapters.clear()

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)

        base_result = result = self.base_layer(x, *args, **kwargs)
        bias = self.get_base_layer().bias
        for active_adapter in self.active_adapters:
            if active_adapter not in self.secura_rows:
                continue
            rows = self.secura_rows[active_adapter]
            z = base_result[..., rows]  # x @ R.T, and the bias of those channels
            if bias is not None:
                z = z - bias[rows]
            projection = self._get_projection(active_adapter)
            z = self.secura_dropout[active_adapter](z).to(projection.dtype)
            result = result + z @ projection.T
        return result.to(base_result.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def __repr__(self) -> str:
        rep = super().__repr__()
        return "secura." + rep
