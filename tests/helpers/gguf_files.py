"""GGUF files of tiny Llamas and their LoRAs, as llama.cpp's own converters lay them out."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file
from torch import Tensor

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_model(model, path: Path) -> Path:
    """Write a Llama without biases, in fp32, with one letter or so a token."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    special = ["<unk>", "<s>", "</s>"]
    letters = [f"t{token}" for token in range(len(special), config.vocab_size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(special + letters)
    writer.add_token_scores([0.0] * config.vocab_size)
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * len(letters))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    for name, weight in model.state_dict().items():
        layer = name.removesuffix(".weight")
        writer.add_tensor(_name(layer) + ".weight", _numbers(_permuted(layer, weight, config)))
    return _finish(writer, path)


def write_lora(folder: Path, config, path: Path) -> Path:
    """Write a PEFT LoRA of a Llama with ``config``: alpha once, ranks by tensor."""
    about = json.loads((folder / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(about["lora_alpha"]))
    for name, factor in load_file(folder / "adapter_model.safetensors").items():
        layer, _, kind = name.removeprefix("base_model.model.").partition(".lora_")
        if kind.startswith("B"):
            factor = _permuted(layer, factor, config)
        end = {"A.weight": "lora_a", "B.weight": "lora_b"}[kind]
        writer.add_tensor(f"{_name(layer)}.weight.{end}", _numbers(factor))
    return _finish(writer, path)


def _name(layer: str) -> str:
    if layer in WHOLE:
        return WHOLE[layer]
    block, _, rest = layer.removeprefix("model.layers.").partition(".")
    return f"blk.{block}.{NAMES[rest]}"


def _permuted(layer: str, weight: Tensor, config) -> Tensor:
    """q and k with the two halves of each head's rows interleaved, as llama.cpp rotates them."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(layer.rpartition(".")[2])
    if count is None:
        return weight
    return weight.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(weight.shape)


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().contiguous().numpy()


def _finish(writer, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
