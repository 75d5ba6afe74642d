"""Which runs are copies of others, and which pre-training each result comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from mae_et.report.facts import describe, metadata_facts
from mae_et.report.records import BROKEN, DUPLICATE, FINISHED, UNFINISHED, Run, dig, text

WORTH = {
    "classify": ("top1",),
    "detection": ("box_ap", "mask_ap"),
    "segmentation": ("miou", "miou_ms"),
}


def connect(runs: list[Run]) -> None:
    """Fills in, in place, what only shows between runs: copies, sources, evaluations of trainings; then the facts.

    Weights join by their digest. Runs of versions before that had no digest; they join by the name of the run's folder where
    just one pre-training has it, with a note.
    """
    _mark_duplicates(runs)
    _join_tests(runs)
    trained = [run for run in runs if run.kind == "pretrain" and run.status in (FINISHED, UNFINISHED)]
    for run in runs:
        if run.kind != "pretrain":
            run.source = _source(run, trained)
    for run in runs:
        run.facts = describe(run)
        if run.status == FINISHED:
            _check(run)
            run.facts["status"] = run.status


def backbone(run: Run) -> Mapping[str, Any] | None:
    """Returns what a result's record says of its backbone file; None if it says nothing, or that there was none."""
    told = run.summary or next(iter(run.tests), {})
    if run.kind in ("detection", "segmentation"):
        value = told.get("backbone")
        if not isinstance(value, Mapping):
            return None
        metadata = value.get("metadata")
        return {**(metadata if isinstance(metadata, Mapping) else {}), **value}
    if run.kind in ("reconstructions", "features"):
        return {"file": told.get("backbone"), "encoder_sha256": told.get("encoder_sha256")}
    metadata = told.get("backbone_metadata")
    path = text(told, "backbone")
    if path is None and not isinstance(metadata, Mapping):
        return None
    return {"file": path, **(metadata if isinstance(metadata, Mapping) else {})}


def starts_at_random(run: Run) -> bool:
    """Tells whether a run says that its network had random weights at the start."""
    told = run.summary or next(iter(run.tests), {})
    return "backbone" in told and (told["backbone"] is None or told["backbone"] == "random")


def _mark_duplicates(runs: list[Run]) -> None:
    """Of runs with the same result the finished one stays, and of those the one that lies highest."""
    seen: dict[tuple[str, str], Run] = {}
    for run in sorted(runs, key=lambda run: (run.status != FINISHED, len(run.path.parts), str(run.path))):
        if run.status == BROKEN:
            continue
        for mark, reason in _marks(run):
            first = seen.setdefault((run.kind, mark), run)
            is_certain = run.status == UNFINISHED or "earlier" not in reason
            if first is not run and run.status != DUPLICATE and is_certain:
                run.status, run.reason = DUPLICATE, f"{reason} {first.name!r}"


def _marks(run: Run) -> list[tuple[str, str]]:
    """Returns what two runs have in common only if one is a copy of the other, or its repetition."""
    marks = []
    weights = text(run.summary, "encoder_sha256" if run.kind == "pretrain" else "weights_sha256")
    if run.kind in ("pretrain", "detection", "segmentation") and weights:
        marks.append((weights, "the same weights as (a copy, or the same config and seed once more)"))
    told = [run.summary] if run.summary else run.tests
    if told and run.kind != "features":
        marks.append((json.dumps(told, sort_keys=True), "a copy of"))
    elif told:
        marks.append((json.dumps([told, run.path.name], sort_keys=True), "a copy of"))
    if run.metrics and "seconds" in run.metrics[0]:  # measured: hardly a second run has the same
        marks.append((json.dumps(run.metrics[0], sort_keys=True), "a copy, or an earlier state, of"))
    return marks


def _join_tests(runs: list[Run]) -> None:
    """Gives evaluations in folders of their own to the training whose weights they judge."""
    trainings = {
        (run.kind, weights, _data(run.summary)): run
        for run in runs
        if run.status == FINISHED and (weights := text(run.summary, "weights_sha256"))
    }
    for run in runs:
        if run.status != FINISHED or run.summary or not run.tests:
            continue
        for test in list(run.tests):
            training = trainings.get((run.kind, text(test, "weights_sha256") or "", _data(test)))
            if training is not None:
                training.tests.append(test)
                run.source = training
                run.notes.append("an evaluation: shown in the row of the training whose weights it judges")


def _data(told: Mapping[str, Any]) -> tuple[Any, str]:
    return (told.get("data"), json.dumps(dig(told, "data_splits", "val"), default=str))


def judges(run: Run) -> Run | None:
    """Returns the training that an evaluation in a folder of its own belongs to."""
    is_test = not run.summary and bool(run.tests)
    return run.source if is_test and run.source is not None and run.source.kind == run.kind else None


def _source(run: Run, trained: list[Run]) -> Run | None:
    if run.source is not None:
        return run.source
    told = backbone(run)
    if told is None:
        return None
    digest = text(told, "encoder_sha256")
    if digest is not None:
        return next((one for one in trained if text(one.summary, "encoder_sha256") == digest), None)
    names = _names(text(told, "file"))
    found = [one for one in trained if one.path.resolve().name in names and not text(one.summary, "encoder_sha256")]
    if len(found) != 1 or not _agree(told, describe(found[0])):
        if len(found) > 1:
            run.notes.append(
                f"older version: {len(found)} pre-trainings are called {found[0].path.name!r}: joined to none"
            )
        return None
    run.notes.append("older version without a digest of the weights: joined to its pre-training by the folder's name")
    return found[0]


def _names(path: str | None) -> set[str]:
    parts = PurePath((path or "").replace("\\", "/")).parts
    return set(parts[-1:]) | set(parts[-2:-1]) | set(parts[-3:-2] if "checkpoints" in parts[-2:] else ())


def _agree(told: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Tells whether the metadata of a backbone file can be those of a pre-training."""
    metadata = metadata_facts(told)
    return all(metadata[key] == facts[key] for key in ("seed", "num_steps", "data") if key in metadata and key in facts)


def _check(run: Run) -> None:
    """Takes runs out of the tables that finished without a result."""
    if run.kind in WORTH and judges(run) is None and not any(key in run.facts for key in WORTH[run.kind]):
        named = ", ".join(WORTH[run.kind])
        run.fail(BROKEN, f"finished, but holds none of its metrics ({named})")
    if run.kind == "pretrain" and "seconds" not in run.facts and "images_seen" not in run.facts:
        run.fail(BROKEN, "summary.json holds neither its time nor its images")
    if run.kind in ("classify", "detection", "segmentation") and run.status == FINISHED:
        told = run.summary or next(iter(run.tests), {})
        if "backbone" not in told:
            run.notes.append("older version: it does not say which backbone it started from")
    if run.status == FINISHED and run.kind in ("pretrain", "classify") and not run.config:
        run.notes.append("no config.py: what the run was is told by summary.json alone")
