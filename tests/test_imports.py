"""Imports run down only: every one, those inside functions too, against a table of what may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("secura_kernels", "secura", "benchmarks")
"""From the ground up: each may import itself and those before it."""

GROUND = (
    "_ops",
    "dispatch",
    "gpu",
    "norm",
    "layer",
    "cur",
    "plan",
    "kept_weight",
    "shared",
    "held",
)
"""Modules of ``secura_kernels`` that the ops stand on."""

SPACES = {
    "project": (),
    "weight": ("project",),
    "lowrank": ("project", "weight"),
    "channel": ("project", "lowrank"),
    "activation": ("project", "lowrank"),
}
"""By folder of ``secura_kernels/ops``: the other folders it may import."""

SHARED = ("common", "jit", "launch", "operands", "triton")
"""Modules of ``secura_kernels/ops`` that every folder may import, and that import none."""

INSPECTION = "secura_kernels.inspection"
INSPECTORS = ("secura.cli", "benchmarks")
"""Who may import ``secura_kernels.inspection``, beside itself and the tests."""

IMPORTERS = ("require", "import_module", "__import__")
"""Functions that import a module by its name in a string."""


def module_of(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, root: Path = ROOT) -> Iterator[tuple[int, str]]:
    """``(line, dotted name)`` of each import of an own module, wherever it stands in a file.

    ``from a import b`` counts as ``a.b`` where that is a module, else as ``a``.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if _is_own(alias.name))
    for line, name, taken in names_imported(path, root):
        found = root.joinpath(*f"{name}.{taken}".split("."))
        is_module = found.is_dir() or found.with_suffix(".py").exists()
        yield line, f"{name}.{taken}" if is_module else name


def names_imported(path: Path, root: Path = ROOT) -> Iterator[tuple[int, str, str]]:
    """``(line, module, name)`` of each name that is imported from an own module."""
    package = module_of(path, root).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names if _is_own(name) else ():
                yield node.lineno, name, alias.name


def hidden(path: Path) -> Iterator[tuple[int, str]]:
    """``(line, name)`` of each own module that is imported by a string."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or _called(node) not in IMPORTERS or not node.args:
            continue
        name = node.args[0]
        if isinstance(name, ast.Constant) and _is_own(str(name.value)):
            yield node.lineno, str(name.value)


def _called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _is_own(name: str) -> bool:
    return name.split(".")[0] in PACKAGES


def forbidden(importer: str, target: str) -> str | None:
    """Why ``importer`` may not import ``target``, or None."""
    high, low = (PACKAGES.index(name.split(".")[0]) for name in (importer, target))
    if high < low:
        return f"runs up to {PACKAGES[low]}"
    if target.startswith(INSPECTION) and not importer.startswith((INSPECTION, *INSPECTORS)):
        return "only the command line, benchmarks and tests look at the ops"
    if importer.startswith("secura_kernels."):
        return _forbidden_within(importer.split(".")[1:], target.split(".")[1:])
    return None


def _forbidden_within(importer: list[str], target: list[str]) -> str | None:
    """Within ``secura_kernels``; names without that."""
    if not target:
        return "the package itself stands above its modules"
    if importer[0] in GROUND and target[0] not in GROUND:
        return "runs up: the ops stand on it"
    if importer[0] != "ops":
        return None
    if target[0] in GROUND:
        return None
    if target[0] != "ops":
        return "runs up: from an op to what is made of ops"
    space, other = (name[1] if len(name) > 1 else "" for name in (importer, target))
    if space not in SPACES:
        is_shared = space in SHARED and other not in SHARED
        return "runs up: every space stands on it" if is_shared else None
    if other in (space, *SHARED, *SPACES[space]):
        return None
    return f"sideways: {space} may import {SPACES[space]} and {SHARED}"


def problems(root: Path = ROOT) -> list[str]:
    """Every import that runs up or sideways, and every own module in a string."""
    found = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            module = module_of(path, root)
            for line, target in imported(path, root):
                if reason := forbidden(module, target):
                    found.append(f"{module}:{line} imports {target}: {reason}")
            found += [f"{module}:{line} hides {name} in a string" for line, name in hidden(path)]
    return found


def test_imports_run_down():
    assert problems() == []


def test_what_another_module_imports_is_public():
    """It stands in ``__all__`` of where it comes from, which every module of the two has."""
    listed = {}
    for package in PACKAGES[:2]:
        for path in (ROOT / package).rglob("*.py"):
            found = [node for node in ast.parse(path.read_text()).body if _assigns_all(node)]
            names = {
                each.value for node in found for each in ast.walk(node.value) if _is_text(each)
            }
            listed[module_of(path)] = names
    hidden_away = [
        f"{module_of(path)}:{line} takes {name} of {source}"
        for package in PACKAGES[:2]
        for path in (ROOT / package).rglob("*.py")
        for line, source, name in names_imported(path)
        if source in listed
        and name not in listed[source] | {"__version__"}
        and f"{source}.{name}" not in listed
    ]
    assert hidden_away == []


def _assigns_all(node: ast.AST) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else []
    return any(isinstance(one, ast.Name) and one.id == "__all__" for one in targets)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_the_table_names_what_is_there():
    ops = ROOT / "secura_kernels" / "ops"
    assert set(SPACES) == {path.name for path in ops.iterdir() if (path / "op.py").exists()}
    assert all((ops / f"{name}.py").exists() for name in SHARED)
    assert all((ROOT / "secura_kernels" / f"{name}.py").exists() for name in GROUND)


@pytest.mark.parametrize(
    ("path", "line", "message"),
    [
        ("secura_kernels/norm.py", "import secura", "runs up to secura"),
        ("secura_kernels/norm.py", "from secura.config import AdapterConfig", "runs up to secura"),
        ("secura/config.py", "import benchmarks.layer", "runs up to benchmarks"),
        ("secura_kernels/norm.py", "from .ops.common import cast", "the ops stand on it"),
        ("secura_kernels/norm.py", "from . import api", "the ops stand on it"),
        ("secura_kernels/ops/common.py", "from .project import op", "every space stands on it"),
        ("secura_kernels/ops/weight/op.py", "from ..channel import op", "sideways: weight"),
        (
            "secura_kernels/ops/lowrank/op.py",
            "from ..channel.op import channel",
            "sideways: lowrank",
        ),
        ("secura_kernels/ops/weight/op.py", "from ...api import Layer", "from an op to what"),
        ("secura_kernels/api.py", "from .inspection import examples", "look at the ops"),
        ("secura/cabr.py", "import secura_kernels.inspection.examples", "look at the ops"),
        ("secura_kernels/norm.py", "importlib.import_module('secura.config')", "in a string"),
        ("secura/config.py", "require('secura.tuner', 'train')", "in a string"),
    ],
)
@pytest.mark.parametrize("inside", [False, True], ids=["at the top", "in a function"])
def test_one_that_is_planted_is_found(path, line, message, inside, tmp_path):
    for folder in ("secura_kernels", "secura", "benchmarks"):
        for source in (ROOT / folder).rglob("*.py"):
            copy = tmp_path / source.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text("")
    assert problems(tmp_path) == []
    (tmp_path / path).write_text(f"def late():\n    {line}\n" if inside else f"{line}\n")
    (found,) = problems(tmp_path)
    assert message in found


def test_every_parameter_of_the_kernels_package_has_a_type():
    """But for those of functions that Triton compiles."""
    untyped = []
    for path in (ROOT / "secura_kernels").rglob("*.py"):
        tree = ast.parse(path.read_text())
        compiled = [node for node in ast.walk(tree) if _is_compiled(node, path)]
        skipped = {id(inner) for node in compiled for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and id(node) not in skipped:
                untyped += [f"{path}:{node.lineno} {name}" for name in _untyped(node)]
    assert untyped == []


def _is_compiled(node: ast.AST, path: Path) -> bool:
    if not isinstance(node, ast.FunctionDef) or path.name not in ("triton.py", "jit.py"):
        return False
    is_jit = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    return is_jit or any("constexpr" in ast.unparse(arg) for arg in node.args.args)


def _untyped(node: ast.FunctionDef) -> Iterator[str]:
    arguments = node.args
    rest = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *rest]:
        if argument.annotation is None and argument.arg not in ("self", "cls"):
            yield argument.arg


def test_the_formatter_is_told_to_keep_off_at_most_twenty_times():
    sources = (ROOT / "secura_kernels").rglob("*.py")
    assert sum(source.read_text().count("# fmt: skip") for source in sources) <= 20
