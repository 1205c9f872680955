"""Checkpoints that transformers dequantises as it loads them: MXFP4 and fine-grained FP8."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Mxfp4Config

import secura
from secura import SecuraConfig
from secura.cli import main

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="transformers leaves them quantised where there is a GPU"
)

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
STEPS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP4 = torch.cat([STEPS, -STEPS])
"""What the 16 codes of MXFP4 stand for."""


def mxfp4(weight):
    """Bytes ``[E, N, K / 32, 16]`` and exponents ``[E, N, K / 32]`` of ``weight [E, K, N]``."""
    blocks = weight.mT.float().unflatten(-1, (-1, 32))
    exponents = torch.ceil(torch.log2(blocks.abs().amax(-1) / 6))
    codes = ((blocks / exponents.exp2()[..., None])[..., None] - FP4).abs().argmin(-1)
    packed = codes[..., ::2] | codes[..., 1::2] << 4
    return {"_blocks": packed.to(torch.uint8), "_scales": (exponents + 127).to(torch.uint8)}


def of_mxfp4(blocks, scales):
    """The weight ``[E, K, N]``."""
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()
    return (FP4[codes] * (scales.float() - 127).exp2()[..., None]).flatten(-2).mT


def fp8(weight):
    """Numbers ``[N, K]`` and a scale for every 32 × 32 of them."""
    blocks = weight.float().unflatten(1, (-1, 32)).unflatten(0, (-1, 32))
    scale = blocks.abs().amax((1, 3)) / 448
    rounded = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1)
    return {"": rounded.to(torch.float8_e4m3fn), "_scale_inv": scale}


def gpt_oss():
    """Widths that are multiples of MXFP4's 32."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_local_experts=3,
        num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    return GptOssForCausalLM(config)


FORMATS = {
    "mxfp4": (gpt_oss, mxfp4, EXPERTS, {}),
    "fp8": (tiny.wide, fp8, ["proj.weight"], {"weight_block_size": [32, 32]}),
}


@pytest.fixture(scope="module", params=FORMATS)
def checkpoint(request, tmp_path_factory):
    """The format and the folder of a quantised checkpoint."""
    make, quantise, names, settings = FORMATS[request.param]
    path = tmp_path_factory.mktemp(request.param)
    make().to(torch.bfloat16).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    file, config = path / "model.safetensors", path / "config.json"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(tuple(names))]:
        parts = quantise(tensors.pop(name))
        tensors |= {name + suffix: part.contiguous() for suffix, part in parts.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    # as transformers names them: what has to stay dense
    kept = ["model.layers.*.self_attn", "lm_head"] if request.param == "mxfp4" else ["lm_head"]
    said = {"quant_method": request.param, "modules_to_not_convert": kept, **settings}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": said}))
    return request.param, path


def loaded(path, **settings):
    return AutoModelForCausalLM.from_pretrained(path, **settings).eval()


def targets(kind, norm):
    """All that is adapted; experts do not take ``activation``."""
    if kind == "fp8":
        return {"target_modules": "all-linear"}
    experts = {} if norm == "activation" else {"target_parameters": EXPERTS}
    return {"target_modules": ATTENTION} | experts


@pytest.mark.parametrize("norm", tiny.NORMS)
def test_trains_as_dense_and_loads_again_before_and_after_a_merge(checkpoint, norm, tmp_path):
    """In fp32, where a merge is no other rounding."""
    kind, path = checkpoint
    base = loaded(path).float()
    assert getattr(base.config, "quantization_config", None) is None
    twin = FORMATS[kind][0]().eval()
    twin.load_state_dict(base.state_dict())
    config = {"r": 4, "norm": norm, **targets(kind, norm)}
    model, exact = (get_peft_model(one, SecuraConfig(**config)) for one in (base, twin))
    adapters = len(tiny.layers(model))
    assert adapters == {"mxfp4": 4 if norm == "activation" else 6, "fp8": 14}[kind]
    for one in (model, exact):
        tiny.perturb(one.train())
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
        assert len(tiny.gradients(one)) == 2 * adapters
        optimizer.step()
        secura.fold(one)
        tiny.perturb(one, 1)
    tiny.assert_same(tiny.gradients(model), tiny.gradients(exact))
    before = tiny.logits(model.eval())
    assert not torch.allclose(before, tiny.logits(loaded(path).float()), atol=0.1)

    model.save_pretrained(tmp_path / "adapter")
    again = secura.from_pretrained(loaded(path).float(), tmp_path / "adapter")
    assert torch.equal(tiny.logits(again), before)
    if norm == "activation":
        with pytest.raises(ValueError, match=r"q_proj: norm='activation' is not linear"):
            model.merge_and_unload()
        return
    merged = model.merge_and_unload()
    after = tiny.logits(merged)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = loaded(tmp_path / "merged")
    assert not hasattr(again.config, "quantization_config")
    tiny.assert_same(again.state_dict(), merged.state_dict())
    assert torch.equal(tiny.logits(again), after)


@pytest.mark.parametrize("checkpoint", ["mxfp4"], indirect=True)
def test_experts_are_what_their_bytes_stand_for(checkpoint):
    _, path = checkpoint
    stored = load_file(path / "model.safetensors")
    settings = ({}, {"quantization_config": Mxfp4Config(dequantize=True)})
    for model in (loaded(path, **one) for one in settings):
        for name, weight in model.named_parameters():
            if name.endswith(("gate_up_proj", "down_proj")):
                expected = of_mxfp4(stored[f"{name}_blocks"], stored[f"{name}_scales"])
                assert torch.equal(weight.float(), expected)


def test_secura_merge_writes_a_dense_checkpoint(checkpoint, tmp_path):
    """In bf16, as it is stored."""
    kind, path = checkpoint
    model = get_peft_model(loaded(path), SecuraConfig(r=4, **targets(kind, "weight")))
    tiny.perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    base, merged = ["--model_name_or_path", str(path)], tmp_path / "merged"
    given = ["--adapter_name_or_path", str(tmp_path / "adapter"), "--output_dir", str(merged)]
    assert main(["merge", *given, *base]) == 0
    tiny.assert_same(loaded(merged).state_dict(), model.merge_and_unload().state_dict())
