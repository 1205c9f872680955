"""Export a SECURA adapter as a LoRA, load it with PEFT alone, and compare the logits.

Run it: python examples/serve_lora.py --output_dir lora
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from secura import SecuraConfig, export_lora


def tiny() -> LlamaForCausalLM:
    """A random two-layer Llama, the same each time."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 64, "initializer_range": 0.1}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**size, **heads)).eval()


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> float:
    """Export to the output folder.

    Returns:
        The largest difference of the LoRA's logits from the SECURA adapter's.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output_dir", required=True, type=Path, help="a new or empty folder")
    args = parser.parse_args(argv)

    # init_weights=False draws B at random, in the place of training.
    config = SecuraConfig(r=8, norm="channel", target_modules="all-linear", init_weights=False)
    model = get_peft_model(tiny(), config).eval()
    export_lora(model, args.output_dir)

    lora = PeftModel.from_pretrained(tiny(), args.output_dir)
    ids = torch.arange(40).view(4, 10)
    base, adapted = tiny()(input_ids=ids).logits, model(input_ids=ids).logits
    gap = (lora(input_ids=ids).logits - adapted).abs().max().item()
    change = (base - adapted).abs().max().item()
    print(f"the LoRA is off by {gap:.1e} where the adapter changes {change:.1e}")
    return gap


if __name__ == "__main__":
    main()
