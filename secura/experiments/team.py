"""The processes `accelerate launch` starts: they train a cell together, the first keeps it."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from secura._extras import require


class Team:
    """One process, or several that decide alike."""

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self._state = None
        if self.size > 1:
            torch = require("torch", "experiments")
            accelerate = require("accelerate", "experiments")
            self._state = accelerate.PartialState(
                cpu=not torch.cuda.is_available(), timeout=timedelta(hours=24)
            )

    @property
    def is_main(self) -> bool:
        """Whether this process scores and writes."""
        return self._state is None or self._state.is_main_process

    def agree(self, value: Any) -> Any:
        """The first process's `value`, in every process."""
        if self._state is None:
            return value
        values = [value]
        require("accelerate.utils", "experiments").broadcast_object_list(values)
        return values[0]

    def wait(self) -> None:
        """Until every process is here."""
        if self._state is not None:
            self._state.wait_for_everyone()


__all__ = ["Team"]
