"""What an installation promises: pins, import rules, optional packages, the Makefile's stamp."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from setuptools import find_packages

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
OPTIONAL = ("transformers", "peft", "trl", "accelerate", "datasets", "gguf", "matplotlib", "rich")
SOURCES = sorted(
    path
    for package in ("secura", "secura_kernels", "benchmarks")
    for path in (ROOT / package).rglob("*.py")
)


def requirements():
    optional = PROJECT["optional-dependencies"]
    return [
        Requirement(text)
        for extra, group in {"": PROJECT["dependencies"], **optional}.items()
        for text in group
        if extra != "quant"
    ]


def test_what_the_tests_need_is_pinned_within_the_ranges():
    assert (PINS["torch"], PINS["triton"]) == ("2.13.0", "3.7.1")
    for requirement in requirements():
        if requirement.name != "secura":
            assert Version(PINS[requirement.name]) in requirement.specifier, requirement.name


def test_every_extra_named_in_an_error_exists():
    asked = {
        extra
        for path in SOURCES
        for extra in re.findall(r'require\(\s*"[\w.]+",\s*"(\w+)"', path.read_text())
    }
    assert asked and asked <= PROJECT["optional-dependencies"].keys()


def imported(path):
    """Names of the packages a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_kernels_import_torch_and_triton_alone():
    allowed = {*sys.stdlib_module_names, "secura_kernels", "torch", "triton"}
    for path in SOURCES:
        if path.is_relative_to(ROOT / "secura_kernels"):
            assert imported(path) <= allowed, path


def test_the_wheel_holds_the_product_alone():
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    shipped = find_packages(ROOT, include=found["find"]["include"])
    assert {name.partition(".")[0] for name in shipped} == {"secura", "secura_kernels"}
    laboratory = {"experiments", "demo", "assets", "asset_table", "retention"}
    product = [path for path in SOURCES if not path.is_relative_to(ROOT / "benchmarks")]
    assert not laboratory & {path.stem for path in product}
    assert not laboratory & {path.parent.name for path in product}
    for path in product:
        assert "benchmarks" not in imported(path), path


def test_nothing_is_pickled():
    pickling = re.compile(r"\btorch\.(save|load)\(|\bpickle\b|allow_pickle=True|weights_only=False")
    for path in SOURCES:
        assert not pickling.search(path.read_text()), path


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_alone_is_enough():
    blocked = (*OPTIONAL, "triton", "yaml")
    said = run_python(
        f"""
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
import torch, secura
from secura.cli import main
layer = secura.SECURALinear.from_linear(torch.nn.Linear(9, 7), r=3)
layer(torch.ones(2, 9)).sum().backward()
for name in ("SecuraConfig", "FoldCallback"):
    try:
        getattr(secura, name)
    except ImportError as error:
        print(name, error)
assert main(["train", "--help"]) == 0
assert main(["doctor"]) == 0
"""
    )
    assert "SecuraConfig peft is not installed; get it with: pip install '.[train]' in a" in said
    assert "FoldCallback transformers is not installed" in said
    assert "21 of 21 checks passed" in said


def test_help_loads_no_heavy_package():
    heavy = ("transformers", "peft", "trl", "datasets", "matplotlib")
    run_python(
        f"""
import sys
from secura.cli import main
for command in ("train", "merge", "export_lora", "generate", "doctor"):
    try:
        main([command, "--help"])
    except SystemExit as left:
        assert left.code == 0
assert not set({heavy!r}) & set(sys.modules)
"""
    )


def test_a_failure_inside_an_installed_package_is_not_a_missing_extra(tmp_path, monkeypatch):
    from secura._extras import MissingExtraError, require

    (tmp_path / "has_a_hole.py").write_text("import a_package_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError) as raised:
        require("has_a_hole", "train")
    assert not isinstance(raised.value, MissingExtraError)
    with pytest.raises(MissingExtraError, match=r"\.\[bench\]"):
        require("a_package_that_is_not_there.at_all", "bench")


# The stub stands in for the interpreter: `-m venv` makes a folder with the stub as its python, and
# every call is written down. pip fails while a file named `broken` is there.
STUB = """#!/bin/sh
echo "$@" >> calls
case "$1 $2" in
"-m venv") mkdir -p "$3/bin" && cp stub "$3/bin/python" ;;
"-m pip") case "$*" in *editable*) test ! -e broken ;; esac ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """A folder with the Makefile, what it depends on, and the stub."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    stub = tmp_path / "stub"
    stub.write_text(STUB)
    stub.chmod(0o755)
    return tmp_path


def install(clone):
    """Runs `make install` with the stub; its exit status, and the calls it made."""
    (clone / "calls").write_text("")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(
        ["make", "install", "PYTHON=./stub"], cwd=clone, env=environment, capture_output=True
    )
    return done.returncode, (clone / "calls").read_text().splitlines()


def test_torch_is_asked_for_first_and_by_version(clone):
    status, calls = install(clone)
    asked = [call for call in calls if "pip install" in call]
    assert status == 0 and len(asked) == 2
    assert asked[0].endswith("--constraint constraints.txt torch==2.13.0")
    assert "--constraint constraints.txt" in asked[1] and "--editable" in asked[1]


def test_the_second_installation_does_nothing_until_a_pin_moves(clone):
    install(clone)
    assert install(clone) == (0, [])
    later = (clone / ".venv" / ".installed").stat().st_mtime + 5
    os.utime(clone / "constraints.txt", (later, later))
    status, calls = install(clone)
    assert status == 0 and calls


def test_a_broken_installation_leaves_no_stamp(clone):
    (clone / "broken").touch()
    assert install(clone)[0] != 0
    assert not (clone / ".venv" / ".installed").exists()
    (clone / "broken").unlink()
    assert install(clone)[0] == 0
    assert (clone / ".venv" / ".installed").exists()


def test_ci_runs_lint_and_tests_from_anywhere(tmp_path):
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    make = tmp_path / "make"
    make.write_text('#!/bin/sh\necho "$PWD $@"\n')
    make.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    said = subprocess.run(
        ["bash", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert said.splitlines() == [
        f"{ROOT} --no-print-directory {target}" for target in ("lint", "test")
    ]
