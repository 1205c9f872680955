"""Tiny random models and token data for the tests that run transformers, PEFT and TRL."""

from __future__ import annotations

import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertForMaskedLM,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
    ViTForImageClassification,
)

from secura import SecuraConfig
from secura.tuner import SecuraLayer

VOCAB = 32
WIDE = 64
NORMS = ("none", "channel", "weight", "activation")
TEXTS = [torch.arange(3, 25), torch.arange(5, 30), torch.tensor([3, 4, 5, 9, 8, 7])]
"""Old text, as token ids."""


def llama(
    seed: int = 0, *, dtype: torch.dtype = torch.float32, bias: bool = True, hidden: int = 24
):
    """Two decoder layers, grouped heads; the same weights for the same seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        attention_bias=bias, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value, std=0.1)
    return model.to(dtype).eval()


def wide():
    """:func:`llama` as formats of quantised weights take it: ``WIDE``, and without biases."""
    return llama(hidden=WIDE, bias=False)


def drawn(kind, **settings):
    """A model of a class of transformers' with random weights, always the same."""
    torch.manual_seed(0)
    return kind(kind.config_class(**settings)).eval()


def gpt2():
    """Two blocks whose linear layers are transformers' ``Conv1D``."""
    return drawn(
        GPT2LMHeadModel,
        vocab_size=VOCAB, n_positions=64, n_embd=24, n_layer=2, n_head=4, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip


def t5():
    """An encoder and a decoder of one block each."""
    return drawn(
        T5ForConditionalGeneration,
        vocab_size=VOCAB, d_model=24, d_kv=6, d_ff=48, num_layers=1, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, initializer_factor=2.0,
        tie_word_embeddings=False,
    )  # fmt: skip


def bert():
    """An encoder of one block, which fills in masked tokens."""
    return drawn(
        BertForMaskedLM,
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48, bos_token_id=1,
    )  # fmt: skip


def vit():
    """An encoder of one block that names images, its position embeddings of three dimensions."""
    return drawn(
        ViTForImageClassification,
        hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        image_size=16, patch_size=8, num_labels=8,
    )  # fmt: skip


def mixtral():
    """One decoder layer, whose four experts' weights are stacked."""
    return drawn(
        MixtralForCausalLM,
        vocab_size=VOCAB, hidden_size=24, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip


def classifier(labels: int = 3):
    """:func:`llama`'s decoder with a random head."""
    decoder = llama()
    decoder.config.num_labels = labels
    model = LlamaForSequenceClassification(decoder.config)
    model.model = decoder.model
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Words ``t0`` … as the models' tokens."""
    special = {0: "<pad>", 1: "<s>", 2: "</s>"}
    vocab = {special.get(index, f"t{index}"): index for index in range(VOCAB)}
    fast = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


TARGETS = {llama: ["q_proj", "v_proj"], classifier: ["q_proj", "v_proj"], gpt2: ["c_attn", "c_fc"],
           t5: ["q", "v", "wi"]}  # fmt: skip
"""Some linear layers of each model."""


def config(**settings) -> SecuraConfig:
    """Small ranks on q and v unless told otherwise."""
    return SecuraConfig(**({"r": 4, "target_modules": ["q_proj", "v_proj"]} | settings))


def adapted(model=None, *, seed: int = 0, **settings):
    """``model`` (a fresh tiny Llama) with an adapter that changes what it computes, in eval."""
    model = get_peft_model(llama() if model is None else model, config(**settings))
    perturb(model, seed)
    return model.eval()


@torch.no_grad()
def perturb(model, seed: int = 0, adapter: str | None = None) -> None:
    """Draw B (or U), and the bias where there is one, of the adapter (of every one) at random."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model).values():
        for name, part in layer.secura_adapter.items():
            if adapter in (None, name):
                for value in (part.trained, part.bias):
                    if value is not None:
                        value.copy_(torch.randn(value.shape, generator=generator) * 0.5)


def layers(model) -> dict[str, SecuraLayer]:
    """Every adapted layer by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SecuraLayer)}


def parts(model, adapter: str = "default") -> list:
    """The adapter's modules, in order."""
    return [layer.secura_adapter[adapter] for layer in layers(model).values()]


def anchors(model) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """``left`` and ``right`` of every adapted layer."""
    return [(part.left, part.right) for part in parts(model)]


def tokens(count: int = 3, length: int = 7, seed: int = 0) -> torch.Tensor:
    """``[count, length]`` random token ids, none special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (count, length), generator=generator)


def cored(**settings):
    """A Llama with ``core="u"``, U at random."""
    return adapted(core="u", norm="none", **settings)


def logits(model, ids: torch.Tensor | None = None, **inputs) -> torch.Tensor:
    """The model's logits, without gradients; an encoder's model gets the ids for both parts."""
    ids = tokens() if ids is None else ids
    whole = getattr(model, "module", model)  # of one that DistributedDataParallel wraps
    if whole.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def gradients(model, ids: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Gradients of the language-model loss by parameter name."""
    ids = tokens() if ids is None else ids
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def snapshot(module) -> dict[str, torch.Tensor]:
    """A copy of every tensor of the module's state."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def base_weights(model) -> dict[str, torch.Tensor]:
    """A copy of every tensor that is no adapter's, by its name in the plain model."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value.clone()
        for name, value in model.state_dict().items()
        if "secura_adapter" not in name
    }


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Same names, same shapes, same bits."""
    assert first.keys() == second.keys()
    changed = [name for name in first if not torch.equal(first[name], second[name])]
    assert not changed
