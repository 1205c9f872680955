"""`secura export_lora`: an additive adapter as a LoRA, of which vLLM and others serve many."""

from __future__ import annotations

from pathlib import Path

from secura.cli.adapters import (
    base_of,
    load_adapted,
    load_adapter_config,
    refuse_undeclared,
)
from secura.cli.errors import Parser
from secura.cli.folders import check_output_folder
from secura.cli.models import add_adapter_flags, add_loading_flags


def make_parser() -> Parser:
    """The flags of `secura export_lora`."""
    parser = Parser(prog="secura export_lora", description=__doc__)
    add_adapter_flags(
        parser,
        dtype="dtype the base is loaded in, whose rows become lora_A; auto is the base's own. The "
        "LoRA is written in float32",
    )
    add_loading_flags(parser)
    return parser


def main(argv: list[str]) -> int:
    """Exports, and leaves the LoRA adapter in `--output_dir`, complete or not at all."""
    args = make_parser().parse_args(argv)
    output, adapter = Path(args.output_dir), args.adapter_name_or_path
    check_output_folder(output, hint="choose another --output_dir")
    config = load_adapter_config(adapter, check_base=not args.no_check_base)
    from secura.export import check_exportable, export_lora

    check_exportable(config)
    base, revision = base_of(config, adapter, args.model_name_or_path, args.model_revision)
    loading = {"revision": revision, "trust_remote_code": args.trust_remote_code}
    model = load_adapted(adapter, config, base, dtype=args.dtype, **loading)
    refuse_undeclared(model, adapter)
    config.base_model_name_or_path, config.revision = base, revision
    export_lora(model, output)
    print(f"secura: exported {adapter} as a LoRA adapter into {output}")
    return 0
