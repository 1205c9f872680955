"""The demo on a tiny random model: everything it does with the real one, in a few steps."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from benchmarks.demo import report, stages
from benchmarks.demo import run as demo
from benchmarks.demo.settings import Settings, Sources
from benchmarks.demo.text import answer_examples, collate, news_examples, training_batches
from benchmarks.demo.train import DivergedError, evaluate, rate_factor, token_losses, train
from secura.cli.errors import UserError

WORDS = ["<pad>", "<eos>", "<unk>", "Question:", "Answer:", "plus", "is", *map(str, range(20))]
SETTINGS = Settings(
    steps=3, batch_size=2, eval_examples=5, news_articles=3, news_tokens=6, dtype="fp32"
)


def make_tokenizer():
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return FastTokenizer(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=128, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=1, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def sums(numbers):
    return [
        {"question": f"{a} plus {b}", "answer": f"{a} plus {b} is {a + b}"}
        for a in numbers
        for b in range(a)
    ]


TINY = Sources(
    load_model=lambda: (make_model(), make_tokenizer()),
    train_rows=lambda: sums(range(1, 8)),
    test_rows=lambda: sums(range(8, 10)),
    news=lambda: ["1 is 2 is 3 is 4 is 5"] * 4 + ["too short"],
    assets=("smollm2-135m", "gsm8k-train"),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder the demo has filled."""
    folder = tmp_path_factory.mktemp("bench") / "out"
    demo.run(folder, SETTINGS, sources=TINY)
    return folder


@pytest.fixture
def results(finished):
    return json.loads((finished / "results.json").read_text())


def test_everything_is_written_and_nothing_left_over(finished):
    assert sorted(path.name for path in finished.iterdir()) == sorted([*demo.FILES, *demo.FOLDERS])
    for name in ("lora", "secura"):
        assert {"adapter_config.json", "adapter_model.safetensors", "record.json"} <= {
            path.name for path in (finished / name).iterdir()
        }
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_holds_the_figures_of_the_results(finished, results):
    written = (finished / "report.md").read_text()
    base = results["base"]
    for name, method in results["methods"].items():
        row = next(line for line in written.splitlines() if line.startswith(f"| {method['title']}"))
        last = method["evaluations"][-1]
        figures = [re.match(r"[\d.,]+", cell.strip())[0] for cell in row.split("|")[2:-1]]
        assert figures == [
            f"{last['gsm8k']:.3f}",
            f"{last['news']:.3f}",
            f"{method['trainable_parameters']:,}",
            f"{method['adapter_bytes']:,}",
            f"{method['seconds_per_step']:.2f}",
        ]
        weights = finished / name / "adapter_model.safetensors"
        assert method["adapter_bytes"] == weights.stat().st_size
        assert [point["step"] for point in method["evaluations"]] == [1, 3]
        assert len(method["train_losses"]) == len(method["step_seconds"]) == SETTINGS.steps
    assert f"| base model | {base['gsm8k']:.3f} | {base['news']:.3f} |" in written
    assert f"{results['merge']['max_logit_difference']:.1e}" in written
    for asset in results["assets"]:
        assert asset["sha256"] in written and asset["licence"] in written
    assert "dequantised from GGUF Q4_1" in written
    assert results["versions"]["torch"] == torch.__version__


def test_methods_differ_from_the_base_and_the_merged_model_is_plain(finished, results):
    for method in results["methods"].values():
        assert method["evaluations"][-1]["gsm8k"] != results["base"]["gsm8k"]
    with safe_open(finished / "merged" / "model.safetensors", "pt") as weights:
        assert not [key for key in weights.keys() if "secura" in key]  # noqa: SIM118
    merged = AutoModelForCausalLM.from_pretrained(finished / "merged")
    assert not torch.equal(
        merged.model.layers[0].self_attn.q_proj.weight,
        make_model().model.layers[0].self_attn.q_proj.weight,
    )
    assert results["merge"]["max_logit_difference"] <= results["merge"]["tolerance"]


def test_a_folder_in_use_is_refused_and_left_alone(finished, tmp_path):
    before = (finished / "results.json").read_text()
    with pytest.raises(UserError, match=r"not empty.*--resume.*--overwrite_output_dir"):
        demo.run(finished, SETTINGS, sources=TINY)
    with pytest.raises(UserError, match="was begun with --seed 0, not 1"):
        demo.run(finished, replace(SETTINGS, seed=1), resume=True, sources=TINY)
    with pytest.raises(UserError, match="exclude each other"):
        demo.run(finished, SETTINGS, resume=True, overwrite=True, sources=TINY)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        demo.main(["--output_dir", str(tmp_path)])
    with pytest.raises(UserError, match="not empty"):
        demo.run(tmp_path, SETTINGS, resume=True, sources=TINY)
    assert (finished / "results.json").read_text() == before


def test_a_stopped_demo_keeps_its_finished_methods(finished, results, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    for name in ("results.json", "report.md", "curves.png"):
        (folder / name).unlink()
    shutil.rmtree(folder / "secura")
    trained = []
    usual = stages.train
    monkeypatch.setattr(
        stages, "train", lambda model, *rest: trained.append(model) or usual(model, *rest)
    )
    merge = {key: value for key, value in results["merge"].items() if key != "seconds"}
    monkeypatch.setattr(stages.serve, "merge_and_check", lambda *_: merge)
    again = demo.run(folder, SETTINGS, resume=True, sources=TINY)
    assert len(trained) == 1
    assert again["methods"]["lora"] == results["methods"]["lora"]
    for key in ("train_losses", "evaluations"):
        assert again["methods"]["secura"][key] == results["methods"]["secura"][key]
    monkeypatch.setattr(stages, "load", None)
    assert demo.run(folder, SETTINGS, resume=True, sources=TINY) == again


def test_overwriting_removes_the_earlier_demo_and_nothing_else(finished, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    (folder / "note.txt").write_text("mine")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "train_method", stop)
    with pytest.raises(KeyboardInterrupt):
        demo.run(folder, SETTINGS, overwrite=True, sources=TINY)
    assert sorted(path.name for path in folder.iterdir()) == [
        "note.txt",
        "plan.json",
        "settings.json",
    ]


def test_steps_are_fitted_into_the_time(tmp_path, monkeypatch):
    material = stages.load(SETTINGS, TINY)
    monkeypatch.setattr(stages.serve, "generate_answer", lambda *_: "")
    board = Silent()
    found = []
    for seconds in (1.0, 1e6):
        path = tmp_path / f"{seconds}.json"
        settings = replace(SETTINGS, steps=None, max_seconds=seconds)
        found.append(stages.plan(path, settings, material, board)["steps"])
    assert found == [stages.MIN_STEPS, stages.MAX_STEPS]


class Silent:
    """A board that shows nothing."""

    seconds = 0.0

    def stage(self, name):
        pass

    def advance(self, units=1, detail=None):
        pass

    def say(self, line):
        pass


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--learning_rate", "-1"], "must be above 0"),
        (["--step", "3"], "did you mean --steps"),
        (["--dtype", "int8"], "invalid choice"),
    ],
)
def test_bad_flags_are_told_before_anything_is_written(tmp_path, flags, told):
    with pytest.raises((UserError, ValueError), match=told):
        demo.main(["--output_dir", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_too_few_examples_name_the_flag(tmp_path):
    with pytest.raises(UserError, match=r"only 17 test problems .* --eval_examples 99"):
        stages.load(replace(SETTINGS, eval_examples=99), TINY)


def test_the_loss_is_transformers_own_on_the_answer():
    model, tokenizer = make_model(), make_tokenizer()
    examples = answer_examples(sums([5, 12]), tokenizer, 64)
    batch = collate([examples[0], examples[-1]], tokenizer.pad_token_id)
    labels = torch.where(batch.scored, batch.input_ids, -100)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    torch.testing.assert_close(
        token_losses(model, batch).mean(), model(**inputs, labels=labels).loss
    )
    scored = tokenizer.decode(batch.input_ids[0][batch.scored[0]])
    assert scored == "5 plus 0 is 5 <eos>"
    assert evaluate(model, [batch], "fp32", lambda: None) == pytest.approx(
        token_losses(model, batch).mean().item()
    )


def test_batches_depend_on_the_seed_alone_and_start_over():
    examples = answer_examples(sums(range(1, 6)), make_tokenizer(), 64)
    first, again, other = (training_batches(examples, 2, 20, 0, seed) for seed in (3, 3, 4))
    assert len(first) == 20
    assert all(batch.input_ids.shape[0] == 2 for batch in first)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(first, again, strict=True))
    assert any(
        a.input_ids.shape != b.input_ids.shape or not torch.equal(a.input_ids, b.input_ids)
        for a, b in zip(first, other, strict=True)
    )


def test_long_problems_and_short_articles_are_left_out():
    tokenizer = make_tokenizer()
    assert not answer_examples(sums([5]), tokenizer, 4)
    assert [e.ids for e in news_examples(["1 is 2", "1 is"], tokenizer, 3)] == [(8, 6, 9)]


def test_the_rate_warms_up_and_falls_to_zero():
    factors = [rate_factor(step, 20) for step in range(20)]
    assert factors[0] == pytest.approx(1 / 3)
    assert max(factors) == factors[2] == 1
    assert factors[2:] == sorted(factors[2:], reverse=True) and factors[-1] > 0
    assert rate_factor(0, 1) > 0


def test_a_loss_that_is_not_finite_stops_the_run():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    batch = stages.load(SETTINGS, TINY).gsm8k[0]
    with pytest.raises(DivergedError, match="lower learning rate"):
        train(model, [batch], 1e-3, "fp32", lambda step, loss: None)


def test_the_finding_is_read_off_the_scores():
    def scores(gsm8k, news):
        return {"evaluations": [{"gsm8k": 9.0, "news": 9.0}, {"gsm8k": gsm8k, "news": news}]}

    methods = {"secura": scores(1.0, 3.6), "lora": scores(1.1, 3.5)}
    told = report._finding({"methods": methods})
    assert told == "SECURA ends 0.100 below LoRA on GSM8K and 0.100 above it on news."
