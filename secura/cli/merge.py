"""`secura merge`: base and adapter as one plain transformers checkpoint, which needs no SECURA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secura.cli.errors import Parser, UserError
from secura.cli.folders import check_output_folder, complete_folder
from secura.cli.models import (
    DTYPES,
    base_of,
    load_adapted,
    load_adapter_config,
    load_tokenizer,
)


def make_parser() -> Parser:
    """The flags of `secura merge`."""
    parser = Parser(prog="secura merge", description=__doc__)
    parser.add_argument(
        "--adapter_name_or_path",
        "--adapter",
        required=True,
        metavar="DIR",
        help="the adapter's folder or hub name",
    )
    parser.add_argument(
        "--model_name_or_path",
        "--model",
        metavar="MODEL",
        help="the base; the adapter names the one it was trained on",
    )
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--dtype",
        "--torch_dtype",
        choices=DTYPES,
        default="auto",
        help="dtype the base is loaded, merged and written in; auto is the base's own",
    )
    parser.add_argument(
        "--allow_inexact",
        action="store_true",
        help="with norm=activation, which no plain checkpoint can express: write W + ΔW, without "
        "the norm, as the released code does",
    )
    parser.add_argument(
        "--model_revision", metavar="REVISION", help="branch, tag or commit of the base"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run the base's own code")
    return parser


def main(argv: list[str]) -> int:
    """Merges, and leaves the checkpoint in `--output_dir`, complete or not at all."""
    args = make_parser().parse_args(argv)
    output = Path(args.output_dir)
    check_output_folder(output, hint="choose another --output_dir")
    adapter = args.adapter_name_or_path
    config = load_adapter_config(adapter)
    allow_inexact(config, adapter, allow=args.allow_inexact)
    base, revision = base_of(config, adapter, args.model_name_or_path, args.model_revision)
    loading = {"revision": revision, "trust_remote_code": args.trust_remote_code}
    tokenizer = adapter_tokenizer(adapter, base, loading)
    model = load_adapted(adapter, config, base, dtype=args.dtype, **loading)
    merged = model.merge_and_unload(progressbar=True)
    with complete_folder(output) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"secura: merged {adapter} into {output} ({merged.dtype})".replace("torch.", ""))
    return 0


def allow_inexact(config: Any, adapter: str, *, allow: bool) -> None:
    """Refuses early, before the base is loaded, a norm that cannot be merged exactly."""
    if getattr(config, "norm", None) != "activation":
        return
    if not allow:
        raise UserError(
            f"{adapter} was trained with norm='activation', which is not linear in its input: no "
            "plain checkpoint computes the same. Give --allow_inexact to write W + ΔW without the "
            "norm, or serve the adapter unmerged"
        )
    config.allow_inexact_merge = True


def adapter_tokenizer(adapter: str, base: str, loading: dict[str, Any]) -> Any:
    """The tokenizer saved with the adapter, where there is one, else the base's."""
    folder = Path(adapter).expanduser()
    if (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(str(folder.resolve()))
    return load_tokenizer(base, **loading)
