"""The replay buffer against a naive one of Python lists; counts, draws, refill, memory and what is refused."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_et.config.schema import ClassifyConfig, PretrainConfig, from_dict
from mae_et.curriculum.replay import GIB, StageReplay
from mae_et.data.buffers import BadImage, Batch
from mae_et.data.order import ImageOrder
from mae_et.data.replay import (
    _DRAWS,
    ReplayBatches,
    ReplayBuffer,
    StoredCrop,
    check_memory,
    entry_step,
)
from mae_et.data.stream import _MicroBatches
from mae_et.errors import ConfigError, UserError
from mae_et.lowfreq import crop_to_bytes, low_frequency_crop
from tests.conftest import small_values
from tests.plans import plan_for

ROWS = [{"bandwidth": 16, "factor": 4, "size": 3}, {"bandwidth": 24, "factor": 2, "size": 2}]


def plan_of(world_size=1, dataset_size=20, local_world_size=None, **overrides):
    return plan_for(from_dict(PretrainConfig, small_values(**overrides)), dataset_size, world_size, local_world_size)


def small_plan(mode="mix", world_size=1, rows=ROWS, batch=16, **overrides):
    overrides = {"batch__global_batch_size": batch, "curriculum__equivalent_epochs": 14.0, **overrides}
    return plan_of(world_size, replay__mode=mode, replay__stages=rows, **overrides)


def faults_of(plan):
    with pytest.raises(ConfigError) as caught:
        plan()
    return caught.value.faults


class FakeLoader:
    """Fresh images that tell their place: every pixel of image i is i % 251, its label is i % 7."""

    def __init__(self, plan, first_step, rank=0, side=None):
        self.plan, self.first_step, self.rank, self.side = plan, first_step, rank, side

    def __iter__(self):
        for step in range(self.first_step, self.plan.num_steps):
            sizes = self.plan.loader_batches(step)
            place = self.plan.first_image(step) + self.rank * sum(sizes)
            side = self.side or self.plan.stage_at(step).bandwidth
            for size in sizes:
                places = torch.arange(place, place + size)
                images = (places % 251).to(torch.uint8)[:, None, None, None].expand(size, 3, side, side)
                yield Batch(images, places % 7, places, [], place)
                place += size


def batches_of(plan, first_step=0, rank=0, seed=5):
    entry = entry_step(plan, first_step)
    return ReplayBatches(FakeLoader(plan, entry, rank), plan, seed, first_step, rank)


def shown(plan, first_step=0, rank=0, seed=5):
    """Returns the places shown at each step."""
    batches, steps = iter(batches_of(plan, first_step, rank, seed)), {}
    for step in range(first_step, plan.num_steps):
        several = [next(batches) for _ in range(plan.stage_at(step).accum_steps)]
        steps[step] = torch.cat([batch.places for batch in several]).tolist()
    assert next(batches, None) is None
    return steps


def naive(plan, rank=0, seed=5):
    """The same from the description: lists of chunks, appended, cut off at the front, drawn one by one."""
    steps, place = {}, 0
    for stage in plan.stages:
        local, factor, held = stage.global_batch_size // plan.world_size, stage.replay.factor, []
        mode = stage.replay.mode
        loader_batch = local // factor if mode == "mix" else local
        chunk = max(n for n in range(1, loader_batch + 1) if loader_batch % n == 0 and n <= max(1, loader_batch / 32))
        for i in range(stage.num_steps):
            fresh = []
            if mode != "alternate" or i % factor == 0:
                fresh = [place + rank * loader_batch + k for k in range(loader_batch)]
                place += loader_batch * plan.world_size
            held += [fresh[k : k + chunk] for k in range(0, len(fresh), chunk)]
            held = held[-stage.replay.buffer_images // chunk :] if mode != "off" else []
            drawn = []
            if mode != "off":
                rng = np.random.default_rng((_DRAWS, seed, stage.first_step + i, rank))
                for k in rng.integers(len(held), size=(local - len(fresh)) // chunk):
                    drawn += held[k]
            steps[stage.first_step + i] = fresh + drawn
    return steps


# ---- what is shown ----


@pytest.mark.parametrize("mode", ["mix", "alternate"])
@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("batch", [16, 512])  # chunks of 1, and of more at 512
def test_replay_batches__equal_a_naive_buffer(mode, world_size, rank, batch):
    plan = small_plan(mode, world_size, batch=batch, curriculum__equivalent_epochs=14.0 * batch / 16)
    assert [stage.replay.mode for stage in plan.stages] == [mode, mode, "off"]
    assert plan.stages[1].replay.chunk_size == (1 if batch == 16 else (8 if mode == "mix" else 16) // world_size)
    assert shown(plan, rank=rank) == naive(plan, rank)


@pytest.mark.parametrize("mode", ["mix", "alternate"])
def test_replay_batches__show_the_newest_of_their_own_stage(mode):
    plan = small_plan(mode)
    steps = shown(plan)
    for stage in plan.stages:
        for k in range(stage.num_steps):
            step = stage.first_step + k
            end = plan.first_image(step) + stage.replay.num_fresh(k)
            room = stage.replay.buffer_images or stage.global_batch_size
            assert len(steps[step]) == stage.global_batch_size
            assert all(max(stage.first_image, end - room) <= place < end for place in steps[step])
            assert set(range(plan.first_image(step), end)) <= set(steps[step])  # every fresh image is shown at once


@pytest.mark.parametrize("mode", ["mix", "alternate"])
def test_replay_batches__pixels_and_labels_belong_to_their_places(mode):
    plan = small_plan(mode)
    for batch in batches_of(plan):
        assert batch.images.dtype == torch.uint8
        assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.places % 251)
        assert torch.equal(batch.labels, batch.places % 7)


def test_replay_batches__have_the_size_of_their_stage_across_boundaries():
    plan = small_plan()
    sides = [batch.images.shape[1:] for batch in batches_of(plan)]
    assert sides == [(3, s.bandwidth, s.bandwidth) for s in plan.stages for _ in range(s.num_steps * s.accum_steps)]
    with pytest.raises(AssertionError, match="another stage"):
        list(ReplayBatches(FakeLoader(plan, 0, side=32), plan, 0))


def test_stored_crop__crops_for_the_stage_that_reads_a_place():
    plan, images = small_plan(), torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    crop = StoredCrop(plan, centered=True)
    for stage in plan.stages:
        for place in (stage.first_image, stage.first_image + stage.num_fresh_images - 5):
            result = crop(Batch(images, torch.zeros(5), torch.arange(5), [], place)).images
            exact = low_frequency_crop(images.double(), stage.bandwidth, centered=True)
            assert (result.double() - exact.clamp(0, 255)).abs().max() <= 0.5 + 1e-3
            assert torch.equal(crop(Batch(result, torch.zeros(5), torch.arange(5), [], place)).images, result)
    assert crop(Batch(images[:0], torch.zeros(0), torch.arange(0), [], 0)).images.numel() == 0


@pytest.mark.parametrize("mode", ["mix", "alternate"])
@pytest.mark.parametrize("micro", [1, 4, 6, 16])
def test_replay_batches__accumulation_changes_nothing(mode, micro):
    assert shown(small_plan(mode, batch__micro_batch_size=micro)) == shown(small_plan(mode))


@pytest.mark.parametrize("mode", ["off", "mix", "alternate"])
def test_replay_batches__each_showing_has_a_number_of_its_own(mode):
    plan = small_plan(mode, world_size=2, batch__micro_batch_size=4)
    numbers = torch.cat([batch.showings for rank in (0, 1) for batch in batches_of(plan, rank=rank)])
    assert sorted(numbers.tolist()) == list(range(plan.num_images))
    if mode == "off":  # then it is the place: the masks are those of a run without a buffer
        assert all(torch.equal(batch.showings, batch.places) for batch in batches_of(plan))


def test_replay_batches__draws_depend_on_seed_and_process_only():
    plan = small_plan(world_size=2)
    assert shown(plan) == shown(plan)
    assert shown(plan) != shown(plan, seed=6)
    slots = [
        [[p - plan.first_image(0) for p in places] for places in shown(plan, rank=rank).values()] for rank in (0, 1)
    ]
    assert slots[0] != [[p - 2 for p in places] for places in slots[1]]


def test_replay_buffer__draws_are_uniform():
    buffer = ReplayBuffer(40 * 3)
    buffer.reset(40, 3, (1, 1))
    for i in range(7):
        ids = torch.arange(10) + 10 * i
        buffer.insert(torch.zeros(10, 3, 1, 1, dtype=torch.uint8), ids, ids)
    assert (buffer.oldest, buffer.end) == (30, 70)
    drawn = buffer.draw(80_000, 2, np.random.default_rng(0))
    counts = Counter((drawn[::2]).tolist())
    assert sorted(counts) == list(range(30, 70, 2))
    assert np.array_equal(drawn[1::2], drawn[::2] + 1)
    expected = 40_000 / 20
    assert max(abs(n - expected) for n in counts.values()) < 5 * math.sqrt(expected)
    _, _, places = buffer.gather(np.arange(30, 70))
    assert places.tolist() == list(range(30, 70))


# ---- going on after a stop ----


@pytest.mark.parametrize("mode", ["mix", "alternate"])
@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (2, 1)])
def test_refill__continues_exactly_from_any_step(mode, world_size, rank):
    plan = small_plan(mode, world_size)
    whole = shown(plan, rank=rank)
    for first_step in range(plan.num_steps + 1):
        assert shown(plan, first_step, rank) == {step: whole[step] for step in range(first_step, plan.num_steps)}


@pytest.mark.parametrize("mode", ["mix", "alternate"])
def test_refill__reads_no_more_than_the_buffer_held(mode):
    plan = small_plan(mode)
    for first_step in range(plan.num_steps):
        batches = batches_of(plan, first_step)
        iter(batches)
        stage = plan.stage_at(first_step)
        held = stage.replay.fresh_before(first_step - stage.first_step)
        assert batches.refill() == (min(held, stage.replay.buffer_images) if stage.replay.is_on else 0)
        assert batches.refill() == 0


def test_refill__stops_when_asked_and_can_go_on():
    plan = small_plan()
    first_step = plan.stages[0].num_steps - 1
    batches = batches_of(plan, first_step)
    iter(batches)
    answers = iter([False, True])
    assert batches.refill(lambda: next(answers)) == 4
    assert batches.refill() == 12
    assert next(batches).places.tolist() == shown(plan)[first_step]


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["mix", "alternate"]), st.integers(2, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 40)
)
def test_stage_replay__counts_equal_counting(mode, factor, loader_batch, num_batches, step):
    local = loader_batch * factor if mode == "mix" else loader_batch
    replay = StageReplay(mode, factor, local, loader_batch, num_batches * loader_batch, 0)
    held: list[int] = []  # the step of each image
    for k in range(step):
        held += [k] * replay.num_fresh(k)
    assert replay.fresh_before(step) == len(held)
    held = held[-replay.buffer_images :]
    assert replay.first_held(step) == (held[0] if held else step)


# ---- unreadable images ----


class SomeBad(FakeLoader):
    """Batches that tell of an unreadable image; from `empty_from` on, nothing could be read."""

    def __init__(self, plan, first_step, empty_from=10**9):
        super().__init__(plan, first_step)
        self.empty_from = empty_from

    def __iter__(self):
        for batch in super().__iter__():
            if batch.first_place >= self.empty_from:
                yield Batch(
                    torch.empty(0), batch.labels[:0], batch.places[:0], [BadImage(1, "cut off")], batch.first_place
                )
            else:
                batch.bad_images.append(BadImage(batch.first_place, "cut off"))
                yield batch


@pytest.mark.parametrize("mode", ["mix", "alternate"])
def test_replay_batches__tell_of_each_unreadable_image_once(mode):
    plan = small_plan(mode, batch__micro_batch_size=4)
    shown = [bad.index for batch in ReplayBatches(SomeBad(plan, 0), plan, 0) for bad in batch.bad_images]
    assert shown == [batch.first_place for batch in FakeLoader(plan, 0)]


def test_replay_batches__a_batch_without_an_image_reaches_the_loop():
    plan = small_plan()
    batches = iter(ReplayBatches(SomeBad(plan, 0, empty_from=8), plan, 0))
    sizes = [len(next(batches).images) for _ in range(4)]
    assert sizes == [16, 16, 0, 0]
    batches = ReplayBatches(SomeBad(plan, 0, empty_from=8), plan, 0, first_step=4)  # while refilling
    iter(batches)
    batches.refill()
    assert len(next(batches).images) == 0


# ---- the plan ----


def test_make_plan__off_is_the_stream_of_before():
    plan = small_plan("off", world_size=2, batch__micro_batch_size=4)
    assert plan == small_plan("off", world_size=2, batch__micro_batch_size=4, rows=[])
    assert plan.num_fresh_images == plan.num_images
    for rank in (0, 1):
        expected = []
        for step in range(plan.num_steps):
            stage = plan.stage_at(step)
            before = stage.first_image + (step - stage.first_step) * 16 + rank * 8
            expected += [
                list(range(before + k * stage.micro_batch_size, before + (k + 1) * stage.micro_batch_size))
                for k in range(stage.accum_steps)
            ]
        draws = list(_MicroBatches(plan, ImageOrder(plan.dataset_size, 0), 0, rank))
        assert [[draw.place for draw in several] for several in draws] == expected


@pytest.mark.parametrize("mode", ["mix", "alternate"])
def test_make_plan__processes_share_the_fresh_stream_without_gap_or_overlap(mode):
    plan = small_plan(mode, world_size=2, batch__micro_batch_size=3)
    draws = itertools.chain(
        *(several for rank in (0, 1) for several in _MicroBatches(plan, ImageOrder(plan.dataset_size, 0), 0, rank))
    )
    assert sorted(draw.place for draw in draws) == list(range(plan.num_fresh_images))
    assert plan.first_image(plan.num_steps) == plan.num_fresh_images
    assert plan.first_showing(plan.num_steps) == plan.num_images == sum(s.num_images for s in plan.stages)
    off = small_plan("off", world_size=2)
    assert (plan.num_steps, plan.num_images, plan.real_epochs) == (off.num_steps, off.num_images, off.real_epochs)


def test_make_plan__published_setting_takes_half_the_published_bytes():
    config = {"data": {"train": "unused"}, "replay": {"mode": "mix"}}
    plan = plan_for(from_dict(PretrainConfig, config), 1_281_167, 8)
    assert [(s.bandwidth, s.replay.factor) for s in plan.stages] == [(96, 4), (160, 2), (224, 1)]
    assert [s.replay.buffer_images for s in plan.stages] == [1920 * 128, 256 * 256, 0]
    assert [s.replay.buffer_bytes for s in plan.stages] == [1920 * 128 * 3 * 96**2, 256 * 256 * 3 * 160**2, 0]
    assert 2 * plan.replay_bytes == pytest.approx(13.6e9, rel=0.005)  # the released code's, in half precision
    assert [s.num_images / s.num_fresh_images for s in plan.stages] == [4, 2, 1]
    assert [s.replay.chunk_size for s in plan.stages[:2]] == [4, 8]


def test_make_plan__alternate_takes_no_more_memory_than_mix():
    config = {"data": {"train": "unused"}}
    mix, alternate = (
        plan_for(from_dict(PretrainConfig, {**config, "replay": {"mode": mode}}), 1_281_167, 8)
        for mode in ("mix", "alternate")
    )
    assert [s.replay.buffer_images for s in alternate.stages] == [s.replay.buffer_images for s in mix.stages]


@pytest.mark.parametrize(
    ("size", "bandwidths", "factors"),
    [
        (224, [98, 154, 196, 224], [4, 2, 1, 1]),  # patches of 14: 96 and 160 snapped
        (224, [128, 192], [2, 1]),  # half way: the larger bandwidth's, which replays less
        (64, [24, 48, 64], [4, 2, 1]),
        (32, [16, 24, 32], [4, 2, 1]),
    ],
)
def test_make_plan__published_factors_go_by_relative_bandwidth(size, bandwidths, factors):
    stages = [{"compute_fraction": 1 / len(bandwidths), "bandwidth": b} for b in bandwidths]
    values = {
        "data": {"train": "unused", "image_size": size},
        "model": {"patch_size": 14 if 98 in bandwidths else 8},
        "curriculum": {"preset": "custom", "stages": stages},
        "replay": {"mode": "mix"},
    }
    plan = plan_for(from_dict(PretrainConfig, values), 100_000)
    assert [s.replay.factor for s in plan.stages] == factors


def test_make_plan__buffers_are_no_larger_than_their_stage():
    plan = small_plan(rows=[{"bandwidth": 16, "factor": 4, "size": 10**6}])
    stage = plan.stages[0]
    assert stage.replay.buffer_images == stage.num_fresh_images


@pytest.mark.parametrize(
    ("factor", "batch", "shown"),
    [
        (3, 16, "factors that do are 2 and 4, the nearest such batch is 15 images"),
        (5, 6, "factors that do are 3 and 6, the nearest such batch is 5 images"),
        (32, 16, "factors that do are 16, the nearest such batch is 32 images"),
    ],
)
def test_make_plan__factor_that_does_not_divide_names_the_nearest(factor, batch, shown):
    rows = [{"bandwidth": 16, "factor": factor}]
    (fault,) = faults_of(lambda: small_plan(rows=rows, batch=batch))
    assert fault.startswith(f"replay factor {factor} at bandwidth 16 does not divide the {batch} images")
    assert shown in fault
    assert small_plan("alternate", rows=rows, batch=batch).stages[0].replay.factor == factor  # takes whole batches


def test_make_plan__factor_must_divide_what_one_process_shows():
    assert small_plan(world_size=2, rows=[{"bandwidth": 16, "factor": 8}]).stages[0].replay.loader_batch == 1
    (fault,) = faults_of(lambda: small_plan(world_size=2, rows=[{"bandwidth": 16, "factor": 16}]))
    assert "the 8 images that each process shows" in fault


def test_make_plan__bandwidth_that_no_stage_has():
    (fault,) = faults_of(lambda: small_plan(rows=[*ROWS, {"bandwidth": 96, "factor": 2}]))
    assert fault == "replay.stages[2].bandwidth = 96: no stage has it; the stages' bandwidths are 16, 24, 32"


# ---- memory ----

BATCH_GIB = 4 * 3 * 16**2 / GIB  # a loader batch of 4 images at 16 px
ONE_ROW = [{"bandwidth": 16, "factor": 4, "size": 3}]


def test_make_plan__memory_limit_is_for_all_processes_of_a_machine():
    limit = {"replay__max_memory_gib": 3.5 * BATCH_GIB}
    assert small_plan(rows=ONE_ROW, **limit).stages[0].replay.buffer_images == 12
    two = {"world_size": 2, "batch": 32, "curriculum__equivalent_epochs": 28.0}
    (fault,) = faults_of(lambda: small_plan(rows=ONE_ROW, **limit, **two))
    assert "2 processes, 12 images each" in fault
    assert "replay.max_memory_gib = " in fault
    assert "lower its size in replay.stages to 1" in fault
    spread = small_plan(rows=ONE_ROW, **limit, **two, local_world_size=1)
    assert spread.stages[0].replay.buffer_images == 12


def test_make_plan__not_even_one_loader_batch_fits():
    (fault,) = faults_of(lambda: small_plan(rows=ONE_ROW, replay__max_memory_gib=0.5 * BATCH_GIB))
    assert "not even one loader batch fits" in fault


@pytest.mark.parametrize("mode", ["mix", "alternate"])
def test_make_plan__size_named_in_the_refusal_is_accepted(mode):
    rows, limit = [{"bandwidth": 16, "factor": 4, "size": 8}], {"replay__max_memory_gib": 5 * BATCH_GIB}
    (fault,) = faults_of(lambda: small_plan(mode, rows=rows, **limit))
    rows[0]["size"] = int(fault.split("lower its size in replay.stages to ")[1].split(",")[0])
    assert small_plan(mode, rows=rows, **limit).stages[0].replay.is_on


def test_check_memory__refuses_what_does_not_fit():
    plan = small_plan(world_size=2)
    needed = 2 * plan.replay_bytes
    check_memory(plan, 2 * needed)
    with pytest.raises(UserError, match=r"2 processes.*GiB are free.*replay\.stages"):
        check_memory(plan, needed)
    check_memory(small_plan("off"), 0)


# ---- the config ----


@pytest.mark.parametrize(
    ("replay", "shown"),
    [
        ({"mode": "mixed"}, "replay.mode = 'mixed' must be one of 'off', 'mix', 'alternate'; did you mean 'mix'?"),
        ({"stages": [{"bandwidth": 16, "factor": 0}]}, "replay.stages[0].factor = 0 must be >= 1"),
        ({"stages": [{"bandwidth": 16, "factor": 2.5}]}, "replay.stages[0].factor = 2.5 must be an int"),
        ({"stages": [{"bandwidth": 16, "factor": 2, "size": 0}]}, "replay.stages[0].size = 0 must be >= 1"),
        ({"stages": [{"bandwidth": 16}]}, "replay.stages[0].factor is missing"),
        ({"stages": [{"bandwidth": 16, "factor": 2}] * 2}, "replay.stages name bandwidth 16 more than once"),
        ({"max_memory_gib": 0}, "replay.max_memory_gib = 0"),
        ({"on_excess": "cap"}, "unknown key replay.on_excess"),
        ({"factors": [4, 2, 1]}, "unknown key replay.factors"),
    ],
)
def test_from_dict__faulty_replay(replay, shown):
    faults = faults_of(lambda: from_dict(PretrainConfig, small_values(replay=replay)))
    assert [fault for fault in faults if fault.startswith(shown)]


def test_from_dict__classification_may_have_replay():
    values = {"data": {"train": "a", "val": "b", "image_size": 32}, "model": {"patch_size": 16}}
    assert from_dict(ClassifyConfig, values).replay.mode == "off"
    rows = [{"bandwidth": 32, "factor": 2, "size": 4}]
    config = from_dict(ClassifyConfig, {**values, "replay": {"mode": "mix", "stages": rows}})
    plan = plan_for(config, 2048)
    assert plan.num_images == 2 * plan.num_fresh_images


# ---- quantisation ----


def test_crop_to_bytes__rounds_and_clips_the_exact_crop():
    images = torch.randint(0, 256, (4, 3, 48, 48), dtype=torch.uint8)
    for centered in (False, True):
        exact = low_frequency_crop(images.double(), 32, centered)
        assert (crop_to_bytes(images, 32, centered).double() - exact.clamp(0, 255)).abs().max() <= 0.5 + 1e-3
    assert torch.equal(crop_to_bytes(images, 48), images)
    with pytest.raises(ValueError, match="uint8"):
        crop_to_bytes(images.float(), 32)
    with pytest.raises(ValueError, match="bandwidth = 64"):
        crop_to_bytes(images, 64)
