"""The tuner of docs/upstream: it computes what ours does, and passes the tests written for PEFT."""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import peft
import peft.mapping
import peft.utils
import pytest
import torch
from torch import nn

from secura import AdapterConfig, SECURALinear
from secura.tuner.registration import peft_type

FOLDER = Path(__file__).parent.parent / "docs" / "upstream"
NAME = "peft.tuners.secura"
TARGETS = "TRANSFORMERS_MODELS_TO_SECURA_TARGET_MODULES_MAPPING"
REGISTRY = (
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING,
)


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_folder(patch: pytest.MonkeyPatch) -> tuple[ModuleType, type, dict, list]:
    """Import the tuner and its tests as if the pull request were in PEFT, and ours were not.

    Returns the tuner, the class of its tests, its modules by name, and its entries of REGISTRY.
    """
    for mapping in REGISTRY:
        patch.delitem(mapping, peft_type())
    lora = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    patch.setattr(peft.utils, TARGETS, lora.copy(), raising=False)
    tuner = load(NAME, FOLDER / "src/peft/tuners/secura/__init__.py")
    patch.setattr(peft, "SecuraConfig", tuner.SecuraConfig, raising=False)
    tests = load("upstream_test_secura", FOLDER / "tests/test_secura.py").TestSecura
    modules = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(NAME)}
    return tuner, tests, modules, [mapping[peft_type()] for mapping in REGISTRY]


with pytest.MonkeyPatch.context() as patched:
    TUNER, TestPeftsOwn, MODULES, REGISTERED = load_folder(patched)


@pytest.fixture(autouse=True)
def upstream(monkeypatch):
    """The folder's tuner, in PEFT in the place of ours."""
    for mapping, entry in zip(REGISTRY, REGISTERED, strict=True):
        monkeypatch.setitem(mapping, peft_type(), entry)
    for name, module in MODULES.items():
        monkeypatch.setitem(sys.modules, name, module)
    return TUNER


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("norm", ["none", "channel"])
@pytest.mark.parametrize("core", ["ab", "u"])
def test_it_computes_what_ours_does(core, norm, bias, upstream):
    torch.manual_seed(0)
    base = nn.Linear(48, 40, bias=bias)
    before = base.weight.detach().clone()
    settings = {"r": 8, "core": core, "norm": norm, "scaling": 1.5}
    ours = SECURALinear(copy.deepcopy(base), AdapterConfig(**settings))
    model = peft.get_peft_model(
        nn.Sequential(base), upstream.SecuraConfig(**settings, target_modules=["0"])
    )
    theirs = model.base_model.model[0]
    assert isinstance(theirs, upstream.SecuraLinear)
    pairs = [
        (own, getattr(theirs, f"secura_{name}")["default"])
        for name, own in (("A", ours.A), ("B", ours.B), ("U", ours.U))
        if own is not None
    ]
    assert len(pairs) == (2 if core == "ab" else 1)
    for own, other in pairs:
        assert torch.equal(own, other)
        if not own.any():
            nn.init.normal_(own, std=0.3)
            other.data.copy_(own.data)
    assert torch.equal(ours.rows, theirs.secura_rows["default"])
    assert torch.equal(ours.cols, theirs.secura_cols["default"])

    inputs = [torch.randn(2, 5, 48).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    grad = torch.randn(2, 5, 40)
    outputs = [ours(inputs[0]), model(inputs[1])]
    close(outputs[1], outputs[0])
    assert not torch.allclose(outputs[0], base(inputs[0]), atol=1e-2)
    for output in outputs:
        output.backward(grad)
    close(inputs[1].grad, inputs[0].grad)
    for own, other in pairs:
        close(other.grad, own.grad)

    change = ours.effective_weight() - before
    close(theirs.get_delta_weight("default"), change)
    model.merge_adapter()
    close(base.weight, ours.effective_weight())
    close(model(inputs[1]), outputs[0])
    model.unmerge_adapter()
    assert torch.equal(base.weight, before)


def close(got, expected):
    """Equal within a few roundings of fp32, measured by the largest entry."""
    largest = float(expected.detach().abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-6 * largest)


def test_an_anchored_core_is_a_plain_one_upstream(upstream):
    """As the folder says: drop_anchor() leaves a U that it computes the same with."""
    torch.manual_seed(0)
    settings = {"r": 8, "core": "u", "norm": "channel"}
    ours = SECURALinear(nn.Linear(48, 40), AdapterConfig(**settings))
    ours.set_anchor(*(torch.randn(3, 8, 8) * 0.3).unbind(), 0.01)
    x = torch.randn(5, 48)
    expected = ours(x)
    ours.drop_anchor()
    theirs = upstream.SecuraLinear(ours.base, "default", upstream.SecuraConfig(**settings), r=8)
    theirs.secura_U["default"].data.copy_(ours.U.data)
    close(theirs(x), expected)


def test_it_imports_nothing_of_ours():
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            roots = {name.partition(".")[0] for name in names}
            assert not roots & {"secura", "secura_kernels", "benchmarks", "triton"}, path


def test_the_entry_of_the_comparison_is_a_whole_config(upstream):
    (path,) = FOLDER.rglob("adapter_config.json")
    entry = json.loads(path.read_text())
    config = upstream.SecuraConfig.from_pretrained(path.parent)
    assert {key: getattr(config, key) for key in entry} == entry
    own = set(config.to_dict()) - set(peft.PeftConfig().to_dict())
    assert own <= entry.keys()


def test_its_page_names_every_file_and_links_to_what_is_there():
    page = (FOLDER / "README.md").read_text()
    files = [path for kind in ("py", "md", "json", "patch") for path in FOLDER.rglob(f"*.{kind}")]
    assert len(files) == 9
    for path in files:
        assert path.name == "README.md" or f"`{path.relative_to(FOLDER).as_posix()}`" in page, path
    for link in re.findall(r"\]\((?!\w+:)([^)#\s]+)", page):
        assert (FOLDER / link).exists(), link
