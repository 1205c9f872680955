"""From a trained adapter to a plain checkpoint: reload, merge, save, load without this package."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.demo.text import PROMPT, Example
from secura._extras import require

LOGIT_TOLERANCE = 1e-3
MAX_NEW_TOKENS = 160


class MergeError(RuntimeError):
    """The merged checkpoint does not say what the adapted model says."""


@torch.inference_mode()
def example_logits(model: Any, example: Example) -> torch.Tensor:
    """fp32 logits of one text, `[T, V]`, with no autocast."""
    was_training = model.training
    model.eval()
    logits = model(input_ids=torch.tensor([example.ids])).logits[0]
    model.train(was_training)
    return logits


@torch.inference_mode()
def generate_answer(model: Any, tokenizer: Any, question: str) -> str:
    """The model's greedy answer to a question in the form it was trained on."""
    model.eval()
    prompt = tokenizer(PROMPT.format(question=question), return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    start = prompt["input_ids"].shape[1]
    return tokenizer.decode(output[0, start:], skip_special_tokens=True).strip()


def merge_and_check(
    base: Any, tokenizer: Any, adapter: Path, target: Path, example: Example, question: str
) -> dict[str, Any]:
    """Reloads `adapter` on `base`, merges, saves to `target`, and checks it in a new process.

    The new process loads the checkpoint with transformers alone; `secura` and `peft` cannot be
    imported there.

    Args:
        base: the model the adapter was trained on; left as it is.
        tokenizer: saved beside the merged model.
        adapter: folder of the saved adapter.
        target: folder of the merged checkpoint; replaced whole, and only once it is checked.
        example: the text whose logits are compared.
        question: what the merged model is asked.

    Returns:
        `max_logit_difference` between the reloaded adapter and the merged checkpoint, the
        `tolerance`, `max_logit` for scale, the checkpoint's `bytes` and the `answer`.

    Raises:
        MergeError: the difference is above `LOGIT_TOLERANCE`, or the new process failed.
    """
    peft = require("peft", "bench")
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), adapter).eval()
    adapted = example_logits(model, example)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".merged-") as scratch:
        folder = Path(scratch)
        made = folder / "merged"
        model.merge_and_unload().save_pretrained(made)
        tokenizer.save_pretrained(made)
        del model
        request = {
            "model": str(made),
            "threads": torch.get_num_threads(),
            "input_ids": list(example.ids),
            "prompt_ids": tokenizer(PROMPT.format(question=question))["input_ids"],
            "max_new_tokens": MAX_NEW_TOKENS,
        }
        plain, answer = _ask_plain(request, folder)
        difference = (plain - adapted).abs().max().item()
        if not difference <= LOGIT_TOLERANCE:
            raise MergeError(
                f"the merged checkpoint's logits differ from the adapter's by {difference:.2e}, "
                f"more than {LOGIT_TOLERANCE:.0e}; please report this with results.json"
            )
        shutil.rmtree(target, ignore_errors=True)
        os.replace(made, target)
    return {
        "max_logit_difference": difference,
        "max_logit": adapted.abs().max().item(),
        "tolerance": LOGIT_TOLERANCE,
        "bytes": sum(file.stat().st_size for file in target.iterdir()),
        "answer": answer,
    }


def _ask_plain(request: dict[str, Any], folder: Path) -> tuple[torch.Tensor, str]:
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
