"""The anchored core beside a Trainer and on the command line."""

from __future__ import annotations

import json
import math
import re
import shutil
from itertools import cycle
from types import SimpleNamespace

import pytest
import tiny
import torch
from cli_fixtures import base, data, fails, train_flags  # noqa: F401
from continual_runs import cored, rows, trainer
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import TrainerState, get_cosine_schedule_with_warmup

import secura
from secura.cli import adapter_flags, arguments, main
from secura.cli import anchoring as commands
from secura.continual import AnchorCallback, AnchorDecayCallback


def test_a_task_ends_with_a_fold_and_its_statistics(tmp_path):
    model = cored()
    before = [part.right.clone() for part in tiny.parts(model)]
    callback = AnchorCallback()
    run = trainer(tmp_path, model, [callback])
    run.train()
    texts = [torch.tensor(row["input_ids"]) for row in rows()]
    assert callback.report.tokens == sum(map(len, texts)) and not callback.report.sampled
    for part, right in zip(tiny.parts(model), before, strict=True):
        assert not part.U.any() and part.core.any()
        old, new = (torch.linalg.inv(root @ root) for root in (right, part.right))
        means = [matrix.diagonal().mean() for matrix in (old, new)]
        torch.testing.assert_close(means[1], 2 * means[0], rtol=1e-3, atol=0)  # two sets of texts
    outputs = tiny.logits(model)
    trainer(tmp_path, model, [AnchorCallback(fold=False)]).train()
    assert tiny.parts(model)[0].U.any() and not torch.equal(tiny.logits(model), outputs)


def test_decay_is_that_of_adamw_whatever_the_optimizer(tmp_path):
    """AdamW's own decay of the same strength takes the same steps."""
    ours, theirs = cored(), cored()
    trainer(tmp_path, ours, [AnchorDecayCallback(3.0)], weight_decay=0.0).train()
    run = trainer(tmp_path, theirs, weight_decay=3.0)
    run.train()
    for a, b in zip(tiny.parts(ours), tiny.parts(theirs), strict=True):
        torch.testing.assert_close(a.U, b.U, rtol=1e-5, atol=1e-7)
        assert a.U.any()


@pytest.mark.parametrize(
    ("steps", "fast", "slow"), [(200, math.exp(-1), math.exp(-0.5)), (1, 0.5, 0.75)]
)
def test_decay_divides_by_e_over_a_run_of_any_length(steps, fast, slow):
    """Up over a tenth, then down a cosine; a group of half the rate decays half as much."""
    model = cored()
    cores = [part.U for part in tiny.parts(model)]
    for core in cores:
        torch.nn.init.normal_(core)
    head = model.get_output_embeddings().weight
    groups = (cores[1:], 0.05), (cores[:1], 0.1), ([head], 10.0)
    optimizer = torch.optim.SGD([{"params": own, "lr": rate} for own, rate in groups])
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    callback, state = AnchorDecayCallback(), TrainerState(max_steps=steps)
    how = {"model": model, "optimizer": optimizer}
    callback.on_train_begin(None, state, None, lr_scheduler=schedule, **how)
    before = [core.norm().item() for core in cores]
    for state.global_step in range(steps):
        callback.on_pre_optimizer_step(None, state, None, **how)
        optimizer.step()
        schedule.step()
    left = [core.norm().item() / was for core, was in zip(cores, before, strict=True)]
    assert left == pytest.approx([fast, *[slow] * len(cores[1:])], abs=0.01)


def test_decay_of_a_run_wants_rates_that_are_known(tmp_path):
    run = trainer(tmp_path, cored(), [AnchorDecayCallback()])
    run.lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(run.create_optimizer(), 0.9)
    with pytest.raises(ValueError, match="ExponentialLR does not tell its learning rates"):
        run.train()
    with pytest.raises(ValueError, match="read off a Trainer's run"):
        AnchorDecayCallback().on_pre_optimizer_step(None, None, None, model=cored())


def test_decay_reaches_a_core_in_bf16():
    """Rounded to nearest none of these steps would move a number."""
    model, steps = cored(), 100
    shapes = (4, 4), (2, 2, 4), (16,), (0,)  # experts' and FSDP1's are of other dimensions
    for part, shape in zip(tiny.parts(model), cycle(shapes)):
        part.U.data = torch.randn(shape).to(torch.bfloat16)
    before = [part.U.detach().float().norm() for part in tiny.parts(model)]
    callback, state = AnchorDecayCallback(3.0), TrainerState()
    optimizer = torch.optim.SGD([part.U for part in tiny.parts(model)], lr=5e-4)
    for state.global_step in range(steps):
        callback.on_pre_optimizer_step(None, state, None, model=model, optimizer=optimizer)
    after = [part.U.detach().float().norm() for part in tiny.parts(model)]
    shrunk = torch.stack(after).norm() / torch.stack(before).norm()
    assert abs(shrunk - (1 - 5e-4 * 3) ** steps) < 0.01


def test_what_the_optimizer_knew_of_a_folded_core_is_forgotten(tmp_path):
    """Adam's moments are of coordinates that are gone."""
    model = cored()
    run = trainer(tmp_path, model, [AnchorCallback()])
    run.train()
    cores = {part.U for part in tiny.parts(model)}
    assert not cores & run.optimizer.state.keys()
    again = trainer(tmp_path, model)
    again.train()
    assert cores <= again.optimizer.state.keys()


@pytest.mark.parametrize(
    ("texts", "message"),
    [([], "there is no text"), ([[3]], "1 token"), ([[3, 999]], "the token id 999")],
)
def test_texts_that_cannot_be_read_are_refused_before_the_first_step(texts, message, tmp_path):
    run = trainer(tmp_path, cored(), [AnchorCallback(texts)])
    with pytest.raises(ValueError, match=message):
        run.train()
    assert run.state.global_step == 0


def test_a_loop_without_a_trainer_decays_by_a_given_number():
    model = cored()
    core = tiny.parts(model)[0].U
    optimizer, before = torch.optim.SGD([core], lr=0.1), core.detach().clone()
    callback = AnchorDecayCallback(1.0)
    for _ in range(2):
        callback.on_pre_optimizer_step(None, None, None, model=model, optimizer=optimizer)
    torch.testing.assert_close(core.detach(), 0.81 * before)


def test_a_core_of_16_bits_that_is_not_folded_is_refused_before_the_first_step(tmp_path):
    model = cored()
    for part in tiny.parts(model):
        part.to(torch.bfloat16)
    run = trainer(tmp_path, model, [AnchorCallback(tiny.TEXTS, fold=False)])
    with pytest.raises(ValueError, match="U is in bfloat16"):
        run.train()
    assert run.state.global_step == 0
    trainer(tmp_path, model, [AnchorCallback(tiny.TEXTS)], max_steps=1).train()


@pytest.mark.parametrize("callback", [AnchorCallback(), AnchorDecayCallback(1.0)])
def test_a_model_without_a_core_is_refused_before_the_first_step(callback, tmp_path):
    with pytest.raises(ValueError, match="no active adapter with core='u'"):
        trainer(tmp_path, tiny.adapted(), [callback]).train()


def test_a_decay_that_turns_the_sign_is_refused(tmp_path, base, data, capfd):  # noqa: F811
    model = cored()
    before = tiny.snapshot(model)
    settings = {"optim": "sgd", "learning_rate": 0.1, "warmup_steps": 2}
    run = trainer(tmp_path, model, [AnchorDecayCallback(30)], **settings)
    with pytest.raises(ValueError, match=r"multiply U by -0.5 a step|multiply U by -2 a step"):
        run.train()
    assert tiny.snapshot(model).keys() == before.keys() and not tiny.parts(model)[0].U.isnan().any()
    given = ("--anchor", "--anchor_decay", "30", "--learning_rate", "0.1")
    flags = train_flags(base, data, tmp_path / "out", *given)
    fails(flags, capfd, "--anchor_decay=30 at a learning rate of 0.1")


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_decay_that_is_none(value):
    with pytest.raises(ValueError, match="anchor_decay"):
        AnchorDecayCallback(value)


def test_a_model_that_reads_no_tokens_is_refused_before_the_first_step(tmp_path):
    config = tiny.config(core="u", norm="none", target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    run = trainer(tmp_path, get_peft_model(tiny.t5(), config), [AnchorCallback()])
    with pytest.raises(ValueError, match="T5ForConditionalGeneration says You must specify"):
        run.train()
    assert run.state.global_step == 0


def test_the_highest_rate_of_all_groups_is_looked_at(tmp_path):
    model = cored()
    first, *rest = (part.U for part in tiny.parts(model))
    run = trainer(tmp_path, model, [AnchorDecayCallback(30)], lr_scheduler_type="constant")
    groups = [{"params": [first], "lr": 0.1}, {"params": rest, "lr": 1e-4}]
    run.optimizer = torch.optim.SGD(groups)
    with pytest.raises(ValueError, match="multiply U by -2 a step"):
        run.train()


def test_the_rate_of_what_is_no_core_is_not_looked_at(tmp_path):
    model = cored()
    cores, head = [part.U for part in tiny.parts(model)], model.get_output_embeddings().weight
    head.requires_grad_(True)
    run = trainer(tmp_path, model, [AnchorDecayCallback(30)], lr_scheduler_type="constant")
    groups = [{"params": cores, "lr": 1e-4}, {"params": [head], "lr": 0.1}]
    run.optimizer = torch.optim.SGD(groups)
    run.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"texts": ["a text"]}, "give the tokenizer"),
        ({"tokens": 1}, "tokens=1 must be"),
        ({"length": 1.5}, "length=1.5"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_what_cannot_be_read_is_refused_before_training(settings, message):
    with pytest.raises(ValueError, match=message):
        AnchorCallback(**settings)


@pytest.mark.parametrize("decay", [1.0, None])
def test_a_resumed_run_takes_the_same_steps_bit_for_bit(decay, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trainer(tmp_path / "whole", cored(), [AnchorDecayCallback(decay)], **settings)
    whole.train()
    fresh = get_peft_model(tiny.llama(), tiny.config(core="u", norm="none"))
    run = trainer(tmp_path / "whole", fresh, [AnchorDecayCallback(decay)], **settings)
    run.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    tiny.assert_same(tiny.snapshot(fresh), tiny.snapshot(whole.model))


@pytest.mark.parametrize("source", ["self", "text", "jsonl"])
def test_train_anchors_and_says_so(source, base, data, tmp_path, capfd):  # noqa: F811
    by = {"self": "self", "text": tmp_path / "old.txt", "jsonl": tmp_path / "old.jsonl"}[source]
    if source == "text":
        by.write_text("how many apples are left\n\nann has 3 and\neats 1\n")
    if source == "jsonl":
        by.write_text(json.dumps({"text": "how many apples are left"}) + "\n")
    output = tmp_path / "adapter"
    flags = ("--anchor", by, "--anchor_decay", 1)
    few = source == "self"
    more = ("--anchor_tokens", 3 if few else 256, "--save_steps", 2)
    assert main(train_flags(base, data, output, *flags, *more)) == 0
    said = capfd.readouterr().out
    assert "secura: anchored 6 layers by" in said and "secura: anchoring by" in said
    assert ("these are few for r=4" in said) == few
    assert ("the model's own samples" if source == "self" else str(by)) in said
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["core"] == "u" and config["anchored"] and config["anchor_damping"] == 0.01
    names = {name.rpartition(".")[2] for name in load_file(output / "adapter_model.safetensors")}
    assert {"U", "left", "right"} <= names and not {"A", "B"} & names
    assert "anchored by old text" in (output / "README.md").read_text()
    assert main(["merge", "--adapter", str(output), "--output_dir", str(tmp_path / "m")]) == 0
    other = [*train_flags(base, data, output, *flags, *more), "--resume_from_checkpoint"]
    if source == "text":  # which is not read again, whatever it is called now
        by.unlink()
        shutil.rmtree(output / "checkpoint-4")
        named = other.index("--anchor") + 1
        assert main([*other[:named], "moved.txt", *other[named + 1 :]]) == 0
        fails([*other[:named], "self", *other[named + 1 :]], capfd, "anchor was", "is now 'self'")
    other[other.index("--anchor_decay") + 1] = "2"
    fails(other, capfd, "anchor_decay", "1", "2")


def test_an_anchor_is_drawn_from_the_runs_seed_and_is_not_made_again():
    asked = SimpleNamespace(anchor="self", anchor_tokens=40)
    sides = []
    for seed in (0, 1, 1):
        model = tiny.adapted(core="u", norm="none")
        args = SimpleNamespace(device=torch.device("cpu"))
        run = SimpleNamespace(model=model, args=args, processing_class=None)
        assert not [*commands.begin(run, asked, None, seed, resumed=True)]
        assert len([*commands.begin(run, asked, None, seed, resumed=False)]) == 2
        sides.append(tiny.parts(model)[1].right)
    assert torch.equal(sides[1], sides[2])
    assert not torch.allclose(sides[0], sides[1], rtol=1e-2)


def test_decay_that_would_reach_nothing_is_refused(tmp_path):
    class Copies(torch.optim.AdamW):
        """As ZeRO's, which trains copies of the parameters."""

        def __init__(self, parameters):
            super().__init__([one.detach().clone().requires_grad_() for one in parameters])

    model = cored()
    run = trainer(tmp_path, model, [AnchorDecayCallback(1.0)])
    run.optimizer = Copies(one for one in model.parameters() if one.requires_grad)
    with pytest.raises(ValueError, match="trains none of the model's cores"):
        run.train()


def test_a_core_without_an_anchor_is_noted(base, data, tmp_path, capfd):  # noqa: F811
    flags = ("--core", "u", "--norm", "none")
    assert main(train_flags(base, data, tmp_path / "adapter", *flags)) == 0
    assert "note: the core has no anchor" in capfd.readouterr().out


BAD = {
    "--core u": ["--core", "ab", "--anchor", "self"],
    "--anchor_tokens is --anchor's": ["--core", "u", "--anchor_tokens", "64"],
    "--anchor_damping is --anchor's": ["--core", "u", "--anchor_damping", "0.5"],
    "must be 2 or more": ["--core", "u", "--anchor", "self", "--anchor_tokens", "1"],
    "and finite": ["--core", "u", "--anchor_decay", "nan"],
    "--anchor_decay acts": ["--anchor_decay", "1"],
    "must be 0 or more": ["--core", "u", "--anchor_decay", "-1"],
    "no such file": ["--core", "u", "--anchor", "nowhere.txt"],
    "leave out --fold_every": ["--anchor", "--fold_every", "2"],
    "--anchor_decay 0, or another --optim": ["--anchor", "--optim", "schedule_free_adamw"],
    "--fold_every 0, or another --optim": ["--fold_every", "2", "--optim", "schedule_free_sgd"],
    "greedy does not tell": [
        *("--anchor", "--lr_scheduler_type", "greedy"),
        *("--eval_strategy", "steps", "--eval_steps", "2"),
    ],
    "inner_r": ["--core", "u", "--inner_r", "8"],
}


@pytest.mark.parametrize("message", BAD)
def test_flags_that_do_not_fit_are_one_line(message, base, data, tmp_path, capfd):  # noqa: F811
    fails(train_flags(base, data, tmp_path / "out", *BAD[message]), capfd, message)


@pytest.mark.parametrize("way", ["bare", "valued", "file"])
def test_anchor_sets_other_defaults_where_no_flag_does(way, base, data, tmp_path):  # noqa: F811
    given = {"bare": ["--anchor"], "valued": ["--anchor=self"], "file": []}[way]
    if way == "file":
        (tmp_path / "run.yaml").write_text("anchor: self\n")
        given = ["--config", str(tmp_path / "run.yaml")]
    flags = ["--model", str(base), "--dataset", str(data), "--output_dir", str(tmp_path / "out")]
    training, _, _, adapter, anchor = arguments.parse([*flags, *given, "--r", "16"])
    assert (adapter.core, adapter.norm, adapter.r) == ("u", "none", 16)
    assert (training.learning_rate, anchor.anchor, anchor.decays) == (None, "self", True)
    assert not arguments.parse([*flags, *given, "--anchor_decay", "0"])[-1].decays
    config = adapter_flags.to_secura_config(adapter, 0)
    layers = "model.layers.0.mlp.gate_proj", "gpt_neox.layers.3.mlp.dense_h_to_4h", "h.1.mlp.c_fc"
    assert all(re.fullmatch(config.target_modules, f"base.{name}") for name in layers)
    assert not re.fullmatch(config.target_modules, "model.layers.0.mlp.gate")
    (tmp_path / "none.yaml").write_text("anchor: null\n")
    for without in ([], ["--config", str(tmp_path / "none.yaml")]):
        _, _, _, adapter, anchor = arguments.parse([*flags, *without])
        assert (adapter.core, adapter.r, anchor.decays) == ("ab", 64, False)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("old.txt", "\n\n", "holds no text: name another file, or self"),
        ("old.jsonl", '{"text": null}\n{"text": "a"}\n', "1 of 2 rows have no 'text' (row 1)"),
        ("OLD.JSONL", '{"words": "a"}\n', "wanted a column text"),
    ],
)
def test_a_file_of_no_old_text_is_one_line(name, text, message, base, data, tmp_path, capfd):  # noqa: F811
    (tmp_path / name).write_text(text)
    flags = ("--anchor", tmp_path / name, "--anchor_decay", 1)
    fails(train_flags(base, data, tmp_path / "out", *flags), capfd, message)


def test_public_names():
    assert {"anchor", "unanchor", "AnchorReport"} <= set(dir(secura))


def test_a_decay_that_would_do_nothing_is_refused(tmp_path):
    frozen, low = (tiny.adapted(core="u", norm="none") for _ in range(2))
    for adapter in tiny.parts(frozen):
        adapter.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no core U of the model is trained.*is_trainable=True"):
        AnchorDecayCallback(1.0).on_train_begin(None, None, None, model=frozen)
    for adapter in tiny.parts(low):
        adapter.half()
    with pytest.raises(ValueError, match="a core U is in float16"):
        AnchorDecayCallback(1.0).on_train_begin(None, None, None, model=low)


def test_rates_that_are_all_0_tell_no_decay(tmp_path):
    run = trainer(tmp_path, cored(), [AnchorDecayCallback()], learning_rate=0.0)
    with pytest.raises(ValueError, match="rates are all 0"):
        run.train()
    warming = AnchorDecayCallback()  # one step at a rate of 0
    trainer(tmp_path, cored(), [warming], max_steps=1, warmup_steps=1).train()
    assert warming.decay == 0
