"""Export to LoRA: PEFT alone computes the same, and what is no LoRA is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tiny
import torch
from cli_fixtures import fails, train_flags
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, save_as_lora
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from secura import export_lora, fold
from secura.cli import main
from secura.export import vllm_rank

FILES = {"adapter_config.json", "adapter_model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


def config_of(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def check(model, base, folder) -> dict:
    """The exported folder on ``base`` computes what ``model`` does; its config."""
    adapted, plain = tiny.logits(model), tiny.logits(base)
    before = tiny.snapshot(model)
    assert export_lora(model, folder) == folder
    tiny.assert_same(tiny.snapshot(model), before)
    assert {path.name for path in folder.iterdir()} == FILES
    lora = PeftModel.from_pretrained(base, folder)
    assert type(lora.base_model).__name__ == "LoraModel"
    torch.testing.assert_close(tiny.logits(lora), adapted, rtol=0, atol=1e-5)
    assert (adapted - plain).abs().max() > 0.01
    return config_of(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"norm": "none"},
        {"norm": "none", "scaling": 0.5, "norm_combine": "averaged"},
        {"norm": "channel"},
        {"norm": "channel", "norm_form": "paper", "norm_eps_relative": True},
        {"norm": "channel", "norm_form": "released", "dropout": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("reference", [None, "folded", "pretrained"])
def test_the_exported_lora_computes_the_same(settings, reference, tmp_path):
    model = tiny.adapted(**settings, norm_reference=reference or "pretrained")
    if reference:
        fold(model)
        tiny.perturb(model, 1)
    config = check(model, tiny.llama(), tmp_path / "deep" / "lora")
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
    assert not config["rank_pattern"] and not config["fan_in_fan_out"]
    assert set(config["target_modules"]) == {
        f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")
    }
    state = load_file(tmp_path / "deep" / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_layers_of_two_ranks_are_filled_up_to_one(tmp_path):
    model = tiny.adapted(norm="channel", rank_pattern={r"layers\.1.*q_proj": 6, "v_proj": 3})
    with pytest.warns(UserWarning, match=r"^3 of 4 layers have fewer rows than 6: filled up with"):
        config = check(model, tiny.llama(), tmp_path / "lora")
    assert config["r"] == config["lora_alpha"] == 6
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    state = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {t.shape[0] for name, t in state.items() if ".lora_A." in name} == {6}
    assert {t.shape[1] for name, t in state.items() if ".lora_B." in name} == {6}


def test_a_compiled_base_leaves_no_trace_in_the_names(tmp_path):
    model = tiny.adapted(torch.compile(tiny.llama(), backend="eager"), norm="channel")
    with torch.compiler.set_stance("force_eager"):
        check(model, tiny.llama(), tmp_path / "lora")


@pytest.mark.parametrize("norm", ["none", "channel"])
def test_conv1d_of_gpt2(norm, tmp_path):
    model = tiny.adapted(tiny.gpt2(), norm=norm, target_modules=["c_attn", "c_proj"])
    assert check(model, tiny.gpt2(), tmp_path / "lora")["fan_in_fan_out"]


def test_modules_saved_in_full_come_along(tmp_path):
    model = tiny.adapted(norm="channel", modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save.default.weight += 1
    assert check(model, tiny.llama(), tmp_path / "lora")["modules_to_save"] == ["lm_head"]


def test_a_lora_names_its_bases_revision_and_its_task(tmp_path):
    named = {"revision": "a-branch", "task_type": "CAUSAL_LM"}
    export_lora(tiny.adapted(norm="channel", **named), tmp_path / "lora")
    config = config_of(tmp_path / "lora")
    assert {name: config[name] for name in named} == named


@pytest.mark.parametrize("core", ["ab", "u"])
@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.t5])
def test_pefts_own_conversion_is_exact_without_a_norm(build, core, tmp_path):
    model = tiny.adapted(build(), norm="none", core=core, target_modules=tiny.TARGETS[build])
    assert model.supports_lora_conversion()
    save_as_lora(tmp_path, model, rank=4)
    lora = PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(tiny.logits(lora), tiny.logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"norm": "channel"}, {"norm": "weight"}, {"norm": "none", "train_bias": True}]
)
def test_pefts_own_conversion_refuses_what_a_delta_does_not_tell(settings):
    model = tiny.adapted(**settings)
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match=r"do not support LoRA conversion.*SecuraLinear"):
        convert_to_lora(model, rank=4)


def test_one_adapter_of_two(tmp_path):
    model = tiny.adapted(norm="channel")
    model.add_adapter("second", tiny.config(norm="none", r=5, target_modules=["o_proj"]))
    tiny.perturb(model, 1, "second")
    model.set_adapter("second")
    adapted = tiny.logits(model)
    model.set_adapter("default")
    export_lora(model, tmp_path / "lora", "second")
    lora = PeftModel.from_pretrained(tiny.llama(), tmp_path / "lora")
    torch.testing.assert_close(tiny.logits(lora), adapted, rtol=0, atol=1e-5)


class Nested(nn.Module):
    """``fc``, and another layer whose name ends the same."""

    config = None

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.block = nn.Linear(9, 9), nn.ModuleDict({"fc": nn.Linear(9, 9)})

    def forward(self, x):
        return self.block["fc"](self.fc(x))


@pytest.mark.parametrize("target", [r"fc", r"fc|block\.fc"])
def test_layers_whose_names_end_alike(target, tmp_path):
    settings = {"r": 3, "norm": "none", "target_modules": target, "rank_pattern": {"^fc": 2}}
    model = get_peft_model(Nested(), tiny.config(**settings))
    tiny.perturb(model)
    x = torch.randn(4, 9)
    export_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(Nested(), tmp_path / "lora")
    torch.testing.assert_close(lora(x), model(x), rtol=0, atol=1e-5)
    adapted = {n.rpartition(".lora_A.")[0] for n, _ in lora.named_parameters() if "lora_A" in n}
    assert adapted == set(tiny.layers(model))


class Deep(nn.Module):
    """Layers ``fc``, ``sub.fc`` and ``big.sub.fc``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(8, 8)
        self.sub = nn.ModuleDict({"fc": nn.Linear(8, 8)})
        self.big = nn.ModuleDict({"sub": nn.ModuleDict({"fc": nn.Linear(8, 8)})})

    def forward(self, x):
        return self.fc(x) + self.sub["fc"](x) + self.big["sub"]["fc"](x)


def test_a_layer_left_out_takes_none_along_that_ends_alike(tmp_path):
    config = tiny.config(r=2, norm="channel", target_modules=["fc"], exclude_modules=r"sub\.fc")
    model = get_peft_model(Deep(), config)
    tiny.perturb(model)
    export_lora(model, tmp_path / "lora")
    lora, x = PeftModel.from_pretrained(Deep(), tmp_path / "lora"), torch.randn(3, 8)
    torch.testing.assert_close(lora(x), model(x))


def test_a_bf16_base_gives_an_fp32_lora(tmp_path):
    model = tiny.adapted(tiny.llama(dtype=torch.bfloat16), norm="channel")
    export_lora(model, tmp_path / "lora")
    state = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    lora = PeftModel.from_pretrained(tiny.llama(dtype=torch.bfloat16), tmp_path / "lora")
    torch.testing.assert_close(tiny.logits(lora), tiny.logits(model), rtol=0, atol=0.05)


def test_a_lora_in_a_narrower_dtype_is_rounded_once(tmp_path):
    model = tiny.adapted(norm="channel")
    wide, narrow = tmp_path / "wide", tmp_path / "narrow"
    export_lora(model, wide)
    export_lora(model, narrow, dtype=torch.bfloat16)
    state = load_file(narrow / "adapter_model.safetensors")
    for name, tensor in load_file(wide / "adapter_model.safetensors").items():
        assert torch.equal(state[name], tensor.bfloat16()), name
    with torch.no_grad():
        tiny.parts(model)[0].B.mul_(1e6)
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.q_proj: it does not fit .*float16"
    ):
        export_lora(model, tmp_path / "half", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"a LoRA in torch\.int8 is none: choose one of"):
        export_lora(model, tmp_path / "half", dtype=torch.int8)
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize(
    ("r", "needed"), [(1, 1), (2, 8), (16, 16), (17, 32), (64, 64), (257, 320), (512, 512)]
)
def test_the_rank_that_vllm_is_started_with(r, needed):
    assert vllm_rank(r) == needed
    assert vllm_rank(513) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "weight"}, "norm='weight' gives each weight a gain of its own"),
        ({"norm": "activation"}, "norm='activation' is not linear"),
        ({"norm": "channel", "norm_combine": "averaged"}, "norm_combine='averaged' scales"),
        ({"norm": "channel", "restrain": True}, "restrain scales the base"),
        ({"norm": "none", "train_bias": True}, "train_bias=True adds a bias"),
        ({"norm": "none", "stochastic_rounding": True}, "whose mean alone is a LoRA"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_is_no_lora_is_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=rf"{message}.*no LoRA computes the same: export"):
        export_lora(tiny.adapted(**settings), tmp_path / "lora")
    assert not list(tmp_path.iterdir())


def test_bad_exports_leave_nothing(tmp_path, monkeypatch):
    model = tiny.adapted(norm="channel")
    with pytest.raises(TypeError, match=r"LlamaForCausalLM is no PeftModel.*from_pretrained"):
        export_lora(tiny.llama(), tmp_path / "lora")
    with pytest.raises(ValueError, match=r"no adapter 'other': the model has \['default'\]"):
        export_lora(model, tmp_path / "lora", "other")
    lora = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="none of SECURA's"):
        export_lora(lora, tmp_path / "lora")
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="unmerge it to export"):
        export_lora(model, tmp_path / "lora")
    model.unmerge_adapter()

    def full(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr("secura.export.save_file", full)
        export_lora(model, tmp_path / "lora")
    with torch.no_grad():
        tiny.parts(model)[-1].B[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.self_attn\.v_proj: .*NaN or inf"):
        export_lora(model, tmp_path / "lora")
    assert not list(tmp_path.iterdir())
    (tmp_path / "notes.txt").write_text("mine")
    for taken in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(FileExistsError, match="is no empty folder: choose another"):
            export_lora(tiny.adapted(norm="channel"), taken)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


PLAIN = """
import sys
sys.modules["secura"] = sys.modules["secura_kernels"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.inference_mode():
    logits = PeftModel.from_pretrained(base, sys.argv[2])(torch.arange(3, 20)[None]).logits
torch.save(logits, sys.argv[3])
"""


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory):
    """An adapter that ``secura train`` left, with its norm in channels, folded once."""
    output = tmp_path_factory.mktemp("run") / "adapter"
    flags = ("--norm", "channel", "--fold_every", 3, "--save_strategy", "no")
    assert main(train_flags(base, data, output, *flags)) == 0
    return output


def test_the_command_line_writes_a_lora_that_needs_no_secura(trained, base, tmp_path, capfd):
    lora, answer = tmp_path / "lora", tmp_path / "logits.pt"
    assert main(["export_lora", "--adapter", str(trained), "--output_dir", str(lora)]) == 0
    assert "vLLM takes it with --max-lora-rank 8\n" in capfd.readouterr().out
    assert {path.name for path in lora.iterdir()} == FILES | TOKENIZER
    assert config_of(lora)["base_model_name_or_path"] == str(base)
    subprocess.run([sys.executable, "-c", PLAIN, base, lora, answer], check=True, cwd=tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        unadapted = plain(ids).logits
        expected = PeftModel.from_pretrained(plain, trained)(ids).logits
    torch.testing.assert_close(torch.load(answer), expected, rtol=1e-5, atol=1e-5)
    assert (expected - unadapted).abs().max() > 1e-2


def test_exporting_onto_a_named_base(trained, base, tmp_path, capfd):
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(-1)
    model.save_pretrained(tmp_path / "other")
    argv = ["export_lora", "--adapter", trained, "--model", tmp_path / "other"]
    argv += ["--output_dir", tmp_path / "lora", "--dtype", "bfloat16"]
    fails(argv, capfd, "layers.1.mlp.up_proj", "--no_check_base")
    assert main([*map(str, argv), "--no_check_base"]) == 0
    assert config_of(tmp_path / "lora")["base_model_name_or_path"] == str(tmp_path / "other")
    state = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


def test_the_command_line_refuses_before_it_loads_the_base(
    trained, base, data, tmp_path, capfd, monkeypatch
):
    adapter, out = tmp_path / "adapter", ["--output_dir", tmp_path / "lora"]
    flags = ("--max_steps", 1, "--save_strategy", "no")
    assert main(train_flags(base, data, adapter, *flags)) == 0

    def loaded(*_, **__):
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("secura.cli.models.load_model", loaded)
    fails(["export_lora", "--adapter", adapter, *out], capfd, "norm='weight'", "or merge this one")
    fails(["export_lora", "--adapter", trained, "--output_dir", trained], capfd, "not empty")
    fails(["export_lora", "--adapter", base, *out], capfd, "no adapter_config.json")
    fails(["export_lora", *out], capfd, "--adapter_name_or_path")
    assert not (tmp_path / "lora").exists()
