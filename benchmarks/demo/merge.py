"""From a trained adapter to a plain checkpoint: reload, merge, save, load without this package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor

import secura.tuner  # noqa: F401, PEFT knows SECURA from here on

TOLERANCE = 1e-3
ANSWER_TOKENS = 160
_BYTES_A_PARAMETER = 5


class MergeError(RuntimeError):
    """The merged checkpoint does not say what the adapted model says."""


def merge_and_check(
    base: Any, tokenizer: Any, adapter: Path, target: Path, text: str, prompt: str
) -> dict[str, Any]:
    """Reloads `adapter` on `base`, merges, saves to `target`, and checks it in a new process.

    The new process loads the checkpoint with transformers alone.

    Args:
        base: a fresh model the adapter was trained on; it is the merged one afterwards.
        tokenizer: saved beside the merged model.
        adapter: folder of the saved adapter.
        target: folder of the merged checkpoint; replaced whole, and only once it is checked.
        text: whose logits are compared.
        prompt: what the merged model is asked.

    Returns:
        `max_logit_difference` between the reloaded adapter and the merged checkpoint, the
        `tolerance`, `max_logit` for scale, the checkpoint's `bytes` and the `answer`.

    Raises:
        MergeError: the difference is above `TOLERANCE`, or the new process failed.
        OSError: the disk has no room.
    """
    need = _BYTES_A_PARAMETER * sum(value.numel() for value in base.parameters())
    if (free := shutil.disk_usage(target.parent).free) < need:
        raise OSError(
            f"the merged model needs {need / 1e6:,.0f} MB in {target.parent}, where "
            f"{free / 1e6:,.0f} MB are free; make room, then continue with --resume"
        )
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    ids = tokenizer(text)["input_ids"]
    with torch.inference_mode():
        adapted = model(input_ids=torch.tensor([ids])).logits[0]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".merged-") as scratch:
        folder = Path(scratch)
        made = folder / "merged"
        model.merge_and_unload().save_pretrained(made)
        tokenizer.save_pretrained(made)
        request = {
            "model": str(made),
            "threads": torch.get_num_threads(),
            "input_ids": ids,
            "prompt_ids": tokenizer(prompt)["input_ids"],
            "max_new_tokens": ANSWER_TOKENS,
        }
        plain, answer = _ask_plain(request, folder)
        difference = (plain - adapted).abs().max().item()
        if not difference <= TOLERANCE:
            raise MergeError(
                f"the merged checkpoint's logits differ from the adapter's by {difference:.2e}, "
                f"more than {TOLERANCE:.0e}; please report this with results.json"
            )
        shutil.rmtree(target, ignore_errors=True)
        os.replace(made, target)
    return {
        "max_logit_difference": difference,
        "max_logit": adapted.abs().max().item(),
        "tolerance": TOLERANCE,
        "bytes": sum(file.stat().st_size for file in target.iterdir()),
        "answer": answer,
    }


def _ask_plain(request: dict[str, Any], folder: Path) -> tuple[Tensor, str]:
    """Logits `[T, V]` and answer of a process that has transformers and not this package."""
    request_file = folder / "request.json"
    request_file.write_text(json.dumps(request), encoding="utf-8")
    script = Path(__file__).with_name("plain_check.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(request_file), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise MergeError(f"transformers could not load the merged checkpoint: {last}")
    logits = load_file(folder / "logits.safetensors")["logits"][0]
    return logits, json.loads((folder / "answer.json").read_text(encoding="utf-8"))["answer"]


__all__ = ["ANSWER_TOKENS", "MergeError", "merge_and_check"]
