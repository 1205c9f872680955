"""`--push_to_hub` of `secura train`: the published adapter, in one upload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secura._extras import require
from secura.cli.errors import UserError, one_line
from secura.wording import plain

LEFT_OUT = (".*", "_*", "checkpoint-*", "training_args.bin")
"""What may be in an output folder beside a finished adapter: no upload has it."""


def check_strategy(strategy: Any) -> None:
    """Refuse a trainer's own uploads: it copies adapters of checkpoints out for them.

    Raises:
        UserError: for any strategy but the upload at the end.
    """
    name = plain(strategy)
    if name != "end":
        raise UserError(
            f"--hub_strategy {name} uploads an adapter that is not finished, and leaves it in "
            "--output_dir: leave it out, and the finished one is uploaded"
        )


def push(trainer: Any) -> None:
    """Upload the adapter that a run published.

    Raises:
        UserError: it did not arrive; the folder stays as it is.
    """
    if not trainer.is_world_process_zero():
        return
    args, output = trainer.args, Path(trainer.args.output_dir)
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    name_no_folder(output / "README.md")
    try:
        require("huggingface_hub", "train").HfApi().upload_folder(
            repo_id=trainer.hub_model_id,
            folder_path=output,
            commit_message="End of training",
            token=args.hub_token,
            revision=args.hub_revision,
            ignore_patterns=list(LEFT_OUT),
        )
    except Exception as error:  # the hub's clients raise no narrower one
        raise UserError(
            f"the adapter is in {output}, but not on the hub: {one_line(error)}; where checkpoints "
            "were saved, the same flags with --resume_from_checkpoint upload it again"
        ) from error


def name_no_folder(card: Path) -> None:
    """Take a base that is a folder out of a model card's header, in which the hub refuses one."""
    if not card.is_file():
        return
    content = require("huggingface_hub", "train").ModelCard.load(card)
    base = content.data.base_model
    if isinstance(base, str) and Path(base).is_dir():
        content.data.base_model = None
        content.data.tags = [tag for tag in content.data.tags or [] if base not in tag]
        content.save(card)


__all__ = ["check_strategy", "push"]
