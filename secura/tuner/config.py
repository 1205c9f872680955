"""``SecuraConfig``: the adapter's settings and PEFT's targeting fields."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from secura._extras import how_to_install
from secura.config import AdapterConfig, check_rank, check_switch
from secura.integrity import check_file, file_checksum, read_file
from secura.names import INNER, PREFIX, is_own, without_wrappers
from secura.wording import did_you_mean

from .registration import peft_type

FORMAT = 4
"""Version of the adapter files this package writes and reads; none before it was released."""

_HOW_TO_LOAD = "import secura.tuner first: PEFT knows SECURA from then on"

_OF_LORA = {
    "lora_alpha": "scaling, the factor itself and no numerator over r",
    "use_rslora": "scaling",
    "lora_dropout": "dropout",
    "bias": "train_bias",
    "lora_bias": "train_bias",
    "init_lora_weights": "init",
    "alpha_pattern": "one scaling for all layers",
}
"""What stands here for some of ``LoraConfig``'s settings."""

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
        target_parameters: names of parameters to adapt, by suffix: fused experts' weights
            ``[E, N, K]``, such as ``["experts.gate_up_proj", "experts.down_proj"]``, each expert
            with rows and columns of its own. ``target_modules=None`` then adapts these alone.
        modules_to_save: modules trained in full and saved with the adapter.
        trainable_token_indices: tokens whose embeddings are trained, as rows alone, and saved with
            the adapter; or a dict of such lists by the embedding's name.
        rank_pattern: ``r`` by layer name or regular expression.
        layer_replication: refused: SECURA does not repeat layers.
        format_version: of the adapter file.
        checksum: of the adapter file's tensors; None once the file was loaded.
        base_tensors: names of the base's own tensors (resized embeddings) that the file holds.
        id2label: what a classifier calls its labels, of the model that the file was saved with;
            None where they have no names. ``secura merge`` gives them to the merged model.
        how_to_load: a note in ``adapter_config.json`` for whoever finds it.

    Raises:
        TypeError: for a setting that there is not; of LoRA's, what stands for it.
        ValueError: for a setting out of range, or a file of another format.
    """

    def __new__(cls, *args: Any, **settings: Any) -> SecuraConfig:
        """Refuse settings that there are not, with those that are meant."""
        known = [of.name for of in fields(cls) if of.init]
        unknown = [] if cls.__init__ is not SecuraConfig.__init__ else settings.keys() - {*known}
        if unknown:
            name = min(unknown)
            near = did_you_mean(name, known) or "; see docs/from_lora.md"
            hint = f": take {_OF_LORA[name]}" if name in _OF_LORA else near
            raise TypeError(  # PEFT knows such an error by these words
                f"{cls.__name__}.__init__() got an unexpected keyword argument {name!r}{hint}"
            )
        return super().__new__(cls)

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    layer_replication: Any = None
    format_version: int = FORMAT
    checksum: str | None = field(default=None, compare=False, repr=False)
    base_tensors: list[str] | None = field(default=None, compare=False, repr=False)
    id2label: dict[int, str] | None = field(default=None, compare=False, repr=False)
    how_to_load: str = field(default=_HOW_TO_LOAD, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_rank("format_version", self.format_version)
        if self.format_version != FORMAT:
            newer = self.format_version > FORMAT
            raise ValueError(
                f"the adapter was written in format {self.format_version}, this version of secura "
                f"reads {FORMAT}: " + ("get a newer secura" if newer else "train it again")
            )
        self.how_to_load = _HOW_TO_LOAD
        if self.id2label is not None:  # JSON's keys are text
            self.id2label = {int(label): name for label, name in self.id2label.items()}
        if not _are_tokens(self.trainable_token_indices):
            raise ValueError(
                f"trainable_token_indices={self.trainable_token_indices!r} must be a list of "
                "token ids, or a dict of such lists by the embedding's name"
            )
        if self.layer_replication is not None:
            raise ValueError(
                "SECURA does not repeat layers, so layer_replication is not taken: repeat them in "
                "the base model, save it, and adapt that"
            )
        PeftConfig.__post_init__(self)
        AdapterConfig.__post_init__(self)
        self.peft_type = peft_type()
        if self.target_parameters and self.target_modules is None:
            self.target_modules = []
        for name, rank in self.rank_pattern.items():
            check_rank(f"rank_pattern[{name!r}]", rank)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                setattr(self, name, set(value))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform needs names in target_modules, such as q_proj v_proj, and "
                f"{self.target_modules!r} is a pattern"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layers_to_transform counts: give both")

    def checksum_settings(self, folded: bool) -> str:
        """As of :class:`secura.AdapterConfig`, with the tokens that the trained rows belong to."""
        own = super().checksum_settings(folded)
        tokens = self.trainable_token_indices
        return own if tokens is None else f"{own} {tokens}"

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
            ValueError: for a ``check_base`` that is no bool, and where the folder's adapter file
                was cut short or is no safetensors file.
        """
        check_base = kwargs.pop("check_base", True)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        check_switch("check_base", check_base)
        config.check_base = check_base
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        check_file(folder / SAFETENSORS_WEIGHTS_NAME)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The settings as they are saved; an override of ``check_base`` is for one loading."""
        own = super().to_dict() | {"check_base": True, "checksum": "", "base_tensors": None}
        for name in ("target_modules", "exclude_modules"):
            if isinstance(own[name], set):  # in one order: a file's bytes are the same each time
                own[name] = sorted({without_wrappers(module) for module in own[name]})
        return own

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, with a checksum where PEFT has just written the tensors.

        The folder's model card, where there is one, then says what to import.
        """
        super().save_pretrained(save_directory, **kwargs)
        if "auto_mapping_dict" not in kwargs:  # then another saved: its tensors are not there yet
            return
        folder, anchored = Path(save_directory), self.anchored
        if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
            tensors = read_file(folder / SAFETENSORS_WEIGHTS_NAME)
            written = json.loads((folder / CONFIG_NAME).read_text())
            anchored = any(name.endswith(f"{INNER}left") for name in tensors)
            written["checksum"] = file_checksum(tensors.values())
            written["anchored"] = anchored
            written["base_tensors"] = self._base_tensors(tensors) or None
            (folder / CONFIG_NAME).write_text(json.dumps(written, indent=2, sort_keys=True))
        describe_loading(folder / "README.md", self.describe_core(anchored))

    def describe_core(self, anchored: bool) -> str:
        """What is trained, in one sentence."""
        if self.core == "ab":
            return "The core U = A B of ΔW = C U R is trained."
        anchor = f"anchored by old text with damping {self.anchor_damping:g}"
        how = anchor if anchored else "without an anchor"
        return f"The core U of ΔW = C U R is trained itself, {how}."

    def _base_tensors(self, names: Iterable[str]) -> list[str]:
        """Of an adapter file's tensors, those of the base that PEFT added: resized embeddings."""
        rest = (n.removeprefix(PREFIX) for n in names if not is_own(n))
        own = [f".{module}." for module in self.modules_to_save or ()] + [".trainable_tokens_delta"]
        copies = (".modules_to_save.", ".original_module.")  # of embeddings that are saved in full
        return sorted(
            n
            for n in rest
            if any(copy in n for copy in copies) or not any(name in f".{n}" for name in own)
        )

    @classmethod
    def released(cls, kind: str = "M1", **settings: Any) -> SecuraConfig:
        """The settings of the released experiments.

        q and v projections, CUR rank 150, inner rank 200, form ``released``, ``averaged``,
        trainable output bias, fusion after every step; they ran with AdamW at lr 1e-3. Folding
        every step leaves B at 0 in every forward, so A receives no gradient (∂A = ∂U Bᵀ = 0). The
        bias is never folded: in ``"M1"`` it alone is Δ, and from the second step on the norm acts
        through it, the layer's output about 4/3 of its base's. Train with
        :class:`secura.FoldCallback` to reproduce that. The trained bias does not outlast a merge on
        layers that have none of their own (see ``train_bias``): pass ``train_bias=False`` where the
        model is to be merged; the norm of ``"M1"`` then never acts.

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


def _are_tokens(value: Any) -> bool:
    """Whether ``value`` is None, a list of token ids, or a dict of such lists."""
    if value is None:
        return True
    if isinstance(value, dict):
        return all(isinstance(tokens, list) and _are_tokens(tokens) for tokens in value.values())
    return isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)


def describe_loading(card: Path, core: str) -> None:
    """Add to a folder's model card, where there is one, what its adapter is and how it is loaded.

    Args:
        card: the file.
        core: a sentence on what is trained.
    """
    if not card.is_file() or "import secura.tuner" in (text := card.read_text(encoding="utf-8")):
        return
    heading = "## How to Get Started with the Model"
    lines = (
        f"{core} PEFT knows this adapter's method once `secura` ({how_to_install('train')}) is "
        "imported:\n\n```python\nimport secura.tuner  # before peft loads it\n"
        "from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, folder)\n```\n"
    )
    before, found, after = text.partition(heading)
    card.write_text(
        f"{before}{heading}\n\n{lines}{after}" if found else f"{text}\n{heading}\n\n{lines}",
        encoding="utf-8",
    )


__all__ = ["SecuraConfig"]
