"""`secura export_lora`: an additive adapter as a LoRA, of which vLLM and others serve many."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from secura._extras import require
from secura.cli.adapters import has_tokenizer, load, load_adapter_config
from secura.cli.folders import fresh_folder
from secura.cli.models import add_adapter_flags, add_loading_flags
from secura.cli.parser import Parser
from secura.folders import complete_folder


def make_parser() -> Parser:
    """The flags of `secura export_lora`."""
    parser = Parser(prog="secura export_lora", description=__doc__)
    add_adapter_flags(
        parser,
        dtype="dtype the base is loaded in and the LoRA written in; auto is the base's own, and "
        "float32 for the LoRA",
    )
    add_loading_flags(parser)
    return parser


def main(argv: list[str]) -> int:
    """Export, and leave the LoRA adapter in `--output_dir`, complete or not at all."""
    args = make_parser().parse_args(argv)
    output = Path(args.output_dir).expanduser()
    with fresh_folder(output):
        export(args, output)
    return 0


def export(args: Any, output: Path) -> None:
    """Export with parsed flags, with the tokenizer where the adapter brings its own."""
    adapter = args.adapter_name_or_path
    config = load_adapter_config(adapter, check_base=not args.no_check_base)
    import torch

    from secura.export import check_exportable, export_lora

    check_exportable(config)
    model, tokenizer = load(args, config, args.dtype)
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    with (
        warnings.catch_warnings(record=True, action="always", category=UserWarning) as noted,
        complete_folder(output) as folder,
    ):
        export_lora(model, folder, dtype=dtype)
        if has_tokenizer(adapter):
            tokenizer.save_pretrained(folder)
    for note in noted:
        print(f"secura: note: {note.message}")
    print(
        f"secura: exported {adapter} as a LoRA adapter into {output}; {_for_vllm(output, config)}"
    )


def _for_vllm(output: Path, config: Any) -> str:
    """What vLLM must be told to take the exported adapter, or why it does not."""
    from secura.export import VLLM_RANKS, vllm_rank

    if config.modules_to_save or config.trainable_token_indices or config.base_tensors:
        return "vLLM takes no modules_to_save, trained tokens or resized embeddings"
    r = require("peft", "train").PeftConfig.from_pretrained(str(output)).r
    needed = vllm_rank(r)
    if needed is None:
        return f"its rank is {r}, and vLLM takes no more than {VLLM_RANKS[-1]}"
    return f"vLLM takes it with --max-lora-rank {needed}"


__all__ = ["main"]
