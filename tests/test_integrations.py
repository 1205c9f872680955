"""The plugins run in their frameworks, from the settings that docs/integrations.md shows.

Skipped where a framework is not installed: most pin other versions than these tests.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Trainer

import secura

DOCS = Path(__file__).parent.parent / "docs"
STEPS = 4


def needs(framework: str):
    """The module, or the test is skipped."""
    return pytest.importorskip(framework, reason=f"{framework} is not installed")


def shown(heading: str, kind: str) -> str:
    """The code block of that kind that docs/integrations.md has under a heading."""
    section = (DOCS / "integrations.md").read_text().partition(f"## {heading}\n")[2]
    return re.search(rf"```{kind}\n(.*?)```", section.partition("\n## ")[0], re.S)[1]


@pytest.fixture
def base(tmp_path):
    """A tiny Llama and its tokenizer in a folder."""
    folder = tmp_path / "base"
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def rows(path: Path, row: dict) -> Path:
    """A JSONL file of one row, sixteen times."""
    path.write_text(f"{json.dumps(row)}\n" * 16)
    return path


def check(base, adapter, trained) -> None:
    """The saved adapter computes what the framework's own model does, on a base left as it was."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    plain = tiny.logits(model)
    loaded = secura.from_pretrained(model, adapter).eval()
    assert all(part.core.any() for part in tiny.parts(loaded)), "nothing was folded"
    tiny.assert_same(tiny.base_weights(trained), tiny.snapshot(tiny.llama()))
    assert (tiny.logits(loaded) - plain).abs().max() > 1e-3
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(trained.eval()))


@pytest.fixture
def trainers(monkeypatch):
    """Every transformers trainer that is run."""
    found, run = [], Trainer.train

    def train(self, *args, **kwargs):
        found.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", train)
    return found


def stand_in(monkeypatch, framework: str, **modules) -> types.ModuleType:
    """The plugin of a framework, imported beside modules that hold only what it takes from them."""
    for name, names in modules.items():
        module = types.ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, f"{framework}.{name.replace('__', '.')}", module)
    name = f"secura.integrations.{framework}"
    monkeypatch.setitem(sys.modules, name, None)  # so that it is taken out again afterwards
    del sys.modules[name]
    return importlib.import_module(name)


def test_the_ms_swift_plugin_without_ms_swift(monkeypatch):
    """By the signatures of 4.6.0."""
    tuners, callbacks = {}, {}
    plugin = stand_in(
        monkeypatch, "swift", callbacks={"callbacks_map": callbacks},
        tuner_plugin={"PeftTuner": object, "tuners_map": tuners},
        pipelines__train__tuner={
            "get_target_modules": lambda args, model: args.target_modules,
            "get_modules_to_save": lambda args, model, task: [],
        },
    )  # fmt: skip
    with pytest.raises(ValueError, match="unknown norm 'x'"):
        plugin.register(norm="x")
    assert not tuners
    plugin.register(norm="none", fold_every=2)
    args = types.SimpleNamespace(
        lora_rank=3, target_modules=["v_proj"], task_type="causal_lm", callbacks=[]
    )
    with pytest.raises(ValueError, match="fold_every=2 needs --callbacks secura"):
        tuners["secura"].prepare_model(args, tiny.llama())
    args.callbacks = ["secura"]
    config = tuners["secura"].prepare_model(args, tiny.llama()).peft_config["default"]
    assert (config.r, config.norm, config.target_modules) == (3, "none", {"v_proj"})
    assert isinstance(callbacks["secura"](None, None), secura.FoldCallback)
    args = types.SimpleNamespace(**vars(args) | {"target_parameters": ["experts.down_proj"]})
    args.task_type = "generative_reranker"
    config = tuners["secura"].prepare_model(args, tiny.mixtral()).peft_config["default"]
    assert (config.task_type, config.target_parameters) == ("CAUSAL_LM", ["experts.down_proj"])
    plugin.register(norm="none", r=2)
    args = types.SimpleNamespace(
        lora_rank=3, target_modules=["v_proj"], task_type="reranker", callbacks=[]
    )
    config = tuners["secura"].prepare_model(args, tiny.classifier()).peft_config["default"]
    assert (config.r, config.task_type) == (2, "SEQ_CLS")


def test_the_axolotl_plugin_without_axolotl(monkeypatch, tmp_path):
    """By the signatures of 0.19.0."""
    plugin = stand_in(
        monkeypatch, "axolotl",
        integrations__base={"BasePlugin": object, "AdapterCapabilities": types.SimpleNamespace},
    ).SecuraPlugin()  # fmt: skip
    assert [found.name for found in plugin.get_adapter_capabilities()] == ["secura"]
    cfg = {"adapter": "secura", "secura": {"r": 3, "target_modules": ["v_proj"]}}
    plugin.register(cfg)
    assert cfg["merge_method"] == "legacy"
    with pytest.raises(ValueError, match="memory_efficient merges LoRA alone"):
        plugin.register(cfg | {"merge_method": "memory_efficient"})
    with pytest.raises(TypeError, match="rank"):
        plugin.register(cfg | {"secura": {"rank": 3}})
    for key, said in (
        ({"lora_r": 8, "lora_dropout": 0.0}, "^lora_r: adapter: secura does not read them"),
        ({"peft_layers_to_transform": [1]}, "peft_layers_to_transform"),
        ({"load_in_4bit": True}, "load_in_4bit: axolotl quantises for adapter: lora and qlora"),
        ({"adapter": "lora"}, "read with adapter: secura alone"),
    ):
        with pytest.raises(ValueError, match=said):
            plugin.register(cfg | key)
    own = {"lora_modules_to_save": ["lm_head"], "peft_trainable_token_indices": [5]}
    plugin.register(cfg | own)
    model, config = plugin.load_adapter(
        tiny.classifier(2), types.SimpleNamespace(**cfg, lora_model_dir=None)
    )
    assert config.task_type == "SEQ_CLS" and model.get_base_model().score.modules_to_save
    _, config = plugin.load_adapter(
        None, types.SimpleNamespace(**cfg | own, lora_model_dir=None), config_only=True
    )
    assert (config.modules_to_save, config.trainable_token_indices) == (["lm_head"], [5])
    with pytest.raises(ValueError, match="TRL is given settings"):
        plugin.load_adapter(
            None, types.SimpleNamespace(**cfg, lora_model_dir="a"), config_only=True
        )
    other = types.SimpleNamespace(adapter="lora")
    assert plugin.load_adapter(None, other) is None
    assert plugin.add_callbacks_pre_trainer(other, None) == []
    cfg = types.SimpleNamespace(**cfg, lora_model_dir=None)
    nothing, config = plugin.load_adapter(None, cfg, config_only=True)
    assert nothing is None and config.r == 3
    model, _ = plugin.load_adapter(tiny.llama(), cfg)
    tiny.perturb(model)
    model.save_pretrained(tmp_path)
    cfg.lora_model_dir = str(tmp_path)
    for inference in (False, True):
        loaded, _ = plugin.load_adapter(tiny.llama(), cfg, inference=inference)
        assert torch.equal(tiny.logits(loaded.eval()), tiny.logits(model.eval()))
        assert all(part.B.requires_grad is not inference for part in tiny.parts(loaded))
    (callback,) = plugin.add_callbacks_pre_trainer(cfg, model)
    assert isinstance(callback, secura.FoldCallback)


TURNS = [{"role": "user", "content": "t4 t5"}, {"role": "assistant", "content": "t6 t7"}]


def test_ms_swift(base, trainers, tmp_path):
    swift = needs("swift")
    plugin = tmp_path / "secura_plugin.py"
    plugin.write_text(shown("ms-swift", "python"))
    data = rows(tmp_path / "data.jsonl", {"messages": TURNS})
    flags = f"""
        --external_plugins {plugin} --tuner_type secura --callbacks secura --lora_rank 4
        --target_modules all-linear --model {base} --model_type llama --template dummy --use_hf true
        --dataset {data} --dataset_num_proc 1 --dataloader_num_workers 0 --max_length 32
        --output_dir {tmp_path}/out --max_steps {STEPS} --save_steps {STEPS} --learning_rate 0.03
        --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --torch_dtype float32
        --gradient_checkpointing false --use_cpu true --report_to none
    """
    with pytest.raises(ValueError, match="needs --callbacks secura"):
        swift.sft_main(flags.replace("--callbacks secura", "").split())
    result = swift.sft_main(flags.split())
    check(base, result["last_model_checkpoint"], trainers[-1].model)


def test_axolotl(base, tmp_path):
    needs("axolotl")
    from axolotl.cli.config import load_cfg
    from axolotl.cli.merge_lora import do_merge_lora
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    data = rows(tmp_path / "data.jsonl", {"text": "t4 t5 t6 t7 t8"})
    settings = yaml.safe_load(shown("axolotl", "yaml"))
    settings["secura"]["r"] = 4
    settings |= {
        "base_model": str(base), "tokenizer_type": "PreTrainedTokenizerFast",
        "datasets": [{"path": str(data), "ds_type": "json", "type": "completion"}],
        "dataset_prepared_path": f"{tmp_path}/prepared", "output_dir": f"{tmp_path}/out",
        "sequence_len": 32, "micro_batch_size": 2, "gradient_accumulation_steps": 1,
        "max_steps": STEPS, "learning_rate": 0.03, "optimizer": "adamw_torch",
        "lr_scheduler": "constant", "val_set_size": 0, "bf16": False, "fp16": False, "tf32": False,
        "gradient_checkpointing": False, "attn_implementation": "eager", "dataset_num_proc": 1,
    }  # fmt: skip
    run = tmp_path / "run.yaml"

    def configured(**more):
        run.write_text(yaml.safe_dump(settings | more))
        return load_cfg(str(run))

    cfg = configured()
    model, _, _ = train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    check(base, tmp_path / "out", model)
    do_merge_lora(cfg=configured(lora_model_dir=f"{tmp_path}/out"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged").eval()
    torch.testing.assert_close(tiny.logits(merged), tiny.logits(model), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="merge_method: memory_efficient merges LoRA alone"):
        configured(merge_method="memory_efficient")
    with pytest.raises(TypeError, match="rank"):
        configured(secura={"rank": 4})


def test_llama_factory(base, trainers, tmp_path, monkeypatch):
    spec = importlib.util.find_spec("llamafactory")
    if spec is None:
        pytest.skip("llamafactory is not installed")
    shutil.copytree(Path(spec.origin).parent, tmp_path / "src" / "llamafactory")
    patch = DOCS / "integrations" / "llamafactory-0.9.5.patch"
    subprocess.run(["patch", "-p1", "-d", tmp_path / "src", "-i", patch], check=True)
    monkeypatch.syspath_prepend(tmp_path / "src")
    from llamafactory.train.tuner import run_exp

    assert sys.modules["llamafactory"].__file__.startswith(str(tmp_path))
    rows(tmp_path / "data.jsonl", {"instruction": "t4 t5", "input": "", "output": "t6 t7"})
    (tmp_path / "dataset_info.json").write_text('{"own": {"file_name": "data.jsonl"}}')
    settings = yaml.safe_load(shown("LLaMA-Factory", "yaml")) | {
        "model_name_or_path": str(base), "stage": "sft", "do_train": True, "template": "empty",
        "dataset": "own", "dataset_dir": str(tmp_path), "output_dir": f"{tmp_path}/out",
        "lora_rank": 4, "max_steps": STEPS, "per_device_train_batch_size": 2,
        "learning_rate": 0.03, "cutoff_len": 32, "report_to": "none", "use_cpu": True,
        "preprocessing_num_workers": 1,
    }  # fmt: skip
    run_exp(settings)
    check(base, tmp_path / "out", trainers[-1].model)


def test_lightning(base, tmp_path):
    lightning = needs("lightning")
    shows: dict = {}
    exec(shown("Lightning", "python"), shows)
    settings = {"r": 4, "norm": "channel", "target_modules": "all-linear"}
    module = shows["Tuned"](get_peft_model(tiny.llama(), tiny.config(**settings)))
    batches = [{"input_ids": ids, "labels": ids} for ids in tiny.tokens(2 * STEPS).split(2)]
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[shows["Fold"]()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    module.model.save_pretrained(tmp_path / "adapter")
    check(base, tmp_path / "adapter", module.model)
