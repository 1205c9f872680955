"""Fine-tune a causal language model with SECURA, on TRL's SFTTrainer; save and merge it.

Run it: python examples/finetune.py --model Qwen/Qwen2-1.5B --dataset train.jsonl --output_dir out
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from secura import SecuraConfig, learning_rate


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, save `adapter` and, merged, `merged` in the output folder, which is returned."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="a folder or a hub name")
    parser.add_argument(
        "--dataset", required=True, help="JSONL with prompt and completion, or text"
    )
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--norm", default="channel", help="weight, channel or none: all merge")
    parser.add_argument("--learning_rate", type=float, help="by the weights, unless given")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--use_cpu", action="store_true")
    args = parser.parse_args(argv)

    model = AutoModelForCausalLM.from_pretrained(args.model)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(args.output_dir / "checkpoints"),
            max_steps=args.max_steps,
            per_device_train_batch_size=4,
            use_cpu=args.use_cpu,
            bf16=not args.use_cpu,
            gradient_checkpointing=not args.use_cpu,
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=args.dataset, split="train"),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=SecuraConfig(r=args.r, norm=args.norm, target_modules="all-linear"),
    )
    # before the optimizer is made; unlike LoRA's, it goes by the weights
    trainer.args.learning_rate = args.learning_rate or learning_rate(trainer.model, args.max_steps)
    trainer.train()
    trainer.save_model(str(args.output_dir / "adapter"))
    trainer.model.merge_and_unload().save_pretrained(args.output_dir / "merged")
    return args.output_dir


if __name__ == "__main__":
    main()
