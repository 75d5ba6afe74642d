"""Buffers of batches: used again when nobody holds them, and never before."""

import gc
import re
from types import SimpleNamespace

import pytest
import torch

from mae_et.data import buffers as buffers_module
from mae_et.data import need
from mae_et.data.buffers import Batch, BatchBuffers, buffer_sizes
from mae_et.data.sources.spec import open_source
from mae_et.data.stream import make_loader
from mae_et.data.transforms import make_train_transform

from .test_loading import make_config, plan_for


def test_lend__free_again_when_the_last_view_is_gone():
    buffers = BatchBuffers(2, 100, shared=False)
    slot = buffers.take()
    buffers.view(slot, (2, 3)).copy_(torch.arange(6).view(2, 3))
    lent = buffers.lend(slot, (2, 3))
    assert lent.tolist() == [[0, 1, 2], [3, 4, 5]]
    part = lent[1:]
    del lent
    gc.collect()
    assert slot not in buffers.free
    assert part.tolist() == [[3, 4, 5]]
    del part
    gc.collect()
    assert buffers.free == [1 - slot, slot]


def test_view__too_small_a_slot_is_not_used():
    buffers = BatchBuffers(1, 10, shared=False)
    assert buffers.view(0, (11,)) is None
    assert buffers.view(None, (1,)) is None
    buffers.take()
    assert buffers.take() is None


def loader(num_workers):
    config = make_config("scenes:40@64", "exact")
    source = open_source("scenes:40@64")
    plan = plan_for(config, len(source))
    return make_loader(source, make_train_transform(config.data), plan, 3, num_workers=num_workers)


@pytest.fixture(scope="module")
def expected():
    return [batch.images.clone() for batch in loader(0)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader__batches_in_the_hands_of_the_consumer_do_not_change(expected, num_workers):
    batches = loader(num_workers)
    buffers = batches.batch_sampler.buffers
    held, used = [], set()
    for i, batch in enumerate(batches):
        if i % 4 == 0:  # more than there are slots, in the end: these travel on their own
            held.append((i, batch))
        used.add(batch.images.untyped_storage().data_ptr())
        assert torch.equal(batch.images, expected[i])
    assert all(torch.equal(batch.images, expected[i]) for i, batch in held)
    assert len(held) > len(buffers.storage) // 2
    slots = {buffers.storage[slot].data_ptr() for slot in range(len(buffers.storage))}
    assert used & slots


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader__same_slots_again(num_workers):
    batches = loader(num_workers)
    buffers = batches.batch_sampler.buffers
    slots = {buffers.storage[slot].data_ptr() for slot in range(len(buffers.storage))}
    for batch in batches:
        assert batch.images.untyped_storage().data_ptr() in slots
    del batch
    gc.collect()
    assert len(buffers.free) == len(buffers.storage)


def test_buffer_sizes__prefetch_is_bounded_in_bytes(monkeypatch):
    stages = [SimpleNamespace(micro_batch_size=n, input_size=(b, b)) for n, b in ((40, 8), (10, 16))]
    plan = SimpleNamespace(stages=stages, image_size=(16, 16))
    assert buffer_sizes(plan, True, 2, 3) == (2 * 4 + 3, 3 * 40 * 64, 4)
    assert buffer_sizes(plan, False, 2, 3) == (2 * 4 + 3, 3 * 40 * 256, 4)
    monkeypatch.setattr(buffers_module, "PREFETCH_BYTES", 2 * 3 * 3 * 40 * 256)
    assert buffer_sizes(plan, False, 2, 3).prefetch == 3
    monkeypatch.setattr(buffers_module, "PREFETCH_BYTES", 1)
    assert buffer_sizes(plan, False, 2, 3) == (2 + 3, 3 * 40 * 256, 1)


@pytest.mark.parametrize(
    ("cores", "using", "level", "message"),
    [
        (
            8,
            0.4,
            "INFO",
            r"a batch in 900 ms, and the run uses it in 4\d\d ms, so 3 loader processes keep up \(3 are at work\)",
        ),
        (8, 0.2, "WARNING", r"so 5 loader processes keep up, but 3 are at work; set data\.num_workers=5"),
        (4, 0.2, "WARNING", r"3 are at work and each training process has 4 cores: see docs/guides/loading\.md"),
    ],
)
def test_measured_batches__says_how_many_processes_keep_up(monkeypatch, caplog, cores, using, level, message):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(need, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(need, "available_cores", lambda: cores)

    def batches():
        for _ in range(need.SKIPPED_BATCHES + need.MEASURED_BATCHES):
            clock.now += 5  # waiting for the loader does not count
            yield Batch(torch.empty(1, 3, 8, 8), torch.empty(1), torch.empty(1), [], seconds=0.9)

    with caplog.at_level("INFO", logger="mae_et"):
        for _ in need.MeasuredBatches(batches(), 3, 1):
            clock.now += using + 0.01
    (record,) = [record for record in caplog.records if record.levelname == level]
    assert re.search(message, record.getMessage())
