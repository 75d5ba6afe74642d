"""The comparison of a state dict with a model, key by key."""

import torch

from mae_et.models.strict import misfit, some

OWN = {"a": torch.zeros(2), "b": torch.zeros(3, 1), "c": torch.zeros(())}


def test_misfit__nothing():
    assert not misfit(dict(OWN), OWN)
    assert not misfit({"a": OWN["a"], "b": OWN["b"]}, OWN, lambda key: key == "c")
    assert not misfit({}, {})


def test_misfit__names_each_kind_with_its_shapes():
    found = misfit({"a": torch.zeros(4), "b": OWN["b"], "d": torch.zeros(5)}, OWN)
    assert found
    assert (found.missing, found.unexpected) == (["c ()"], ["d (5,)"])
    assert found.keys_missing == ["c"]
    assert str(found) == "1 missing: c (); 1 unexpected: d (5,); 1 of another shape: a (4,), the model has (2,)"


def test_misfit__what_may_be_missing_must_still_have_the_shape():
    assert misfit({"a": torch.zeros(9), "b": OWN["b"]}, OWN, lambda key: True).other_shape


def test_some__the_first_few():
    assert some(list("abcdef")) == "a, b, c, d, e, f"
    assert some(list("abcdefg")) == "a, b, c, d, e, f, ..."
