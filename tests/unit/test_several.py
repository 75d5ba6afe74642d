"""Several sources as one, and their sampling weights."""

from pathlib import Path

import numpy as np
import pytest

from mae_et.api import _spec
from mae_et.config.files import load_config
from mae_et.config.schema import ClassifyConfig, PretrainConfig, from_dict
from mae_et.config.source_list import split_sources
from mae_et.data.inspection import inspect_images
from mae_et.data.order import ImageOrder, WeightedOrder, images_per_pass
from mae_et.data.sources.class_list import number_classes
from mae_et.data.sources.folder import FolderSource
from mae_et.data.sources.several import describe_sampling, join
from mae_et.data.sources.source import as_regions
from mae_et.data.sources.spec import check_same_classes, open_source
from mae_et.data.stream import make_loader
from mae_et.data.transforms import make_train_transform
from mae_et.errors import ConfigError, DataError
from mae_et.report.facts import data_name
from tests.conftest import small_values
from tests.plans import plan_for
from tests.unit.shard_files import png, value_of


@pytest.fixture
def roots(tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_ET_CACHE", str(tmp_path / "cache"))
    for number, path in enumerate(["one/cat/0.png", "one/dog/1.png", "two/ant/2.png", "two/cat/0.png", "flat/4.png"]):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(png(number))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("/a", ["/a"]),
        ("[/a, /b c ]", ["/a", "/b c"]),
        ("[a-{0,1}.tar,scenes:20@32,seed=3,first=2,t.csv,root=/x,label=y,/b]",
         ["a-{0,1}.tar", "scenes:20@32,seed=3,first=2", "t.csv,root=/x,label=y", "/b"]),
        ("""['/a,b', "c"]""", ["/a,b", "c"]),
        ("[2023, 2024]", ["2023", "2024"]),
        ("[ab]-000.tar", ["[ab]-000.tar"]),
        ("[]", []),
    ],
)  # fmt: skip
def test_split_sources(text, sources):
    assert split_sources(text) == sources


def test_config__lists_and_weights():
    data = {"train": ["/a", "/b,c"], "val": ("/v", "/w")}
    config = from_dict(PretrainConfig, {"data": {**data, "train_weights": [2, 0.5]}})
    assert split_sources(config.data.train) == ["/a", "/b,c"]
    assert split_sources(config.data.val) == ["/v", "/w"]
    assert _spec([Path("/a"), "/b"]) == ["/a", "/b"]
    by_name = load_config(PretrainConfig, "photos", {"data.train": "[/a, /b]", "data.train_weights": "2,1"})
    assert (split_sources(by_name.data.train), by_name.data.train_weights) == (["/a", "/b"], (2.0, 1.0))
    faulty = {"data": {**data, "train_weights": [2, 1, 3], "image_size": "x"}, "protocol": "knn"}
    with pytest.raises(ConfigError) as error:
        from_dict(ClassifyConfig, faulty)
    assert "train_weights has 3 values, but train lists 2 sources" in str(error.value)
    assert "data.train_weights = [2, 1, 3] has no effect with protocol = 'knn'" in str(error.value)
    with pytest.raises(ConfigError, match=r"train_weights\[1\] = -1 must be > 0"):
        from_dict(PretrainConfig, {"data": {**data, "train_weights": [2, -1]}})
    with pytest.raises(ConfigError, match="has no effect with one source in train"):
        from_dict(PretrainConfig, {"data": {"train": "/a", "train_weights": [2.0]}})


def test_concat__images_and_classes_of_all_sources(roots):
    source = open_source(f"[{roots}/one, {roots}/two]", need_labels=True)
    assert [value_of(source.load(i)) for i in range(4)] == [0, 1, 2, 3]
    assert [source.name(i) for i in (1, 2)] == [f"{roots}/one/dog/1.png", f"{roots}/two/ant/2.png"]
    assert len({source.key(i) for i in range(4)}) == 4  # both roots have cat/0.png
    assert [source.class_names[label] for label in source.labels] == ["cat", "dog", "ant", "cat"]
    assert source.size(3) == len(png(3))
    source.read_ahead([3, 0])
    with pytest.raises(IndexError):
        source.load(4)
    number_classes(source, ["zoo", "dog", "cat", "ant"], "list", "data.train")
    assert source.labels.tolist() == [2, 1, 3, 2]
    assert not [item for item in inspect_images(source).items if item.severity == "error"]


def test_concat__labels_must_be_of_one_kind(roots):
    assert open_source(f"[{roots}/one, {roots}/flat]").labels is None
    with pytest.raises(
        DataError, match=r"1 of 2 sources have none, e\.g\. .*flat: the classes are .* label all sources"
    ):
        open_source(f"[{roots}/one, {roots}/flat]", need_labels=True)
    (roots / "n.txt").write_text("flat/4.png 1\n")
    with pytest.raises(DataError, match=r"one names its classes and .*n\.txt only numbers them"):
        open_source(f"[{roots}/one, {roots}/n.txt]", need_labels=True)
    (roots / "m.csv").write_text("path,label\ntwo/ant/2.png,0\n")
    numbered = open_source(f"[{roots}/n.txt, {roots}/m.csv]", need_labels=True)
    assert (numbered.labels.tolist(), numbered.class_names) == ([1, 0], None)
    with pytest.raises(DataError, match=r"classes\.txt beside the shards or the list file"):
        check_same_classes(numbered, open_source(f"{roots}/one"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("[]", "no list of sources"),
        ("['[a, b]', 'c']", "no list of sources"),
        ("[ROOT/one, ROOT/one]", "twice; name it once, with a weight in data.train_weights"),
        ("[ROOT/one, ROOT/three]", "three does not exist"),
    ],
)
def test_concat__faults(roots, spec, message):
    with pytest.raises(DataError, match=message):
        open_source(spec.replace("ROOT", str(roots)))


def test_concat__raw_sets_keep_their_regions(roots):
    class Stored(FolderSource):
        num_checks = 0

        def shape(self, index):
            return np.asarray(self.load(index)).shape[:2]

        def read_region(self, index, box, side=None):
            return np.asarray(self.load(index))[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]

        def check_sizes(self, sizes):
            self.num_checks += len(list(sizes))

    stored = [Stored(roots / name) for name in ("one", "two")]
    regions = as_regions(join(stored, ["one", "two"]))
    assert regions.shape(3) == (2, 3)
    assert regions.read_region(3, (1, 0, 1, 2)).shape == (1, 2, 3)
    assert [regions.read_region(i, (0, 0, 1, 1))[0, 0, 0] for i in (0, 1, 3)] == [0, 1, 3]
    regions.check_sizes(size for size in (8, 16))
    assert [part.num_checks for part in stored] == [2, 2]
    assert as_regions(join([stored[0], FolderSource(roots / "two")], ["one", "two"])) is None


def test_data_name__of_lists_and_tables():
    assert data_name('["/data/a/train", "/data/b.csv,label=x", "datasets:/data/c,split=train"]') == "a + b + c"
    assert data_name("/data/pets/train.txt,root=/x") == "pets"


# ---- weights ----


@pytest.mark.parametrize("block_size", [1, 4])
def test_weighted_order__shares_and_streams_of_the_sources(block_size):
    sizes, weights, num_passes = [10, 20, 6], [2, 1, 1], 12
    order = WeightedOrder(sizes, weights, seed=3, block_size=block_size)
    images = order.images(0, 36 * num_passes)
    starts = np.cumsum([0, *sizes])
    sources = np.searchsorted(starts[1:], images, "right")
    for number in range(num_passes):
        assert np.bincount(sources[36 * number : 36 * (number + 1)]).tolist() == [18, 9, 9]
    for k, size in enumerate(sizes):  # the images of a source follow each other as in a run on that source alone
        own = images[sources == k]
        for i in range(0, len(own) - size + 1, size):
            assert sorted(own[i : i + size]) == list(range(starts[k], starts[k + 1]))
    assert np.array_equal(WeightedOrder(sizes, weights, 3, block_size).images(101, 200), images[101:301])
    assert not np.array_equal(WeightedOrder(sizes, weights, 4, block_size).images(0, 36), images[:36])
    assert not np.array_equal(sources[:36], sources[36:72])


def test_images_per_pass__largest_remainders():
    assert images_per_pass([5, 5], [1, 1]) == [5, 5]
    assert images_per_pass([4, 3, 3], [1, 1, 1]) == [4, 3, 3]
    assert images_per_pass([7, 4], [0.3, 0.2]) == [7, 4]  # 6.6 and 4.4
    with pytest.raises(DataError, match=r"train_weights\[1\] = 0\.0001 is 0\.003 of the 30 images of a pass"):
        images_per_pass([10, 20], [1, 1e-4])


def test_make_loader__weights_decide_what_is_shown_and_a_run_enters_anywhere(roots):
    values = small_values(data__train=[f"{roots}/one", "scenes:6@32"], data__train_weights=[1, 3])
    config = from_dict(PretrainConfig, values)
    source = open_source(config.data.train)
    plan, transform = plan_for(config, len(source)), make_train_transform(config.data)

    def places_and_labels(first_step):
        loader = make_loader(source, transform, plan, 0, first_step, weights=config.data.train_weights)
        return [pair for batch in loader for pair in zip(batch.places.tolist(), batch.labels.tolist(), strict=True)]

    source.labels, source.class_names = np.arange(len(source)), None
    shown = places_and_labels(0)
    assert [label for _, label in shown] == WeightedOrder([2, 6], [1, 3], 0).images(0, len(shown)).tolist()
    assert [label for _, label in shown] != ImageOrder(8, 0).images(0, len(shown)).tolist()
    later = places_and_labels(7)
    assert later == shown[-len(later) :]
    text = describe_sampling(source, config.data.train_weights)
    assert "a pass of 8 images shows 2 of" in text
    assert "6 of scenes:6@32 (6 images, 1 times each)" in text
