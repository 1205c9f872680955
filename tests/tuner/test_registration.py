"""A PEFT that would pass over a method in which files are checked is refused at import."""

from __future__ import annotations

import inspect

import pytest
from peft.tuners.tuners_utils import BaseTuner

from secura.tuner import SecuraConfig, SecuraModel
from secura.tuner.registration import CALLED_BY_PEFT, register


@pytest.mark.parametrize("name", CALLED_BY_PEFT)
def test_a_peft_that_never_calls_a_check_is_refused(name, monkeypatch):
    monkeypatch.delattr(BaseTuner, name)
    with pytest.raises(ImportError, match=rf"its tuners have no {name}.*install peft>="):
        register(SecuraConfig, SecuraModel)


def test_the_list_is_of_what_the_tuner_overrides():
    """Of its private methods, those that PEFT's own class has: no other is called by PEFT."""
    private = {name for name in vars(SecuraModel) if name.startswith("_") and name[1] != "_"}
    known = {name for name, _ in inspect.getmembers(BaseTuner)}
    assert {name for name in private if name in known} - {"_abc_impl"} == set(CALLED_BY_PEFT)
