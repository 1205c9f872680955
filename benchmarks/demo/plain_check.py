"""Loads a merged checkpoint with transformers alone and records what it says.

Run as a script in a process of its own, in which this project and `peft` cannot be imported:
`python plain_check.py REQUEST.json RESULT_FOLDER`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(request_file: str, result_folder: str) -> None:
    """Writes `logits.safetensors` and `answer.json` for the checkpoint a request names."""
    for blocked in ("secura", "secura_kernels", "benchmarks", "peft"):
        sys.modules[blocked] = None  # type: ignore[assignment]
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([request["input_ids"]])).logits
        prompt = torch.tensor([request["prompt_ids"]])
        answer = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request["max_new_tokens"],
            do_sample=False,
        )
    text = tokenizer.decode(answer[0, prompt.shape[1] :], skip_special_tokens=True)
    folder = Path(result_folder)
    save_file({"logits": logits.contiguous()}, folder / "logits.safetensors")
    (folder / "answer.json").write_text(json.dumps({"answer": text.strip()}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
