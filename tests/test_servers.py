"""Exported and merged models as servers read them: llama.cpp run, TGI, LoRAX and vLLM by rules."""

from __future__ import annotations

import copy

import gguf_files
import pytest
import tiny
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from secura import export_lora

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A Llama adapted in every linear, in two ranks, and the folder of its LoRA."""
    base = tiny.llama(bias=False, hidden=64)
    settings = {"target_modules": TARGETS, "rank_pattern": {"v_proj": 6}, "scaling": 2.0}
    model = tiny.adapted(base, norm="channel", **settings)
    folder = tmp_path_factory.mktemp("served") / "lora"
    with pytest.warns(UserWarning, match="to this one rank"):
        export_lora(model, folder)
    return model, folder


def stacked(folder, model) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By kind of layer a LoRA's ``(A [layers, r, K], B [layers, N, r])``, as TGI and LoRAX read it.

    They take r, alpha and no pattern of either, want every kind in every decoder layer, and stack
    what they find: adapters/lora.py of text-generation-inference and of LoRAX.
    """
    config = LoraConfig.from_pretrained(folder)
    assert not config.use_rslora and not config.fan_in_fan_out
    state, found = load_file(folder / "adapter_model.safetensors"), {}
    for kind in TARGETS:
        part = "mlp" if kind in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        names = [
            f"base_model.model.model.layers.{i}.{part}.{kind}.lora_"
            for i in range(model.config.num_hidden_layers)
        ]
        a, b = (torch.stack([state.pop(f"{n}{f}.weight") for n in names]) for f in "AB")
        found[kind] = a, b * (config.lora_alpha / config.r)
        assert a.shape[1] == b.shape[2] == config.r
    assert not state
    return found


def test_tgi_and_lorax_find_what_they_read(exported):
    model, folder = exported
    plain = tiny.llama(bias=False, hidden=64)
    for kind, (a, b) in stacked(folder, plain).items():
        for i, layer in enumerate(plain.model.layers):
            weights = {name.rpartition(".")[2]: part for name, part in layer.named_modules()}
            weights[kind].weight.data += b[i] @ a[i]
    torch.testing.assert_close(tiny.logits(plain), tiny.logits(model), rtol=0, atol=1e-5)


def test_vllm_finds_what_it_reads(exported):
    _, folder = exported
    config = LoraConfig.from_pretrained(folder)
    assert isinstance(config.target_modules, set | list) and config.bias == "none"
    assert not config.modules_to_save and not config.use_dora and not config.use_rslora
    for name in load_file(folder / "adapter_model.safetensors"):
        assert name.startswith("base_model.model.")
        assert name.endswith((".lora_A.weight", ".lora_B.weight"))


def served(model, lora=None) -> tuple[list[int], torch.Tensor]:
    """``(ids, log-probabilities [4, V])`` of what llama.cpp adds greedily to a prompt."""
    llama_cpp = pytest.importorskip("xllamacpp", reason="xllamacpp (llama.cpp) is not installed")
    settings = llama_cpp.CommonParams()
    settings.model.path = str(model)
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = 64, 1, False, -1
    settings.cache_type_k = settings.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora is not None:
        adapter = llama_cpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = str(lora), 1.0
        settings.lora_adapters = [adapter]
    ids = tiny.tokens(1)[0].tolist()
    answer = llama_cpp.Server(settings).handle_completions(
        {"prompt": ids, "n_predict": 4, "n_probs": tiny.VOCAB, "temperature": 0.0}
    )
    chosen = answer["choices"][0]["logprobs"]["content"]
    logs = torch.empty(len(chosen), tiny.VOCAB)
    for row, token in zip(logs, chosen, strict=True):
        for other in token["top_logprobs"]:
            row[other["id"]] = other["logprob"]
    return ids + [token["id"] for token in chosen], logs


def assert_same_text(model, ids: list[int], logs: torch.Tensor) -> None:
    """llama.cpp's probabilities of each token it added are ``model``'s."""
    count = len(logs)
    own = tiny.logits(model, torch.tensor(ids)[None])[0, -count - 1 : -1].log_softmax(-1)
    assert own.argmax(-1).tolist() == ids[-count:]
    torch.testing.assert_close(logs, own, rtol=0, atol=1e-4)


def test_llama_cpp_runs_an_exported_lora(exported, tmp_path):
    model, folder = exported
    base = tiny.llama(bias=False, hidden=64)
    file = gguf_files.write_model(base, tmp_path / "base.gguf")
    ids, logs = served(file)
    assert_same_text(base, ids, logs)
    lora = gguf_files.write_lora(folder, base.config, tmp_path / "lora.gguf")
    ids, adapted = served(file, lora)
    assert_same_text(model, ids, adapted)
    assert (logs[0] - adapted[0]).abs().max() > 0.1


@pytest.mark.parametrize("norm", ["none", "channel", "weight"])
def test_llama_cpp_runs_a_merged_checkpoint(norm, tmp_path):
    model = tiny.adapted(
        tiny.llama(bias=False, hidden=64), norm=norm, target_modules=TARGETS, scaling=2.0
    )
    merged = copy.deepcopy(model).merge_and_unload()
    assert_same_text(model, *served(gguf_files.write_model(merged, tmp_path / "merged.gguf")))
