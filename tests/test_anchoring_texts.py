"""What ``secura.anchor`` reads: given texts and the model's own samples; what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from tiny import TEXTS, cored

from secura import anchor, language_models, texts


def test_it_samples_its_own_text_where_none_is_given():
    first, second = cored(), cored()
    report = anchor(first, tokens=60, length=20, seed=3)
    assert report.sampled and report.tokens == 60
    anchor(second, tokens=60, length=20, seed=3)
    assert all(
        torch.equal(a[0], b[0])
        for a, b in zip(tiny.anchors(first), tiny.anchors(second), strict=True)
    )
    other = cored()
    anchor(other, tokens=60, length=20, seed=4)
    assert not torch.allclose(tiny.anchors(first)[0][1], tiny.anchors(other)[0][1], rtol=1e-3)


def test_what_it_samples_is_what_the_model_writes():
    model = cored()
    model.get_output_embeddings().weight.data.mul_(5)
    generator = torch.Generator().manual_seed(0)
    pieces, finite = texts.sample(model, None, 8, 20, 2, generator)
    generator.manual_seed(0)
    ids = torch.full((8, 1), model.config.bos_token_id)
    for _ in range(19):
        shares = tiny.logits(model, ids)[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(shares, 1, generator=generator)], dim=1)
    assert finite and torch.equal(torch.stack(pieces), ids)


@pytest.mark.parametrize(
    ("tokenizer", "config", "token"),
    [((7, 8), (1, 2), 7), (None, (1, 2), 1), (None, (None, [5, 6]), 5), ((None, 8), (None, 2), 2)],
)
def test_the_token_that_a_sample_starts_with(tokenizer, config, token):
    owner = lambda ids: ids and SimpleNamespace(bos_token_id=ids[0], eos_token_id=ids[1])  # noqa: E731
    model = SimpleNamespace(config=owner(config))
    assert texts.start_token(model, owner(tokenizer)) == token


def test_positions_are_those_of_the_language_model_within():
    text = SimpleNamespace(max_position_embeddings=16, bos_token_id=7)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    assert language_models.positions(model) == 16
    assert texts.start_token(model, None) == 7


def test_tokens_are_taken_from_every_text_in_turn():
    pieces = texts.pieces_of(cored(), TEXTS, None, 20, 6)
    assert [len(piece) for piece in pieces] == [6, 6, 6, 2]
    assert [int(piece[0]) for piece in pieces] == [3, 5, 3, 9]


def test_token_ids_may_be_lists():
    """As a tokenised data set holds them."""
    models = [tiny.adapted(core="u", norm="none") for _ in range(2)]
    anchor(models[0], [torch.arange(3, 12), torch.arange(5, 20)])
    anchor(models[1], [[*range(3, 12)], [*range(5, 20)]])
    assert torch.equal(*(tiny.parts(model)[0].left for model in models))


BAD = {
    "there is no text": {"texts": []},
    "text 1 has 1 token": {"texts": [torch.arange(3, 9), torch.tensor([3])]},
    "give the tokenizer": {"texts": ["some text"]},
    "neither a string nor": {"texts": [torch.rand(5)]},
    "text 0 is a row with input_ids": {"texts": [{"input_ids": [3, 4]}]},
    "damping=0 must lie between 1e-6 and 1000": {"texts": TEXTS, "damping": 0},
    "damping=1e-07 must lie": {"texts": TEXTS, "damping": 1e-7},
    "texts are a mapping with train, test": {"texts": {"train": ["a"], "test": ["b"]}},
    "test_anchoring_texts.py is a file: read it": {"texts": __file__},
    "text 1 has 0 token": {"texts": [[3, 4], [0, 0, 0]]},
    "text 1 has the token id -100": {"texts": [[3, 4], torch.tensor([3, -100])]},
    "text 0 has the token id 999, and the model knows 0 to": {"texts": [[3, 999]]},
    "damping=10000.0 must lie": {"texts": TEXTS, "damping": 1e4},
    "damping=nan": {"texts": TEXTS, "damping": float("nan")},
    "tokens=1": {"texts": TEXTS, "tokens": 1},
    "length=1.5": {"texts": TEXTS, "length": 1.5},
    "batch_size=0": {"texts": TEXTS, "batch_size": 0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_error_and_changes_nothing(message):
    model = cored()
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=message):
        anchor(model, **BAD[message])
    tiny.assert_same(tiny.snapshot(model), before)


@pytest.mark.parametrize("ends", [None, 2, [5, 2]], ids=str)
def test_padding_is_no_old_text(ends):
    """Of the model's pad token; where it ends texts too, one of it is kept."""
    one, other = cored(), cored()
    for model in (one, other):
        model.config.pad_token_id = 2 if ends else 0
        model.config.eos_token_id = ends or 2
    pad = one.config.pad_token_id
    given = [[3, 4, 5, 9], [6, pad, 7, 8, 3]]  # of one within a text nothing is known
    padded = [[pad, pad, *given[0], pad, pad, pad], [*given[1], pad]]
    if ends:
        given = [[pad, *given[0], pad], [*given[1], pad]]
    reports = [anchor(one, given), anchor(other, padded)]
    assert reports[0].tokens == reports[1].tokens == sum(map(len, given))
    tiny.assert_same(tiny.snapshot(one), tiny.snapshot(other))


def test_a_model_that_cannot_sample_says_so():
    model = cored()
    model.config.bos_token_id = model.config.eos_token_id = None
    with pytest.raises(ValueError, match=r"cannot sample: .*give texts"):
        anchor(model)


def test_no_more_tokens_are_read_than_asked_for_or_than_positions_allow():
    assert anchor(cored(), tokens=50, length=128).tokens == 50
    assert anchor(cored(), tokens=50, length=20).tokens == 40
    model = cored()
    assert anchor(model, tokens=200, length=128).tokens == 192  # 64 positions


def test_a_forward_without_a_cache_cannot_sample():
    model = cored()
    inner = model.forward
    model.forward = lambda input_ids: inner(input_ids=input_ids)
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=r"cannot sample: its forward takes no past.*give texts"):
        anchor(model)
    tiny.assert_same(tiny.snapshot(model), before)
    anchor(model, TEXTS)


def test_places_of_images_are_no_text():
    """Neither in texts, nor in what a model writes by itself."""
    model, fresh = cored(), cored()
    model.config.image_token_id, model.config.audio_token_id = 5, 9
    with_images = [torch.tensor([5, 5, 5, 9, *text.tolist(), 5]) for text in TEXTS]
    plain = [text[(text != 5) & (text != 9)] for text in TEXTS]
    report, other = anchor(model, with_images), anchor(fresh, plain)
    assert report.tokens == other.tokens
    for (left, right), expected in zip(tiny.anchors(model), tiny.anchors(fresh), strict=True):
        assert torch.equal(left, expected[0]) and torch.equal(right, expected[1])
    pieces, _ = texts.sample(model, None, 40, 30, 8, torch.Generator().manual_seed(0))
    written = torch.stack(pieces)[:, 1:]
    assert not ((written == 5) | (written == 9)).any() and (written == 6).any()


@pytest.mark.parametrize("name", ["Llava", "Qwen2VL", "SmolVLM", "Gemma3", "Qwen2Audio"])
def test_configs_name_the_places_of_images_and_sound(name):
    config = getattr(transformers, f"{name}Config")()
    assert language_models.placeholders(SimpleNamespace(config=config))


def test_a_model_that_reads_no_text_is_named_by_what_it_reads():
    model = SimpleNamespace(
        main_input_name="pixel_values", parameters=lambda: iter([torch.ones(1)])
    )
    with pytest.raises(ValueError, match="SimpleNamespace reads pixel_values"):
        language_models.check_reads(model)


def test_places_outside_of_the_logits_are_none():
    """Llava's config names one token more than its language model knows; an old one -200."""
    model = cored()
    model.config.image_token_index = model.config.vocab_size
    model.config.video_token_id = -200
    assert anchor(model, tokens=40, length=20).tokens == 40
    logits = torch.full((1, 1, 8), -50.0)
    logits[..., 3] = 50
    for seed in range(5):
        drawn, finite = texts.draw(logits, torch.Generator().manual_seed(seed), without=[3])
        assert finite and int(drawn) != 3


def test_a_text_of_images_alone_is_passed_over():
    model, fresh = cored(), cored()
    model.config.image_token_id = 5
    images = torch.full((6,), 5)
    report = anchor(model, [images, TEXTS[0][TEXTS[0] != 5]])
    anchor(fresh, [TEXTS[0][TEXTS[0] != 5]])
    assert report.tokens == int((TEXTS[0] != 5).sum())
    with pytest.raises(ValueError, match="images or sound alone"):
        anchor(model, [images])
