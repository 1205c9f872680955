"""What a saved adapter does not hold, or never learned, is told when it is saved."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch

import secura
from secura import FoldCallback


def test_a_scale_that_the_file_has_not_is_told(tmp_path):
    model = tiny.adapted(norm="none")
    for layer in tiny.layers(model).values():
        layer.set_scale("default", 2.0)
    told = r"acts with scaling=2 here.*says 1, .*set_scale\('default', 2\.0\)"
    with pytest.warns(UserWarning, match=told):
        model.save_pretrained(tmp_path)


def test_what_is_told_of_an_edited_scaling_brings_back_what_acted(tmp_path):
    model = tiny.adapted(norm="none", scaling=0.5)
    tiny.perturb(model)
    before = tiny.logits(model)
    model.peft_config["default"].scaling = 2.0
    with pytest.warns(UserWarning, match=r"says 2, .*set_scale\('default', 0\.25\)"):
        model.save_pretrained(tmp_path)
    again = secura.from_pretrained(tiny.llama(), tmp_path)
    assert not torch.equal(tiny.logits(again), before)
    for layer in tiny.layers(again).values():
        layer.set_scale("default", 0.25)
    torch.testing.assert_close(tiny.logits(again), before)


@pytest.mark.parametrize(("first", "written"), [(3.0, 1.0), (1.0, 0.0)])
def test_scales_that_are_no_one_multiple_of_the_configs_are_told(first, written, tmp_path):
    model = tiny.adapted(norm="none")
    next(iter(tiny.layers(model).values())).set_scale("default", first)
    model.peft_config["default"].scaling = written
    told = rf"says {written:g}, .*set_scale\('default', the scale of each\)"
    with pytest.warns(UserWarning, match=told):
        model.save_pretrained(tmp_path)


def test_layers_that_were_never_trained_are_told(tmp_path):
    model = tiny.adapted(norm="none", init_weights=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)  # none was
        tiny.perturb(model)
        model.save_pretrained(tmp_path)
        list(tiny.layers(model).values())[1].fold()
        model.save_pretrained(tmp_path)  # B is 0 there, and what was folded is not
    with torch.no_grad():
        tiny.parts(model)[1].core.zero_()
    with pytest.warns(UserWarning, match=r"1 of 4 layers.*layers\.0\.self_attn\.v_proj first"):
        model.save_pretrained(tmp_path)


def test_folds_that_never_came_are_told(tmp_path):
    """`fold_every` is the callback's: without it nothing folds."""
    model = tiny.adapted(norm="none", fold_every=1)
    with pytest.warns(UserWarning, match=r"fold_every=1 and not folded.*FoldCallback"):
        model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        secura.fold(model)
        model.save_pretrained(tmp_path)
        trained = tiny.adapted(norm="none", fold_every=100)
        FoldCallback().on_train_begin(None, None, None, model=trained)
        trained.save_pretrained(tmp_path)


def test_folds_that_no_longer_come_are_told_too(tmp_path):
    """An adapter that was folded, gone on with in a run without the callback."""
    model = tiny.adapted(norm="none", fold_every=1)
    secura.fold(model)
    tiny.perturb(model)
    model.save_pretrained(tmp_path / "folded")
    for trains in (True, False):
        loaded = secura.from_pretrained(tiny.llama(), tmp_path / "folded", is_trainable=trains)
        if trains:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                loaded.save_pretrained(tmp_path / "untrained")
            tiny.perturb(loaded, 1)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            loaded.save_pretrained(tmp_path / "again")
        assert any("not folded since" in str(one.message) for one in told) is trains


def test_what_is_told_of_folds_is_read_off_what_is_saved(tmp_path):
    """FSDP2 has one process save, which must not ask for parameters that all of them hold."""
    model = tiny.adapted(norm="none", fold_every=1)
    state = tiny.snapshot(model)
    unlearned = {n: v.zero_() if n.endswith(".B") else v for n, v in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path, state_dict=unlearned)


def test_what_is_trained_beside_the_adapter_is_told(tmp_path):
    model = tiny.adapted(norm="none", modules_to_save=["lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path / "all of it")
    layer = next(iter(tiny.layers(model)))
    model.get_submodule(layer).base_layer.bias.requires_grad_(True)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"3 parameter\(s\) beside .*embed_tokens"):
        model.save_pretrained(tmp_path / "less")
