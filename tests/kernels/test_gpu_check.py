"""``benchmarks.gpu_check`` on a machine without a GPU: its one line, and its dry run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def gpu_check(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_check", *map(str, args)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_without_a_gpu_it_says_so_and_exits_2(tmp_path):
    done = gpu_check("--out", tmp_path)
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 1 and "no GPU" in done.stdout
    assert not list(tmp_path.iterdir())


def test_dry_run_goes_through_every_step(tmp_path):
    done = gpu_check("--dry_run", "--out", tmp_path, "--commit", "abc")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "gpu_check.json").read_text())
    assert result["complete"] and not result["failures"] and result["commit"] == "abc"
    assert result["tests"]["skipped"] == result["tests"]["total"] > 0
    assert {row["provider"] for row in result["rows"]} >= {"linear", "none", "weight"}
    assert all(row["status"] == "ok" for row in result["rows"])
    assert "all well" in (tmp_path / "gpu_check.log").read_text()


def test_a_budget_too_small_is_an_incomplete_run(tmp_path):
    done = gpu_check("--dry_run", "--out", tmp_path, "--budget_s", 0.001)
    assert done.returncode == 1
    result = json.loads((tmp_path / "gpu_check.json").read_text())
    assert not result["complete"] and result["tests"]["not reached"]
