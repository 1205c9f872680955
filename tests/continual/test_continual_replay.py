"""Experience replay: what is kept, what is drawn, and that a run with it can be resumed."""

from __future__ import annotations

import pytest
import tiny
import torch
from continual_runs import adapted, pad, parameters, rows, trainer
from trainer_runs import losses

from secura.continual import ReplayBuffer, ReplayCollator


def task(place: int, count: int) -> list[dict[str, list[int]]]:
    """Examples whose tokens say which task they are of, and which example."""
    return [{"input_ids": [place, index], "labels": [place, index]} for index in range(count)]


def kept(buffer) -> list[set[int]]:
    """The examples kept, by task."""
    pairs = [tuple(features["input_ids"]) for features in buffer]
    assert len(set(pairs)) == len(pairs)
    return [{i for p, i in pairs if p == place} for place in range(1 + max(p for p, _ in pairs))]


def test_each_task_gets_an_equal_part():
    buffer = ReplayBuffer([task(0, 50), task(1, 40), task(2, 30)], size=13, seed=0)
    assert [len(part) for part in kept(buffer)] == [5, 4, 4]
    short = ReplayBuffer([task(0, 50), task(1, 2), task(2, 30)], size=12, seed=0)
    assert [len(part) for part in kept(short)] == [5, 2, 5]
    assert len(ReplayBuffer([task(0, 3)], size=10)) == 3


def test_what_is_kept_depends_on_the_seed_and_shrinks_as_tasks_come():
    one = ReplayBuffer([task(0, 50)], size=12, seed=0)
    two = ReplayBuffer([task(0, 50), task(1, 40)], size=12, seed=0)
    assert list(one) == list(ReplayBuffer([task(0, 50)], size=12, seed=0))
    assert kept(one) != kept(ReplayBuffer([task(0, 50)], size=12, seed=1))
    assert kept(two)[0] < kept(one)[0]


def test_memories_that_make_no_sense():
    with pytest.raises(ValueError, match="size=0"):
        ReplayBuffer([task(0, 3)], size=0)
    for nothing in ([], [task(0, 3), []]):
        with pytest.raises(ValueError, match="at least one example"):
            ReplayBuffer(nothing, size=4)
    with pytest.raises(ValueError, match="columns input_ids cannot"):
        ReplayBuffer([task(0, 3), [{"input_ids": [1]}]], size=4)
    with pytest.raises(ValueError, match="memory is empty: give it examples"):
        ReplayCollator(pad, [])
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="share="):
            ReplayCollator(pad, task(0, 3), share)


@pytest.mark.parametrize(
    ("batch", "share", "replayed"),
    [(4, 0.2, 1), (8, 0.2, 2), (4, 0.5, 4), (1, 0.1, 1), (3, 0.9, 27), (15, 0.5, 15), (5, 0.25, 2)],
)
def test_the_share_is_that_of_the_final_batch(batch, share, replayed):
    memory = ReplayBuffer([task(0, 20)], size=20)
    drawn = ReplayCollator(list, memory, share)(task(1, batch))
    assert drawn[:batch] == task(1, batch)
    assert [features["input_ids"][0] for features in drawn[batch:]] == [0] * replayed
    distinct = {features["input_ids"][1] for features in drawn[batch:]}
    assert len(distinct) == replayed or replayed > len(memory)


def test_the_draw_is_of_the_seed_and_the_batch_alone():
    memory = ReplayBuffer([task(0, 1000)], size=1000)
    batches = [task(1, 8), task(2, 8), task(1, 8)[::-1]]
    draws = [ReplayCollator(list, memory, 0.5).draw(batch) for batch in batches]
    assert draws[0] != draws[1] and draws[0] != draws[2]
    assert draws[0] != ReplayCollator(list, memory, 0.5, seed=1).draw(batches[0])
    again = ReplayCollator(list, memory, 0.5)
    torch.manual_seed(5)
    assert [again.draw(batch) for batch in reversed(batches)] == draws[::-1]
    tensors = [{name: torch.tensor(ids) for name, ids in f.items()} for f in batches[0]]
    assert again.draw(tensors) == draws[0]


def test_features_that_do_not_go_together():
    collator = ReplayCollator(list, task(0, 3))
    with pytest.raises(ValueError, match="columns attention_mask, input_ids, labels cannot"):
        collator([{**task(1, 1)[0], "attention_mask": [1, 1]}])
    with pytest.raises(ValueError, match="columns input_ids cannot"):
        collator([*task(1, 1), {"input_ids": [1]}])
    with pytest.raises(ValueError, match="needs token ids, and got labels"):
        ReplayCollator(list, [{"labels": [1]}])([{"labels": [1]}])


def run(folder, *, resume=None, workers=0, share=0.5, **settings):
    """A run with replay: its trainer, and the batches in the order they were trained on."""
    memory = ReplayBuffer([rows(20, seed=7)], size=10)
    collator = ReplayCollator(pad, memory, share)
    model, batches = adapted(dropout=0.1), []
    one = trainer(folder, model, collator=collator, dataloader_num_workers=workers, **settings)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(kwargs), with_kwargs=True
    )
    one.train(resume_from_checkpoint=resume)
    return one, batches


def test_resumed_runs_and_workers_see_the_same_batches(tmp_path):
    whole, batches = run(tmp_path / "whole", save_strategy="steps", save_steps=2)
    resumed, later = run(tmp_path / "rest", resume=str(tmp_path / "whole" / "checkpoint-2"))
    loaded, elsewhere = run(tmp_path / "workers", workers=1)
    assert {len(batch["input_ids"]) for batch in batches} == {8}
    for first, second in [
        *zip(batches[2:], later, strict=True),
        *zip(batches, elsewhere, strict=True),
    ]:
        assert torch.equal(first["input_ids"], second["input_ids"])
    assert losses(resumed) == losses(whole) == losses(loaded)
    tiny.assert_same(parameters(resumed.model), parameters(whole.model))


def test_the_loss_is_the_mean_over_new_and_replayed_tokens(tmp_path):
    one, batches = run(
        tmp_path, share=0.2, gradient_accumulation_steps=2, max_steps=1, learning_rate=0.0
    )
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    assert [len(batch["labels"]) for batch in batches] == [5, 5]
    assert [int(batch["num_items_in_batch"]) for batch in batches] == [items, items]
    assert losses(one)
