"""The dry run that finds micro batches: bisection, the margin, and a prediction on the CPU that a real pass confirms."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from mae_et.config.files import load_config, save_config
from mae_et.config.schema import PretrainConfig, from_dict
from mae_et.engine.hardware import process_memory
from mae_et.errors import UserError
from mae_et.tasks import micro_batch
from mae_et.tasks.micro_batch import MARGIN, fit_micro_batches, largest_fitting, measure_growth
from tests.conftest import small_values
from tests.plans import plan_for
from tests.processes import PRELOADED, run_command

MIB = 2**20


def config_of(**overrides):
    return from_dict(PretrainConfig, small_values(**overrides))


def peak_of(config, bandwidth, num_images):
    micro_batch._Step(config, torch.device("cpu"), bandwidth)(num_images, bandwidth)
    return process_memory("VmHWM")


def in_a_fresh_process(function, *args):
    """Runs a function in a fork of a server that has imported torch and done nothing with it."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


@pytest.mark.parametrize("sizes", [[1], [1, 2, 4, 8, 16], [1, 3, 5, 15], list(range(1, 100))])
def test_largest_fitting__every_limit(sizes):
    for limit in range(max(sizes) + 2):
        tried = []
        found = largest_fitting(sizes, lambda n, limit=limit, tried=tried: tried.append(n) or n <= limit)
        assert found == max([n for n in sizes if n <= limit], default=None)
        assert len(tried) <= len(sizes).bit_length()  # a pass each: bisection, no search one by one


def fake_gpu(monkeypatch, images_that_fit):
    """A GPU of 1000 bytes, 800 of them free, on which a pass of too many images ends for lack of memory."""
    fractions = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (800, 1000))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda f, device: fractions.append(f))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    class Step:
        def __init__(self, config, device, size):
            self(1, size)

        def __call__(self, num_images, size):
            if num_images > images_that_fit(size[0]):
                raise torch.OutOfMemoryError

    monkeypatch.setattr(micro_batch, "_Step", Step)
    return fractions


def test_fit_micro_batches__on_a_gpu_by_trying(monkeypatch):
    config = config_of(batch__global_batch_size=96)
    plan = plan_for(config, 2000, world_size=2)
    fractions = fake_gpu(monkeypatch, lambda bandwidth: 30 * (32 / bandwidth) ** 2)
    assert fit_micro_batches(config, plan, "cuda") == (48, 48, 24)  # of 48 images: up to 120, 53 and 30
    assert fractions == [pytest.approx((1 - MARGIN) * 0.8), 1.0]


@pytest.mark.parametrize("limit", [lambda bandwidth: 0, lambda bandwidth: bandwidth < 20])
def test_fit_micro_batches__not_even_one_image(monkeypatch, limit):
    config = config_of()
    fractions = fake_gpu(monkeypatch, limit)
    with pytest.raises(UserError, match="one image at bandwidth"):
        fit_micro_batches(config, plan_for(config, 200), "cuda")
    assert fractions[-1] == 1.0


def test_fit_micro_batches__on_a_cpu_by_its_memory(monkeypatch):
    config = config_of(batch__global_batch_size=64)
    plan = plan_for(config, 2000, world_size=2)
    growth = {16: (100 * MIB, MIB), 24: (100 * MIB, 5 * MIB), 32: (100 * MIB, 60 * MIB)}

    class Pool:
        def __init__(self, *args, **kwargs): ...
        def __enter__(self):
            return self

        def __exit__(self, *error): ...
        def submit(self, function, config, size, most):
            assert (function, most) == (measure_growth, 32)
            self.value = growth[size[0]]
            return self

        def result(self):
            return self.value

    monkeypatch.setattr(micro_batch, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(micro_batch, "available_memory", lambda: 2 * 200 * MIB / (1 - MARGIN))  # 200 MiB a process
    assert fit_micro_batches(config, plan, "cpu") == (32, 16, 1)
    monkeypatch.setattr(micro_batch, "available_memory", lambda: 2 * 150 * MIB)
    with pytest.raises(UserError, match="not even one image at bandwidth 32"):
        fit_micro_batches(config, plan, "cpu")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_measure_growth__predicts_a_larger_batch():
    # Wider than the other tests' model, so that 60 images take far more than torch itself varies by.
    config = config_of(model__embed_dim=192, model__depth=6, data__image_size=64, curriculum__stages=[
        {"compute_fraction": 1.0, "bandwidth": 64}
    ])  # fmt: skip
    base, per_image = in_a_fresh_process(measure_growth, config, (64, 64), 1000)
    assert per_image > 0.5 * MIB
    num_images = int(3 * micro_batch.CLEAR_GROWTH / per_image)
    peak = in_a_fresh_process(peak_of, config, (64, 64), num_images)
    assert base + num_images * per_image == pytest.approx(peak, rel=0.1)


def test_plan_tool__fits_and_what_it_prints_can_be_used(tmp_path):
    stages = [{"compute_fraction": 0.5, "bandwidth": bandwidth} for bandwidth in (16, 32)]  # each takes a new process
    config = config_of(batch__micro_batch_size=2, curriculum__stages=stages)
    save_config(config, tmp_path / "c.py", "A test.")
    command = ["plan", tmp_path / "c.py", "--dataset-size", "20", "--device", "cpu"]
    done = run_command(*command, "--fit-micro-batch", "--json")
    assert done.returncode == 0, done.stderr
    assert [stage["micro_batch_size"] for stage in json.loads(done.stdout)["stages"]] == [8, 8]
    assert "to train with it: --cfg-options 'batch.micro_batch_sizes=[8,8]'" in done.stderr
    config = load_config(PretrainConfig, tmp_path / "c.py", {"batch.micro_batch_sizes": [8, 8]})
    assert [stage.accum_steps for stage in plan_for(config, 20).stages] == [1, 1]
    done = run_command(*command)
    assert done.returncode == 1
    assert "--device has an effect only with --fit-micro-batch" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_fit_micro_batches__on_a_real_gpu():
    config = config_of(model__embed_dim=768, model__depth=12, model__num_heads=12, batch__global_batch_size=2**20)
    plan = plan_for(config, 2**22)
    sizes = fit_micro_batches(config, plan, "cuda")
    assert 1 < sizes[-1] <= sizes[0] < 2**20
    step = micro_batch._Step(config, torch.device("cuda"), 32)
    step(sizes[-1], 32)
    assert torch.cuda.max_memory_allocated() < torch.cuda.mem_get_info()[1]
