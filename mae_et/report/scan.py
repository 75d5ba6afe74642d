"""Finds the runs below folders and reads their files. A run that cannot be read is kept, with the reason."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import stat
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from mae_et.config.filters import NUM_BANDS
from mae_et.errors import UserError
from mae_et.report.searches import find_searches
from mae_et.runs.record_files import read_json, read_plan, read_record, read_summary
from mae_et.runs.records import (
    CLASSIFY_KINDS,
    DENSE_KINDS,
    DENSE_PROBE,
    LIMIT,
    AnySummary,
    Environment,
    InitialWeights,
    PlanRecord,
    TestSummary,
)
from mae_et.runs.search import SEARCH

FINISHED, RUNNING, UNFINISHED, BROKEN, DUPLICATE = "finished", "running", "unfinished", "broken", "duplicate"
RUNNING_SECONDS = 900  # a run without a summary counts as running if it wrote a file this recently
TESTS = ("test_summary.json", "test_summary_tta.json")
MARKERS = {"summary.json", *TESTS, "plan.json", "environment.json", "metrics.jsonl", "last_checkpoint",
           "reconstructions.json"}  # fmt: skip
PARTS = {"checkpoints", "tensorboard", "reconstructions", "vis_data", "vis_image"}  # of a run, not runs themselves
STARTED = re.compile(r"\d{8}_\d{6}")  # mmengine's folder of one start
FEATURES = (".npy", ".safetensors")
LOGGED = (
    "step",
    "equivalent_epochs",
    "seconds",
    "compute_fraction",
    "bandwidth",
    "lr",
    "strength",
    "loss",
    "knn/top1",
    "val/top1",
    "val/loss",
    "val/rankme",
    "val/alpha_req",
    *(f"val/band_error_{k}" for k in range(NUM_BANDS)),
)
MAX_CONFIG_BYTES, MAX_LOG_BYTES, MAX_LINE_BYTES, TAIL_BYTES = 2**20, 2**30, 2**20, 2**16


@dataclass(eq=False)
class Run:
    """One run. It ends in the tables, among the running ones, or in the list of problems with a reason."""

    path: Path  # the folder; of features the JSON file
    name: str  # unique within a report
    kind: str = "unknown"
    status: str = BROKEN
    reason: str = ""  # why it is in no table
    notes: list[str] = field(default_factory=list)  # what a reader must know although the run is in the tables
    summary: AnySummary | None = None
    tests: list[TestSummary] = field(default_factory=list)
    environment: Environment | None = None
    plan: PlanRecord | None = None
    config: dict[str, Any] = field(default_factory=dict)
    metrics: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(LOGGED), dtype=float))
    first_line: str = ""  # of metrics.jsonl
    about: dict[str, Any] = field(default_factory=dict)  # the record of features or reconstructions
    pictures: list[Path] = field(default_factory=list)
    progress: float | None = None  # of a run without a summary, 0 to 1
    facts: dict[str, Any] = field(default_factory=dict)  # see `facts.FACTS`
    source: Run | None = None  # the pre-training that the weights come from

    @property
    def record(self) -> AnySummary | TestSummary | None:
        """The summary, or of an evaluation in a folder of its own the first test summary."""
        return self.summary or next(iter(self.tests), None)

    @property
    def weights(self) -> InitialWeights | None:
        """The weights that the run started from; None: random, or not recorded."""
        if self.record is not None:
            return self.record.initial_weights
        file, digest = self.about.get("backbone"), self.about.get("encoder_sha256")
        if not isinstance(file, str):
            return None
        digest = digest if isinstance(digest, str) else None
        return InitialWeights(file=file, sha256=None, encoder_sha256=digest, metadata={})

    def fail(self, status: str, reason: str) -> None:
        """Takes the run out of the tables; the first reason stays."""
        if self.status == FINISHED or not self.reason:
            self.status, self.reason = status, reason


def discover(roots: Sequence[Path]) -> list[Run]:
    """Returns the runs at or below the roots, ordered by path.

    Raises:
        UserError: if a root is not a folder, or there is no run.
    """
    for root in roots:
        if not root.is_dir():
            raise UserError(f"no such folder: {root}")
    found = {place.resolve(): (place, root) for root in roots for place in _places(root)}
    places = sorted(found.values())
    if not places and not find_searches(roots):
        raise UserError(
            f"no run in {', '.join(map(str, roots))}: give folders that pretrain, classify, train, test, extract or "
            "reconstruct wrote into, or folders above them"
        )
    runs = [_read_features(place) if place.suffix == ".json" else _read(place) for place, _ in places]
    _name(runs, [root for _, root in places])
    return runs


def _places(root: Path) -> Iterator[Path]:
    """Yields the folders that are runs, and the JSON files beside features."""
    for here, folders, files in os.walk(root):
        folder = Path(here)
        if SEARCH in files:  # its trials are no runs of their own; see searches.py
            folders.clear()
            continue
        is_run = bool(MARKERS & set(files)) or any(
            STARTED.fullmatch(name) and ((folder / name / "vis_data").is_dir() or any((folder / name).glob("*.log")))
            for name in folders
        )
        if is_run:
            yield folder
        for stem in {Path(name).stem for name in files if name.endswith(FEATURES)}:
            if f"{stem}.json" in files and f"{stem}.json" not in MARKERS and _is_features(folder / f"{stem}.json"):
                yield folder / f"{stem}.json"
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and not (is_run and (name in PARTS or STARTED.fullmatch(name)))
        )


def _is_features(path: Path) -> bool:
    try:
        return {"backbone", "feature", "data"} <= read_json(path).keys()
    except (OSError, ValueError):
        return False


def _read_features(path: Path) -> Run:
    return Run(path, path.stem, "features", FINISHED, about=read_json(path))


def _read(folder: Path) -> Run:
    """Reads all files of a run folder; faults become notes, or the reason why the run is in no table."""
    run, faults = Run(folder, folder.resolve().name), []

    def load(name: str, read: Callable[[Path], Any]) -> Any:
        if not os.path.lexists(folder / name):
            return None
        try:
            return read(folder / name)
        except (OSError, ValueError) as error:
            said = error.strerror if isinstance(error, OSError) else error
            faults.append(f"{name} cannot be read: {said}")
            return None

    run.summary = load("summary.json", read_summary)
    run.environment = load("environment.json", lambda path: read_record(path, Environment))
    run.plan = load("plan.json", read_plan)
    run.tests = [test for name in TESTS if (test := load(name, lambda path: read_record(path, TestSummary)))]
    run.config = load("config.py", read_literals) or {}
    copies = sorted(folder.glob("*/vis_data/config.py"), reverse=True)  # mmengine's, the newest first
    if not run.config and copies:
        run.config = load(copies[0].relative_to(folder).as_posix(), read_literals) or {}
    load("metrics.jsonl", lambda path: _read_metrics(path, run))
    run.about = load("reconstructions.json", read_json) or {}
    run.kind = _kind(run)
    run.pictures = sorted(folder.glob("*.png")) if run.kind == "reconstructions" else _pictures(folder)
    if run.record is not None:
        run.notes += run.record.notes
        run.notes += [f"{count} {name.replace('_', ' ')}" for name, count in run.record.counts.items() if count]

    if faults:
        run.fail(BROKEN, "; ".join(faults))
    elif run.kind == "unknown":
        run.fail(BROKEN, "none of its files says what it was")
    elif run.record is not None or run.kind == "reconstructions":
        run.status = FINISHED
    else:
        run.progress, said = _progress(run)
        age = time.time() - max((path.stat().st_mtime for path in _written(folder)), default=0)
        if age < RUNNING_SECONDS:
            run.fail(RUNNING, said)
        else:
            run.fail(UNFINISHED, f"no summary.json, and no file written in {RUNNING_SECONDS // 60} minutes: {said}")
    return run


def read_literals(path: Path) -> dict[str, Any]:
    """Reads the assignments of a config file without running it: literals, and dict(key=value).

    Returns:
        Values by name; computed values are left out.
    Raises:
        ValueError: if the file is not such a text.
        OSError: if it cannot be read.
    """
    _check_file(path, MAX_CONFIG_BYTES)
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not Python: {type(error).__name__}") from error
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            try:
                values[node.targets[0].id] = _literal(node.value)
            except (ValueError, TypeError, RecursionError, MemoryError):
                continue
    return values


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        pairs: dict[Any, Any] = {}
        for keyword in node.keywords:
            pairs |= {keyword.arg: _literal(keyword.value)} if keyword.arg else _literal(keyword.value)
        return pairs
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        if None in node.keys:
            raise ValueError("computed: ** in braces")
        keys = [str(_literal(key)) for key in node.keys if key is not None]
        return dict(zip(keys, (_literal(value) for value in node.values), strict=True))
    value = ast.literal_eval(node)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("larger than a seed")
    return value


def _check_file(path: Path, limit: int) -> None:
    """Refuses pipes and devices, which could block for ever, and files above the limit."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > limit:
        raise ValueError(f"{status.st_size} bytes; the limit is {limit}")


def _read_metrics(path: Path, run: Run) -> None:
    """Reads the columns that figures need, line by line; notes the lines that are cut off or damaged."""
    _check_file(path, MAX_LOG_BYTES)
    columns = {name: array("d") for name in LOGGED}
    damaged, first, num_lines = 0, 0, 0
    with open(path, "rb") as file:
        for i, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                values = None
            if not isinstance(values, dict):
                damaged, first = damaged + 1, first or i
                continue
            num_lines += 1
            if num_lines == 1 and "seconds" in values:
                run.first_line = json.dumps(values, sort_keys=True)
            for name, column in columns.items():
                column.append(_logged_number(values.get(name), f"{name} in line {i}"))
    if damaged:
        where = f"line {first}" if damaged == 1 else f"{damaged} lines, the first {first},"
        run.notes.append(f"metrics.jsonl: {where} cut off or damaged; the other {num_lines} are used")
    run.metrics = pd.DataFrame({name: pd.Series(column, dtype=float) for name, column in columns.items()})


def _logged_number(value: Any, place: str) -> float:
    """Returns a number of the log, NaN for anything else; a finite number beyond LIMIT is damage."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    if isinstance(value, int) or math.isfinite(value):
        if abs(value) > LIMIT:
            raise ValueError(f"{place} is beyond {LIMIT:g}")
        return float(value)
    return math.nan


def _pictures(folder: Path) -> list[Path]:
    """Returns a run's own pictures, the newest last."""
    own = sorted((folder / "reconstructions").glob("*.png"))
    return own or sorted(folder.glob("*/vis_data/vis_image/*.png"), key=_start_and_step)


def _start_and_step(path: Path) -> tuple[str, list[int], str]:
    return (path.parts[-4], [int(word) for word in re.findall(r"\d{1,18}", path.stem)][::-1], path.name)


def _kind(run: Run) -> str:
    if run.record is not None:
        return run.record.kind
    if run.about:
        return "reconstructions"
    if (protocol := run.config.get("protocol")) in CLASSIFY_KINDS:
        return str(protocol)
    if "max_patches" in run.config:
        return DENSE_PROBE
    if (scope := run.config.get("default_scope")) in ("mmdet", "mmseg"):
        return DENSE_KINDS[scope == "mmseg"]
    model = run.config.get("model")
    if isinstance(model, dict) and "name" in model and run.plan is not None:
        return "supervised"
    return "pretrain" if run.plan is not None or run.metrics["bandwidth"].notna().any() else "unknown"


def _written(folder: Path) -> Iterator[Path]:
    """Yields the files that a run writes while it works."""
    for pattern in ("environment.json", "metrics.jsonl", "last_checkpoint", "*.pth", "checkpoints/*", "*/*.log",
                    "*/vis_data/*.json"):  # fmt: skip
        yield from (path for path in folder.glob(pattern) if path.is_file())


def _progress(run: Run) -> tuple[float | None, str]:
    """Returns the fraction done, None if unknown, and the same in words."""
    share = run.metrics["compute_fraction"].max()
    if not math.isnan(share):
        return min(1.0, max(0.0, share)), f"at {share:.0%} of its compute"
    saved = [
        int(match[1]) for path in run.path.glob("iter_*.pth") if (match := re.match(r"iter_(\d{1,12})\.", path.name))
    ]
    logged = [_last_step(path) for path in run.path.glob("*/vis_data/*.json")]
    step = max([*saved, *logged], default=0)
    if not step:
        return None, "nothing logged yet"
    loop = run.config.get("train_cfg")
    total = loop.get("max_iters") if isinstance(loop, dict) else None
    if not isinstance(total, int) or total < step:
        return None, f"at step {step}"
    return step / total, f"at step {step} of {total} ({step / total:.0%})"


def _last_step(path: Path) -> int:
    """Returns the last training step in mmengine's scalars, from the end of the file; 0 without one."""
    try:
        _check_file(path, MAX_LOG_BYTES)
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().splitlines()
    except (OSError, ValueError):
        return 0
    for line in reversed(lines):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        step = values.get("iter", values.get("step")) if isinstance(values, dict) else None
        if isinstance(step, int) and not isinstance(step, bool) and 0 < step < 10**15:
            return step
    return 0


def _name(runs: list[Run], roots: Sequence[Path]) -> None:
    """Makes names unique: shared names become paths below the root, then with the root, then whole paths."""
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
