"""``SecuraConfig``: the adapter's settings and PEFT's targeting fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from secura.config import AdapterConfig, check_rank
from secura.integrity import check_file

from .registration import peft_type

FORMAT = 2
"""Version of the adapter files this package writes. In 1 ``norm="weight"`` averaged by default."""

_RELEASED: dict[str, dict[str, Any]] = {
    "M1": {"norm": "activation", "norm_reference": "folded", "fold_every": 1, "restrain": True},
    "M2": {"norm": "activation", "norm_reference": "pretrained", "fold_every": 1, "restrain": True},
    "CABR": {"norm": "none", "fold_every": 1},
}


@dataclass
class SecuraConfig(AdapterConfig, PeftConfig):
    """Settings of a SECURA adapter for PEFT. See :class:`secura.AdapterConfig` for the method's.

    Example:
        >>> model = get_peft_model(model, SecuraConfig(r=64, target_modules="all-linear"))

    Args:
        target_modules: names of the layers to adapt: a list of suffixes, a regular expression, or
            ``"all-linear"``. None takes PEFT's choice for the architecture (as for LoRA).
        exclude_modules: names or a regular expression of layers to leave alone.
        layers_to_transform: indices of the decoder layers to adapt.
        layers_pattern: name of the list those indices count in.
        modules_to_save: modules trained in full and saved with the adapter.
        rank_pattern: ``r`` by layer name or regular expression.
        format_version: of the adapter file.

    Raises:
        ValueError: for a setting out of range, or a file a newer version wrote.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    format_version: int = FORMAT

    def __post_init__(self) -> None:
        check_rank("format_version", self.format_version)
        if self.format_version > FORMAT:
            raise ValueError(
                f"the adapter was written in format {self.format_version}, this version of secura "
                f"reads up to {FORMAT}: upgrade with pip install -U secura"
            )
        if self.format_version == 1 and self.norm == "weight" and self.norm_combine is None:
            self.norm_combine = "averaged"
        self.format_version = FORMAT
        PeftConfig.__post_init__(self)
        AdapterConfig.__post_init__(self)
        self.peft_type = peft_type()
        for name, rank in self.rank_pattern.items():
            check_rank(f"rank_pattern[{name!r}]", rank)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                setattr(self, name, set(value))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform needs target_modules to be a list of names, not a pattern"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layers_to_transform counts: give both")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SecuraConfig:
        """Read ``adapter_config.json`` of a folder or a hub repository.

        Args:
            pretrained_model_name_or_path: the folder or the repository.
            subfolder: where in it.
            **kwargs: ``check_base`` for this loading; others are for the download.

        Raises:
            ValueError: where the folder's adapter file was cut short or is no safetensors file.
        """
        check_base = kwargs.pop("check_base", True)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        config.check_base = check_base
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        check_file(folder / SAFETENSORS_WEIGHTS_NAME)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The settings as they are saved; an override of ``check_base`` is for one loading."""
        return super().to_dict() | {"check_base": True}

    @classmethod
    def released(cls, kind: str = "M1", **settings: Any) -> SecuraConfig:
        """The settings of the released experiments.

        q and v projections, CUR rank 150, inner rank 200, form ``released``, ``averaged``,
        trainable output bias, fusion after every step; they ran with AdamW at lr 1e-3. Folding
        every step leaves B at 0 in every forward: the norm then never acts, and A receives no
        gradient (∂A = ∂U Bᵀ = 0). Train with :class:`secura.FoldCallback` to reproduce that. The
        trained bias does not outlast a merge on layers that have none of their own (see
        ``train_bias``): pass ``train_bias=False`` where the model is to be merged.

        Args:
            kind: ``"M1"`` (norm against the folded weight), ``"M2"`` (against the original) or
                ``"CABR"`` (no norm).
            **settings: fields to change.

        Raises:
            ValueError: for another kind.
        """
        if kind not in _RELEASED:
            raise ValueError(f"unknown kind {kind!r}: choose one of {tuple(_RELEASED)}")
        released: dict[str, Any] = {
            "r": 150,
            "inner_r": 200,
            "target_modules": ["q_proj", "v_proj"],
            "train_bias": True,
            **_RELEASED[kind],
        }
        if kind != "CABR":
            released |= {"norm_form": "released", "norm_combine": "averaged"}
        return cls(**(released | settings))


__all__ = ["FORMAT", "SecuraConfig"]
