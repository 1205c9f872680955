"""Adapters by name, on the base, vocabulary and tokenizer they were trained with."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from secura._extras import require
from secura.cli import models
from secura.cli.errors import UserError, one_line
from secura.cli.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from secura.layers import embeddings
from secura.names import PREFIX, bare, is_own
from secura.wording import plain

CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""transformers' class of a base by the adapter's `task_type`."""

_HEAD = re.compile(r"\.(score|classifier|classifier\.out_proj)\.weight")
_COPY = re.compile(r"\.(modules_to_save|original_module)(?=\.)")
_MISFITS = (
    TypeError,
    LookupError,
    AttributeError,
    re.error,
)  # PEFT's answers to settings of no sense


def load_adapter_config(adapter: str, *, check_base: bool = True) -> Any:
    """The `PeftConfig` of a local or hub adapter, with the SECURA tuner registered.

    Args:
        adapter: the adapter's folder or hub name.
        check_base: whether loading it on another base weight is to be an error.
    """
    peft = require("peft", "train")
    import secura.tuner  # noqa: F401  it registers the method

    path = Path(adapter).expanduser()
    named = "/" in adapter and not adapter.startswith((".", "/", "~"))
    if not path.is_dir() and (path.exists() or not named):
        raise UserError(
            f"adapter {adapter!r}: no such folder; give an adapter's, or a hub name (owner/name)"
        )
    if path.is_dir() and not (path / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"adapter {adapter!r}: the folder has no adapter_config.json; give the --output_dir of "
            "a finished training run, or one of its checkpoint folders"
        )
    if path.is_dir() and not any(path.glob("adapter_model.*")):
        raise UserError(
            f"adapter {adapter!r}: the folder has no {ADAPTER_WEIGHTS}; give the --output_dir of a "
            "finished training run"
        )
    try:
        config = peft.PeftConfig.from_pretrained(_place(adapter))
    except (*_MISFITS, ValueError) as error:
        place = "" if ADAPTER_WEIGHTS in str(error) else f"{ADAPTER_CONFIG}: "
        raise UserError(f"adapter {adapter!r}: {place}{one_line(error)}") from error
    if config.peft_type != "SECURA":
        kind = plain(config.peft_type)
        raise UserError(
            f"adapter {adapter!r} is a {kind} adapter, not one of SECURA's: load it with "
            "peft.PeftModel.from_pretrained, or give the SECURA adapter it was made of"
        )
    if not isinstance(config.base_model_name_or_path, str | None):
        raise UserError(
            f"adapter {adapter!r}: {ADAPTER_CONFIG}: base_model_name_or_path "
            f"{config.base_model_name_or_path!r} is no name"
        )
    config.check_base = check_base
    return config


def base_of(config: Any, adapter: str, model: str | None, revision: str | None) -> tuple[str, str]:
    """The base's name and revision: the flags' where given, else those the adapter records.

    A folder's name is its absolute path, which an exported adapter then records.
    """
    name = model or config.base_model_name_or_path
    if not name:
        raise UserError(f"adapter {adapter!r} does not name its base; give --model_name_or_path")
    recorded = None if model else config.revision
    if Path(name).expanduser().is_dir():
        name = models.resolve_model(name)
    return name, revision or recorded or "main"


def load(args: Any, config: Any, dtype: str) -> tuple[Any, Any]:
    """The adapter that flags name on its base, a `PeftModel` in eval mode, and the tokenizer.

    Args:
        args: parsed flags, `add_loading_flags`' among them.
        config: the adapter's config, from `load_adapter_config`; the model's names the base loaded.
        dtype: of the base.

    Raises:
        UserError: the adapter, its base and its tokenizer do not fit each other.
    """
    adapter = args.adapter_name_or_path
    base, revision = base_of(config, adapter, args.model_name_or_path, args.model_revision)
    loading = {"revision": revision, "trust_remote_code": args.trust_remote_code}
    model = load_adapted(adapter, config, base, dtype=dtype, **loading)
    own = model.active_peft_config
    own.base_model_name_or_path, own.revision = base, revision
    return model, tokenizer_for(model, adapter, base, loading)


def load_adapted(adapter: str, config: Any, base: str, **kwargs: Any) -> Any:
    """A base model with an adapter on it, as a `PeftModel` in eval mode.

    The base is of the class the adapter was trained on, and has as many tokens.

    Args:
        adapter: the adapter's folder or hub name.
        config: the adapter's config, from `load_adapter_config`.
        base: the base's name.
        kwargs: given to `from_pretrained` of the base.

    Raises:
        UserError: the adapter does not fit the base, or its file holds what nothing takes.
    """
    peft = require("peft", "train")
    file = weights_file(adapter)
    shapes = _shapes(file)
    kind = class_of(config)
    if kind == CLASSES["CAUSAL_LM"]:
        own = ("revision", "trust_remote_code")
        kind = models.causal_class(base, **{key: kwargs[key] for key in own if key in kwargs})
    if labels := [shape[0] for name, shape in shapes.items() if _HEAD.search(name)]:
        kwargs["num_labels"] = labels[-1]
    if names := config.id2label:
        kwargs |= {"id2label": names, "label2id": {name: label for label, name in names.items()}}
    model = models.load_model(base, kind, shapes, **kwargs)
    fit_vocabulary(model, shapes, adapter)
    try:
        model = peft.PeftModel.from_pretrained(model, _place(adapter), config=config).eval()
    except _MISFITS as error:
        raise UserError(f"adapter {adapter!r} does not fit {base}: {one_line(error)}") from error
    if file is not None:
        refuse_left_out(model, file, adapter)
    return model


def class_of(config: Any) -> str:
    """The name of transformers' class that an adapter's base is loaded with."""
    if config.task_type is not None:
        kind = CLASSES.get(plain(config.task_type))
        if kind is None:
            raise UserError(
                f"an adapter of task_type {config.task_type} is not known here, only of "
                f"{', '.join(CLASSES)}: load it with peft.PeftModel.from_pretrained"
            )
        return kind
    own = (config.auto_mapping or {}).get("base_model_class")
    known = isinstance(own, str) and hasattr(require("transformers", "train"), own)
    return str(own) if known else CLASSES["CAUSAL_LM"]


def fit_vocabulary(model: Any, shapes: dict[str, tuple[int, ...]], adapter: str) -> None:
    """Give the base as many tokens as the embeddings that an adapter's file holds.

    Raises:
        UserError: the file holds the resized embeddings, but not the head that grew with them.
    """
    inputs, outputs = embeddings(model)
    if inputs is None:
        return
    names = {module: name for name, module in model.named_modules()}
    parts = [inputs] if outputs is None or outputs.weight is inputs.weight else [inputs, outputs]
    held = {names[part]: _stored(shapes, names[part]) for part in parts}
    counts = {shape[0] for shape in held.values() if shape is not None}
    tokens = inputs.weight.shape[0]
    if counts <= {tokens}:
        return
    if len(counts) > 1 or None in held.values():
        lacking = [name for name, shape in held.items() if shape is None] or list(held)
        raise UserError(
            f"adapter {adapter!r} was trained with {max(counts)} tokens, its base has {tokens}, "
            f"and its file does not hold all that grew with them ({', '.join(lacking)}): train it "
            f"with --modules_to_save {' '.join(name.rpartition('.')[2] for name in held)}, or give "
            "a base with resized embeddings as --model_name_or_path"
        )
    model.resize_token_embeddings(counts.pop(), mean_resizing=False)


def _stored(shapes: dict[str, Any], name: str) -> Any:
    """The shape in which a file holds an embedding: as it is, or under its trained rows."""
    own = f"{PREFIX}{name}."
    return shapes.get(f"{own}weight", shapes.get(f"{own}token_adapter.base_layer.weight"))


def undeclared(model: Any, file: Path) -> list[str]:
    """Tensors of an adapter's file that are neither SECURA's nor of its `modules_to_save`.

    Of a resized embedding in `modules_to_save`, PEFT writes a second copy and the untrained one
    beside it, and of trained tokens in a tied head a copy; they are not counted.
    """
    from secura.tuner.saved import saved_in_full

    if not (names := list(_shapes(file))):
        return []
    own = require("peft", "train").get_peft_model_state_dict(model, save_embedding_layers=False)
    copies = saved_in_full(model, model.active_adapter)
    return [name for name in names if _COPY.sub("", name) not in own and bare(name) not in copies]


def refuse_left_out(model: Any, file: Path, adapter: str) -> None:
    """Refuse an adapter file with tensors that are not in the model after loading."""
    import torch

    from secura.integrity import opened

    names, state = undeclared(model, file), model.state_dict()
    with opened(file) as tensors:
        lost = [
            name
            for name in names
            if name not in state
            or not torch.equal(state[name].cpu(), tensors.get_tensor(name).to(state[name].dtype))
        ]
    if lost:
        raise UserError(
            f"adapter {adapter!r}: its file holds {len(lost)} tensors, such as {lost[0]}, that are "
            "neither SECURA's nor of its modules_to_save, and would be lost: where tokens were "
            "added, train with --modules_to_save embed_tokens lm_head"
        )


def tokenizer_for(model: Any, adapter: str, base: str, loading: dict[str, Any]) -> Any:
    """The tokenizer saved with the adapter, with which the model is made to agree; else the base's.

    Args:
        model: the base with the adapter on it; its configuration is changed in place.
        adapter: the adapter's folder or hub name.
        base: the base's name.
        loading: `revision` and `trust_remote_code` of the base.

    Raises:
        UserError: the embeddings of tokens that were added are in neither of them.
    """
    if not has_tokenizer(adapter):
        return models.load_tokenizer(base, **loading)
    tokenizer = models.load_tokenizer(
        _place(adapter), trust_remote_code=loading["trust_remote_code"]
    )
    inputs, _ = embeddings(model)
    count, held = len(tokenizer), len(tokenizer) if inputs is None else inputs.weight.shape[0]
    if count > held and count > len(models.load_tokenizer(base, **loading)):
        raise UserError(
            f"the tokenizer of adapter {adapter!r} has {count} tokens, its base has {held}, and "
            "the embeddings of those added are in neither; resize the base's and save it, and "
            "train with --modules_to_save embed_tokens lm_head"
        )
    settle_tokens(model, tokenizer)
    return tokenizer


def has_tokenizer(adapter: str) -> bool:
    """Whether a tokenizer was saved with the adapter."""
    place, own = _place(adapter), "tokenizer_config.json"
    if Path(place).is_dir():
        return (Path(place) / own).is_file()
    with suppress(OSError):
        return require("transformers.utils.hub", "train").has_file(place, own)
    return False


def settle_tokens(model: Any, tokenizer: Any) -> None:
    """Make a model's configurations agree with a tokenizer on where an answer ends."""
    text = model.config.get_text_config()
    for name in ("eos_token_id", "pad_token_id"):
        token = getattr(tokenizer, name)
        if token is None:
            continue
        for holder in (text, getattr(model, "generation_config", None)):
            ids = getattr(holder, name, None)
            known = ids if isinstance(ids, list) else [] if ids is None else [ids]
            if holder is None or token in known:
                continue
            more = name == "eos_token_id" and known and holder is not text
            setattr(holder, name, [token, *known] if more else token)


def weights_file(adapter: str) -> Path | None:
    """The adapter's safetensors file, downloaded where it is on the hub; None without one."""
    place = _place(adapter)
    if Path(place).is_dir():
        file = Path(place) / ADAPTER_WEIGHTS
        return file if file.is_file() else None
    with suppress(OSError, ValueError):
        return Path(require("huggingface_hub", "train").hf_hub_download(place, ADAPTER_WEIGHTS))
    return None


def _place(adapter: str) -> str:
    path = Path(adapter).expanduser()
    return str(path) if path.is_dir() else adapter


def _shapes(file: Path | None) -> dict[str, tuple[int, ...]]:
    """Shapes by name of the tensors in a file that are not SECURA's."""
    if file is None:
        return {}
    from secura.integrity import opened

    with opened(file) as tensors:
        names = sorted(name for name in tensors.keys() if not is_own(name))  # noqa: SIM118
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}


__all__ = [
    "base_of",
    "has_tokenizer",
    "load",
    "load_adapter_config",
    "refuse_left_out",
    "undeclared",
]
