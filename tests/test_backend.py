"""``secura_kernels`` for others: alone in a process, and as builds for the Kernel Hub."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import secura_kernels
from secura_kernels import Layer, NormOptions, naive, with_norms

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "secura_kernels"
BLOCK = re.compile(r"<!-- run alone -->\n```python\n(.*?)^```$", re.M | re.S)

ALONE = """
import sys
absent = ("secura", "transformers", "peft", "numpy", "safetensors", "accelerate")
sys.modules.update(dict.fromkeys(absent))
"""


@pytest.mark.parametrize("number", [0, 1], ids=["functions", "module"])
def test_the_page_runs_with_torch_alone(number, tmp_path):
    blocks = BLOCK.findall((ROOT / "docs" / "backend.md").read_text(encoding="utf-8"))
    assert len(blocks) == 2
    block = blocks[number]
    shutil.copytree(SOURCE, tmp_path / SOURCE.name)
    done = subprocess.run(
        [sys.executable, "-c", ALONE + block], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_sources_are_what_the_hub_takes():
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for path in SOURCE.rglob("*.py"):
        if path.is_relative_to(SOURCE / "inspection"):
            continue
        for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 9))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            assert {name.partition(".")[0] for name in names} <= allowed, path
            assert not getattr(node, "level", 0) or "inspection" not in str(node.module), path


def build(out: Path, source: Path = SOURCE) -> Path:
    """``out`` with the project and builds that hub/build.py makes of a package's folder."""
    script = shutil.copytree(ROOT / "hub", source.parent / "hub", dirs_exist_ok=True) / "build.py"
    subprocess.run([sys.executable, script, out], check=True)
    return out


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """Two of them, of sources that differ in a comment."""
    made = []
    for comment in ("", "# later\n"):
        place = tmp_path_factory.mktemp("hub")
        source = shutil.copytree(SOURCE, place / SOURCE.name)
        with (source / "api.py").open("a") as file:
            file.write(comment)
        made.append(build(place / "out", source))
    return made


def load(out: Path):
    """The CPU's build, imported as ``kernels`` does."""
    variant = out / "build" / "torch-cpu"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Namespaces(TorchDispatchMode):
    """Keeps the namespaces of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.namespace)
        return func(*args, **(kwargs or {}))


class Plain(nn.Module):
    """A framework's layer in plain equations, with the attributes that ``SecuraLinear`` reads."""

    kernel_layer_name = "SecuraLinear"

    def __init__(self, norm: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        weight, rows, cols = torch.randn(13, 8), torch.tensor([1, 4, 9]), torch.tensor([0, 5, 7])
        self.A, self.B = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(5, 3))
        layer = with_norms(Layer(weight, None, rows, cols, NormOptions("channel")))
        for name, value in {
            "weight": weight, "bias": torch.randn(13), "rows": rows, "cols": cols,
            "core": torch.randn(3, 3), "gram": layer.gram, "base_norms": layer.base_norms,
        }.items():  # fmt: skip
            self.register_buffer(name, value)
        self.scaling, self.options = 0.5, NormOptions(norm)

    def forward(self, x):
        layer = secura_kernels.Layer(
            self.weight, self.bias, self.rows, self.cols, NormOptions(*self.options), self.scaling,
            core=self.core, gram=self.gram, base_norms=self.base_norms,
        )  # fmt: skip
        return naive.secura_linear(x, layer, self.A, self.B)


def outcomes(layer: Plain) -> list[torch.Tensor]:
    """Output and gradients of A and B."""
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    out = layer(x)
    return [out, *torch.autograd.grad(out.square().sum(), [layer.A, layer.B])]


@pytest.mark.parametrize("norm", ["none", "channel", "weight", "activation"])
def test_two_versions_live_in_one_process(builds, norm):
    layer = Plain(norm)
    expected = outcomes(layer)
    for kernel in map(load, builds):
        assert kernel.__all__ == secura_kernels.__all__
        layer.forward = kernel.layers.SecuraLinear.forward.__get__(layer)
        torch.testing.assert_close(outcomes(layer), expected)
        with Namespaces() as namespaces:
            torch.testing.assert_close(outcomes(layer), expected)
        assert {name for name in namespaces.seen if "secura" in name} == {kernel.__name__}


def test_a_build_lies_as_the_hub_wants_it(builds):
    for out in builds:
        general = tomllib.loads((out / "build.toml").read_text())["general"]
        project = out / "torch-ext" / general["name"].replace("-", "_")
        assert (project / "_ops.py").read_bytes() == (SOURCE / "_ops.py").read_bytes()
        assert not (project / "inspection").exists()
        variants = {f"torch-{backend}" for backend in general["backends"]}
        assert {path.name for path in (out / "build").iterdir()} == variants
    ids = [path.read_text() for out in builds for path in out.glob("build/*/metadata.json")]
    assert len(set(ids)) == 2 * len(general["backends"])
    taken = subprocess.run(
        [sys.executable, ROOT / "hub" / "build.py", out], capture_output=True, text=True
    )
    assert taken.returncode == 1 and "is no empty folder: choose another" in taken.stderr


@pytest.mark.parametrize("norm", ["none", "channel", "weight", "activation"])
def test_the_kernels_package_takes_a_build(builds, norm):
    kernels = pytest.importorskip("kernels", reason="kernels is not installed")
    kernel = kernels.get_local_kernel(builds[0])
    assert kernel.__name__.startswith("_secura_kernels_cpu_")
    layer = Plain(norm)
    layer.kernel_condition = lambda module: True
    expected = outcomes(layer)
    repository = kernels.LocalLayerRepository(builds[0], layer_name="SecuraLinear")
    with kernels.use_kernel_mapping({"SecuraLinear": {"cpu": repository}}):
        mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
        kernels.kernelize(layer, mode=mode, device="cpu", use_fallback=False)
    assert layer.forward.__module__ == f"{kernel.__name__}.layers"
    torch.testing.assert_close(outcomes(layer), expected)
