"""`secura merge`: base and adapter as one plain transformers checkpoint, which needs no SECURA."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from secura._extras import require
from secura.cli.adapters import load, load_adapter_config
from secura.cli.errors import UserError, one_line
from secura.cli.folders import fresh_folder
from secura.cli.models import add_adapter_flags, add_loading_flags
from secura.cli.parser import Parser
from secura.folders import complete_folder
from secura.names import bare

_PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""Files beside a tokenizer's that say how a model reads images and sound."""


def make_parser() -> Parser:
    """The flags of `secura merge`."""
    parser = Parser(prog="secura merge", description=__doc__)
    add_adapter_flags(
        parser, dtype="dtype the base is loaded, merged and written in; auto is the base's own"
    )
    parser.add_argument(
        "--allow_inexact",
        action="store_true",
        help="with norm=activation, which no plain checkpoint can express: write W + ΔW, without "
        "the norm, as the released code does",
    )
    add_loading_flags(parser)
    return parser


def main(argv: list[str]) -> int:
    """Merge, and leave the checkpoint in `--output_dir`, complete or not at all."""
    args = make_parser().parse_args(argv)
    output = Path(args.output_dir).expanduser()
    with fresh_folder(output):
        merge(args, output)
    return 0


def merge(args: Any, output: Path) -> None:
    """Merge with parsed flags; the output folder is this run's alone."""
    adapter = args.adapter_name_or_path
    config = load_adapter_config(adapter, check_base=not args.no_check_base)
    allow_inexact(config, adapter, allow=args.allow_inexact)
    model, tokenizer = load(args, config, args.dtype)
    refuse_lost_biases(model, adapter)
    refuse_generation_config(model)
    processors = processor_files(model)
    merged = model.merge_and_unload(progressbar=True)
    with complete_folder(output) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in processors:
            shutil.copyfile(file, folder / file.name)
    print(f"secura: merged {adapter} into {output} ({merged.dtype})".replace("torch.", ""))


def processor_files(model: Any) -> list[Path]:
    """Paths of the files by which a base reads images and sound, beside its tokenizer's."""
    found = require("transformers.utils", "train").cached_file
    config = model.active_peft_config
    paths = [
        found(
            config.base_model_name_or_path,
            name,
            revision=config.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        for name in _PROCESSORS
    ]
    return [Path(path) for path in paths if path]


def allow_inexact(config: Any, adapter: str, *, allow: bool) -> None:
    """Refuse early, before the base is loaded, a norm that cannot be merged exactly."""
    if getattr(config, "norm", None) != "activation":
        return
    if not allow:
        raise UserError(
            f"{adapter} was trained with norm='activation', which is not linear in its input: no "
            "plain checkpoint computes the same. Give --allow_inexact to write W + ΔW without the "
            "norm, or serve the adapter unmerged"
        )
    config.allow_inexact_merge = True


def refuse_generation_config(model: Any) -> None:
    """Refuse, before the work, settings of generation that transformers would not save."""
    config = getattr(model.get_base_model(), "generation_config", None)
    try:
        if config is not None:
            config.validate(strict=True)
    except ValueError as error:
        raise UserError(
            f"the base's generation_config.json cannot be saved again: {one_line(error)}. Mend it "
            "in the base's folder (do_sample: true, where it has a temperature)"
        ) from error


def refuse_lost_biases(model: Any, adapter: str) -> None:
    """Refuse trained biases of layers that have none: transformers would load them nowhere."""
    from secura.tuner.saved import gaining_bias

    layers = [bare(name) for name in gaining_bias(model)]
    if layers:
        raise UserError(
            f"{adapter} was trained with train_bias=True, and {len(layers)} of its layers, such as "
            f"{layers[0]}, have no bias in the base: transformers would leave theirs out when it "
            "loads the merged checkpoint. Serve the adapter unmerged, or train one with "
            "train_bias=False"
        )


__all__ = ["main"]
