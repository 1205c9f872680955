"""Two processes fold, anchor and merge as one does, and fail together."""

from __future__ import annotations

from types import SimpleNamespace

import continual_runs
import pytest
import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F
import two_processes
from datasets import IterableDataset
from peft import get_peft_model
from sharded_runs import TARGETS, TEXTS, adapted, fsdp1, gap, train, whole_state
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

import secura
from secura.continual import AnchorCallback

STACK = "model.layers.0.mlp.experts.gate_up_proj"
EXPERTS = {"norm": "none", "target_modules": [], "target_parameters": ["experts.gate_up_proj"]}


def equal(tensors) -> bool:
    """Whether both processes hold the same tensors."""
    mine = torch.cat([tensor.flatten() for tensor in tensors])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    return torch.equal(*both)


def folds_under_fsdp1(folder):
    """How far a fold moves the logits, and how far what is folded is from one process's."""
    one = train(adapted("none"), tiny.tokens(4))
    secura.fold(one)
    model = fsdp1("none")
    train(model, tiny.tokens(4).chunk(2)[dist.get_rank()])
    before = tiny.logits(model)
    assert secura.fold(model) == len(TARGETS) * 2 - 1
    pairs = zip(tiny.parts(model), tiny.parts(one), strict=True)
    return [gap(tiny.logits(model), before), max(gap(a.core, b.core) for a, b in pairs)]


def folds_within_a_summons(folder):
    """The same, where the parameters are whole already."""
    model = fsdp1("none")
    train(model, tiny.tokens(4).chunk(2)[dist.get_rank()])
    before = tiny.logits(model)
    with FullyShardedDataParallel.summon_full_params(model):
        secura.fold(model)
    return gap(tiny.logits(model), before)


def folds_a_layer_of_fsdp1(folder):
    """A layer by itself, whose parameters are elsewhere."""
    next(iter(tiny.layers(fsdp1("none")).values())).fold()


def anchors_under_fsdp1(folder):
    """How far an anchor, one more and its end move the logits of a core that is not 0."""
    model = tiny.adapted(core="u", norm="none", target_modules=TARGETS)
    tiny.perturb(model)
    policy = fsdp1("none", model)
    before, moved = tiny.logits(policy), []
    for act in (
        lambda: secura.anchor(policy, TEXTS, batch_size=1),
        lambda: secura.anchor(policy, TEXTS, batch_size=1, add=True),
        lambda: secura.unanchor(policy),
        lambda: secura.fold(policy),
    ):
        act()
        moved.append(gap(tiny.logits(policy), before))
    return [max(moved), equal([part.core for part in tiny.parts(policy)])]


def experts_of_a_plan(folder):
    """The adapter is put on a model whose experts are shared out."""
    whole, plan = tiny.mixtral(), DistributedConfig(tp_plan="auto", tp_size=2)
    model = type(whole).from_pretrained(
        None, config=whole.config, state_dict=whole.state_dict(), distributed_config=plan
    )
    get_peft_model(model, tiny.config(**EXPERTS))


def merges_experts(folder):
    """How far a merge into shards that are still gathered is from one in one process."""
    one = get_peft_model(tiny.mixtral(), tiny.config(**EXPERTS)).eval()
    tiny.perturb(one)
    model = get_peft_model(tiny.mixtral(), tiny.config(**EXPERTS)).eval()
    tiny.perturb(model)
    expected = one.merge_and_unload().state_dict()[STACK]
    fully_shard(model)
    tiny.logits(model)
    return gap(whole_state(model.merge_and_unload())[STACK], expected)


class Routed(nn.Module):
    """Two layers, of which even tokens reach the first and odd ones the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)
        config = secura.AdapterConfig(r=4, core="u", norm="none")
        self.experts = nn.ModuleList(
            secura.SECURALinear(nn.Linear(16, 16), config) for _ in range(2)
        )

    def forward(self, input_ids):
        x = self.embed(input_ids)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            here = input_ids % 2 == number
            if here.any():
                out = out.index_put(here.nonzero(as_tuple=True), expert(x[here]))
        return SimpleNamespace(logits=self.head(torch.tanh(out + x)))


def anchors_what_one_process_reaches(folder):
    """How far each layer's anchor is from one process's, whose labels are its own."""
    texts = [torch.tensor([2, 4, 6, 8, 10]), torch.tensor([3, 5, 7, 9, 11])]
    model = Routed()
    report = secura.anchor(model, texts, batch_size=1)
    norms = [float(part.left.norm() * part.right.norm()) for part in model.experts]
    lefts = [part.left for part in model.experts]
    return [report.tokens, list(report.unseen), equal(lefts), norms]


def anchors_by_samples(folder):
    """How many tokens both read, and S of a layer."""
    model = tiny.adapted(core="u", norm="none")
    report = secura.anchor(model, tokens=80, length=20)
    return [report.tokens, tiny.parts(model)[1].right.tolist()]


def fails_on_one_process(folder):
    """A text that one process reads makes its logits infinite."""
    model = tiny.adapted(core="u", norm="none")
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("inf")
    secura.anchor(model, [torch.tensor([3, 4, 5, 6]), torch.tensor([3, 4, 7, 6])], batch_size=1)


def anchors_by_a_stream(folder):
    """A data set that the first process hands out; the second process's rows are shorter."""
    model = tiny.adapted(core="u", norm="none")
    secura.anchor(model, TEXTS, batch_size=1)
    rows = [
        {name: ids[: 8 if number % 8 < 4 else 3] for name, ids in row.items()}
        for number, row in enumerate(continual_runs.rows(400))
    ]

    def padded(features):
        batch = continual_runs.pad(features)
        lacking = 8 - batch["input_ids"].shape[1]
        fill = {"labels": -100}
        return {k: F.pad(v, (0, lacking), value=fill.get(k, 0)) for k, v in batch.items()}

    args = TrainingArguments(
        folder / "out", max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    stream = IterableDataset.from_generator(lambda: iter(rows))
    callback = AnchorCallback(tokens=128)
    Trainer(model, args, padded, stream, callbacks=[callback]).train()
    parts = tiny.parts(model)
    same = equal([part.left for part in parts] + [part.core for part in parts])
    return [callback.report.tokens > 0, same]


def takes_one_rate(folder):
    """The rate of parts of FSDP2's, as a share of one process's, and where weights differ."""
    one = secura.learning_rate(adapted("none"), 100)
    shared = secura.learning_rate(fully_shard(adapted("none")), 100)
    model = adapted("none")
    for layer in tiny.layers(model).values():
        layer.base_layer.weight.data.mul_(1 + dist.get_rank())
    rate = secura.learning_rate(model, 100)
    return [shared / one, rate / one, equal([torch.tensor([rate])])]


def takes_no_rate(folder):
    secura.learning_rate(fsdp1("none"), 100)


def cases():
    """What both processes run."""
    return {
        case.__name__: case
        for case in (
            folds_under_fsdp1,
            folds_within_a_summons,
            folds_a_layer_of_fsdp1,
            anchors_under_fsdp1,
            experts_of_a_plan,
            merges_experts,
            anchors_what_one_process_reaches,
            anchors_by_samples,
            fails_on_one_process,
            anchors_by_a_stream,
            takes_one_rate,
            takes_no_rate,
        )
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return two_processes.run("test_two_processes:cases", tmp_path_factory.mktemp("two"))


def test_a_fold_under_fsdp1_is_one_processs(found):
    moved, core = found["folds_under_fsdp1"]
    assert moved < 1e-6 and core < 1e-5
    assert found["folds_within_a_summons"] < 1e-6
    assert "FSDP1 holds a part of the adapter's" in found["folds_a_layer_of_fsdp1"]


def test_anchors_under_fsdp1_move_nothing(found):
    moved, same = found["anchors_under_fsdp1"]
    assert moved < 1e-5 and same


def test_experts_that_a_plan_shares_out_are_refused(found):
    assert "ValueError: " in found["experts_of_a_plan"]
    assert "shares the experts out over processes" in found["experts_of_a_plan"]


def test_a_merge_of_experts_reaches_the_shards(found):
    assert found["merges_experts"] == 0


def test_a_layer_that_one_process_reaches_has_one_anchor(found):
    tokens, unseen, same, norms = found["anchors_what_one_process_reaches"]
    assert (tokens, unseen, same) == (10, [], True)
    model = Routed()
    secura.anchor(model, [torch.tensor([2, 4, 6, 8, 10]), torch.tensor([3, 5, 7, 9, 11])])
    expected = [float(part.left.norm() * part.right.norm()) for part in model.experts]
    assert norms == pytest.approx(expected, rel=0.5)  # each draws labels of its own


def test_each_process_samples_texts_of_its_own(found):
    tokens, right = found["anchors_by_samples"]
    model = tiny.adapted(core="u", norm="none")
    assert tokens == 80 == 2 * secura.anchor(model, tokens=40, length=20).tokens
    first = tiny.parts(model)[1].right
    assert not torch.allclose(torch.tensor(right), first, rtol=1e-2)


def test_processes_fail_together(found):
    assert found["fails_on_one_process"].startswith(
        "ValueError: the model's logits hold NaN or inf"
    )


def test_a_stream_is_read_by_both_to_the_same_batch(found):
    assert found["anchors_by_a_stream"] == [True, True]


def test_processes_take_the_rate_of_whole_weights_and_one_together(found):
    assert found["takes_one_rate"] == [1, 1, True]
    assert "a part of FSDP1's" in found["takes_no_rate"]
