"""Random damage to COCO annotations, class files and masks.

The inspection reports findings or raises a DataError; it never ends in another error. MAE_ET_FUZZ_SECONDS limits the time of
each test (default 8).
"""

from __future__ import annotations

import copy
import json
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mae_et.errors import DataError

pytestmark = pytest.mark.mm
pytest.importorskip("mmengine")

SECONDS = float(os.environ.get("MAE_ET_FUZZ_SECONDS", "8"))
free = settings(max_examples=int(SECONDS * 20), deadline=None, suppress_health_check=list(HealthCheck), database=None)

WHOLE = {
    "images": [
        {"id": 1, "file_name": "a.png", "width": 32, "height": 24},
        {"id": 2, "file_name": "b.png", "width": 32, "height": 24},
    ],
    "categories": [{"id": 1, "name": "box"}, {"id": 7, "name": "ball"}],
    "annotations": [
        {
            "id": number, "image_id": 1 + number % 2, "category_id": (1, 7)[number % 2], "bbox": [2, 3, 10, 9], "area": 90,
            "iscrowd": 0, "segmentation": [[2, 3, 12, 3, 12, 12, 2, 12]],
        }
        for number in range(1, 5)
    ],
}  # fmt: skip

JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-5, 50), st.integers(-(10**25), 10**25), st.floats(), st.text(max_size=4),
        st.sampled_from(["box", "ball", "a.png", "../a.png", "/etc", ""]),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["id", "name", "counts", "size"]), inner),
    max_leaves=6,
)  # fmt: skip


@st.composite
def changed_annotations(draw):
    content = copy.deepcopy(WHOLE)
    for _ in range(draw(st.integers(1, 4))):
        node, key = content, draw(st.sampled_from(list(content)))
        while isinstance(node[key], (dict, list)) and node[key] and draw(st.integers(0, 3)):
            node = node[key]
            key = draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        action = draw(st.sampled_from(["replace", "remove", "repeat"]))
        if action == "replace":
            node[key] = draw(JSON)
        elif action == "remove" and len(node) > 1:
            del node[key]
        elif isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        if not content:
            break
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("coco")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 24)).save(path / name)
    return path


@free
@given(content=changed_annotations())
@example(content=WHOLE)
@example(content=[])
@example(content={"images": 3, "annotations": None, "categories": {}})
def test_inspect_coco__any_content(folder, content):
    from downstream.checks.coco import inspect_coco

    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    try:
        found = inspect_coco(path, folder, ["box", "ball"], is_scored=True, needs_masks=True)
    except DataError:
        return
    assert all(isinstance(text, str) for text in [*found.errors, *found.warnings])


MODES = ["L", "P", "1", "I;16", "RGB", "RGBA", "LA", "I", "F"]


@free
@given(
    modes=st.lists(st.sampled_from(MODES), min_size=1, max_size=3),
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=3, max_size=3),
    values=st.lists(st.integers(0, 255), min_size=1, max_size=4),
    classes=st.one_of(
        st.lists(st.sampled_from(["road", "sky", "", "ä"]), max_size=3),
        st.dictionaries(st.sampled_from(["road", "sky"]), JSON, max_size=2),
        JSON,
    ),
)
def test_inspect_masks__any_masks_and_classes(tmp_path_factory, modes, sizes, values, classes):
    from downstream.checks.masks import inspect_masks
    from mae_et.data.mask_files import pair_files, read_classes

    folder = tmp_path_factory.mktemp("ade")
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    for number, mode in enumerate(modes):
        pixels = np.resize(np.array(values, np.uint8), (24, 32))
        mask = Image.fromarray(pixels).resize(sizes[number]) if sizes[number][0] % 2 else Image.fromarray(pixels)
        suffix = "tif" if mode in ("F", "I;16") else "png"
        mask.convert(mode).save(folder / "masks" / f"{number}.{suffix}")
        Image.new("RGB", (32, 24)).save(folder / "images" / f"{number}.JPG", "JPEG")
    (folder / "classes.json").write_text(json.dumps({"classes": classes}))
    try:
        listed = read_classes(folder / "classes.json")
        found = inspect_masks(pair_files(folder / "images", folder / "masks"), "train", listed.labels, listed.names)
    except DataError:
        return
    assert all(isinstance(text, str) for text in [*found.errors, *found.warnings])
