"""The flags of `secura train`: the model's, the data's, the adapter's, and those of `SFTConfig`.

Flags are fields of dataclasses, named as TRL's and transformers' are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn, get_type_hints

from secura._extras import require
from secura.cli import steps
from secura.cli.adapter_flags import adapter_arguments
from secura.cli.config_file import as_defaults, read_config, take_config_flag
from secura.cli.errors import UserError, one_line
from secura.cli.hub import check_strategy
from secura.cli.models import DTYPES
from secura.cli.parser import Parser, refuse_repeated, refuse_unknown

PROG = "secura train"
ANCHORED: dict[str, Any] = {
    "core": "u",
    "norm": "none",
    "r": 128,
    "target_modules": [r".*\.(mlp|feed_forward)\.(\w+_proj|c_fc|fc\d|dense_\w+)"],
}
"""Defaults with `--anchor`: those that kept most in docs/results.md."""

REQUIRED = ("model_name_or_path", "dataset_name", "output_dir")
COMMON_TRAINER_FLAGS = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "packing",
    "lr_scheduler_type",
    "warmup_steps",
    "eval_strategy",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "gradient_checkpointing",
    "bf16",
    "use_cpu",
    "seed",
    "report_to",
)


@dataclass
class ModelArguments:
    """Which model, how it is loaded, and how its adapters are run."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "aliases": ["--model"],
            "help": "Hub name or local folder.",
        },
    )
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of a hub model."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "dtype of the frozen weights: bfloat16 with --bf16, else float32, unless set.",
            "choices": DTYPES,
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention implementation, such as flash_attention_2."}
    )
    hold_gradients: bool = field(
        default=False,
        metadata={
            "help": "With --gradient_accumulation_steps, compute what depends on the adapters "
            "alone once a step, not a micro-batch: less time where batches are small, for some "
            "memory (secura.accumulate)."
        },
    )


@dataclass
class DataArguments:
    """Which data, and where results go."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "aliases": ["--dataset"],
            "help": "Hub name, local folder, or .jsonl, .json, .csv or .parquet file. Columns: "
            "messages, or prompt and completion, or text, or question and answer.",
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the data set, such as main."}
    )
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split to train on; slices such as train[:500] work."}
    )
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on, with --eval_strategy."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Use an --output_dir that is not empty; its old checkpoints go."},
    )


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else f"{value}"


@dataclass
class AnchorArguments:
    """How a core of ``--core u`` is held to old text."""

    anchor: str | None = field(
        default=None,
        metadata={
            "help": "Before training, anchor a core that is trained itself: by the model's own "
            "samples (self, also without a value), or by a file of old text: .jsonl, .json, .csv "
            "or .parquet with a column text, or any other, in which an empty line ends a text. "
            "Sets other defaults: "
            + ", ".join(f"--{name} {_words(value)}" for name, value in ANCHORED.items())
            + ".",
            "nargs": "?",
            "const": "self",
        },
    )
    anchor_tokens: int | None = field(
        default=None,
        metadata={"help": "With --anchor: tokens of old text that are read at most. [8192]"},
    )
    anchor_decay: float | None = field(
        default=None,
        metadata={
            "help": "With --core u: decay of U before each step, times the learning rate; with "
            "--anchor a penalty against leaving old knowledge. [with --anchor: what divides U by e "
            "over the run, 30 for 128 steps at 5e-4; else 0]"
        },
    )

    @property
    def decays(self) -> bool:
        """Whether U is pulled back."""
        return bool(self.anchor) if self.anchor_decay is None else self.anchor_decay > 0


def print_help() -> None:
    """Print the flags SECURA adds and name the common ones of `SFTConfig`, without loading it."""
    listing = Parser(
        prog=PROG,
        usage=f"{PROG} --model MODEL --dataset DATA --output_dir DIR [flags] [--config FILE.yaml]",
        description="Fine-tunes a causal language model with SECURA, on TRL's SFTTrainer.",
        epilog="Every field of TRL's SFTConfig is a flag too, among them: "
        + ", ".join(f"--{name}" for name in COMMON_TRAINER_FLAGS)
        + f". '{PROG} --help_all' describes all of them. On a CPU, "
        "--bf16 and --gradient_checkpointing are off unless asked for.",
    )
    general = listing.add_argument_group("general")
    general.add_argument("--config", metavar="FILE", help="YAML file of flags; flags given win.")
    general.add_argument("--output_dir", metavar="DIR", help="Where checkpoints and adapter go.")
    general.add_argument(
        "--resume_from_checkpoint",
        metavar="PATH",
        help="Go on from this checkpoint folder, or without a value from the last complete one.",
    )
    general.add_argument(
        "--learning_rate",
        metavar="FLOAT",
        help="Peak learning rate. [by the weights that are adapted]",
    )
    groups = (
        ("model", ModelArguments),
        ("data", DataArguments),
        ("adapter", adapter_arguments()),
        ("anchor", AnchorArguments),
    )
    for title, arguments in groups:
        group = listing.add_argument_group(title)
        types = get_type_hints(arguments)
        for entry in fields(arguments):
            group.add_argument(
                f"--{entry.name}",
                *entry.metadata.get("aliases", ()),
                metavar=_metavar(types[entry.name]),
                help=entry.metadata["help"] + _default_of(entry),
            )
    listing.print_help()


def _metavar(kind: Any) -> str:
    word = str(kind)
    if "list" in word:
        return "ITEM ..."
    return next((name.upper() for name in ("bool", "int", "float") if name in word), "TEXT")


def _default_of(entry: Any) -> str:
    default = entry.default
    return f" [{default}]" if default is not None and isinstance(default, str | int | float) else ""


def make_parser() -> Any:
    """TRL's parser over the five groups of flags, with errors on one line."""
    trl = require("trl", "train")
    for package in ("transformers", "peft", "accelerate", "datasets"):
        require(package, "train")

    class TrainParser(trl.TrlParser):  # type: ignore[name-defined]
        def error(self, message: str) -> NoReturn:
            commas = re.search(r"'[\w.]+(,[\w.]+)+'", message)
            hint = "; separate values by spaces" if commas else ""
            raise UserError(f"{message}{hint} (see '{PROG} --help')")

        def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
            refuse_repeated(args or [], self._actions)
            parsed, unknown = super().parse_known_args(args, namespace)
            refuse_unknown(unknown, self._option_string_actions, PROG)
            settle(parsed)
            return parsed, unknown

    groups = (trl.SFTConfig, ModelArguments, DataArguments, adapter_arguments(), AnchorArguments)
    parser = TrainParser(groups, prog=PROG, allow_abbrev=False)
    for action in parser._actions:
        if action.dest == "resume_from_checkpoint":
            action.nargs, action.const = "?", "true"
        elif _takes_bool(action) and action.nargs is None:
            action.nargs, action.const = "?", True  # such as --bf16, which TRL wants a value for
    parser.set_defaults(learning_rate=None)  # for `steps.choose_rate`, once there are weights
    parser.set_defaults(logging_nan_inf_filter=False)  # a loss of NaN is to be seen
    parser.set_defaults(ddp_broadcast_buffers=False)  # each step; `send_buffers` does it once
    parser.set_defaults(hub_strategy="end")
    parser.set_defaults(bf16=None, gradient_checkpointing=None)  # for `settle` to choose
    return parser


def _takes_bool(action: Any) -> bool:
    """Whether a flag of `argparse` is one of transformers' switches."""
    return getattr(action.type, "__name__", "") == "string_to_bool"


def parse(argv: list[str]) -> tuple[Any, Any, Any, Any, Any]:
    """`SFTConfig`, `ModelArguments`, `DataArguments`, the adapter's, `AnchorArguments`.

    Raises:
        UserError: an unknown flag or key, a value of the wrong kind, a required flag missing.
    """
    argv, file = take_config_flag(argv)
    read = None if file is None else read_config(file)  # first: libraries read its env on import
    parser = make_parser()
    defaults: dict[str, Any] = {}
    if file is not None and read is not None:
        defaults = as_defaults(_by_field(read, file, parser), file, parser)
    flagged = any(word.partition("=")[0] == "--anchor" for word in argv)
    if flagged or defaults.get("anchor") is not None:
        parser.set_defaults(**ANCHORED)
    parser.set_defaults_with_config(**defaults)
    try:
        return parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    except TypeError as error:
        if "keyword argument" not in str(error):  # of a flag that is a dict, an unknown key
            raise
        raise UserError(one_line(error)) from error


def _by_field(read: dict[str, Any], name: str, parser: Any) -> dict[str, Any]:
    """A file's nodes by the flags' fields, which some keys are other names of."""
    named = [a for a in parser._actions if a.const is not False or a.nargs != 0]  # not --no_X
    known = {word.lstrip("-"): a.dest for a in named for word in a.option_strings}
    found: dict[str, Any] = {}
    for key, value in read.items():
        dest = known.get(key, key)
        if dest in found:
            raise UserError(f"{name}: {key!r} gives {dest!r} a second time: leave one of them out")
        found[dest] = value
    return found


def settle(parsed: Any) -> None:
    """Check what is required, and choose what the machine decides where no flag does.

    That is `use_cpu`, `bf16`, and TRL's `gradient_checkpointing`, which on a CPU would cost a third
    of the time to save what is rarely short there.
    """
    missing = [f"--{name}" for name in REQUIRED if not getattr(parsed, name)]
    if missing:
        raise UserError(f"{', '.join(missing)} missing; give flags, or keys of a --config file")
    steps.check_numbers(parsed)
    if parsed.model_init_kwargs:
        raise UserError(
            "--model_init_kwargs would be ignored, since the model is loaded before TRL has it: "
            "give --dtype, --attn_implementation, --model_revision or --trust_remote_code, or load "
            "it in Python"
        )
    if parsed.push_to_hub:
        check_strategy(parsed.hub_strategy)
    import torch

    if not torch.accelerator.is_available():
        parsed.use_cpu = True
    if parsed.bf16 is None:
        from transformers.utils import is_torch_bf16_gpu_available

        parsed.bf16 = not parsed.fp16 and not parsed.use_cpu and is_torch_bf16_gpu_available()
    if parsed.gradient_checkpointing is None:
        parsed.gradient_checkpointing = not parsed.use_cpu


__all__ = ["make_parser", "parse", "print_help"]
