"""Random configs and random damage to files of weights.

A config is built or refused with a ConfigError that names each fault. A damaged file of weights gives a UserError, or
exactly the tensors that were written. MAE_ET_FUZZ_SECONDS limits the time of each test (default 8).
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from mae_et.config.schema import ClassifyConfig, PretrainConfig, from_dict
from mae_et.config.validation import flat, to_dict
from mae_et.errors import ConfigError, UserError
from mae_et.models.sizes import as_size
from mae_et.models.vit import random_vit
from mae_et.storage.backbone import read_backbone, write_backbone
from mae_et.storage.checkpoint import load_checkpoint, save_checkpoint
from tests.plans import plan_for

SECONDS = float(os.environ.get("MAE_ET_FUZZ_SECONDS", "8"))
free = settings(max_examples=int(SECONDS * 25), deadline=None, suppress_health_check=list(HealthCheck), database=None)


def keys_of(section, prefix=""):
    """Yields the dotted names of all options of a config."""
    for name, field in section.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            yield from keys_of(nested, f"{prefix}{name}.")
        else:
            yield prefix + name


PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.integers(-3, 300),
    st.floats(),
    st.sampled_from(["", "etpp", "constant", "custom", "base", "huge", "mix", "hog", "bf16", "knn", "nan", "\0", "ä"]),
    st.text(max_size=5),
)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
)


@pytest.mark.parametrize("kind", [PretrainConfig, ClassifyConfig])
@free
@given(data=st.data())
def test_from_dict__builds_or_names_each_fault(kind, data):
    names = list(keys_of(kind))
    chosen = data.draw(st.dictionaries(st.sampled_from([*names, "model", "run", "bogus.key"]), VALUES, max_size=6))
    values = {"data": {"train": "scenes:40@32", "val": "scenes:40@32", "image_size": 32}}
    for name, value in chosen.items():
        node, *rest = values, *name.split(".")
        for parent in rest[:-1]:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict):
            node[rest[-1]] = value
    faults = None
    try:
        config = from_dict(kind, values)
        plan = plan_for(config, 1000)
    except ConfigError as error:
        faults = error.faults
    if faults is not None:
        assert faults
        assert all(isinstance(fault, str) and fault for fault in faults)
        return
    assert plan.num_steps >= 1
    assert as_size(dict(flat(to_dict(config)))["data.image_size"]) == config.data.image_size


@functools.cache
def written(suffix: str, folder: str) -> bytes:
    """Returns the content of a small file of weights."""
    torch.manual_seed(0)
    path = Path(folder) / f"b{suffix}"
    model = random_vit(16, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    if suffix == ".ckpt":
        save_checkpoint({"model": model.state_dict(), "step": 1}, Path(folder), 1, 1)
        return (Path(folder) / "step_00000001.pt").read_bytes()
    write_backbone(model.state_dict(), path, "timm", {"num_heads": "2", "image_size": "16"})
    return path.read_bytes()


DAMAGE = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(0, 7)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
        st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=9)),
        st.tuples(st.just("zero"), st.floats(0, 1, exclude_max=True), st.integers(1, 4096)),
    ),
    min_size=1,
    max_size=3,
)


def damaged(content: bytes, damage) -> bytes:
    spoilt = bytearray(content)
    for kind, place, what in damage:
        at = int(place * len(spoilt))
        if kind == "flip" and spoilt:
            spoilt[min(at, len(spoilt) - 1)] ^= 1 << what
        elif kind == "cut":
            del spoilt[at:]
        elif kind == "insert":
            spoilt[at:at] = what
        elif kind == "zero":
            spoilt[at : at + what] = bytes(len(spoilt[at : at + what]))
    return bytes(spoilt)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@free
@given(damage=DAMAGE)
@example(damage=[("cut", 0.0, 0)])
@example(damage=[("flip", 0.5, 0)])
def test_weights__damage_is_found_or_harmless(tmp_path_factory, suffix, damage):
    folder = tmp_path_factory.getbasetemp() / "fuzz_weights"
    folder.mkdir(exist_ok=True)
    content = written(suffix, str(folder))
    whole, path = folder / f"whole{suffix}", folder / f"damaged{suffix}"
    whole.write_bytes(content)
    path.write_bytes(damaged(content, damage))
    read = (lambda file: load_checkpoint(file)["model"]) if suffix == ".ckpt" else (lambda file: read_backbone(file)[0])
    expected = read(whole)
    try:
        found = read(path)
    except UserError:
        return
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
