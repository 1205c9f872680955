"""Which implementation an op takes, and when it is an operator that others are to see."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from secura_kernels import NormOptions, api, dispatch
from secura_kernels.dispatch import interpreting
from secura_kernels.gpu import too_old

from .draws import OPTIONS, draw


def on_gpu(dtype, index=0):
    device = f"cuda:{index}"
    return SimpleNamespace(
        is_cuda=True, is_meta=False, device=device, dtype=dtype, get_device=lambda: index
    )


@pytest.mark.parametrize(
    ("capability", "hip", "taken"),
    [((7, 5), None, False), ((8, 0), None, True), ((12, 0), None, True), ((7, 5), "6.4", True)],
)
def test_a_gpu_that_triton_makes_no_matrix_instructions_for(capability, hip, taken, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(dispatch, "too_old", too_old.__wrapped__)
    tensor = on_gpu(torch.float16)
    assert dispatch.resolve("auto", tensor) == ("triton" if taken else "reference")
    if not taken:
        with pytest.raises(RuntimeError, match=r"the GPU has compute capability 7\.5"):
            dispatch.resolve("triton", tensor)


def test_auto_takes_kernels_where_they_take_every_operand(monkeypatch):
    """On a GPU, of which these say they are: a weight or a core of another dtype is no error."""

    monkeypatch.setattr(dispatch, "too_old", lambda index: None)
    low, wide, eighth = map(on_gpu, (torch.bfloat16, torch.float64, torch.float8_e4m3fn))
    assert dispatch.supported("auto", low, None, on_gpu(torch.float32)) == "triton"
    for other in (wide, eighth):
        assert dispatch.supported("auto", low, None, other) == "reference"
        with pytest.raises(RuntimeError, match="no kernel takes float"):
            dispatch.supported("triton", low, other)
    assert dispatch.supported("auto", low, on_gpu(torch.bfloat16, 1)) == "reference"  # torch raises
    asked = []
    monkeypatch.setattr(api, "supported", lambda impl, *of: asked.append(of) or "reference")
    for options in OPTIONS:
        example = draw(options)
        example.output()
        layer = example.layer
        operands = layer.weight, layer.columns, example.a, example.b
        assert all(one is other for one, other in zip(asked[-1][1:], operands, strict=True))


def test_what_a_layer_found_of_its_tensors_is_not_asked_again(monkeypatch):
    calls = []
    monkeypatch.setattr(api, "supported", lambda impl, *of: "triton")
    monkeypatch.setattr(api.SecuraFunction, "apply", lambda *given: calls.append(given[-1]))
    draw(NormOptions("none")).output()
    monkeypatch.setattr(dispatch, "supported", None)  # to be called is an error
    monkeypatch.setattr(dispatch, "_kernels", lambda package: f"kernels of {package}")
    assert dispatch.kernels("a space", calls[0].impl) == "kernels of a space"
    assert calls[0].impl == "triton", "as an operator's schema takes it"


@pytest.mark.parametrize("place", [0, 2])
def test_an_operator_that_gets_a_tensor_subclass_is_one(place):
    class Sharded(torch.Tensor):
        pass

    arguments = [torch.ones(1), None, torch.ones(1), 3]
    assert not dispatch.is_watched(*arguments)
    arguments[place] = arguments[place].as_subclass(Sharded)
    assert dispatch.is_watched(*arguments) and dispatch.is_watched(None, arguments)


class Other(torch.Tensor):
    """A tensor subclass whose operators are torch's own."""


@pytest.mark.parametrize("name", ["bias", "rows", "cols", "core", "columns", "gram", "base_norms"])
def test_any_tensor_of_a_layer_that_is_a_subclass_is_seen(name, monkeypatch):
    example = draw(NormOptions("channel"), folded="change")
    layer = example.layer._replace(columns=example.layer.weight[:, example.layer.cols])
    seen = []
    monkeypatch.setattr(api, "is_watched", lambda *of: seen.append(dispatch.is_watched(*of)) or 0)
    example._replace(layer=layer).output()
    changed = layer._replace(**{name: getattr(layer, name).as_subclass(Other)})
    example._replace(layer=changed).output()
    assert seen == [False, True]


@pytest.mark.skipif(interpreting(), reason="the interpreter runs kernels on the CPU")
def test_an_implementation_that_cannot_run_is_an_error(monkeypatch):
    example = draw(NormOptions("none"))
    with pytest.raises(RuntimeError, match="impl='triton' cannot run"):
        example.output("triton")
    with pytest.raises(ValueError, match="unknown impl 'cuda'"):
        example.output("cuda")
    monkeypatch.setenv("SECURA_IMPL", "triton")
    with pytest.raises(RuntimeError, match="impl='triton' cannot run"):
        example.output()
    monkeypatch.setenv("SECURA_IMPL", "reference")
    assert example.output().shape == example.grad.shape
