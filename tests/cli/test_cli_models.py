"""`secura merge`, `secura generate` and `secura doctor`."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from cli_fixtures import fails, train_flags
from peft import get_peft_model
from tokenizers import processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from secura import SecuraModel
from secura.cli import generate, main
from secura.tuner import SecuraLayer

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


@pytest.mark.parametrize(
    ("settings", "merges"),
    [({"norm": "weight"}, True), ({"norm": "none", "stochastic_rounding": True}, True),
     ({"norm": "channel"}, False)],
)  # fmt: skip
def test_what_would_form_a_weight_for_each_token_is_merged_to_answer(settings, merges):
    model = tiny.adapted(tiny.llama(dtype=torch.bfloat16), **settings)
    answering = generate.settle(model)
    assert (answering is not model) is merges
    assert any(isinstance(part, SecuraLayer) for part in answering.modules()) is not merges


def saved(model, base, folder):
    """A base's folder with the tokenizer of `base`, and one of an adapter with a trained bias."""
    model.save_pretrained(folder / "base")
    PreTrainedTokenizerFast.from_pretrained(base).save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = tiny.adapted(model, norm="channel", train_bias=True)
    model.save_pretrained(folder / "adapter")
    return ["merge", "--adapter", folder / "adapter", "--output_dir", folder / "merged"], model


def test_a_trained_bias_outlasts_the_merge_of_a_base_with_biases(base, tmp_path):
    argv, model = saved(tiny.llama(bias=True), base, tmp_path)
    assert main([*map(str, argv)]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


def test_a_trained_bias_that_would_be_lost_is_not_merged(base, tmp_path, capfd):
    argv, _ = saved(tiny.llama(bias=False), base, tmp_path)
    parts = ("train_bias=True", "4 of its layers", "layers.0.self_attn.q_proj", "train_bias=False")
    fails(argv, capfd, *parts)
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_fails_leaves_nothing(trained, tmp_path, capfd, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    argv = ["merge", "--adapter", trained, "--output_dir", tmp_path / "merged"]
    fails(argv, capfd, "no space left")
    assert not list(tmp_path.iterdir())


def test_a_lora_is_not_taken_for_an_adapter_of_securas(base, data, tmp_path, capfd):
    adapter, lora = tmp_path / "adapter", tmp_path / "lora"
    assert main(train_flags(base, data, adapter, "--max_steps", 1, "--norm", "channel")) == 0
    assert main(["export_lora", "--adapter", str(adapter), "--output_dir", str(lora)]) == 0
    for command in (["generate", "--prompt", PROMPT], ["merge", "--output_dir", tmp_path / "m"]):
        fails([*command, "--adapter", lora], capfd, "is a LORA adapter", "peft.PeftModel")


def test_a_base_of_another_width_is_refused_whatever_is_asked(base, tmp_path, capfd):
    """Rows and columns of the narrower model would fit into it."""
    narrow = get_peft_model(tiny.llama(), tiny.config(norm="none"))
    narrow.save_pretrained(tmp_path / "adapter")
    tiny.llama(hidden=48).save_pretrained(tmp_path / "wide")
    PreTrainedTokenizerFast.from_pretrained(base).save_pretrained(tmp_path / "wide")
    argv = ["merge", "--adapter", tmp_path / "adapter", "--model", tmp_path / "wide"]
    for flags in ([], ["--no_check_base"]):
        out = ["--output_dir", tmp_path / "merged", *flags]
        fails([*argv, *out], capfd, "q_proj", "a weight of another shape")
    assert not (tmp_path / "merged").exists()


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
    onto = ["--adapter", trained, "--model", other]
    ways = ("layers.1.mlp.up_proj", "check_base=False", "--no_check_base")
    fails(["merge", *onto, *out], capfd, *ways)
    fails(["generate", *onto, "--prompt", PROMPT], capfd, *ways)
    assert not (tmp_path / "merged").exists()
    assert main([*map(str, ["merge", *onto, *out]), "--no_check_base"]) == 0
    asked = ["--prompt", PROMPT, "--max_new_tokens", "5"]
    capfd.readouterr()
    assert main([*map(str, ["generate", *onto]), *asked, "--no_check_base"]) == 0
    from_adapter = capfd.readouterr().out
    assert main(["generate", "--model", str(tmp_path / "merged"), *asked]) == 0
    assert capfd.readouterr().out == from_adapter


def test_an_activation_norm_is_merged_only_when_asked(base, data, tmp_path, capfd):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    flags = ("--norm", "activation", "--max_steps", 1, "--save_strategy", "no")
    assert main(train_flags(base, data, adapter, *flags)) == 0
    argv = ["merge", "--adapter", str(adapter), "--output_dir", str(merged)]
    fails(argv, capfd, "norm='activation'", "--allow_inexact")
    assert not merged.exists()
    assert main([*argv, "--allow_inexact"]) == 0


def test_generating(trained, base, capfd, monkeypatch):
    asked = ["--prompt", PROMPT, "--max_new_tokens", "5"]
    adapter = ["--adapter", str(trained)]
    assert main(["generate", "--model", str(base), *asked]) == 0
    from_base = capfd.readouterr().out.split()
    assert main(["generate", *adapter, *asked]) == 0
    from_adapter = capfd.readouterr().out.split()
    assert 0 < len(from_base) <= 5 and from_base != from_adapter
    answers, answer = [], generate.answer
    monkeypatch.setattr(
        generate, "answer", lambda *args: answers.append(answer(*args)) or answers[-1]
    )
    assert main(["generate", *adapter, *asked, "--compare"]) == 0
    assert [text.split() for text in answers] == [from_base, from_adapter]
    table = capfd.readouterr().out
    assert all(word in table for word in ("base", "adapter", *from_base, *from_adapter))


@pytest.mark.parametrize("flags", [[], ["--compare"], ["--temperature", "2", "--compare"]])
def test_the_norm_weight_is_merged_to_answer_and_answers_the_same(
    flags, trained, capfd, monkeypatch
):
    argv = ["generate", "--adapter", str(trained), "--prompt", PROMPT, "--prompt", "apples"]
    argv += ["--max_new_tokens", "9", *flags]
    merges, merge = [], SecuraModel.merge_and_unload
    monkeypatch.setattr(
        SecuraModel, "merge_and_unload", lambda model: merges.append(1) or merge(model)
    )
    assert main(argv) == 0
    merged = capfd.readouterr().out
    monkeypatch.setattr("secura.cli.generate.settle", lambda model: model)
    assert main(argv) == 0
    assert merged == capfd.readouterr().out
    assert merges == [1]


def test_a_norm_weight_that_cannot_be_merged_answers_all_the_same(base, tmp_path, capfd):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.lm_head.weight, model.config.tie_word_embeddings = model.model.embed_tokens.weight, True
    model.save_pretrained(tmp_path / "base")
    PreTrainedTokenizerFast.from_pretrained(base).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tiny.adapted(model, target_modules=["lm_head"]).save_pretrained(tmp_path / "adapter")
    argv = ["--adapter", str(tmp_path / "adapter")]
    fails(
        ["merge", *argv, "--output_dir", tmp_path / "merged"],
        capfd,
        "lm_head",
        "weight of its own first",
    )
    assert main(["generate", *argv, "--prompt", PROMPT, "--max_new_tokens", "5"]) == 0
    assert capfd.readouterr().out.split()


def test_a_prompt_begins_once(base):
    """A chat template writes the start token itself; a plain prompt is given it."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    begins = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = begins
    tokenizer.chat_template = "{{ bos_token }} {{ messages[0]['content'] }}"
    seen = []
    answers = lambda input_ids, **_: seen.append(input_ids[0].tolist()) or input_ids  # noqa: E731
    model = SimpleNamespace(device="cpu", generate=answers)
    for raw in (False, True):
        args = SimpleNamespace(raw=raw, temperature=0.0, max_new_tokens=1)
        generate.answer(model, tokenizer, "how many apples", args)
    assert seen[0] == seen[1] and seen[0].count(1) == 1


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
        ("--model {base} --prompt=", "--prompt is empty: give a question"),
        ("--model {base} --prompt hi --max_new_tokens 0", "--max_new_tokens"),
        ("--model {base} --prompt hi --temperature -1", "--temperature"),
        ("--model {base} --prompt hi --device hyper", "--device hyper: torch cannot use it here"),
        ("--model {base} --prompt hi --device xpu:7", "--device xpu:7: torch cannot use it here"),
        ("--adapter adapter --prompt hi", "adapter 'adapter': no such folder; give"),
        ("--model {base} --prompt hi --sed 1", "did you mean --seed?"),
    ],
)
def test_bad_generation(flags, part, base, capfd):
    fails(["generate", *flags.format(base=base).split()], capfd, part)


def test_doctor_checks_every_op(capfd):
    assert main(["doctor"]) == 0
    shown = capfd.readouterr().out
    ops = ("secura_linear", "secura_add", "effective_weight")
    words = (*ops, "torch", "21 of 21 checks passed", "because")
    assert all(word in shown for word in words)


def test_doctor_notices_a_wrong_or_failing_op(capfd, monkeypatch):
    from secura_kernels import api
    from secura_kernels.inspection import selfcheck

    right = api.secura_linear

    def wrong(*args, **kwargs):
        return right(*args, **kwargs) * 1.01

    def broken(*args, **kwargs):
        raise RuntimeError("it broke")

    monkeypatch.setattr(api, "secura_linear", wrong)
    monkeypatch.setattr(api, "secura_add", broken)
    monkeypatch.setattr(selfcheck, "OPS", (("secura_linear", "weight"), ("secura_add", "none")))
    assert main(["doctor"]) == 1
    shown = capfd.readouterr().out
    assert shown.count("FAILED") == 3 and "it broke" in shown
    assert "2 of 5 checks passed" in shown  # 1% lies within what bf16 may err


def test_doctor_notices_a_gradient_of_nan(monkeypatch):
    from secura_kernels import autograd
    from secura_kernels.inspection.selfcheck import self_check

    right = autograd.project.backward
    monkeypatch.setattr(autograd.project, "backward", lambda *given: right(*given) * float("nan"))
    assert {one.passed for one in self_check() if one.op != "effective_weight"} == {False}


def test_doctor_notices_an_anchor_that_moves_something(capfd, monkeypatch):
    from secura.cli import doctor

    monkeypatch.setattr(doctor, "anchor_error", lambda torch: 2 * doctor.ANCHOR_LIMIT)
    assert main(["doctor"]) == 1
    shown = capfd.readouterr().out
    assert "output, FAILED" in shown and "20 of 21 checks passed" in shown


def test_doctor_when_an_implementation_is_forced(capfd, monkeypatch):
    monkeypatch.setenv("SECURA_IMPL", "fastest")
    fails(["doctor"], capfd, "unknown impl 'fastest'")
    if not torch.cuda.is_available():
        monkeypatch.setenv("SECURA_IMPL", "triton")
        assert main(["doctor"]) == 1
        assert "no implementation can run" in capfd.readouterr().out


LAYER = "doctor --layer 4096x14336 --tokens 8192 --r 128 --norm channel --chip"


def test_doctor_counts_what_a_layer_takes(capfd):
    assert main([*LAYER.split(), "h100"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["shape"] | {"n": 14336, "k": 4096, "m": 128, "t": 8192} == found["shape"]
    assert found["choices"] == {"out": "x W'ᵀ", "∂x": "g W'", "W'": "rebuilt"}
    product = 2 * 8192 * 4096 * 14336 / 1e9
    assert found["forward"]["product"]["gflop"] == pytest.approx(product, rel=1e-4)
    steps = [step for part in ("forward", "backward") for step in found[part].values()]
    frozen = 2 * found["forward"]["product"]["us"]
    total = sum(step["us"] for step in steps)
    assert found["over_frozen"] == pytest.approx(total / frozen, abs=1e-3)
    assert main([*LAYER.split(), "3.0,798"]) == 0
    assert json.loads(capfd.readouterr().out) == found
    assert main([*LAYER.split(), "30,798"]) == 0
    assert 1 < json.loads(capfd.readouterr().out)["over_frozen"] < found["over_frozen"]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (f"{LAYER} h900", "choose one of h100, h200, or give TB/s,TFLOP/s"),
        (f"{LAYER} h100 --norm wheight", "--norm wheight: choose one of none"),
        (f"{LAYER} h100 --layer 4096", "e.g. 4096x14336"),
        (f"{LAYER} h100 --tokens 0", "sizes of 1 or more"),
        (f"{LAYER} h100 --layer 64x32 --r 33", "--r 33 must be at most 32"),
        ("doctor --tokens 100", "--tokens goes with --layer"),
    ],
)
def test_bad_layers_of_doctor(flags, part, capfd):
    fails(flags.split(), capfd, part)
