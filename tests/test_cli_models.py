"""`secura merge`, `secura generate` and `secura doctor`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cli_fixtures import fails, train_flags
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from secura.cli import main

PROMPT = "ann has 3 apples and eats 1"


def logits(model):
    with torch.inference_mode():
        return model(torch.arange(3, 20)[None]).logits


PLAIN = """
import sys
sys.modules["secura"] = sys.modules["secura_kernels"] = sys.modules["peft"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.inference_mode():
    torch.save(model(torch.arange(3, 20)[None]).logits, sys.argv[2])
"""


def test_the_merged_model_needs_no_secura(trained, base, tmp_path):
    from peft import PeftModel

    output, answer = tmp_path / "deep" / "merged", tmp_path / "logits.pt"
    assert main(["merge", "--adapter", str(trained), "--output_dir", str(output)]) == 0
    assert not any(path.name.startswith("adapter") for path in output.iterdir())
    subprocess.run([sys.executable, "-c", PLAIN, output, answer], check=True, cwd=tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(base)
    unadapted = logits(plain)
    expected = logits(PeftModel.from_pretrained(plain, trained))
    torch.testing.assert_close(torch.load(answer), expected, rtol=1e-4, atol=1e-4)
    assert (expected - unadapted).abs().max() > 1e-2


def test_merging_in_another_dtype_and_from_a_named_base(trained, base, tmp_path):
    argv = ["merge", "--adapter", trained, "--model", base, "--output_dir", tmp_path / "merged"]
    assert main([*map(str, argv), "--dtype", "bfloat16"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16


def test_a_merge_that_fails_leaves_nothing(trained, tmp_path, capfd, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    argv = ["merge", "--adapter", trained, "--output_dir", tmp_path / "merged"]
    fails(argv, capfd, "no space left")
    assert not list(tmp_path.iterdir())


def test_bad_merges(trained, base, tmp_path, capfd):
    out = ["--output_dir", tmp_path / "merged"]
    fails(["merge", "--adapter", base, *out], capfd, "no adapter_config.json")
    fails(["merge", "--adapter", tmp_path / "none", *out], capfd, "no such folder")
    fails(["merge", *out], capfd, "--adapter_name_or_path")
    fails(["merge", "--adapter", trained, "--output_dir", trained], capfd, "not empty")
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(-1)
    model.save_pretrained(other)
    PreTrainedTokenizerFast.from_pretrained(base).save_pretrained(other)
    fails(["merge", "--adapter", trained, "--model", other, *out], capfd, "layers.1.mlp.up_proj")
    assert not (tmp_path / "merged").exists()


def test_an_activation_norm_is_merged_only_when_asked(base, data, tmp_path, capfd):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    flags = ("--norm", "activation", "--max_steps", 1, "--save_strategy", "no")
    assert main(train_flags(base, data, adapter, *flags)) == 0
    argv = ["merge", "--adapter", str(adapter), "--output_dir", str(merged)]
    fails(argv, capfd, "norm='activation'", "--allow_inexact")
    assert not merged.exists()
    assert main([*argv, "--allow_inexact"]) == 0


def test_generating(trained, base, capfd):
    asked = ["--prompt", PROMPT, "--max_new_tokens", "5"]
    adapter = ["--adapter", str(trained)]
    assert main(["generate", "--model", str(base), *asked]) == 0
    from_base = capfd.readouterr().out.split()
    assert main(["generate", *adapter, *asked]) == 0
    from_adapter = capfd.readouterr().out.split()
    assert 0 < len(from_base) <= 5 and from_base != from_adapter
    assert main(["generate", *adapter, *asked, "--compare"]) == 0
    table = capfd.readouterr().out
    assert all(word in table for word in ("base", "adapter", *from_base, *from_adapter))


def test_sampling_is_seeded(base, capfd):
    asked = f"generate --model {base} --prompt apples --max_new_tokens 9 --temperature 2".split()
    outputs = []
    for seed in ("1", "1", "2"):
        assert main([*asked, "--seed", seed]) == 0
        outputs.append(capfd.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--prompt hi", "--model_name_or_path"),
        ("--model {base} --prompt hi --compare", "--compare needs"),
        ("--model {base}", "--prompt"),
        ("--model {base} --prompt=", "--prompt is empty"),
        ("--model {base} --prompt hi --max_new_tokens 0", "--max_new_tokens"),
        ("--model {base} --prompt hi --temperature -1", "--temperature"),
        ("--model {base} --prompt hi --device hyper", "device"),
        ("--model {base} --prompt hi --sed 1", "did you mean --seed?"),
    ],
)
def test_bad_generation(flags, part, base, capfd):
    fails(["generate", *flags.format(base=base).split()], capfd, part)


def test_doctor_checks_every_op(capfd):
    assert main(["doctor"]) == 0
    shown = capfd.readouterr().out
    ops = ("lowrank_linear", "lowrank_add", "weight_norm_linear", "activation_norm")
    words = (*ops, "activation_linear", "torch", "18 of 18 checks passed", "because")
    assert all(word in shown for word in words)


def test_doctor_notices_a_wrong_or_failing_op(capfd, monkeypatch):
    from secura_kernels import doctor

    def wrong(layer, options):
        return doctor._weight(layer, options) * 1.01

    def broken(layer, options):
        raise RuntimeError("it broke")

    monkeypatch.setattr(doctor, "OPS", (("wrong", "weight", wrong), ("broken", "none", broken)))
    assert main(["doctor"]) == 1
    shown = capfd.readouterr().out
    assert shown.count("FAILED") == 3 and "it broke" in shown
    assert "1 of 4 checks passed" in shown  # 1% lies within what bf16 may err


def test_doctor_when_an_implementation_is_forced(capfd, monkeypatch):
    monkeypatch.setenv("SECURA_IMPL", "fastest")
    fails(["doctor"], capfd, "unknown impl 'fastest'")
    if not torch.cuda.is_available():
        monkeypatch.setenv("SECURA_IMPL", "triton")
        assert main(["doctor"]) == 1
        assert "no implementation can run" in capfd.readouterr().out
