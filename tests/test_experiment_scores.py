"""Scores of the experiments: likelihoods, written answers, perplexity, and weights' spectra."""

from __future__ import annotations

import math
from decimal import Decimal

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from secura.experiments import smoke
from secura.experiments.answers import METRICS, final_number, is_match
from secura.experiments.evaluate import Scorer
from secura.experiments.examples import Example
from secura.experiments.spectra import WeightPair, compare, spectra, weight_pairs


@pytest.fixture
def tokenizer():
    return smoke.load_tokenizer()


@pytest.fixture
def model():
    """The smoke model with weights that tell inputs apart."""
    model = smoke.load_model()
    generator = torch.Generator().manual_seed(1)
    for value in model.parameters():
        value.data.add_(0.2 * torch.randn(value.shape, generator=generator))
    return model


TEXTS = ["the quick brown fox", "jumps over", "x", "a lazy dog and more than that"]


def questions(count: int = 9) -> list[Example]:
    """Prompts, choices and right answers of many lengths."""
    words = ["red", "green", "blue", "ultramarine", "off-white", "it"]
    found = []
    for i in range(count):
        choices = tuple(f" {word} {i}" for word in words[: 2 + i % 4])
        prompt = f"Question: {'which ' * (i % 3)}{i}\nAnswer:"
        found.append(Example(prompt, choices[i % len(choices)], choices))
    return found


def written(count: int = 5) -> list[Example]:
    return [Example(f"Sum {'of ' * i}{i}:", f" it is\n#### {i}") for i in range(count)]


@torch.no_grad()
def token_losses(model, tokenizer, prompt: str, completion: str) -> torch.Tensor:
    """Cross-entropy of each token of the completion, by one plain pass a text."""
    before = tokenizer(prompt)["input_ids"]
    after = tokenizer(completion, add_special_tokens=False)["input_ids"]
    logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(after), reduction="none")


def test_multiple_choice_is_what_a_plain_pass_a_choice_gives(model, tokenizer):
    right, by_byte, margins, bytewise_margins, losses = 0, 0, [], [], []
    model.eval()
    for example in questions():
        each = [token_losses(model, tokenizer, example.prompt, c) for c in example.choices]
        sums = [-each_choice.sum().item() for each_choice in each]
        bytewise = [s / len(c.strip().encode()) for s, c in zip(sums, example.choices, strict=True)]
        right += sums.index(max(sums)) == example.answer
        by_byte += bytewise.index(max(bytewise)) == example.answer
        for values, found in ((sums, margins), (bytewise, bytewise_margins)):
            own = values.pop(example.answer)
            found.append(own - max(values))
        losses.append(each[example.answer])
    scores = Scorer(model, tokenizer, batch_size=4).score(questions(), "accuracy")
    assert scores["n"] == 9
    assert (scores["accuracy"], scores["accuracy_norm"]) == (right / 9, by_byte / 9)
    assert scores["margin"] == pytest.approx(sum(margins) / 9, abs=1e-4)
    assert scores["margin_norm"] == pytest.approx(sum(bytewise_margins) / 9, abs=1e-4)
    assert scores["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)
    assert 0 < right < 9 and 0 < by_byte < 9


def test_likelihoods_agree_with_lm_eval(model, tokenizer):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    pairs = [(e.prompt, choice) for e in questions() for choice in e.choices]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3).loglikelihood(requests, True)
    prompts, choices = [e.prompt for e in questions()], [e.choices for e in questions()]
    scored = Scorer(model, tokenizer)._likelihoods(prompts, choices, lambda: None)
    ours = [likelihood.nats for row in scored for likelihood in row]
    assert ours == pytest.approx([value for value, _ in theirs], abs=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_batches_and_padding_change_nothing(model, tokenizer, implementation):
    model.set_attn_implementation(implementation)
    alone, together = (Scorer(model, tokenizer, batch_size=size) for size in (1, 16))
    pairs = [
        (alone.score(questions(), "accuracy"), together.score(questions(), "accuracy")),
        (alone.score(written(), "exact_match", 8), together.score(written(), "exact_match", 8)),
        (alone.perplexity(TEXTS, 12), together.perplexity(TEXTS, 12)),
    ]
    for first, second in pairs:
        assert first == pytest.approx(second, abs=1e-5)
    answers = [scorer._write(written(), 8, lambda: None) for scorer in (alone, together)]
    assert answers[0] == answers[1] and len(set(answers[0])) > 1
    assert answers[0] == [alone._write([e], 8, lambda: None)[0] for e in written()]


def test_the_loss_is_a_mean_over_tokens(model, tokenizer):
    model.eval()
    losses = torch.cat([token_losses(model, tokenizer, e.prompt, e.completion) for e in written()])
    scorer = Scorer(model, tokenizer, batch_size=2)
    assert scorer.loss(written()) == pytest.approx(losses.mean().item(), abs=1e-5)
    assert scorer.score(written(), "rouge_l", 2)["loss"] == scorer.loss(written())


def test_perplexity_counts_all_but_the_first_token_up_to_the_limit(model, tokenizer):
    model.eval()
    losses = torch.cat([token_losses(model, tokenizer, t[0], t[1:12]) for t in TEXTS if t[1:]])
    scores = Scorer(model, tokenizer, batch_size=2).perplexity(TEXTS, 12)
    assert (scores["n"], scores["tokens"]) == (3, 11 + 9 + 11)
    assert scores["loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))


def test_long_rows_make_smaller_batches(model, tokenizer, monkeypatch):
    monkeypatch.setattr("secura.experiments.evaluate._TOKENS", 128)
    batches = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: batches.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    done = []
    Scorer(model, tokenizer).score(questions(), "accuracy", on_batch=lambda: done.append(1))
    assert len(done) == len(batches) > 2 and max(batches) <= 128


def test_an_answer_ends_where_the_next_prompt_would_begin(model, tokenizer):
    class Told(torch.nn.Module):
        """A model's head that says a text, whatever was asked."""

        def __init__(self, text):
            super().__init__()
            self.ids, self.said = tokenizer(text)["input_ids"], 0

        def forward(self, hidden):
            token = self.ids[min(self.said, len(self.ids) - 1)]
            self.said += 1
            logits = torch.zeros(*hidden.shape[:-1], model.config.vocab_size)
            logits[..., token] = 9.0
            return logits

    text = " 1 + 1\n2 #### 2\nSum of 3: 4"
    for examples, end in ((written(1), " 1 + 1\n2 #### 2"), ([Example("Sum 1:", " 2")], " 1 + 1")):
        model.lm_head = Told(text)
        assert Scorer(model, tokenizer)._write(examples, 40, lambda: None) == [end.strip()]


def test_nan_is_a_wrong_answer_and_no_exception(model, tokenizer):
    model.model.norm.weight.data.fill_(math.nan)
    scorer = Scorer(model, tokenizer)
    scores = scorer.score(questions(), "accuracy")
    assert scores["accuracy"] == scores["accuracy_norm"] == 0
    assert math.isnan(scores["loss"]) and math.isnan(scores["margin"])
    scores = scorer.score(written(), "exact_match", 4)
    assert scores["exact_match"] == 0 and math.isnan(scores["loss"])
    assert math.isnan(scorer.perplexity(TEXTS, 12)["perplexity"])


def test_scoring_leaves_the_model_and_the_tokenizer_as_they_were(model, tokenizer):
    model = get_peft_model(model, tiny.config(norm="none", dropout=0.5))
    tiny.perturb(model)
    model.train()
    model.base_model.model.model.norm.eval()
    tokenizer.pad_token, tokenizer.padding_side = None, "right"
    weights, grads = tiny.snapshot(model), [p.requires_grad for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    places = [p.data_ptr() for p in model.parameters()]
    scorer = Scorer(model, tokenizer, dtype="bf16")
    first = scorer.score(questions(), "accuracy"), scorer.score(written(), "bleu", 4)
    assert first == (scorer.score(questions(), "accuracy"), scorer.score(written(), "bleu", 4))
    tiny.assert_same(weights, tiny.snapshot(model))
    assert grads == [p.requires_grad for p in model.parameters()]
    assert modes == [module.training for module in model.modules()]
    assert places == [p.data_ptr() for p in model.parameters()]
    assert not any(p.grad is not None for p in model.parameters())
    assert tokenizer.pad_token is None and tokenizer.padding_side == "right"
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_an_adapter_is_scored_as_it_computes(model, tokenizer):
    plain = Scorer(model, tokenizer).loss(written())
    model = get_peft_model(model, tiny.config())
    tiny.perturb(model)
    model.eval()
    losses = torch.cat([token_losses(model, tokenizer, e.prompt, e.completion) for e in written()])
    adapted = Scorer(model, tokenizer).loss(written())
    assert adapted == pytest.approx(losses.mean().item(), abs=1e-5) != pytest.approx(plain)


def test_bf16_is_near_fp32(model, tokenizer):
    wide, narrow = (Scorer(model, tokenizer, dtype=d).loss(written()) for d in ("fp32", "bf16"))
    assert wide != narrow and narrow == pytest.approx(wide, rel=0.02)


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("no examples", lambda s: s.score([], "accuracy")),
        ("no examples", lambda s: s.loss([])),
        ("'f1' must be one of accuracy, exact_match", lambda s: s.score(written(), "f1", 4)),
        ("at least two choices", lambda s: s.score(written(), "accuracy")),
        ("needs max_new_tokens", lambda s: s.score(written(), "bleu")),
        ("has no tokens, at 'x'", lambda s: s.loss([Example("x", "")])),
        ("two tokens", lambda s: s.perplexity(["x"], 9)),
        ("dtype='fp16'", lambda s: Scorer(s.model, s.tokenizer, dtype="fp16")),
        ("batch_size=0", lambda s: Scorer(s.model, s.tokenizer, batch_size=0)),
    ],
)
def test_bad_input_is_one_clear_error(model, tokenizer, words, call):
    with pytest.raises(ValueError, match=words):
        call(Scorer(model, tokenizer))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("16 - 3 = 13 eggs\n#### 18", "18"),
        ("#### 1,234,567.", "1234567"),
        ("#### $2.50", "2.5"),
        ("#### 3 + 4 = 7\n\nQuestion: and 9?\n#### 9", "7"),
        ("it is 5, then 6.", "6"),
        ("#### none, so 4", "4"),
        ("4 left\n#### none", "4"),
        ("-3 degrees", "-3"),
        ("10-3", "3"),
        ("none", None),
        ("", None),
    ],
)
def test_the_number_of_an_answer(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Big Apple", True),
        ("the  big-apple!\nQuestion: why", True),
        ("New York City.", True),
        ("in the Big Apple", False),
        ("", False),
        ("NY\nBig Apple", False),
    ],
)
def test_any_reference_is_right(answer, right):
    example = Example("Where?", " New York", references=("New York City", "The Big Apple", "?"))
    assert is_match(example, answer) == right


def test_a_number_is_right_by_value():
    example = Example("How many?", " so\n#### 18")
    assert is_match(example, "#### 18.00") and is_match(example, "it is 18")
    assert not is_match(example, "18 and 19") and not is_match(example, "")


def test_figures_of_written_answers():
    examples = [Example("", " the cat sat on the mat"), Example("", " dogs ran home fast today")]
    right = [example.completion.strip() for example in examples]
    assert METRICS["rouge_l"](examples, right)["rouge_l"] == 1
    # longest common subsequence "cat on mat": 3 of 3 words, and of 6; "dog" stems as "dogs" does
    half = METRICS["rouge_l"](examples, ["cat on mat", "dog"])["rouge_l"]
    assert half == pytest.approx((2 * 1 * 0.5 / 1.5 + 2 * 1 * 0.2 / 1.2) / 2)
    assert METRICS["bleu"](examples, right) == pytest.approx({"bleu": 1, "chrf": 1})
    # 4-grams: 3 of 3 and 1 of 2; 3-grams 4/4, 2/3; 2-grams 5/5, 3/4; words 6/6, 4/5
    near = METRICS["bleu"](examples, [right[0], "dogs ran home fast now"])
    assert near["bleu"] == pytest.approx((10 / 11 * 8 / 9 * 6 / 7 * 4 / 5) ** 0.25)
    assert 0.8 < near["chrf"] < 1
    assert METRICS["exact_match"](examples, right) == {"exact_match": 0}


def lora(**settings):
    model = get_peft_model(
        tiny.llama(), LoraConfig(r=3, target_modules=["q_proj", "v_proj"], **settings)
    )
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.copy_(torch.randn(value.shape, generator=generator))
    return model


ADAPTED = {
    "lora": lambda: lora(),
    "dora": lambda: lora(use_dora=True),
    "weight": lambda: tiny.adapted(norm="weight"),
    "channel": lambda: tiny.adapted(norm="channel"),
    "conv1d": lambda: tiny.adapted(tiny.gpt2(), target_modules=["c_attn"], norm="none"),
}


@pytest.mark.parametrize("kind", ADAPTED)
def test_weights_after_training_are_those_of_the_merged_model(kind):
    model = ADAPTED[kind]()
    before = tiny.snapshot(model)
    pairs = [pair._replace(before=pair.before.clone()) for pair in weight_pairs(model)]
    tiny.assert_same(before, tiny.snapshot(model))
    plain = tiny.gpt2() if kind == "conv1d" else tiny.llama()
    merged = model.merge_and_unload()
    assert len(pairs) == (2 if kind == "conv1d" else 4)
    for pair in pairs:
        for side, whole in ((pair.before, plain), (pair.after, merged)):
            stored = whole.get_submodule(pair.name).weight
            expected = stored.t() if kind == "conv1d" else stored
            torch.testing.assert_close(side, expected, rtol=0, atol=0)
        assert not pair.inexact and not torch.equal(pair.before, pair.after)


def test_the_activation_norm_has_an_additive_weight_marked_inexact():
    model = tiny.adapted(norm="activation")
    for pair, layer in zip(weight_pairs(model), tiny.layers(model).values(), strict=True):
        torch.testing.assert_close(pair.after, pair.before + layer.get_delta_weight("default"))
        assert pair.inexact and not layer.secura_adapter["default"].config.allow_inexact_merge


def test_full_fine_tuning_is_compared_with_the_weights_before():
    model = tiny.llama()
    before = tiny.snapshot(model)
    for value in model.parameters():
        value.data.mul_(1.5)
    pairs = list(weight_pairs(model, before, ["q_proj", "v_proj"]))
    assert [p.name.rpartition(".")[2] for p in pairs] == ["q_proj", "v_proj"] * 2
    assert all(torch.equal(p.before * 1.5, p.after) for p in pairs)
    assert len(list(weight_pairs(model, before))) == 15
    conv1d = tiny.gpt2()
    (pair, _) = weight_pairs(conv1d, conv1d.state_dict(), ["c_attn"])
    assert torch.equal(pair.before, pair.after) and pair.before.shape == (72, 24)
    with pytest.raises(ValueError, match="base_state"):
        spectra(model)
    with pytest.raises(ValueError, match="no linear layers named w"):
        spectra(model, before, ["w"])


def test_a_spectrum_is_what_numpy_finds():
    found = spectra(lora(lora_alpha=1))
    for figures, pair in zip(found, weight_pairs(lora(lora_alpha=1)), strict=True):
        left, sigma, _ = np.linalg.svd(pair.before.double().numpy(), full_matrices=False)
        turned, after, _ = np.linalg.svd(pair.after.double().numpy(), full_matrices=False)
        delta = np.linalg.svd((pair.after - pair.before).double().numpy(), compute_uv=False)
        shares = delta[:3] / delta[:3].sum()
        new = sum(abs(turned[:, i] @ left).max() < 0.5 for i in range(10))
        expected = {
            "norm_before": np.linalg.norm(sigma),
            "norm_after": np.linalg.norm(after),
            "nuclear_before": sigma.sum(),
            "nuclear_after": after.sum(),
            "change": np.linalg.norm(delta) / np.linalg.norm(sigma),
            "stable_rank_before": (sigma**2).sum() / sigma[0] ** 2,
            "stable_rank_after": (after**2).sum() / after[0] ** 2,
            "stable_rank_change": (delta**2).sum() / delta[0] ** 2,
            "effective_rank_change": np.exp(-(shares * np.log(shares)).sum()),
            "new_directions": new,
        }
        assert {key: figures[key] for key in expected} == pytest.approx(expected, rel=1e-4)
        assert figures["quantiles_before"][::31] == pytest.approx([sigma[-1], sigma[0]], abs=1e-5)
        assert len(figures["quantiles_after"]) == 32
    assert any(figures["new_directions"] for figures in found)


def test_directions_are_new_where_none_was_near():
    before = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    turned = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    after = turned @ before
    same, new = (compare(WeightPair("w", before, w), cosine=0.6) for w in (2 * before, after))
    assert (same["new_directions"], new["new_directions"]) == (0, 4)
    assert compare(WeightPair("w", before, after), top=3, cosine=0.6)["new_directions"] == 3
    still = compare(WeightPair("w", before, before))
    assert still["change"] == still["effective_rank_change"] == still["stable_rank_change"] == 0


def test_weights_that_cannot_be_compared():
    broken = torch.full((3, 2), math.nan)
    with pytest.raises(ValueError, match="w holds NaN"):
        compare(WeightPair("w", torch.ones(3, 2), broken))
    model = tiny.adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj is merged.*unmerge"):
        spectra(model)
