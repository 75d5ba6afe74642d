"""Finds the runs below folders and reads their files. A run that cannot be read is a record too, with the reason."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mae_et.errors import UserError
from mae_et.report.literals import read_literals
from mae_et.report.records import BROKEN, FINISHED, UNFINISHED, Run, dig, number, text

MARKERS = {
    "summary.json",
    "test_summary.json",
    "test_summary_tta.json",
    "plan.json",
    "environment.json",
    "metrics.jsonl",
    "last_checkpoint",
    "reconstructions.json",
}
PARTS = {"checkpoints", "tensorboard", "reconstructions", "vis_data", "vis_image"}  # of a run, not runs themselves
STARTED = re.compile(r"\d{8}_\d{6}")  # what mmengine calls the folder of each start
FEATURES = (".npy", ".safetensors")
TESTS = ("test_summary.json", "test_summary_tta.json")
MOST_BYTES = 2**26


def discover(roots: Sequence[Path]) -> list[Run]:
    """Returns a record for each run at or below the roots, in the order of their paths.

    Args:
        roots: folders.
    Raises:
        UserError: if a root is no folder, or there is no run in any of them.
    """
    for root in roots:
        if not root.is_dir():
            raise UserError(f"no such folder: {root}")
    found = {place.resolve(): (place, root) for root in roots for place in _places(root)}
    places = sorted(found.values())
    if not places:
        raise UserError(
            f"no run in {', '.join(map(str, roots))}: give folders that tools/pretrain.py, classify.py, train.py, test.py, "
            "extract.py or reconstruct.py wrote into, or folders above them"
        )
    runs = [_read_features(place) if place.suffix == ".json" else _read(place) for place, _ in places]
    _name(runs, [root for _, root in places])
    return runs


def is_run(folder: Path, files: Sequence[str], folders: Sequence[str]) -> bool:
    """Tells whether a folder is a run, whole or not."""
    return bool(MARKERS & set(files)) or any(
        STARTED.fullmatch(name) and ((folder / name / "vis_data").is_dir() or any((folder / name).glob("*.log")))
        for name in folders
    )


def _places(root: Path) -> Iterator[Path]:
    """Yields the folders that are runs, and the JSON files beside features."""
    for here, folders, files in os.walk(root):
        folder = Path(here)
        is_own = is_run(folder, files, folders)
        if is_own:
            yield folder
        stems = {Path(name).stem for name in files if name.endswith(FEATURES)}
        for stem in stems:
            if f"{stem}.json" in files and f"{stem}.json" not in MARKERS and _is_features(folder / f"{stem}.json"):
                yield folder / f"{stem}.json"
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and not (is_own and (name in PARTS or STARTED.fullmatch(name)))
        )


def _is_features(path: Path) -> bool:
    try:
        values = _load(path)
    except (OSError, ValueError):
        return False
    return {"backbone", "feature", "data"} <= values.keys()


def _read_features(path: Path) -> Run:
    return Run(path, path.stem, "features", FINISHED, summary=_load(path))


def _read(folder: Path) -> Run:
    """Reads all that a run folder holds; faults become notes, or the reason why the run is in no table."""
    run = Run(folder, folder.resolve().name)
    faults = []

    def load(name: str) -> dict[str, Any] | None:
        if not (folder / name).exists():
            return None
        try:
            return _load(folder / name)
        except (OSError, ValueError) as error:
            faults.append(f"{name} cannot be read: {error}")
            return None

    summary = load("summary.json")
    run.environment, run.plan = load("environment.json") or {}, load("plan.json") or {}
    run.tests = [test for name in TESTS if (test := load(name)) is not None]
    pictures = load("reconstructions.json")
    run.config = _config(folder, faults)
    run.metrics = _metrics(folder / "metrics.jsonl", run.notes)
    run.pictures = _pictures(folder)
    run.summary = summary or {}
    if summary is None and not run.tests and pictures is not None:
        run.kind, run.summary, summary = "reconstructions", pictures, pictures
        run.pictures = sorted(folder.glob("*.png"))
    else:
        run.kind = _kind(run)

    if faults:
        run.fail(BROKEN, "; ".join(faults))
    elif run.kind == "unknown":
        run.fail(BROKEN, "none of its files says what it was")
    elif run.summary.get("status") == "finished" or run.kind == "reconstructions":
        run.status = FINISHED
    elif summary is not None:
        run.fail(BROKEN, f"summary.json has the status {str(summary.get('status'))[:40]!r}, not 'finished'")
    elif run.tests:
        run.status = FINISHED
    else:
        run.fail(UNFINISHED, f"no summary.json: the run {_progress(run, folder)}")
    return run


def _load(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path.stat().st_size} bytes are too many")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError("empty" if path.stat().st_size == 0 else f"no whole JSON ({type(error).__name__})") from error
    if not isinstance(values, dict):
        raise ValueError(f"holds a {type(values).__name__}, not an object")
    return values


def _config(folder: Path, faults: list[str]) -> dict[str, Any]:
    """Reads config.py, or of mmengine's copies the newest."""
    candidates = [folder / "config.py", *sorted(folder.glob("*/vis_data/config.py"), reverse=True)]
    for path in candidates:
        if path.is_file():
            try:
                return read_literals(path)
            except (OSError, ValueError) as error:
                faults.append(f"{path.relative_to(folder)} cannot be read: {error}")
    return {}


def _metrics(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Reads the lines of metrics.jsonl that are whole, and notes the others."""
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        notes.append(f"metrics.jsonl cannot be read: {error.strerror}")
        return []
    kept, cut = [], []
    for i, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict):
            kept.append(values)
        elif line.strip():
            cut.append(i)
    if cut:
        where = f"line {cut[0]}" if len(cut) == 1 else f"{len(cut)} lines, the first {cut[0]},"
        notes.append(f"metrics.jsonl: {where} cut off or damaged; the other {len(kept)} are used")
    return kept


def _pictures(folder: Path) -> list[Path]:
    """Returns a run's own pictures, the newest last."""
    own = sorted((folder / "reconstructions").glob("*.png"))
    seen = sorted(folder.glob("*/vis_data/vis_image/*.png"), key=_last_number)
    return own or seen


def _last_number(path: Path) -> tuple[str, list[int], str]:
    return (path.parent.parent.parent.name, [int(word) for word in re.findall(r"\d+", path.stem)][::-1], path.name)


def _kind(run: Run) -> str:
    """Tells what a run was from whatever it left."""
    told = [run.summary, *run.tests]
    if any(text(values, "protocol") for values in told) or "protocol" in run.config:
        return "classify"
    for values in told:
        task, metrics = text(values, "task"), dig(values, "metrics")
        if task in ("detection", "segmentation"):
            return task
        if isinstance(metrics, dict):
            keys = " ".join(map(str, metrics))
            if "mAP" in keys:
                return "detection"
            if "mIoU" in keys:
                return "segmentation"
    scope = run.config.get("default_scope")
    if scope in ("mmdet", "mmseg"):
        return {"mmdet": "detection", "mmseg": "segmentation"}[scope]
    if "knn_top1_after" in run.summary or "norm_pix_loss" in (dig(run.config, "model") or {}):
        return "pretrain"
    is_loop = "stages" in run.summary or "stages" in run.plan or any("bandwidth" in line for line in run.metrics)
    return "pretrain" if is_loop else "unknown"


def _progress(run: Run, folder: Path) -> str:
    shares = [share for line in run.metrics if (share := number(line, "compute_fraction")) is not None]
    if shares:
        return f"stopped, or is still going on, at {max(shares):.0%} of its compute"
    steps = [
        int(path.stem.removeprefix("iter_"))
        for path in folder.glob("iter_*.pth")
        if path.stem.removeprefix("iter_").isdigit()
    ]
    return f"stopped, or is still going on, after step {max(steps)}" if steps else "stopped before its first log"


def _name(runs: list[Run], roots: Sequence[Path]) -> None:
    """Makes names unique: those that two runs share become paths below the root, then with the root, then whole paths."""
    longer: tuple[Callable[[Run, Path], str], ...] = (
        lambda run, root: run.path.relative_to(root).as_posix(),
        lambda run, root: f"{root.resolve().name}/{run.path.relative_to(root).as_posix()}",
        lambda run, root: run.path.as_posix(),
    )
    for i, name in enumerate(longer):
        count = Counter(run.name for run in runs)
        for run, root in zip(runs, roots, strict=True):
            if count[run.name] > 1:
                if i == 0:
                    run.notes.append("another run has the same name: shown with its folder")
                run.name = name(run, root).removesuffix(".json" if run.kind == "features" else "")
                run.name = run.path.resolve().name if run.name == "." else run.name
