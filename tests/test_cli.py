"""The command line, run in this process on a tiny random model made on the spot."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from secura.cli import arguments, main
from secura.cli.data import load_split, to_training_columns
from secura.cli.errors import UserError

SENTENCE = "now how many apples are left if ann has and eats the answer is"
NUMBERS = [str(number) for number in range(20)]
CHAT = (
    "{% for turn in messages %}{{ turn['role'] }} {{ turn['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
PROMPT = "ann has 3 apples and eats 1"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint of a two-layer Llama and its word-level tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    vocab = {
        word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *SENTENCE.split(), *NUMBERS])
    }
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocab),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sixteen questions and answers, as JSONL."""
    path = tmp_path_factory.mktemp("data") / "apples.jsonl"
    rows = [
        {"question": f"how many apples are left if ann has {i + 1} and eats 1", "answer": f"{i}"}
        for i in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_flags(base, data, output, *more):
    flags = f"--model {base} --dataset {data} --output_dir {output} --max_steps 4 --r 4"
    flags += " --learning_rate 0.05 --per_device_train_batch_size 4 --report_to none"
    return ["train", *flags.split(), *map(str, more)]


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory):
    """The output folder of four training steps with a checkpoint after two."""
    output = tmp_path_factory.mktemp("run") / "adapter"
    assert main(train_flags(base, data, output, "--save_steps", 2, "--logging_steps", 1)) == 0
    return output


def fails(argv, capfd, *parts):
    """The one line a failing command printed last, which must contain `parts`."""
    assert main([str(word) for word in argv]) == 2
    line = capfd.readouterr().err.rstrip("\n").splitlines()[-1]
    assert line.startswith("secura: error: ")
    for part in parts:
        assert str(part) in line
    return line


def logits(model):
    with torch.inference_mode():
        return model(torch.arange(3, 20)[None]).logits


# train


def test_training_learns_and_leaves_an_adapter_and_nothing_pickled(trained):
    state = json.loads((trained / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    names = {path.name for path in trained.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pth", ".saving"))}


def test_resuming_equals_an_uninterrupted_run(trained, base, data, tmp_path, capfd):
    output = tmp_path / "resumed"
    shutil.copytree(trained / "checkpoint-2", output / "checkpoint-2")
    stopped_while_saving = output / "checkpoint-3"
    shutil.copytree(trained / "checkpoint-2", stopped_while_saving)
    (stopped_while_saving / "trainer_state.json").unlink()
    assert main(train_flags(base, data, output, "--resume_from_checkpoint")) == 0
    expected = load_file(trained / "adapter_model.safetensors")
    got = load_file(output / "adapter_model.safetensors")
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name


def test_evaluation_folding_and_a_config_file(base, data, tmp_path):
    output, config = tmp_path / "out", tmp_path / "config.yaml"
    config.write_text(
        f"model: {base}\ndataset_name: {data}\noutput_dir: {output}\n"
        "learning_rate: 1e-2\nmax_steps: 9\nr: 4\nnorm: channel\nfold_every: 2\n"
        "target_modules: [q_proj, v_proj]\nrank_pattern: {v_proj: 2}\n"
        "eval_strategy: steps\neval_steps: 2\ndataset_test_split: train[:4]\nreport_to: none\n"
    )
    assert main(["train", f"--config={config}", "--max_steps", "3", "--save_strategy", "no"]) == 0
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in entry for entry in log)
    saved = load_file(output / "adapter_model.safetensors")
    cores = {name: tensor for name, tensor in saved.items() if name.endswith("core")}
    assert {tensor.shape[0] for tensor in cores.values()} == {4, 2}
    assert all(tensor.abs().sum() > 0 for tensor in cores.values())
    written = json.loads((output / "adapter_config.json").read_text())
    assert written["fold_every"] == 2 and written["norm"] == "channel"


def test_overwriting_removes_the_checkpoints_of_the_run_before(trained, base, data, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(trained, output)
    (output / "notes.txt").write_text("mine")
    flags = ("--overwrite_output_dir", "--save_strategy", "no", "--max_steps", 1)
    assert main(train_flags(base, data, output, *flags)) == 0
    assert not list(output.glob("checkpoint-*"))
    assert (output / "notes.txt").read_text() == "mine"
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["global_step"] == 1


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--lerning_rate 1", ["unknown flag --lerning_rate", "did you mean --learning_rate?"]),
        ("--learn 1", ["unknown flag --learn"]),
        ("stray", ["stray"]),
        ("--learning_rate quick", ["--learning_rate", "'quick'"]),
        ("--r 0", ["r=0", "positive integer"]),
        ("--r 4.5", ["--r", "'4.5'"]),
        ("--r 33", ["q_proj", "r=33"]),
        ("--norm layer", ["norm", "'layer'"]),
        ("--norm weight --dropout 0.1", ["dropout"]),
        ("--target_modules nothing", ["nothing"]),
        ("--target_modules embed_tokens", ["embed_tokens"]),
        ("--rank_pattern {", ["--rank_pattern", "JSON"]),
        ("--model nowhere/at-all", ["nowhere/at-all"]),
        ("--model ./nowhere", ["'./nowhere'", "no such folder"]),
        ("--dataset nowhere.jsonl", ["nowhere.jsonl", "no such file"]),
        ("--dataset nowhere/at-all", ["nowhere/at-all"]),
        ("--dataset_train_split tset", ["tset", "train"]),
        ("--eval_strategy epoch", ["'test'", "train"]),
        ("--resume_from_checkpoint", ["no complete checkpoint"]),
        ("--resume_from_checkpoint nowhere", ["nowhere", "no such folder"]),
        ("--config nowhere.yaml", ["nowhere.yaml"]),
        ("--config", ["--config needs"]),
        ("--bf16 --fp16", ["fp16", "bf16"]),
    ],
)
def test_bad_flags(flags, parts, base, data, tmp_path, capfd):
    output = tmp_path / "out"
    fails(train_flags(base, data, output, *flags.split()), capfd, *parts)
    assert not output.exists()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lerning_rate: 1\n", ["'lerning_rate'", "did you mean learning_rate?"]),
        ("- 1\n", ["mapping"]),
        ("a: [\n", ["bad.yaml"]),
        ("max_steps: many\n", ["max_steps", "'many'"]),
        ("r: 0\n", ["r=0"]),
    ],
)
def test_bad_config_files(text, parts, base, data, tmp_path, capfd):
    config, output = tmp_path / "bad.yaml", tmp_path / "out"
    config.write_text(text)
    argv = ["train", "--model", base, "--dataset", data, "--output_dir", output]
    fails([*argv, "--config", config], capfd, *parts)
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "checkpointing", "bf16"),
    [
        ("", False, False),
        ("--gradient_checkpointing --bf16", True, True),
        ("--gradient_checkpointing False --bf16 False", False, False),
    ],
)
def test_what_a_cpu_does_unless_told(flags, checkpointing, bf16, tmp_path):
    argv = f"--model m --dataset d --output_dir {tmp_path} --use_cpu {flags}".split()
    training = arguments.parse(argv)[0]
    assert (training.gradient_checkpointing, training.bf16) == (checkpointing, bf16)
    assert training.learning_rate == 2e-4


def test_required_flags(capfd):
    fails(["train", "--model", "m"], capfd, "--dataset_name, --output_dir missing")


def test_an_output_folder_that_is_not_empty(base, data, tmp_path, capfd, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("secura.cli.train.load_model", loaded)
    (tmp_path / "notes.txt").write_text("mine")
    fails(train_flags(base, data, tmp_path), capfd, "not empty", "--resume_from_checkpoint")
    fails(train_flags(base, data, tmp_path / "notes.txt"), capfd, "is a file")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_checkpoint_is_named(trained, base, data, tmp_path, capfd):
    broken = tmp_path / "out" / "checkpoint-2"
    shutil.copytree(trained / "checkpoint-2", broken)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    flags = train_flags(base, data, tmp_path / "out", "--resume_from_checkpoint")
    fails([*flags, broken], capfd, "checkpoint-2", "adapter_model.safetensors is damaged")
    fails(flags, capfd, "checkpoint-2", "damaged")
    fails([*flags, tmp_path / "out"], capfd, "output folder itself")


# data


def rows_of(path, name="train", **kwargs):
    options = {"text_field": "text", "chat": False} | kwargs
    return to_training_columns(load_split(str(path), None, name), str(path), **options)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_files_are_read(suffix, tmp_path):
    from datasets import Dataset

    path = tmp_path / f"rows{suffix}"
    rows = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["c", "d"], "id": [1, 2]})
    {
        ".jsonl": rows.to_json,
        ".json": rows.to_json,
        ".csv": rows.to_csv,
        ".parquet": rows.to_parquet,
    }[suffix](path)
    assert rows_of(path)[1] == {"prompt": "b", "completion": "d"}
    assert len(rows_of(path, "train[:1]")) == 1


def test_folders_are_read(tmp_path):
    from datasets import Dataset, DatasetDict

    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": split}) + "\n")
    assert rows_of(tmp_path, "test")[0] == {"text": "test"}
    saved = tmp_path / "saved"
    DatasetDict(train=Dataset.from_dict({"text": ["kept"]})).save_to_disk(saved)
    assert rows_of(saved)[0] == {"text": "kept"}
    with pytest.raises(UserError, match="the splits train"):
        rows_of(saved, "test")


def test_columns(tmp_path, data):
    question = {"prompt": "how many apples are left if ann has 1 and eats 1\n", "completion": "0"}
    assert rows_of(data)[0] == question
    assert rows_of(data, chat=True)[0] == {
        "prompt": [{"role": "user", "content": question["prompt"].rstrip()}],
        "completion": [{"role": "assistant", "content": "0"}],
    }
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path.write_text(json.dumps({"messages": turns, "body": "b"}) + "\n")
    assert rows_of(path)[0] == {"messages": turns}
    assert rows_of(path, text_field="body")[0] == {"body": "b"}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"body": "a", "id": 1}\n', ["'body', 'id'", "'question' and 'answer'"]),
        ('{"text": "a"}\n{"text": null}\n', ["1 of 2 rows have no 'text'"]),
        ('{"text": "a"\n', ["rows.jsonl"]),
        ("", ["rows.jsonl"]),
    ],
)
def test_bad_data(text, parts, base, tmp_path, capfd):
    path, output = tmp_path / "rows.jsonl", tmp_path / "out"
    path.write_text(text)
    fails(train_flags(base, path, output), capfd, *parts)
    assert not output.exists()


def test_an_unknown_kind_of_file(base, tmp_path, capfd):
    path = tmp_path / "rows.xlsx"
    path.write_text("")
    fails(train_flags(base, path, tmp_path / "out"), capfd, "rows.xlsx", ".jsonl")


def test_packaged_data_lists_its_splits():
    with pytest.raises(UserError, match="splits train, test"):
        load_split("gsm8k", None, "validation")


def test_chat_messages_train(base, tmp_path):
    model, path = tmp_path / "chat", tmp_path / "rows.jsonl"
    shutil.copytree(base, model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(model)
    turns = [{"role": "user", "content": "how many"}, {"role": "assistant", "content": "3"}]
    path.write_text((json.dumps({"messages": turns}) + "\n") * 4)
    assert main(train_flags(model, path, tmp_path / "out", "--max_steps", 1)) == 0


# merge


PLAIN = """
import sys
sys.modules["secura"] = sys.modules["secura_kernels"] = sys.modules["peft"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.inference_mode():
    torch.save(model(torch.arange(3, 20)[None]).logits, sys.argv[2])
"""


def test_the_merged_model_needs_no_secura(trained, base, tmp_path):
    from peft import PeftModel

    output, answer = tmp_path / "deep" / "merged", tmp_path / "logits.pt"
    assert main(["merge", "--adapter", str(trained), "--output_dir", str(output)]) == 0
    assert not any(path.name.startswith("adapter") for path in output.iterdir())
    subprocess.run([sys.executable, "-c", PLAIN, output, answer], check=True, cwd=tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(base)
    unadapted = logits(plain)
    expected = logits(PeftModel.from_pretrained(plain, trained))
    torch.testing.assert_close(torch.load(answer), expected, rtol=1e-4, atol=1e-4)
    assert (expected - unadapted).abs().max() > 1e-2


def test_merging_in_another_dtype_and_from_a_named_base(trained, base, tmp_path):
    argv = ["merge", "--adapter", trained, "--model", base, "--output_dir", tmp_path / "merged"]
    assert main([*map(str, argv), "--dtype", "bfloat16"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16


def test_a_merge_that_fails_leaves_nothing(trained, tmp_path, capfd, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    argv = ["merge", "--adapter", trained, "--output_dir", tmp_path / "merged"]
    fails(argv, capfd, "no space left")
    assert not list(tmp_path.iterdir())


def test_bad_merges(trained, base, tmp_path, capfd):
    out = ["--output_dir", tmp_path / "merged"]
    fails(["merge", "--adapter", base, *out], capfd, "no adapter_config.json")
    fails(["merge", "--adapter", tmp_path / "none", *out], capfd, "no such folder")
    fails(["merge", *out], capfd, "--adapter_name_or_path")
    fails(["merge", "--adapter", trained, "--output_dir", trained], capfd, "not empty")
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(-1)
    model.save_pretrained(other)
    PreTrainedTokenizerFast.from_pretrained(base).save_pretrained(other)
    fails(["merge", "--adapter", trained, "--model", other, *out], capfd, "layers.1.mlp.up_proj")
    assert not (tmp_path / "merged").exists()


def test_an_activation_norm_is_merged_only_when_asked(base, data, tmp_path, capfd):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    flags = ("--norm", "activation", "--max_steps", 1, "--save_strategy", "no")
    assert main(train_flags(base, data, adapter, *flags)) == 0
    argv = ["merge", "--adapter", str(adapter), "--output_dir", str(merged)]
    fails(argv, capfd, "norm='activation'", "--allow_inexact")
    assert not merged.exists()
    assert main([*argv, "--allow_inexact"]) == 0


# generate


def test_generating(trained, base, capfd):
    asked = ["--prompt", PROMPT, "--max_new_tokens", "5"]
    adapter = ["--adapter", str(trained)]
    assert main(["generate", "--model", str(base), *asked]) == 0
    from_base = capfd.readouterr().out.split()
    assert main(["generate", *adapter, *asked]) == 0
    from_adapter = capfd.readouterr().out.split()
    assert 0 < len(from_base) <= 5 and from_base != from_adapter
    assert main(["generate", *adapter, *asked, "--compare"]) == 0
    table = capfd.readouterr().out
    assert all(word in table for word in ("base", "adapter", *from_base, *from_adapter))


def test_sampling_is_seeded(base, capfd):
    asked = f"generate --model {base} --prompt apples --max_new_tokens 9 --temperature 2".split()
    outputs = []
    for seed in ("1", "1", "2"):
        assert main([*asked, "--seed", seed]) == 0
        outputs.append(capfd.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--prompt hi", "--model_name_or_path"),
        ("--model {base} --prompt hi --compare", "--compare needs"),
        ("--model {base}", "--prompt"),
        ("--model {base} --prompt=", "--prompt is empty"),
        ("--model {base} --prompt hi --max_new_tokens 0", "--max_new_tokens"),
        ("--model {base} --prompt hi --temperature -1", "--temperature"),
        ("--model {base} --prompt hi --device hyper", "device"),
        ("--model {base} --prompt hi --sed 1", "did you mean --seed?"),
    ],
)
def test_bad_generation(flags, part, base, capfd):
    fails(["generate", *flags.format(base=base).split()], capfd, part)


# doctor


def test_doctor_checks_every_op(capfd):
    assert main(["doctor"]) == 0
    shown = capfd.readouterr().out
    ops = ("lowrank_linear", "lowrank_add", "weight_norm_linear", "activation_norm")
    assert all(op in shown for op in (*ops, "torch", "16 of 16 checks passed", "because"))


def test_doctor_notices_a_wrong_or_failing_op(capfd, monkeypatch):
    from secura_kernels import doctor

    def wrong(layer, options):
        return doctor._weight(layer, options) * 1.01

    def broken(layer, options):
        raise RuntimeError("it broke")

    monkeypatch.setattr(doctor, "OPS", (("wrong", "weight", wrong), ("broken", "none", broken)))
    assert main(["doctor"]) == 1
    shown = capfd.readouterr().out
    assert shown.count("FAILED") == 3 and "it broke" in shown
    assert "1 of 4 checks passed" in shown  # 1% lies within what bf16 may err


def test_doctor_when_an_implementation_is_forced(capfd, monkeypatch):
    monkeypatch.setenv("SECURA_IMPL", "fastest")
    fails(["doctor"], capfd, "unknown impl 'fastest'")
    if not torch.cuda.is_available():
        monkeypatch.setenv("SECURA_IMPL", "triton")
        assert main(["doctor"]) == 1
        assert "no implementation can run" in capfd.readouterr().out


# the rest


def test_help_and_unknown_commands(capfd, monkeypatch):
    assert main([]) == 2
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    assert "doctor" in capfd.readouterr().out
    fails(["trian"], capfd, "'trian'")
    monkeypatch.setitem(sys.modules, "trl", None)
    assert main(["train", "--help"]) == 0
    listing = capfd.readouterr().out
    assert all(f"--{flag}" in listing for flag in ("inner_r", "norm_form", "learning_rate"))


def test_a_missing_package_names_the_extra(base, data, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    fails(train_flags(base, data, tmp_path / "out"), capfd, "pip install 'secura[train]'")


def test_traceback_on_request(capfd):
    with pytest.raises(UserError):
        main(["generate", "--traceback", "--prompt", "hi"])


def test_an_interruption_is_no_error(capfd, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("secura.cli.generate.make_parser", stop)
    assert main(["generate"]) == 130
