"""Shards on an HTTP server and on an S3-compatible one: the same images as from the disk, and servers that fail."""

import http.server
import logging
import pickle
import re
import threading

import numpy as np
import pytest

from mae_et.data.eval_loader import eval_loader
from mae_et.data.sources import remote
from mae_et.data.sources.shard_cache import Shard, index_shards
from mae_et.data.sources.shard_index import ShardIndex
from mae_et.data.sources.spec import open_source
from mae_et.data.stream import reading
from mae_et.errors import DataError
from tests.unit.shard_files import labelled, make_tar, value_of

pytest.importorskip("aiohttp")
PATTERN = "t-{000000..000002}.tar"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_ET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.0, 0.0))
    return tmp_path / "cache"


@pytest.fixture
def shards(tmp_path):
    """Three shards of ten labelled images, and their index, as `mae-et prepare` names it."""
    folder = tmp_path / "served"
    folder.mkdir()
    paths = [make_tar(folder / f"t-{i:06d}.tar", labelled(range(10 * i, 10 * i + 10))) for i in range(3)]
    found = [Shard.at(folder / path) for path in paths]
    with (folder / "t-index.safetensors").open("wb") as file:
        ShardIndex.of(found, index_shards(found, 1)).write(file)
    (folder / "classes.txt").write_text("a\nb\nc\n")
    return folder


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder with ranges. `fault(path, number of the request)` may return a status to answer instead."""

    def __init__(self, folder):
        self.folder, self.requests, self.fault, self.knows_ranges = folder, [], lambda path, number: None, True
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def read(self):
        """The requests for parts of shards beyond their heads."""
        return [request for request in self.requests if request[1] and "tar" in request[0] and "=0-" not in request[1]]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path, wanted = self.path, self.headers.get("Range")
        if self.command == "GET":
            self.server.requests.append((path, wanted))
        file = self.server.folder / path.lstrip("/")
        status = self.server.fault(path, len(self.server.requests)) or (200 if file.is_file() else 404)
        body = file.read_bytes() if status == 200 else b""
        if status == 200 and wanted and self.server.knows_ranges:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups()
            status, body = 206, body[int(first) : int(last) + 1]
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server(shards):
    server = Server(shards)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def values(source):
    return [value_of(source.load(index)) for index in range(len(source))]


def used(cache):
    return sum(path.stat().st_blocks * 512 for path in cache.glob("remote/*/*.tar"))


def test_remote__http_equals_the_disk(server, shards):
    here, there = open_source(f"{shards}/{PATTERN}"), open_source(f"{server.url}/{PATTERN}")
    assert values(there) == values(here) == list(range(30))
    assert list(there.labels) == list(here.labels)
    assert there.class_names == here.class_names == ["a", "b", "c"]
    assert there.key(12) == f"{server.url}/t-000001.tar:s0012.png"
    assert [there.read(i) for i in range(30)] == [here.read(i) for i in range(30)]


def test_remote__is_read_once_and_then_kept(server, cache):
    source = open_source(f"{server.url}/{PATTERN}")
    assert values(source) == list(range(30))
    server.requests.clear()
    assert values(source) == values(open_source(f"{server.url}/{PATTERN}")) == list(range(30))
    assert not server.read()
    assert not [path for path, _ in server.requests if "index" in path]
    for path in cache.glob("remote/*/*.tar"):  # a hole, as a power failure leaves it
        path.write_bytes(bytes(path.stat().st_size))
    assert values(source) == list(range(30))


def test_remote__reads_ahead_in_few_requests(server):
    source = open_source(f"{server.url}/{PATTERN}")
    server.requests.clear()
    source.read_ahead([3, 5, 4, 25, 11])
    assert sorted(path for path, _ in server.read()) == ["/t-000000.tar", "/t-000001.tar", "/t-000002.tar"]
    server.requests.clear()
    assert [value_of(source.load(i)) for i in (5, 25, 3, 11)] == [5, 25, 3, 11]
    assert not server.requests


def test_remote__the_cache_is_bounded_for_all_sets_together(server, shards, cache, caplog):
    size = (shards / "t-000000.tar").stat().st_size
    limit = 2.5 * size / 2**30
    source = open_source(f"{server.url}/{PATTERN}", remote_cache_gib=limit)
    assert "2 of 3 shards" in caplog.text
    for _ in range(2):
        server.requests.clear()
        assert values(source) == list(range(30))
    assert {path for path, _ in server.read()} == {"/t-000002.tar"}  # the last one is read in each pass
    assert len(list(cache.glob("remote/*/*.tar"))) == 2
    assert used(cache) <= 2.5 * size
    other = open_source(f"{server.url}/t-000002.tar", remote_cache_gib=limit)
    assert "0 of 1 shards" in caplog.text
    assert value_of(other.load(9)) == 29
    assert len(list(cache.glob("remote/*/*.tar"))) == 2


@pytest.mark.parametrize("gib", [0.0, 1.0])
def test_remote__without_an_index_each_shard_is_downloaded_once(server, shards, caplog, cache, gib):
    (shards / "t-index.safetensors").unlink()
    source = open_source(f"{server.url}/{PATTERN}", remote_cache_gib=gib)
    assert "downloaded once" in caplog.text
    server.requests.clear()
    assert values(source) == list(range(30))
    assert bool(server.read()) == (gib == 0)
    caplog.clear()
    assert len(open_source(f"{server.url}/{PATTERN}", remote_cache_gib=gib)) == 30
    assert "downloaded" not in caplog.text


@pytest.mark.parametrize("damage", [b"", b"foreign content, long enough", None])
def test_remote__an_index_that_does_not_fit_is_not_used(server, shards, caplog, damage):
    path = shards / "t-index.safetensors"
    if damage is None:  # of other shards
        make_tar(shards / "t-000001.tar", labelled(range(50, 60)))
    else:
        path.write_bytes(damage)
    source = open_source(f"{server.url}/{PATTERN}")
    assert "t-index.safetensors is not used" in caplog.text
    assert len(values(source)) == 30


def test_remote__short_failures_are_tried_again(server, caplog):
    source = open_source(f"{server.url}/{PATTERN}")
    server.requests.clear()
    server.fault = lambda path, number: 503 if [request[0] for request in server.requests].count(path) < 3 else None
    source.read_ahead(list(range(30)))
    assert [value_of(source.load(i)) for i in range(30)] == list(range(30))
    assert "503" in caplog.text
    assert "next try" in caplog.text


def test_remote__a_failure_that_stays_is_one_line(server):
    source = open_source(f"{server.url}/{PATTERN}")
    server.fault = lambda path, number: 500
    with pytest.raises(DataError, match=r"t-000001\.tar cannot be read after 3 tries .*500") as caught:
        source.load(15)
    assert len(str(caught.value).splitlines()) == 1
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match="after 3 tries"):
        open_source(f"{server.url}/{PATTERN}")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_remote__failure_in_a_loader_process_is_one_line(server, num_workers):
    source = open_source(f"{server.url}/{PATTERN}")
    server.fault = lambda path, number: 500
    loader = eval_loader(source, range(30), 8, 10, num_workers)
    with pytest.raises(DataError, match="after 3 tries") as caught, reading(loader) as batches:
        list(batches)
    assert len(str(caught.value).splitlines()) == 1


def test_remote__in_loader_processes(server):
    source = open_source(f"{server.url}/{PATTERN}")
    source.load(0)  # a connection before the fork
    with reading(eval_loader(source, range(30), 8, 7, 2)) as batches:
        assert [int(place) for batch in batches for place in batch.places] == list(range(30))
    copy = pickle.loads(pickle.dumps(source))
    assert value_of(copy.load(17)) == 17


def test_remote__what_the_server_lacks(server, shards):
    with pytest.raises(DataError, match=r"t-000003\.tar does not exist"):
        open_source(f"{server.url}/t-{{000002..000003}}.tar")
    with pytest.raises(DataError, match="names no tar shard"):
        open_source(f"{server.url}/images")
    server.fault = lambda path, number: 403
    with pytest.raises(DataError, match="must not be read"):
        open_source(f"{server.url}/{PATTERN}")
    server.fault = lambda path, number: None
    make_tar(shards / "z.tar", labelled(range(3)), "w:gz")
    with pytest.raises(DataError, match="compressed"):
        open_source(f"{server.url}/z.tar")
    source = open_source(f"{server.url}/{PATTERN}")
    server.knows_ranges = False
    with pytest.raises(DataError, match="the whole file instead of a range"):
        source.load(0)


def test_remote__unknown_protocols_and_missing_packages(monkeypatch):
    with pytest.raises(DataError, match="is not a protocol of fsspec"):
        open_source("nonsense://host/t-{000000..000002}.tar")
    import fsspec

    def missing(protocol, **_):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(DataError, match=r"pip install 'mae_et\[remote\]'"):
        open_source("s3://bucket/t-{000000..000002}.tar")


def test_remote__cache_that_cannot_be_written(server, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAE_ET_CACHE", str(tmp_path / "file" / "cache"))
    source = open_source(f"{server.url}/{PATTERN}")
    assert values(source) == list(range(30))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_file_url(shards):
    assert values(open_source(f"file://{shards}/{PATTERN}")) == list(range(30))


def test_remote__s3(shards, monkeypatch, cache):
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    import boto3

    server = server_module.ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for key, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(key, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="images")
        for path in shards.iterdir():
            client.upload_file(str(path), "images", f"set/{path.name}")
        source = open_source(f"s3://images/set/{PATTERN}")
        order = np.random.default_rng(0).permutation(30).tolist()
        source.read_ahead(order[:20])
        assert [value_of(source.load(i)) for i in order] == order
        assert source.class_names == ["a", "b", "c"]
        assert source.key(0) == "s3://images/set/t-000000.tar:s0000.png"
        assert len(list(cache.glob("remote/*/*.tar"))) == 3
        assert len(open_source("s3://images/set/t-*.tar")) == 30
        with pytest.raises(DataError, match="does not exist"):
            open_source("s3://images/set/t-000009.tar")
    finally:
        server.stop()
