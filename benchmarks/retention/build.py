"""Makes the model a cell trains: the base with the method's adapter, anchored or whitened."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import secura
from benchmarks.retention.cells import TARGETS, Cell
from benchmarks.retention.material import Material
from benchmarks.retention.methods import Method
from benchmarks.retention.rows import causal
from benchmarks.retention.score import autocast
from secura.layers import evaluating, secura_layers

_WHITENING_DAMPING = 1e-2


def build(
    cell: Cell,
    method: Method,
    material: Material,
    before: dict[str, Tensor],
    resumed: dict[str, Tensor] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The model with what the parent cell trained, and what the anchoring pass says of itself.

    Args:
        cell: what is trained.
        method: its method.
        material: of its stage.
        before: the adapter's tensors at the parent's end, see :func:`adapter_state`; empty for
            the first task.
        resumed: the adapter's tensors at a checkpoint of this cell, which then are all it takes.
    """
    model = material.fresh_model()
    torch.manual_seed(cell.seed)
    config = method.make_config(cell.targets, cell.seed)
    if config is None:
        model.requires_grad_(True)
    else:
        model = peft.get_peft_model(model, config)
    report: dict[str, Any] = {}
    if method.whiten:
        earlier = [_rows_of(task, cell, material) for task in cell.tasks[:-1]]
        sets = [material.samples(cell.seed), *earlier]
        found = [_covariances(model, texts, material.bf16) for texts in sets]
        if before and resumed is None:
            whiten(model, found[:-1])
            load_adapter(model, before)
            fold_lora(model)
        whiten(model, found)
        if resumed is not None:
            load_adapter(model, resumed)
    elif resumed is not None:
        load_adapter(model, resumed)
    elif before:
        load_adapter(model, before)
        if method.fold == "task":
            secura.fold(model)
        if method.anchor:
            texts = _rows_of(cell.tasks[-2], cell, material)
            report = _anchor(model, method, texts, add=True)
    elif method.anchor:
        report = _anchor(model, method, _anchor_texts(method, material, cell.seed))
    return model, report


def _rows_of(task: str, cell: Cell, material: Material) -> list[Tensor]:
    """The first rows `[T]` that a task trains on, as many as there are samples."""
    rows = [row for batch in material.batches(task, cell.seed, cell.steps) for row in batch]
    texts = rows[: material.settings.samples]
    return [torch.tensor([*row.prompt, *row.completions[0]]) for row in texts]


def _anchor_texts(method: Method, material: Material, seed: int) -> list[Tensor]:
    return material.samples(seed) if method.anchor == "self" else material.anchor_texts()


def _anchor(model: nn.Module, method: Method, texts: list[Tensor], **more: Any) -> dict[str, Any]:
    report = secura.anchor(
        model,
        texts,
        damping=method.damping,
        length=max(len(text) for text in texts),
        tokens=sum(len(text) for text in texts),
        **more,
    )
    if method.kappa == "layer":
        _move_alike(model)
    if method.sides != "both":
        _keep_side(model, method.sides)
    return {"layers": report.layers, "tokens": report.tokens, "unseen": len(report.unseen)}


@torch.no_grad()
def _move_alike(model: nn.Module) -> None:
    """Scales every anchor so that a step moves its layer's weight as far as one on U does."""
    for layer in secura_layers(model).values():
        for adapter in layer.acting_adapters():
            weight = layer.get_base_layer().weight
            c, r = weight[:, adapter.cols], weight[adapter.rows]
            alike = c.norm() / (c @ adapter.left).norm() * r.norm() / (adapter.right @ r).norm()
            adapter.left.mul_(alike)
            adapter.U.div_(alike)


@torch.no_grad()
def _keep_side(model: nn.Module, side: str) -> None:
    """Anchors by the inputs' statistics alone (``"in"``), or by the outputs' (``"out"``)."""
    for layer in secura_layers(model).values():
        for adapter in layer.acting_adapters():
            weight = layer.get_base_layer().weight
            eye = torch.eye(len(adapter.rows), device=weight.device)
            damping = adapter.config.anchor_damping
            if side == "in":
                r = weight[adapter.rows]
                right = adapter.right * (r.norm() / (adapter.right @ r).norm())
                adapter.set_anchor(eye, right, torch.zeros_like(adapter.core), damping)
            else:
                c = weight[:, adapter.cols]
                left = adapter.left * (c.norm() / (c @ adapter.left).norm())
                adapter.set_anchor(left, eye, torch.zeros_like(adapter.core), damping)


def adapter_state(model: nn.Module, *, base: bool = False) -> dict[str, Tensor]:
    """Copies of what training changes: trained parameters, and the buffers of SECURA's adapters.

    With ``base`` also the adapted layers' own weights, which earlier tasks were folded into.
    """
    kept = {name for name, value in model.named_parameters() if value.requires_grad}
    return {
        name: value.detach().cpu().clone()
        for name, value in model.state_dict().items()
        if name in kept or ".secura_adapter." in name or (base and ".base_layer." in name)
    }


def load_adapter(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Takes up what :func:`adapter_state` gave.

    Raises:
        ValueError: a tensor of it is not one of the model's.
    """
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(
            f"the state is another model's ({', '.join(unexpected[:3])}): remove the cell's folder "
            "and run it again"
        )


def gradient_norms(model: nn.Module, targets: str) -> dict[str, float]:
    """The 2-norm of the gradients in each kind of adapted layer."""
    grads: dict[str, list[Tensor]] = {kind: [] for kind in TARGETS[targets]}
    for name, value in model.named_parameters():
        if value.grad is not None:
            for kind, found in grads.items():
                if f".{kind}." in name:
                    found.append(value.grad)
    return {k: float(nn.utils.get_total_norm(found)) for k, found in grads.items() if found}


def make_optimizer(model: nn.Module, cell: Cell, method: Method) -> torch.optim.Optimizer:
    """AdamW or Muon over what is trained, at the cell's rate and the method's decay.

    Muon's steps have the root mean square of 0.2 times the rate in every entry, as Adam's have
    about; it takes matrices alone.
    """
    trained = [value for value in model.parameters() if value.requires_grad]
    decay = method.decay * len(cell.tasks) if method.grows else method.decay
    if method.optimizer == "muon":
        return torch.optim.Muon(
            trained, lr=cell.rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
        )
    return torch.optim.AdamW(trained, lr=cell.rate, weight_decay=decay)


def scale_update(model: nn.Module, factor: float) -> None:
    """Multiplies what an adapter adds, once it is trained."""
    layers: list[Any] = list(model.modules())
    for layer in layers:
        if hasattr(layer, "lora_A") and hasattr(layer, "scale_layer"):
            layer.scale_layer(factor)


class Whitening(nn.Module):
    """A parametrization: A = Ã (Cov(x) + λ)^−½, scaled to leave a random Ã's norm alone.

    Args:
        covariances: `[K, K]` of the layer's inputs, one for each set of texts; each counts 1 in
            its mean eigenvalue, as the sums of an anchor do.
    """

    factor: Tensor

    def __init__(self, *covariances: Tensor) -> None:
        super().__init__()
        total = sum(one.double() / one.diagonal().double().mean() for one in covariances)
        values, vectors = torch.linalg.eigh(total)
        values = values.clamp(min=0) + _WHITENING_DAMPING * values.mean()
        factor = (vectors * values.rsqrt()) @ vectors.T
        factor *= math.sqrt(len(factor)) / torch.linalg.matrix_norm(factor)
        self.register_buffer("factor", factor.to(covariances[0].dtype), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """A `[r, K]` of Ã `[r, K]`."""
        with autocast(weight.device, bf16=False):
            return weight @ self.factor


@torch.no_grad()
def whiten(model: nn.Module, covariances: Sequence[dict[nn.Module, Tensor]]) -> None:
    """Reparametrises every LoRA A by the covariances of its layer's inputs on sets of texts."""
    for layer in _lora_layers(model):
        for adapter in layer.lora_A.values():
            whitening = Whitening(*(one[layer] for one in covariances))
            parametrize.register_parametrization(adapter, "weight", whitening)


@torch.no_grad()
def fold_lora(model: nn.Module) -> None:
    """Adds what whitened LoRAs learned to their base weights, and starts them anew, B = 0."""
    for layer in _lora_layers(model):
        layer.base_layer.weight.add_(layer.get_delta_weight("default"))
        parametrize.remove_parametrizations(layer.lora_A["default"], "weight")
        layer.reset_lora_parameters("default", init_lora_weights=True)


def _covariances(model: nn.Module, texts: list[Tensor], bf16: bool) -> dict[nn.Module, Tensor]:
    """`[K, K]` of every LoRA layer's inputs on texts `[T]`."""
    sums: dict[nn.Module, Tensor] = {}

    def collect(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()
        with autocast(x.device, bf16=False):
            sums[module] = sums.get(module, 0) + x.T @ x

    handles = [layer.register_forward_pre_hook(collect) for layer in _lora_layers(model)]
    device = next(model.parameters()).device
    with torch.no_grad(), evaluating(model), autocast(device, bf16):
        for text in texts:
            causal(model).get_decoder()(input_ids=text[None].to(device), use_cache=False)
    for handle in handles:
        handle.remove()
    tokens = sum(len(text) for text in texts)
    return {layer: total / tokens for layer, total in sums.items()}


def _lora_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


__all__ = [
    "Whitening",
    "adapter_state",
    "build",
    "fold_lora",
    "gradient_norms",
    "load_adapter",
    "make_optimizer",
    "scale_update",
    "whiten",
]
