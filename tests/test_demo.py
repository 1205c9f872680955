"""The demo on a tiny random model: everything it does with the real one, in a few steps."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.metadata import version

import pytest
import retention_models
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from benchmarks.demo import report
from benchmarks.demo import run as demo
from benchmarks.demo.__main__ import main
from benchmarks.retention import data
from secura.cli.errors import UserError


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    retention_models.save_model(folder, width=128)
    return folder


@pytest.fixture(scope="module")
def asked(model_folder):
    chosen = retention_models.settings(model_folder, tasks=("gsm8k",), texts=("news",), probes=())
    return demo.Asked(steps=4, settings=chosen)


@pytest.fixture(scope="module", autouse=True)
def made_up_data(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECURA_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in ("load_task", "load_texts"):
            patch.setattr(data, name, getattr(retention_models, name))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, asked):
    """A folder the demo has filled."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    demo.run(folder, asked)
    return folder


@pytest.fixture
def results(finished):
    return json.loads((finished / "results.json").read_text())


def test_everything_is_written_and_nothing_left_over(finished):
    assert sorted(path.name for path in finished.iterdir()) == sorted([*demo.FILES, *demo.FOLDERS])
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_holds_the_figures_of_the_results(finished, results):
    written = (finished / "report.md").read_text()
    base = results["base"]
    for name, method in results["methods"].items():
        last = method["evaluations"][-1]
        row = next(line for line in written.splitlines() if line.startswith(f"| {method['title']}"))
        assert f"| {last['gsm8k']:.3f} ({last['gsm8k'] - base['gsm8k']:+.3f})" in row
        assert f"| {method['trainable_parameters']:,} | {method['adapter_bytes']:,} |" in row
        weights = finished / name / "adapter_model.safetensors"
        assert method["adapter_bytes"] == weights.stat().st_size
        assert [point["step"] for point in method["evaluations"]] == [1, 2, 3, 4]
        assert len(method["train_losses"]) == 4 and last["gsm8k"] < base["gsm8k"]
    for asset in results["assets"]:
        assert asset["sha256"] in written and asset["licence"] in written
    assert "dequantised from GGUF Q4_1" in written
    assert results["versions"]["torch"] == version("torch")


def test_the_merged_model_is_plain(finished, results, model_folder):
    with safe_open(finished / "merged" / "model.safetensors", "pt") as weights:
        assert not [key for key in weights.keys() if "secura" in key]  # noqa: SIM118
    merged, base = (
        AutoModelForCausalLM.from_pretrained(folder).model.layers[0].self_attn.q_proj.weight
        for folder in (finished / "merged", model_folder)
    )
    assert not torch.equal(merged, base)
    assert results["merge"]["max_logit_difference"] <= results["merge"]["tolerance"]


def test_a_folder_in_use_is_refused_and_left_alone(finished, asked, tmp_path):
    before = (finished / "results.json").read_text()
    with pytest.raises(UserError, match=r"not empty.*--resume.*--overwrite_output_dir"):
        demo.run(finished, asked)
    with pytest.raises(UserError, match="was begun with another seed"):
        demo.run(finished, replace(asked, seed=1), resume=True)
    with pytest.raises(UserError, match="exclude each other"):
        demo.run(finished, asked, resume=True, overwrite=True)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        demo.run(tmp_path, asked, resume=True)
    assert (finished / "results.json").read_text() == before


def test_a_stopped_demo_keeps_its_finished_method(finished, asked, results, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    for name in ("results.json", "report.md", "curves.png"):
        (folder / name).unlink()
    shutil.rmtree(folder / "secura")
    shutil.rmtree(folder / "cells" / "secura-weight-gated")
    monkeypatch.setattr(demo, "merge_and_check", lambda *_: results["merge"])
    again = demo.run(folder, asked, resume=True)
    assert again["methods"]["lora"] == results["methods"]["lora"]
    for key in ("train_losses", "evaluations"):
        assert again["methods"]["secura"][key] == results["methods"]["secura"][key]


def test_overwriting_removes_the_earlier_demo_and_nothing_else(
    finished, asked, tmp_path, monkeypatch
):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    (folder / "note.txt").write_text("mine")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_measure", stop)
    with pytest.raises(KeyboardInterrupt):
        demo.run(folder, asked, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["note.txt", "settings.json"]


@pytest.mark.parametrize(("seconds", "steps"), [(1.0, demo.MIN_STEPS), (1e6, demo.MAX_STEPS)])
def test_steps_are_fitted_into_the_time(asked, tmp_path, seconds, steps, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    monkeypatch.setattr(demo.Runner, "run", stop)
    with pytest.raises(Stopped):
        demo.run(tmp_path / "out", replace(asked, steps=None, max_seconds=seconds))
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["steps"] == steps


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--learning_rate", "-1"], "must be above 0"),
        (["--step", "3"], "did you mean --steps"),
    ],
)
def test_bad_flags_are_told_before_anything_is_written(tmp_path, flags, told):
    with pytest.raises(UserError, match=told):
        main(["--output_dir", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_the_finding_is_read_off_the_scores():
    def scores(gsm8k, news):
        return {"evaluations": [{"gsm8k": 9.0, "news": 9.0}, {"gsm8k": gsm8k, "news": news}]}

    methods = {"secura": scores(1.0, 3.6), "lora": scores(1.1, 3.5)}
    told = report._finding({"methods": methods})
    assert told == "SECURA ends 0.100 below LoRA on GSM8K and 0.100 above it on news."
