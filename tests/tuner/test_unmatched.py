"""A setting that names nothing of the model is told, with the nearest name there is."""

from __future__ import annotations

import warnings

import pytest
import tiny
from peft import PeftModel, get_peft_model

from secura.tuner import UnmatchedWarning


def told(model, **settings) -> list[str]:
    """What ``get_peft_model`` warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(model, tiny.config(**settings))
    return [str(one.message) for one in caught if one.category is UnmatchedWarning]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj", "vproj"]},
         "target_modules: 'vproj' matches no layer; correct it or leave it out; did you mean "
         "v_proj?"),
        ({"exclude_modules": ["o_prj"]}, "exclude_modules: 'o_prj' matches no layer"),
        ({"exclude_modules": r".*\.o_prj"}, "exclude_modules: '.*\\\\.o_prj' matches no layer of"),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save: 'lm_haed' matches no layer"),
        ({"layers_to_transform": [0, 7]}, "layers_to_transform: 7 matches no layer"),
        ({"layers_to_transform": 7, "target_parameters": ["lm_head.weight"]},
         "layers_to_transform: 7 matches no layer"),
        ({"rank_pattern": {"vproj": 2}}, "rank_pattern: 'vproj' matches no layer"),
        ({"target_parameters": ["experts.down"]}, "target_parameters: 'experts.down' matches no "),
    ],
)  # fmt: skip
def test_what_matches_nothing_is_told(settings, message):
    found = told(tiny.llama(), **settings)
    assert len(found) == 1
    assert found[0].startswith(message)


def test_what_matches_is_not(tmp_path):
    assert not told(
        tiny.llama(), target_modules=["q_proj", "layers.1.mlp.up_proj"], layers_to_transform=[1],
        modules_to_save=["lm_head"], rank_pattern={r"layers\.1.*q_proj": 2},
    )  # fmt: skip
    assert not told(tiny.llama(), target_modules="all-linear", exclude_modules=r".*mlp.*")
    assert not told(tiny.classifier(), task_type="SEQ_CLS")


def test_a_second_adapters_are_its_own():
    model = get_peft_model(tiny.llama(), tiny.config(target_modules=["q_proj", "v_proj"]))
    second = tiny.config(target_modules=["q_proj"], rank_pattern={"v_proj": 2})
    with pytest.warns(UnmatchedWarning, match="rank_pattern: 'v_proj' matches no layer"):
        model.add_adapter("second", second)


def test_a_saved_classifier_is_loaded_without_a_word(tmp_path):
    get_peft_model(tiny.classifier(), tiny.config(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny.classifier(), tmp_path)  # where one is told, a test fails
