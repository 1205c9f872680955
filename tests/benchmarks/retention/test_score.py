"""Scores against a plain computation over whole logits."""

from __future__ import annotations

import copy

import pytest
import retention_models
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.retention import score
from benchmarks.retention.rows import Row, batch_loss, by_length, pack, task_row, text_row
from benchmarks.retention.score import Evaluator, final_number, write


@pytest.fixture(scope="module")
def models(model_folder):
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    tuned = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        for value in tuned.parameters():
            value.add_(torch.randn_like(value, generator=None) * 0.02)
    return base, tuned.train(), AutoTokenizer.from_pretrained(model_folder)


@torch.no_grad()
def log_probs(model, row: Row):
    """Of each target of a row with one completion, `[S, V]`, read alone."""
    ids = torch.tensor([[*row.prompt, *row.completions[0]]])
    logits = model.eval()(ids[:, :-1]).logits[0]
    return logits[len(row.prompt) - 1 :].log_softmax(-1)


def test_scores_are_those_of_each_row_alone(models, monkeypatch):
    base, tuned, tokenizer = models
    monkeypatch.setitem(score._LOGITS, "cpu", 5)
    monkeypatch.setitem(score._TOKENS, "cpu", 60)
    rows = [task_row(e, tokenizer) for e in retention_models.load_task("sums").held_out[:5]]
    rows.append(text_row(tokenizer("some words of text")["input_ids"]))
    evaluator = Evaluator(base.get_output_embeddings().weight)
    targets = evaluator.score(tuned, rows, evaluator.states(base, rows))
    found = score.summed(targets)
    ours = torch.cat([log_probs(tuned, row) for row in rows])
    theirs = torch.cat([log_probs(base, row) for row in rows])
    truth = torch.tensor([t for row in rows for t in row.completions[0]])
    assert found.tokens == len(truth)
    assert found.loss == pytest.approx(F.nll_loss(ours, truth).item(), rel=1e-5)
    assert found.base_loss == pytest.approx(F.nll_loss(theirs, truth).item(), rel=1e-5)
    kl = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean()
    assert found.kl == pytest.approx(kl.item(), rel=1e-4)
    assert found.accuracy == pytest.approx((ours.argmax(-1) == truth).float().mean().item())
    assert found.learned == pytest.approx(-found.rise)


def test_the_bases_accuracy_is_its_own(models):
    base, *_ = models
    other, prompt = copy.deepcopy(base), [3, 4, 5]
    with torch.no_grad():
        other.get_output_embeddings().weight.neg_()
    ids = base.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0].tolist()
    rows = [Row(tuple(prompt), (tuple(ids[3:]),))]
    evaluator = Evaluator(base.get_output_embeddings().weight)
    found = score.summed(evaluator.score(other, rows, evaluator.states(base, rows)))
    assert found.base_accuracy == 1 > found.accuracy


def test_logits_are_not_rounded_under_autocast(models):
    _, tuned, _ = models
    head = tuned.get_output_embeddings().weight
    exact, rounding = Evaluator(head), Evaluator(head, bf16=True)
    states = torch.randn(9, head.shape[1]) * 8
    with rounding._scoring(tuned):
        found = rounding._log_probs(states, head)
    torch.testing.assert_close(found, exact._log_probs(states, head), rtol=0, atol=0)


def test_scoring_leaves_the_model_as_it_was(models):
    base, tuned, tokenizer = models
    tuned.train()
    rows = [text_row(tokenizer("text")["input_ids"])]
    evaluator = Evaluator(base.get_output_embeddings().weight)
    evaluator.score(tuned, rows, evaluator.states(base, rows))
    assert tuned.training and all(value.grad is None for value in tuned.parameters())


def test_choices_are_compared_as_if_each_stood_alone(models):
    base, _, tokenizer = models
    examples = retention_models.load_task("colours").held_out[:6]
    rows = [task_row(e, tokenizer, choices=True) for e in examples]
    evaluator = Evaluator(base.get_output_embeddings().weight)
    right = right_norm = 0
    for example, row in zip(examples, rows, strict=True):
        nats = []
        for completion in row.completions:
            alone = log_probs(base, Row(row.prompt, (completion,)))
            nats.append(alone.gather(1, torch.tensor(completion)[:, None]).sum().item())
        sizes = [len(choice.strip()) for choice in example.choices]
        answer = example.choices.index(example.completion)
        right += nats.index(max(nats)) == answer
        by_byte = [n / size for n, size in zip(nats, sizes, strict=True)]
        right_norm += by_byte.index(max(by_byte)) == answer
    assert evaluator.choose(base, examples, rows) == (right / 6, right_norm / 6)


def test_the_loss_is_the_models_own_over_the_completion(models):
    base, _, tokenizer = models
    rows = [task_row(e, tokenizer) for e in retention_models.load_task("sums").train[:3]]
    ids = torch.zeros(3, max(r.length for r in rows) + 1, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for index, row in enumerate(rows):
        whole = torch.tensor([*row.prompt, *row.completions[0]])
        ids[index, : len(whole)] = whole
        labels[index, len(row.prompt) : len(whole)] = whole[len(row.prompt) :]
    batch = pack(rows, torch.device("cpu"))
    wanted = base(input_ids=ids, labels=labels).loss
    assert batch_loss(base, batch).item() == pytest.approx(wanted.item(), rel=1e-5)
    padded = pack(rows, torch.device("cpu"), 80)
    assert padded.ids.shape == (3, 80) and padded.targets.shape == (240,)
    assert batch_loss(base, padded).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_batches_by_length_hold_every_row_once():
    rows = [text_row(range(n)) for n in (5, 30, 7, 2, 30, 11)]
    batches = list(by_length(rows, 60))
    assert sorted(index for batch in batches for index in batch) == list(range(6))
    assert all(max(rows[i].length for i in batch) * len(batch) <= 60 for batch in batches)
    assert batches[0] == [1, 4]


def test_written_answers_are_those_of_each_prompt_alone(models):
    base, _, tokenizer = models
    prompts = [e.prompt for e in retention_models.load_task("sums").held_out[:3]]
    together = write(base, prompts, tokenizer, 6)
    assert together == [write(base, [prompt], tokenizer, 6)[0] for prompt in prompts]


def test_an_answer_ends_at_its_first_empty_line(models, monkeypatch):
    base, _, tokenizer = models
    said = " It is 7.\n\nNext: 8"
    monkeypatch.setattr(tokenizer, "batch_decode", lambda ids, **_: [said] * len(ids))
    assert write(base, ["some", "words"], tokenizer, 2) == ["It is 7."] * 2


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 7\nand 9", 7),
        ("1,234 in all", 1234),
        ("it falls to -2.5", -2.5),
        ("no number", None),
        ("#### none, but 3", 3),
    ],
)
def test_the_final_number_of_an_answer(text, number):
    found = final_number(text)
    assert (found is None) == (number is None) and (found is None or float(found) == number)
