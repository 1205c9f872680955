"""Runs each ``*_interpret.py`` module in a process of its own, where Triton interprets its kernels.

``TRITON_INTERPRET=1`` must be set before triton is imported, and other tests need it unset: so an
interpreter module is one item of the main run, whose failure shows the child's output.
Set the variable yourself to run such a module directly and see its tests one by one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """What is allocated and never written is NaN, and operators without a fixed order raise."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(2, 2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def interpreter_broken() -> str | None:
    """Why this triton cannot interpret a loop over a runtime bound here, or None."""
    triton, numpy = (
        tuple(map(int, metadata.version(name).split(".")[:2])) for name in ("triton", "numpy")
    )
    if triton < (3, 7) and numpy >= (2, 4):
        return f"triton {triton} cannot interpret with numpy {numpy}: install numpy<2.4"
    return None


class InterpreterModule(pytest.File):
    """A test module that only a child process may import."""

    def collect(self) -> Iterator[pytest.Item]:
        item = InterpreterRun.from_parent(self, name="interpreter")
        item.add_marker(pytest.mark.timeout(900))
        yield item


class InterpreterRun(pytest.Item):
    """The child process."""

    def runtest(self) -> None:
        if reason := interpreter_broken():
            pytest.skip(reason)
        command = [sys.executable, "-m", "pytest", str(self.path), "-q", "-x"]
        command += ["-p", "no:cacheprovider", "-p", "no:xdist"]
        environment = {
            key: value for key, value in os.environ.items() if key != "PYTEST_XDIST_WORKER"
        }
        environment |= {
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        }
        if pattern := self.config.getoption("keyword"):
            command += ["-k", pattern]
        child = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True
        )
        self.add_report_section("call", "interpreter", child.stdout[-8000:])
        nothing_selected = 5
        if child.returncode not in (0, nothing_selected):
            pytest.fail(child.stdout[-8000:] + child.stderr[-2000:], pytrace=False)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"{self.path.name} under TRITON_INTERPRET=1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the child processes first: each takes minutes, and none can be shared out."""
    items.sort(key=lambda item: not isinstance(item, InterpreterRun))


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.File | None:
    if module_path.stem.endswith("_interpret") and not INTERPRETING:
        return InterpreterModule.from_parent(parent, path=module_path)
    return None
