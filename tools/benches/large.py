"""Growth with the size of a data set: listing, start of a run, memory of all processes of a machine, order, kNN, metrics.

The folders hold empty files. For a set of 14.2 million images the listing alone is written, with the 21,841 folders of
ImageNet-22K.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from benches.measuring import Comparison, compare, measure
from torch import Tensor

from mae_et.data.inspection import inspect_images
from mae_et.data.order import ImageOrder
from mae_et.data.sources import folder_listing
from mae_et.data.sources.cache import CACHE_VARIABLE, cached_path
from mae_et.data.sources.folder import FolderSource
from mae_et.evaluation.knn import knn_predict
from mae_et.runs.folder import describe_data
from mae_et.storage.array_file import write_arrays
from mae_et.storage.metrics_file import MetricsFile

NUM_22K, FOLDERS_22K = 14_197_122, 21_841
NUM_RANKS = 8


def add_large_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", type=int, nargs="+", default=[10**4, 10**5, 10**6], metavar="N", help="sizes; default: %(default)s"
    )
    parser.add_argument("--folder", metavar="DIR", help="for the files, which are removed; default: a temporary folder")


def bench_large(args: argparse.Namespace) -> list[Comparison]:
    logging.getLogger("mae_et").setLevel(logging.ERROR)
    rows = [*_order(args.rounds), *_knn(args.rounds), *_metrics(args.rounds)]
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        os.environ[CACHE_VARIABLE] = f"{temporary}/cache"
        for num in args.images:
            root = _write_files(Path(temporary) / f"{num}", num)
            rows += _listing(root, num, args.rounds)
        rows += _start(_write_listing(Path(temporary) / "22k"), NUM_22K, args.rounds)
    return rows


def _write_files(root: Path, num: int) -> Path:
    """Makes `num` empty image files in folders of a thousand."""
    for first in range(0, num, 1000):
        folder = root / f"n{first // 1000:08d}"
        folder.mkdir(parents=True)
        for i in range(first, min(first + 1000, num)):
            os.close(os.open(f"{folder}/n{first // 1000:08d}_{i}.JPEG", os.O_CREAT | os.O_WRONLY))
    time.sleep(2.5)  # so that no folder counts as just changed
    return root


def _write_listing(root: Path) -> Path:
    """Makes the folders of a set of the size of ImageNet-22K without its files, and the listing that would be kept."""
    per_folder = np.full(FOLDERS_22K, NUM_22K // FOLDERS_22K)
    per_folder[: NUM_22K % FOLDERS_22K] += 1
    scan = folder_listing._Scan()
    for i, num in enumerate(per_folder):
        name = f"n{i:08d}"
        (root / name).mkdir(parents=True)
        scan.images[name] = b"\0".join(f"{name}_{k}.JPEG".encode() for k in range(num))
        scan.top_folders.append(name)
    for name in ["", *scan.top_folders]:
        scan.times[name] = folder_listing._times(os.stat(root / name))
    path = cached_path(root.resolve().name, f"{root.resolve()}", ".listing")
    arrays, about = scan.packed()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        write_arrays(file, arrays, {**about, "scanned_at": time.time_ns() + 3 * 10**9})
    time.sleep(3.5)  # until that is past
    return root


def _listing(root: Path, num: int, rounds: int) -> list[Comparison]:
    def cold() -> None:
        for path in cached_path("", "", "").parent.glob("*.listing"):
            path.unlink()
        FolderSource(root)

    times = measure({"plain": lambda: _walk(root), "cold": cold}, rounds)
    times |= measure({"warm": lambda: FolderSource(root)}, rounds)
    rows = [
        compare(f"listing {num:.0e} files, {name}, against os.walk", times, name, "plain", None)
        for name in ("cold", "warm")
    ]
    rows[1]["memory"] = _memory({"ours": FolderSource, "reference": _walk}, root)
    return rows


def _walk(root: Path) -> list[tuple[str, int]]:
    """Lists as torchvision's ImageFolder does: a Python list of paths and labels."""
    found: list[tuple[str, int]] = []
    for label, folder in enumerate(sorted(entry.name for entry in os.scandir(root))):
        for parent, _, names in sorted(os.walk(root / folder)):
            found += [(os.path.join(parent, name), label) for name in sorted(names)]
    return found


def _start(root: Path, num: int, rounds: int) -> list[Comparison]:
    """From the kept listing to the first batch of images' numbers, with the inspection; the files are missing."""

    def start() -> None:
        source = FolderSource(root)
        describe_data(source)
        inspect_images(source, None)
        order = ImageOrder(len(source), 0)
        [source.key(int(i)) for i in order.images(0, 4096)]

    def names_in_python() -> None:
        source = FolderSource(root)
        [(source.name(i), int(source.labels[i])) for i in range(len(source) // 10)]  # type: ignore[index]

    times = measure({"start": start}, rounds)
    times |= measure({"a tenth of the names as a list": names_in_python}, 1)
    row = compare(
        f"start with {num:,} images, warm, against a list of the names", times, "start", "a tenth of the names as a list",
        None, work=10,
    )  # fmt: skip
    row["memory"] = _memory({"ours": FolderSource}, root)
    return [row]


def _memory(openers: dict[str, Callable[[Path], Any]], root: Path) -> dict[str, Any]:
    """Returns the MB (2^20) that all ranks together take for the open data set; shared pages count once."""
    context = multiprocessing.get_context("fork")
    result: dict[str, Any] = {"ranks": NUM_RANKS}
    for name, opener in openers.items():
        barrier, queue = context.Barrier(NUM_RANKS), context.Queue()
        ranks = [context.Process(target=_rank, args=(opener, root, i, barrier, queue)) for i in range(NUM_RANKS)]
        for rank in ranks:
            rank.start()
        result[f"{name}_mb"] = sum(queue.get() for _ in ranks)
        for rank in ranks:
            rank.join()
    return result


def _rank(opener: Callable[[Path], Any], root: Path, number: int, barrier: Any, queue: Any) -> None:
    barrier.wait()
    before = _pss()
    barrier.wait()
    data = opener(root)
    if isinstance(data, FolderSource):  # all pages are touched
        order = ImageOrder(len(data), number)
        for i in order.images(0, min(len(data), 200_000)):
            data.key(int(i))
    barrier.wait()
    after = _pss()
    barrier.wait()
    queue.put((after - before) / 2**20)


def _pss() -> int:
    """Returns the proportional share of memory of this process, in bytes (Linux)."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError("no Pss")


def _order(rounds: int) -> list[Comparison]:
    """A pass of 14.2 million images in batches of 256: its first batch, and the time of an image."""
    num_batches = 200

    def computed() -> None:
        order = ImageOrder(NUM_22K, 0)
        for first in range(0, 256 * num_batches, 256):
            order.images(first, 256)

    def permutation() -> None:
        order = np.random.default_rng((0, 0)).permutation(NUM_22K)
        for first in range(0, 256 * num_batches, 256):
            order[first : first + 256]

    def blocks() -> None:
        order = ImageOrder(NUM_22K, 0, 16)
        for first in range(0, 256 * num_batches, 256):
            order.images(first, 256)

    variants = {"permutation": permutation, "computed": computed, "blocks of 16": blocks}
    times = measure(variants, rounds)
    rows = [
        compare(
            f"{256 * num_batches} of {NUM_22K:,} images in order, {name}, against numpy",
            times,
            name,
            "permutation",
            None,
        )
        for name in ("computed", "blocks of 16")
    ]
    for row, name in zip(rows, ("computed", "blocks of 16"), strict=True):
        row["images_per_second"] = 256 * num_batches / min(times[name].wall)
    rows[0]["memory"] = {"ours_mb": 0.0, "reference_mb": NUM_22K * 8 / 2**20}
    return rows


def _knn(rounds: int) -> list[Comparison]:
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(num, 384, generator=generator) for num in (32768, 512))
    labels = torch.randint(0, 1000, (32768,), generator=generator)

    def plain() -> Tensor:
        similarity = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
        weights, neighbours = similarity.topk(20, dim=1)
        votes = torch.zeros(len(queries), 1000).scatter_add_(1, labels[neighbours], (weights / 0.07).exp())
        return votes.argmax(dim=1)

    times = measure({"ours": lambda: knn_predict(bank, labels, queries, [20]), "plain": plain}, rounds)
    return [compare("kNN, 512 queries in 32,768 x 384, against one product", times, "ours", "plain", None)]


def _metrics(rounds: int) -> list[Comparison]:
    """Reopening a log of half a million lines, against parsing and writing it."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "metrics.jsonl"
        with path.open("w") as file:
            for step in range(1, 500_001):
                values = dict.fromkeys(("loss", "lr", "grad_norm", "images_per_second", "waiting_fraction"), step / 7)
                file.write(json.dumps({"step": step, **values}) + "\n")

        def parse() -> None:
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            path.with_suffix(".new").write_text("".join(json.dumps(line) + "\n" for line in lines))

        times = measure({"ours": lambda: MetricsFile(path, 500_000).close()}, rounds)
        times |= measure({"parse": parse}, 1)
    return [compare("reopening 500,000 lines of metrics, against parsing them", times, "ours", "parse", None)]
