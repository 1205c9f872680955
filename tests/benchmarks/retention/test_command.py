"""What the command line says of what it cannot do."""

from __future__ import annotations

import pytest
import torch

from benchmarks.retention.__main__ import main

BAD = {
    "holds no results": ["report", "--out", "nowhere"],
    "none of screen, anchor": ["run", "nonsense"],
    "did you mean lora": ["run", "try", "--methods", "lroa"],
    "unknown place 'foo'": ["run", "try", "--methods", "lora", "--targets", "foo"],
    "unknown task 'nope'": ["run", "try", "--methods", "lora", "--tasks", "nope"],
    "held_out takes int": ["run", "try", "--methods", "lora", "--set", "held_out=abc"],
    "the settings are": ["run", "screen", "--set", "foo=1", "--set", "held_out=8"],
    "rank takes int": ["run", "try", "--methods", "lora@rank=x"],
    "keyword argument 'foo'": ["run", "try", "--methods", "anchored-self@foo=1"],
    "is no folder": ["run", "screen", "--set", "model=nowhere"],
    "whiten takes bool": ["run", "try", "--methods", "lora@whiten=yes"],
    "optimizer takes one of adamw, muon": ["run", "try", "--methods", "lora@optimizer=sgd"],
    "anchor takes one of": ["run", "try", "--methods", "anchored-self@anchor=foo"],
    "against takes one of": ["run", "try", "--methods", "lora@against=foo"],
    "--seeds goes with --methods": ["run", "confirm", "--seeds", "7"],
    "--rates -1.0 must be above 0": ["run", "try", "--methods", "lora", "--rates=-1"],
    "--steps 0 must be 1": ["run", "try", "--methods", "lora", "--steps", "0"],
    "save_every=0 must be at least 1": ["run", "confirm", "--set", "save_every=0"],
    "--threads 0 must be 1": ["run", "confirm", "--threads", "0"],
    "torch knows no such device": ["run", "confirm", "--device", "foo"],
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_not_there_is_one_line(message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = BAD[message]
    with pytest.raises(SystemExit, match="2"):
        main(words if "--out" in words else [*words, "--out", "results"])
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "results").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["run", "screen", "--out", str(tmp_path / "results"), "--device", "cuda"])
    assert "torch sees no CUDA device" in capsys.readouterr().err
