"""SECURA and LoRA learn GSM8K side by side on this machine's CPU.

Leaves a table, a picture, a report, both adapters and a merged plain model.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from secura.cli.errors import USER_ERRORS, one_line
from secura.cli.parser import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; what goes wrong is raised."""
    parser = Parser(prog="python -m benchmarks.demo", description=__doc__)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("demo-output"), help="where everything is written")
    add("--overwrite_output_dir", action="store_true", help="remove an earlier demo there first")
    add("--resume", action="store_true", help="continue a stopped demo with the same settings")
    add("--steps", type=int, help="steps of each method (as many as --max_seconds allow)")
    add("--max_seconds", type=float, default=220.0, help="without --steps (%(default)s)")
    add("--learning_rate", type=float, default=5e-4, help="peak rate of SECURA (%(default)s)")
    add("--lora_learning_rate", type=float, default=1e-3, help="peak rate of LoRA (%(default)s)")
    add("--seed", type=int, default=0, help="random seed (%(default)s)")
    flags = vars(parser.parse_args(argv))

    from transformers.utils import logging

    from benchmarks.demo.run import Asked, run

    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    output_dir, resume = flags.pop("output_dir").expanduser(), flags.pop("resume")
    overwrite = flags.pop("overwrite_output_dir")
    run(output_dir, Asked(**flags), overwrite=overwrite, resume=resume)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except USER_ERRORS as error:
        sys.exit(f"demo: {one_line(error)}")
