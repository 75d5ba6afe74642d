"""Command lines and budgets that went wrong: each ends in the right value or in one clear message."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mae_et.config.files import add_config_arguments, load_config
from mae_et.config.overrides import convert
from mae_et.config.schema import ClassifyConfig, PretrainConfig, from_dict, to_dict
from mae_et.config.validation import flat, schema_node
from mae_et.curriculum.cost import mae_cost
from mae_et.curriculum.plan import make_plan
from mae_et.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs/pretrain/demo.py"


def parsed(*words):
    """What the tools make of --cfg-options WORDS..."""
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return parser.parse_args([str(DEMO), "--cfg-options", *words]).cfg_options


def loaded(*words, cls=PretrainConfig, config=DEMO):
    return load_config(cls, config, parsed(*words))


def run_tool(*args, cwd=ROOT, python=sys.executable):
    return subprocess.run(
        [python, *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )


def one_message(result):
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    return result.stderr.strip()


# ---- values arrive as written ----


@pytest.mark.parametrize(
    "path",
    [
        "/d/my photos",
        " leading",
        "a  b",
        "tab\there",
        "ü/日本",
        "a=b",
        "it's",
        'say "hi"',
        "back\\slash",
        "[a]",
        "(a)",
        "{x: 1}",
    ],
)
def test_case__C1_spaces_arrive_as_written(path):
    assert loaded(f"data.train={path}").data.train == path
    assert loaded(f"data.val={path}").data.val == path


@pytest.mark.parametrize(
    "spec",
    [
        "scenes:128@64,seed=0",
        "shards-{000,001}.tar",
        "/d/{a,b}/*.jpg",
        "a,b",
        "1,2",
        "torchvision:cifar10@/d,split=test",
    ],
)
def test_case__C2_commas_and_braces_arrive_as_written(spec):
    assert loaded(f"data.train={spec}").data.train == spec


@pytest.mark.parametrize("name", ["2024", "1e5", "None", "true", "False", "0x10", "[]", "007", "nan", "inf", "-1"])
def test_case__C3_names_that_look_like_values(name):
    assert loaded(f"data.train={name}").data.train == name
    assert loaded(f"data.val=./{name}").data.val == f"./{name}"
    assert loaded("data.val=None").data.val is None  # the one word that a key which may be None reads as None


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("run.seed=7", 7),
        ("run.compile=True", True),
        ("run.compile=false", False),
        ("optimizer.base_lr=1e-3", 1e-3),
        ("optimizer.base_lr=2", 2.0),
        ("optimizer.clip_grad_norm=None", None),
        ("optimizer.betas=0.9,0.99", (0.9, 0.99)),
        ("optimizer.betas=[0.9, 0.99]", (0.9, 0.99)),
        ("optimizer.betas=(0.9,0.99)", (0.9, 0.99)),
        ("batch.micro_batch_sizes=8,8,16", (8, 8, 16)),
        ("batch.micro_batch_sizes=[8]", (8,)),
        ("batch.micro_batch_sizes=(8,)", (8,)),
        ("batch.micro_batch_sizes=[]", ()),
        ("model.in_chans=3", 3),
        ("run.precision=fp32", "fp32"),
    ],
)
def test_overrides__types_come_from_the_schema(word, value):
    key = word.split("=")[0]
    found = loaded(word)
    for part in key.split("."):
        found = getattr(found, part)
    assert (found, type(found)) == (value, type(value))


def test_overrides__rows_and_sections_are_python_literals():
    rows = '[{"compute_fraction": 0.5, "bandwidth": 32}, {"compute_fraction": 0.5, "bandwidth": 64}]'
    config = loaded(f"curriculum.stages={rows}", "curriculum.preset=custom")
    assert [stage.bandwidth for stage in config.curriculum.stages] == [32, 64]
    config = loaded("optimizer={'base_lr': 1e-4, 'betas': [0.8, 0.9]}")
    assert (config.optimizer.base_lr, config.optimizer.betas) == (1e-4, (0.8, 0.9))
    assert loaded("batch={'micro_batch_size': 4}").batch.global_batch_size == 64  # merged into the file's section


@pytest.mark.parametrize(
    ("word", "fault"),
    [
        ("run.seed=four", "run.seed = 'four' must be an int"),
        ("run.seed=1.5", "run.seed = '1.5' must be an int"),
        ("run.compile=yes", "run.compile = 'yes' must be a bool"),
        ("optimizer.betas=0.9", "optimizer.betas = [0.9] must have 2 values"),
        ("optimizer.betas=0.9,x", "optimizer.betas[1] = 'x' must be a float"),
        ("batch.micro_batch_sizes=8,,8", "batch.micro_batch_sizes[1] = '' must be an int"),
        (
            "curriculum.stages=[nonsense",
            "curriculum.stages = '[nonsense' cannot be read: write rows as a Python literal",
        ),
        ("model=tiny", "model = 'tiny' must be a dict"),
        ("model.sise=tiny", "unknown key model.sise; did you mean model.size?"),
        ("optimizer.base_lr=nan", "optimizer.base_lr = nan must be > 0"),
    ],
)
def test_overrides__faults(word, fault):
    with pytest.raises(ConfigError) as caught:
        loaded(word)
    assert any(found.startswith(fault) for found in caught.value.faults)


@pytest.mark.parametrize("cls", [PretrainConfig, ClassifyConfig])
def test_overrides__every_key_can_be_written_on_the_command_line(cls):
    """What str() makes of a value, read back by the schema, is that value."""
    config = from_dict(cls, {"data": {"train": "a b", "val": "c,d"}})
    for key, value in flat(to_dict(config)):
        node = schema_node(cls, key.split("."))
        assert convert(str(value), node) == value, key


@pytest.mark.parametrize("word", ["photos", "=x", "/d/my"])
def test_overrides__what_is_not_key_value_is_named(word):
    result = run_tool("tools/plan.py", DEMO, "--cfg-options", "run.seed=1", word)
    message = one_message(result)
    assert f"{word!r} is not KEY=VALUE" in message
    assert result.returncode == 2


# ---- where the config is ----


def test_case__C9_a_folder_given_as_config():
    message = one_message(run_tool("tools/plan.py", "configs/pretrain"))
    assert "is a folder" in message
    assert "configs/pretrain/demo.py" in message


def test_case__C9_started_in_another_folder(tmp_path):
    message = one_message(run_tool(ROOT / "tools/plan.py", "configs/pretrain/mine.py", cwd=tmp_path))
    assert f"no such file: {tmp_path}/configs/pretrain/mine.py" in message
    assert f"the current folder is {tmp_path}" in message


def test_case__C9_a_misspelt_config():
    message = one_message(run_tool("tools/plan.py", "configs/pretrain/dmo.py"))
    assert "did you mean configs/pretrain/demo.py" in message
    suggestion = message.split("did you mean ")[1].split("?")[0].split(", ")[0]
    assert run_tool("tools/plan.py", *shlex.split(suggestion)).returncode == 0


def test_case__C9_no_virtual_environment():
    """-S -E -s: a Python without any installed package."""
    code = (
        f"import runpy, sys; sys.argv = ['plan.py', 'x']; sys.path[0:0] = [{str(ROOT / 'tools')!r}]; import _checkout"
    )
    result = subprocess.run(
        [sys.executable, "-S", "-E", "-s", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    message = one_message(result)
    assert "has no package torch, timm, mmengine, pydantic" in message
    assert "activate" in message or "make -C" in message


# ---- budgets ----


def plan_of(dataset_size, **values):
    config = from_dict(PretrainConfig, {"data": {"train": "x"}, **values})
    return make_plan(config, mae_cost(config.model), dataset_size)


def test_case__M1_a_batch_above_the_data_set_and_few_updates_are_noted():
    plan = plan_of(1000)  # batch 4096, 400 equivalent epochs: 222 steps
    assert plan.num_steps == 222
    assert any("4,096 images, but the data set has 1,000" in note for note in plan.notes)
    assert any("only 222 optimizer steps" in note and "global_batch_size" in note for note in plan.notes)
    notes = plan_of(1000, batch={"global_batch_size": 128}).notes
    assert not any("optimizer steps" in note or "data set has" in note for note in notes)


@pytest.mark.parametrize(
    ("size", "patch", "preset", "band"), [(32, 16, "etpp", 16), (16, 16, "constant", 16), (14, 14, "et", 14)]
)
def test_case__M2_one_patch_in_a_stage_is_a_config_fault(size, patch, preset, band):
    values = {
        "data": {"train": "x", "image_size": size},
        "model": {"patch_size": patch},
        "curriculum": {"preset": preset},
    }
    with pytest.raises(ConfigError) as caught:
        plan_of(100_000, **values)
    assert f"the stage at bandwidth {band} has 1 patch per image" in caught.value.faults[0]
    assert caught.value.exit_code == 2


def test_case__M2_no_visible_patch_is_a_config_fault():
    values = {"data": {"train": "x", "image_size": 32}, "model": {"patch_size": 16, "mask_ratio": 0.8}}
    with pytest.raises(ConfigError, match="has 4 patches per image, of which 0 are visible"):
        plan_of(100_000, **values, curriculum={"preset": "constant"})


def test_case__M4_more_than_eight_bandwidths_are_all_compiled():
    import torch
    from torch import nn

    from mae_et.engine.compilation import compile_modules

    bands = [16 * i for i in range(2, 14)]
    stages = [{"compute_fraction": 1 / 12, "bandwidth": band} for band in bands]
    plan = plan_of(1_000_000, curriculum={"preset": "custom", "stages": stages})
    limit = torch._dynamo.config.recompile_limit
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    class Mean(nn.Module):
        def forward(self, images):
            return images.mean()

    model = Mean()
    try:
        torch._dynamo.config.recompile_limit = 8
        compile_modules([model], plan)
        model.compile(dynamic=False, backend=backend)  # counts the graphs instead of building kernels
        for band in bands:
            model(torch.zeros(1, 3, band, band))
    finally:
        torch._dynamo.config.recompile_limit = limit
        torch._dynamo.reset()
    assert len(compiled) == len(bands)
