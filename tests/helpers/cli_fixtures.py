"""A tiny random model, its data and one training run, for the tests of the command line."""

from __future__ import annotations

import json

import pytest
import torch

from secura.cli import main

SENTENCE = "now how many apples are left if ann has and eats the answer is"
NUMBERS = [str(number) for number in range(20)]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A checkpoint of a two-layer Llama and its word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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


def tree(folder):
    """Every file in a folder, with its size."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*")}
