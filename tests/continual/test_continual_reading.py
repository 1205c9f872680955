"""What AnchorCallback reads of a task's own batches, told before the first step."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import tiny
import torch
from continual_runs import cored, pad, rows, trainer

from secura.continual import AnchorCallback, anchoring


def test_a_stream_of_rows_is_trained_on_and_anchored(tmp_path):
    callback = AnchorCallback(tokens=32)
    run = trainer(tmp_path, cored(), [callback])
    run.train_dataset = run.train_dataset.to_iterable_dataset()
    run.train()
    assert run.state.global_step == 4 and callback.report.tokens == 32


def test_batches_without_token_ids_are_refused_before_the_first_step(tmp_path):
    def embedded(features):
        random.random(), np.random.rand()
        width = tiny.llama().config.hidden_size
        return {"inputs_embeds": torch.randn(len(features), 4, width), "labels": torch.ones(1)}

    run = trainer(tmp_path, cored(), [AnchorCallback()], collator=embedded)
    with pytest.raises(ValueError, match="a batch has inputs_embeds, labels and no input_ids"):
        run.train()
    assert run.state.global_step == 0
    callback = AnchorCallback()
    before = torch.random.get_rng_state(), random.getstate()
    known = np.random.get_state()[2]
    loader = torch.utils.data.DataLoader(rows(), collate_fn=embedded)
    with pytest.raises(ValueError, match="and no input_ids"):
        callback.on_train_begin(None, None, None, model=run.model, train_dataloader=loader)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1] and np.random.get_state()[2] == known
    with pytest.raises(ValueError, match="a batch has list and no input_ids"):
        anchoring._read([[{"prompt": "a"}]], 8, torch.device("cpu"))


def test_packed_rows_are_read_text_by_text():
    ids = torch.arange(3, 23)
    packed = {"input_ids": ids[None], "position_ids": torch.tensor([[*range(7), *range(13)]])}
    padded = {"input_ids": ids[None], "attention_mask": (ids > 5)[None].long()}
    of_images = {"input_ids": ids[None], "position_ids": torch.zeros(3, 1, 20)}  # Qwen2-VL's
    assert [text.tolist() for text in anchoring._read([of_images], 100, torch.device("cpu"))] == [
        ids.tolist()
    ]
    found = anchoring._read([packed, padded], 100, torch.device("cpu"))
    assert [text.tolist() for text in found] == [[*ids[:7]], [*ids[7:]], [*ids[3:]]]
    assert len(anchoring._read([packed, padded], 20, torch.device("cpu"))) == 2
    with pytest.raises(ValueError, match="a batch has pixel_values and no input_ids"):
        anchoring._read([{"pixel_values": ids}], 8, torch.device("cpu"))


class Stream(torch.utils.data.IterableDataset):
    """Rows that are there once."""

    def __init__(self):
        self.left = iter(rows())

    def __iter__(self):
        return self.left


def test_a_stream_that_can_be_read_once_is_refused_before_the_first_step(tmp_path):
    run = trainer(tmp_path, cored(), [AnchorCallback()])
    run.train_dataset = Stream()
    with pytest.raises(ValueError, match="a stream that can be read once"):
        run.train()
    assert run.state.global_step == 0
    run = trainer(tmp_path, cored(), [AnchorCallback(rows_of_ids())])
    run.train_dataset = Stream()
    run.train()
    assert run.state.global_step == 4


class Again(Stream):
    """Rows that begin anew whenever they are asked for."""

    def __iter__(self):
        self.left = iter(rows())
        return self

    def __next__(self):
        return next(self.left)


class Yielding(Stream):
    """Rows that are there once, behind a generator that is not."""

    def __iter__(self):
        yield from self.left


def test_a_stream_that_begins_anew_is_read_again(tmp_path):
    callback = AnchorCallback(tokens=32)
    run = trainer(tmp_path, cored(), [callback])
    run.train_dataset = Again()
    run.train()
    assert callback.report.tokens == 32


def test_a_stream_that_is_used_up_is_told_and_nothing_is_folded(tmp_path):
    run = trainer(tmp_path, cored(), [AnchorCallback()], max_steps=6)
    run.train_dataset = Yielding()
    with pytest.raises(ValueError, match="nothing was folded or anchored: give AnchorCallback"):
        run.train()
    assert run.state.global_step == 6 and not tiny.parts(run.model)[0].core.any()


def test_a_loader_that_gives_nothing_any_more_folds_nothing():
    model = cored()
    with torch.no_grad():
        tiny.parts(model)[0].U.fill_(1)
    with pytest.raises(ValueError, match="nothing was folded or anchored"):
        AnchorCallback().on_train_end(None, None, None, model=model, train_dataloader=[])
    assert tiny.parts(model)[0].U.all()


def rows_of_ids():
    return [row["input_ids"] for row in rows()]


def test_a_mask_that_tells_no_texts_apart_is_refused_before_the_first_step(tmp_path):
    def blocks(features):
        batch = pad(features)
        count, length = batch["input_ids"].shape
        return batch | {"attention_mask": torch.ones(count, 1, length, length).tril().bool()}

    run = trainer(tmp_path, cored(), [AnchorCallback()], collator=blocks)
    with pytest.raises(ValueError, match=r"attention_mask \[1, 1, 8, 8\] beside input_ids"):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.parametrize("anchored", [True, False])
def test_a_core_without_an_anchor_to_add_to_is_warned_of(anchored, tmp_path):
    run = trainer(tmp_path, cored(anchored=anchored), [AnchorCallback()], max_steps=1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run.train()
    assert any("a core has none yet" in str(one.message) for one in told) != anchored
