"""The command `secura`: train, merge, export_lora, generate, doctor.

Nothing heavy is imported here, nor by a command before its flags are understood, so that `--help`
and a mistyped flag answer at once. What a user can get wrong is told in one line, with exit status
2; `--traceback` (or `SECURA_TRACEBACK=1`) shows where it came from.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from secura import __version__
from secura.cli.errors import USER_ERRORS, one_line
from secura.cli.parser import Parser

COMMANDS = {
    "train": ("secura.cli.train", "fine-tune a causal language model with SECURA"),
    "merge": ("secura.cli.merge", "write base and adapter as one plain transformers checkpoint"),
    "export_lora": ("secura.cli.export_lora", "write an additive adapter as a LoRA, for servers"),
    "generate": ("secura.cli.generate", "answer a prompt with base, adapter, or both side by side"),
    "doctor": ("secura.cli.doctor", "versions, devices, implementations, a self-check of each op"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; None means the process's own.

    Returns:
        The exit status: 0, 1 (a check of `doctor` failed), 2 (an error a user can mend) or 130
        (interrupted).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    traceback = os.environ.get("SECURA_TRACEBACK", "0") not in ("", "0")
    if "--traceback" in arguments:
        arguments.remove("--traceback")
        traceback = True
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # of characters that a terminal has not
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore", FutureWarning)  # the libraries' notes to themselves
            return _run(arguments)
    except KeyboardInterrupt:
        print("secura: interrupted", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if traceback:
            raise
        print(f"secura: error: {one_line(error)}", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    parser = Parser(
        prog="secura",
        usage="secura [--version] [--traceback] COMMAND ...",
        description="SECURA: CUR-decomposition adapters with a sigmoid magnitude norm.",
        epilog="'secura COMMAND --help' lists a command's flags.",
    )
    parser.add_argument("--version", action="version", version=f"secura {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    command = parser.parse_known_args(arguments[:1])[0].command
    if command is None:
        parser.print_help()
        return 2
    module = importlib.import_module(COMMANDS[command][0])
    return module.main(arguments[1:]) or 0


__all__ = ["main"]
