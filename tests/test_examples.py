"""Every example runs on a CPU in seconds, and does what its first line says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import secura

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    """The module of one example."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_example_is_run_here_and_short():
    files = sorted(EXAMPLES.glob("*.py"))
    assert [path.stem for path in files] == ["continual", "finetune", "layer", "serve_lora"]
    for path in files:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 60, path.name


@pytest.mark.parametrize("norm", ["none", "channel", "weight"])
def test_layer(norm):
    first, last = example("layer").main(["--norm", norm])
    assert last < 0.05 * first


def test_finetune(base, tmp_path):
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    row = {"prompt": "how many apples are left", "completion": " the answer is 7"}
    data.write_text(f"{json.dumps(row)}\n" * 8)
    flags = f"--model {base} --dataset {data} --output_dir {out} --r 4 --max_steps 3 --use_cpu"
    assert example("finetune").main([*flags.split(), "--learning_rate", "0.02"]) == out
    ids = torch.tensor([[1, 5, 7, 9]])
    with torch.no_grad():
        plain, merged = (
            AutoModelForCausalLM.from_pretrained(path)(input_ids=ids).logits
            for path in (base, out / "merged")
        )
        model = AutoModelForCausalLM.from_pretrained(base)
        adapted = secura.from_pretrained(model, out / "adapter")(input_ids=ids).logits
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4)
    assert (plain - adapted).abs().max() > 1e-3


def test_continual():
    losses = example("continual").main(["--steps", "40"])
    assert losses["after the first"] < 0.1 * losses["before"]
    assert losses["after the second"] < 0.5 * losses["before"]


def test_serve_lora(tmp_path):
    folder = tmp_path / "lora"
    assert example("serve_lora").main(["--output_dir", str(folder)]) < 1e-5
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    names = load_file(folder / "adapter_model.safetensors")
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
