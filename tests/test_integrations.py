"""The plugins run in their frameworks, from a file of settings to an adapter that loads again.

Skipped where a framework is not installed: most pin other versions than these tests.
"""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import secura
from secura.cli.merge import main as merge

STEPS = 4


@pytest.fixture
def base(tmp_path):
    """A tiny Llama and its tokenizer in a folder."""
    folder = tmp_path / "base"
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def check(base, adapter, trained) -> None:
    """The saved adapter computes what the framework's own model did, and is not the base."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    plain = tiny.logits(model)
    loaded = secura.from_pretrained(model, adapter).eval()
    assert all(part.core.any() for part in tiny.parts(loaded)), "nothing was folded"
    tiny.assert_same(tiny.base_weights(loaded), tiny.snapshot(tiny.llama()))
    assert (tiny.logits(loaded) - plain).abs().max() > 1e-3
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(trained.eval()))


def test_ms_swift(base, tmp_path):
    swift = pytest.importorskip("swift", reason="ms-swift is not installed")
    from swift.callbacks import TrainerCallback, callbacks_map

    plugin, data = tmp_path / "secura_plugin.py", tmp_path / "data.jsonl"
    plugin.write_text(
        "from secura.integrations.swift import register\nregister(norm='channel', fold_every=2)\n"
    )
    turns = [{"role": "user", "content": "t4 t5"}, {"role": "assistant", "content": "t6 t7"}]
    data.write_text(f"{json.dumps({'messages': turns})}\n" * 16)
    trainers = []

    class Spy(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            trainers.append(self.trainer)

    callbacks_map["spy"] = Spy
    flags = (
        f"--model {base} --model_type llama --template dummy --dataset {data} --output_dir {tmp_path}/out"
        f" --external_plugins {plugin} --tuner_type secura --callbacks secura spy --lora_rank 4"
        f" --target_modules q_proj v_proj --max_steps {STEPS} --learning_rate 0.03 --torch_dtype float32"
        " --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --report_to none"
        " --save_steps 4 --gradient_checkpointing false --dataloader_num_workers 0 --use_hf true"
        " --use_cpu true --max_length 32 --dataset_num_proc 1"
    )
    result = swift.sft_main(flags.split())
    check(base, result["last_model_checkpoint"], trainers[0].model)


AXOLOTL = """
base_model: {base}
tokenizer_type: PreTrainedTokenizerFast
plugins: [secura.integrations.axolotl.SecuraPlugin]
adapter: secura
secura: {{r: 4, norm: channel, target_modules: [q_proj, v_proj], fold_every: 2}}
datasets:
  - {{path: {data}, ds_type: json, type: completion, field: text}}
dataset_prepared_path: {folder}/prepared
output_dir: {folder}/out
sequence_len: 32
micro_batch_size: 2
gradient_accumulation_steps: 1
max_steps: {steps}
learning_rate: 0.03
optimizer: adamw_torch
lr_scheduler: constant
val_set_size: 0
bf16: false
fp16: false
tf32: false
gradient_checkpointing: false
attn_implementation: eager
logging_steps: 1
use_tensorboard: false
dataset_num_proc: 1
"""


def test_axolotl(base, tmp_path):
    pytest.importorskip("axolotl", reason="axolotl is not installed")
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    data, run = tmp_path / "data.jsonl", tmp_path / "run.yaml"
    data.write_text(f"{json.dumps({'text': 't4 t5 t6 t7 t8'})}\n" * 16)
    run.write_text(AXOLOTL.format(base=base, data=data, folder=tmp_path, steps=STEPS))
    cfg = load_cfg(str(run))
    model, _, _ = train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    check(base, tmp_path / "out", model)
