"""Generated demo scenes: the same everywhere, with labels that agree with the pixels."""

import time

import numpy as np
import pytest

from mae_et.data.scenes.files import VAL_FIRST_INDEX
from mae_et.data.scenes.painter import SCENE_CLASSES, STUFF_CLASSES, Scene, make_scene, scene_label
from mae_et.errors import UserError

SIZES = [(32, 32), (96, 96), (40, 150), (130, 33)]
# (label, mean grey of the image, pixels of the main object) for index 0, 7 and 10_000_003 at 96 x 96, seed 0.
RECORDED = {0: (7, 108.37, 1292), 7: (0, 126.12, 2950), 10_000_003: (5, 136.95, 953)}


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(index) for index in range(200)]


@pytest.mark.parametrize("size", SIZES)
def test_make_scene__same_arguments_same_scene(size: tuple[int, int]) -> None:
    first, second = make_scene(5, size, seed=3), make_scene(5, size, seed=3)
    for name in ("image", "boxes", "classes", "masks", "semantic_map"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert first.label == second.label


def test_make_scene__order_of_calls_does_not_matter() -> None:
    forward = [make_scene(index).image for index in (1, 2, 3)]
    backward = [make_scene(index).image for index in (3, 2, 1)][::-1]
    np.testing.assert_array_equal(forward, backward)


def test_make_scene__agrees_with_the_record() -> None:
    # Loose enough for another numpy's rounding, tight enough for a changed draw.
    for index, (label, grey, pixels) in RECORDED.items():
        scene = make_scene(index)
        assert scene.label == label
        assert scene.image.mean() == pytest.approx(grey, abs=0.2)
        assert scene.masks[0].sum() == pytest.approx(pixels, abs=3)


def test_make_scene__index_and_seed_change_the_picture() -> None:
    reference = make_scene(0).image.astype(float)
    for other in (make_scene(1), make_scene(0, seed=1)):
        assert np.abs(other.image - reference).mean() > 10


@pytest.mark.parametrize("size", SIZES)
def test_make_scene__types_and_shapes(size: tuple[int, int]) -> None:
    for index in range(20):
        scene = make_scene(index, size)
        count = len(scene.classes)
        assert 1 <= count <= 5
        assert (scene.image.shape, scene.image.dtype) == ((*size, 3), np.uint8)
        assert (scene.boxes.shape, scene.boxes.dtype) == ((count, 4), np.float32)
        assert scene.classes.dtype == np.int64
        assert (scene.masks.shape, scene.masks.dtype) == ((count, *size), np.bool_)
        assert (scene.semantic_map.shape, scene.semantic_map.dtype) == (size, np.uint8)


def test_make_scene__boxes_enclose_masks_tightly(scenes: list[Scene]) -> None:
    for scene in scenes:
        for box, mask in zip(scene.boxes, scene.masks, strict=True):
            x0, y0, x1, y1 = box.astype(int)
            assert mask.sum() >= 16
            assert mask[y0:y1, x0:x1].sum() == mask.sum()
            assert mask[y0, x0:x1].any()
            assert mask[y1 - 1, x0:x1].any()
            assert mask[y0:y1, x0].any()
            assert mask[y0:y1, x1 - 1].any()


def test_make_scene__masks_do_not_overlap(scenes: list[Scene]) -> None:
    assert max(scene.masks.sum(0).max() for scene in scenes) == 1


def test_make_scene__semantic_map_agrees_with_masks(scenes: list[Scene]) -> None:
    seen: set[int] = set()
    for scene in scenes:
        expected = np.zeros_like(scene.semantic_map)
        for kind, mask in zip(scene.classes, scene.masks, strict=True):
            expected[mask] = 1 + kind
        things = np.where(scene.semantic_map <= len(SCENE_CLASSES), scene.semantic_map, 0)
        np.testing.assert_array_equal(things, expected)
        seen.update(np.unique(scene.semantic_map).tolist())
    assert seen == set(range(1 + len(SCENE_CLASSES) + len(STUFF_CLASSES)))


@pytest.mark.parametrize("size", [(32, 32), (96, 96), (130, 33)])
def test_make_scene__main_object_is_first_and_largest(size: tuple[int, int]) -> None:
    for index in range(100):
        scene = make_scene(index, size)
        areas = scene.masks.sum((1, 2))
        assert scene.classes[0] == scene.label
        assert areas[0] == areas.max()
        x0, y0, x1, y1 = scene.boxes[0]
        assert abs((x0 + x1) / 2 - size[1] / 2) < 0.25 * min(size)
        assert abs((y0 + y1) / 2 - size[0] / 2) < 0.25 * min(size)


def test_make_scene__ten_in_a_row_hold_every_class_once(scenes: list[Scene]) -> None:
    labels = np.array([scene.label for scene in scenes]).reshape(-1, len(SCENE_CLASSES))
    np.testing.assert_array_equal(np.sort(labels, 1), np.tile(np.arange(len(SCENE_CLASSES)), (len(labels), 1)))
    assert len({tuple(row) for row in labels.tolist()}) > 1


@pytest.mark.parametrize("seed", [0, 4])
def test_scene_label__equals_make_scene(seed: int) -> None:
    indices = [*range(40), VAL_FIRST_INDEX + 3, 123_456]
    expected = [make_scene(index, (32, 32), seed).label for index in indices]
    assert [scene_label(index, seed) for index in indices] == expected


def test_scene_label__is_balanced_and_draws_nothing() -> None:
    start = time.perf_counter()
    labels = np.array([scene_label(index, seed=2) for index in range(10_000)])
    assert time.perf_counter() - start < 2.0  # drawing them would take ten times as long
    np.testing.assert_array_equal(np.sort(labels.reshape(-1, 10), 1), np.tile(np.arange(10), (1000, 1)))


def test_scene_label__refuses_bad_arguments() -> None:
    for index, seed in ((-1, 0), (0, -1)):
        with pytest.raises(UserError):
            scene_label(index, seed)


def test_make_scene__mean_colour_does_not_give_the_label() -> None:
    train, val = [make_scene(i) for i in range(600)], [make_scene(VAL_FIRST_INDEX + i) for i in range(200)]
    means = np.array([scene.image.mean((0, 1)) for scene in train])
    labels = np.array([scene.label for scene in train])
    right = 0
    for scene in val:
        nearest = np.argsort(((means - scene.image.mean((0, 1))) ** 2).sum(1))[:10]
        right += int(np.bincount(labels[nearest], minlength=len(SCENE_CLASSES)).argmax() == scene.label)
    # Chance is 0.1 with a deviation of 0.021.
    assert right / len(val) < 0.2


def test_make_scene__pictures_have_texture_at_every_scale(scenes: list[Scene]) -> None:
    power = np.zeros((96, 49))
    for scene in scenes[:50]:
        power += np.abs(np.fft.rfft2(scene.image.mean(-1))) ** 2
    radius = np.hypot(np.fft.fftfreq(96)[:, None] * 96, np.arange(49)[None, :])
    bands = np.array([power[(radius >= low) & (radius < 2 * low)].mean() for low in (2, 4, 8, 16, 24)])
    slope = np.polyfit(np.log([3, 6, 12, 24, 36]), np.log(bands), 1)[0]
    # Photographs have about -2, white noise 0, flat shapes -3 and below.
    assert -2.8 < slope < -1.2


@pytest.mark.parametrize(
    ("index", "size", "seed"), [(0, (31, 96), 0), (0, (96, 8), 0), (-1, (96, 96), 0), (0, (96, 96), -1)]
)
def test_make_scene__refuses_bad_arguments(index: int, size: tuple[int, int], seed: int) -> None:
    with pytest.raises(UserError):
        make_scene(index, size, seed)


def test_scene_classes__order() -> None:
    # The order is part of every written label and map.
    assert SCENE_CLASSES == ("ball", "box", "cone", "tower", "tree", "star", "ring", "cup", "fish", "flower")
    assert STUFF_CLASSES == ("sky", "mountain", "forest", "grass", "sand", "water", "wall", "floor")
