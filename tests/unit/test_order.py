"""The order of the images: every image once in a pass, another order in each pass, the same from any place."""

from itertools import pairwise

import numpy as np
import pytest

from mae_et.config.schema import PretrainConfig, from_dict
from mae_et.data import order
from mae_et.data.order import FeistelPermutation, ImageOrder
from mae_et.data.sources.spec import open_source
from mae_et.data.stream import make_loader
from mae_et.data.transforms import make_train_transform
from tests.conftest import small_values
from tests.plans import plan_for


def whole_pass(order, number=0):
    return order.images(number * order.num_images, order.num_images)


@pytest.fixture(params=[False, True], ids=["in memory", "computed"])
def _kind(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(order, "IN_MEMORY", 0)


@pytest.mark.usefixtures("_kind")
@pytest.mark.parametrize("num_images", [1, 2, 3, 7, 64, 100, 997, 1024, 40_000, 65_537])
@pytest.mark.parametrize("block_size", [1, 16, 33, 64])
def test_image_order__each_image_once_in_a_pass(num_images, block_size):
    for number in (0, 1, 5):
        images = whole_pass(ImageOrder(num_images, 3, block_size), number)
        assert images.dtype == np.int64
        assert np.array_equal(np.sort(images), np.arange(num_images))


@pytest.mark.usefixtures("_kind")
@pytest.mark.parametrize("block_size", [1, 16])
def test_image_order__passes_and_seeds_differ(block_size):
    orders = [whole_pass(ImageOrder(5000, seed, block_size), number) for seed in (0, 1) for number in (0, 1, 2)]
    same = [np.mean(a == b) for i, a in enumerate(orders) for b in orders[:i]]
    assert max(same) < 0.005


@pytest.mark.usefixtures("_kind")
@pytest.mark.parametrize("block_size", [1, 16])
def test_image_order__is_the_same_from_any_place(block_size):
    stream = ImageOrder(101, 7, block_size).images(0, 1000)
    for first, num in [(0, 1), (100, 2), (350, 400), (999, 1), (5, 0)]:
        assert np.array_equal(ImageOrder(101, 7, block_size).images(first, num), stream[first : first + num])
    one_by_one = ImageOrder(101, 7, block_size)
    assert [int(one_by_one.images(place, 1)[0]) for place in range(250)] == stream[:250].tolist()


def test_image_order__below_the_limit_is_numpys_permutation():
    assert order.IN_MEMORY == 10_000_000
    for number in (0, 3):
        expected = np.random.default_rng((11, number)).permutation(1000)
        assert np.array_equal(whole_pass(ImageOrder(1000, 11), number), expected)


@pytest.mark.usefixtures("_kind")
def test_image_order__neighbours_stay_together_and_blocks_are_cut_elsewhere_in_each_pass():
    num_images, block_size = 10_000, 32
    cuts = []
    for number in range(3):
        images = whole_pass(ImageOrder(num_images, 5, block_size), number)
        steps = np.diff(images) % num_images
        assert np.mean(steps == 1) > 1 - 1.2 / block_size
        starts = images[np.flatnonzero(steps != 1) + 1]
        cuts.append(int(np.median(starts % block_size)))
        runs = np.diff(np.flatnonzero(steps != 1))
        assert np.median(runs) == block_size
    assert len(set(cuts)) > 1


@pytest.mark.usefixtures("_kind")
def test_image_order__a_set_smaller_than_a_block():
    assert sorted(ImageOrder(5, 0, 64).images(0, 5)) == list(range(5))


# ---- randomness of the computed permutation


def chi_square(counts):
    """Returns (statistic - its mean) / its deviation, for equally likely cells."""
    expected = counts.mean()
    degrees = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees)


@pytest.mark.parametrize("size", [10_000, 9_973, 250_000])
def test_feistel__positions_are_uniform_over_passes(size):
    """Where a few images land, over many passes: each tenth of the pass is equally likely."""
    watched = np.array([0, 1, 2, size // 2, size - 1])
    landed = np.array([FeistelPermutation(size, (1, number))[watched] for number in range(2000)])
    for column in landed.T:
        assert abs(chi_square(np.bincount(column * 10 // size, minlength=10))) < 4.5
    for a, b in pairwise(landed.T):  # two images land independently of one another
        pairs = np.bincount((a * 6 // size) * 6 + b * 6 // size, minlength=36)
        assert abs(chi_square(pairs)) < 4.5


@pytest.mark.parametrize("size", [65_536, 100_003])
def test_feistel__looks_like_a_permutation_of_numpy(size):
    """Steps between neighbours, cycles of length one and ascents, as in a random permutation."""
    numbers = [FeistelPermutation(size, (2, number))[np.arange(size)] for number in range(20)]
    fixed = sum(int((row == np.arange(size)).sum()) for row in numbers)
    assert 5 <= fixed <= 40  # Poisson with mean 20
    for row in numbers:
        steps = np.diff(row) % size
        assert abs(chi_square(np.bincount(steps * 64 // size, minlength=64))) < 5
        assert abs((np.diff(row) > 0).mean() - 0.5) < 4 / np.sqrt(12 * size) + 1e-3
        cells = np.arange(size) * 16 // size * 16 + row * 16 // size
        assert chi_square(np.bincount(cells, minlength=256)) < 5


def test_feistel__far_beyond_memory():
    numbers = FeistelPermutation(10**15, (0,))[np.arange(10**6)]
    assert len(np.unique(numbers)) == 10**6
    assert 0 <= numbers.min() <= numbers.max() < 10**15
    assert abs(numbers.mean() / 10**15 - 0.5) < 0.002


@pytest.mark.parametrize("num_repeats", [1, 3])
def test_loader__blocks_resume_exactly_and_show_each_image_once(tmp_path, num_repeats):
    """Two processes with workers read the same stream as one, from the start and from the middle."""
    config = from_dict(
        PretrainConfig,
        small_values(data__train="scenes:60@32,seed=1", data__shuffle_block=16, batch__global_batch_size=10),
    )
    source = open_source(config.data.train)
    transform = make_train_transform(config.data)

    def indices(first_step, rank, world_size):
        plan = plan_for(config, len(source), world_size)
        sampler = make_loader(
            source, transform, plan, 3, first_step, rank, num_repeats=num_repeats, shuffle_block=16
        ).batch_sampler
        return [[draw.index for draw in task.draws] for (task,) in sampler]

    whole = indices(0, 0, 1)
    assert indices(7, 0, 1) == whole[7:]
    stream = [index for batch in whole for index in batch]
    steps = [indices(0, rank, 2) for rank in (0, 1)]
    assert sorted(index for rank in steps for batch in rank for index in batch) == sorted(stream)
    assert steps[0][0] + steps[1][0] == stream[: 2 * len(steps[0][0])]
    first_pass = stream[: 60 * num_repeats]
    assert sorted(first_pass) == sorted(list(range(60)) * num_repeats)
    assert stream[::num_repeats] != sorted(stream[::num_repeats])
