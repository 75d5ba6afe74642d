"""Model cards: Markdown with data, curriculum, cost and results, taken from the metadata of a file and its run's summary."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mae_et.models.sizes import recorded_size, size_text
from mae_et.runs.records import ClassifierSummary, PretrainSummary, Summary, SupervisedSummary, TrainingSummary

_ABSENT = "not recorded"


def model_card(metadata: Mapping[str, str], summary: Summary | None, name: str, loading: str = "") -> str:
    """Returns the model card of a file of weights.

    Values that neither the metadata nor the summary holds are given as "not recorded"; nothing is guessed.

    Args:
        metadata: of the file; numbers and structures as JSON.
        summary: of the run that wrote the file; None: the cost and results sections say that they are absent.
        name: title of the card.
        loading: code that loads the file.
    Returns:
        Markdown. It begins with the front matter that the Hugging Face hub reads.
    """
    sections = [
        ("Model", _table(_model_rows(metadata))),
        ("Input", _table(_input_rows(metadata))),
        ("Training data", _table(_data_rows(metadata))),
        ("Curriculum", _curriculum(metadata)),
        ("Cost", _table(_cost_rows(summary)) if isinstance(summary, TrainingSummary) else _no_summary()),
        ("Results", _results(summary)),
        ("Origin", _table(_origin_rows(metadata, summary))),
    ]
    if loading:
        sections.insert(1, ("Loading", f"```python\n{loading}\n```"))
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections)
    return f"---\n{_front_matter(metadata)}---\n\n# {_cell(name)}\n\n{body}\n"


def _front_matter(metadata: Mapping[str, str]) -> str:
    classifier = "class_names" in metadata
    lines = ["library_name: transformers"] if metadata.get("layout") == "huggingface" else []
    lines += [f"pipeline_tag: {'image-classification' if classifier else 'image-feature-extraction'}"]
    lines += ["tags:", "- mae_et", f"- {'image-classification' if classifier else 'masked-autoencoder'}"]
    return "\n".join(lines) + "\n"


def _model_rows(metadata: Mapping[str, str]) -> list[tuple[str, Any]]:
    names = json.loads(metadata.get("class_names", "null"))
    rows = [
        ("architecture", metadata.get("architecture")),
        ("width, depth, heads", _joined(metadata, ("embed_dim", "depth", "num_heads"))),
        ("cls tokens, whose mean is the feature", metadata.get("num_cls_tokens")),
        ("registers", metadata.get("num_registers")),
        ("MLPs", metadata.get("mlp")),
        ("positions", "rotary" if metadata.get("rotary_positions") == "true" else None),
        ("patch size", _px(metadata.get("patch_size"))),
        ("objective", metadata.get("objective") or metadata.get("protocol")),
        ("target", metadata.get("target")),
        ("mask ratio", metadata.get("mask_ratio")),
        ("kind of masks", metadata.get("mask_kind")),
        ("patches along a removed square", metadata.get("mask_grid")),
        ("decay of the moving average", metadata.get("ema_decay")),
        ("layout of the file", metadata.get("layout")),
    ]
    if names:
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        rows.append(("classes", f"{len(names)}: {shown}"))
    always = ("architecture", "objective", "layout of the file")  # the others are of some models only
    return [(key, value) for key, value in rows if value is not None or key in always]


def _input_rows(metadata: Mapping[str, str]) -> list[tuple[str, Any]]:
    return [
        ("image size", _px(size_text(recorded_size(metadata)) if "image_size" in metadata else None)),
        ("channels", metadata.get("in_chans")),
        ("mean", metadata.get("mean")),
        ("std", metadata.get("std")),
        ("share of the shorter side in the centre crop", metadata.get("eval_crop_ratio")),
    ]


def _data_rows(metadata: Mapping[str, str]) -> list[tuple[str, Any]]:
    rows = [("source", metadata.get("data")), ("images", _count(metadata.get("num_images")))]
    return [*rows, ("filter", metadata["filter"])] if "filter" in metadata else rows


def _curriculum(metadata: Mapping[str, str]) -> str:
    curriculum = json.loads(metadata.get("curriculum", "{}"))
    bandwidths = json.loads(metadata.get("bandwidths", "[]"))
    if not curriculum and not bandwidths:
        return "The file records no curriculum."
    rows = [("bandwidths of the stages, px", ", ".join(map(str, bandwidths)) or None)]
    rows += [(key.replace("_", " "), value) for key, value in curriculum.items() if _is_plain(value)]
    return _table(rows)


def _cost_rows(summary: TrainingSummary) -> list[tuple[str, Any]]:
    return [
        ("steps", _count(summary.num_steps)),
        ("images shown", _count(summary.num_images)),
        ("equivalent epochs", f"{summary.equivalent_epochs:g}"),
        ("training compute", f"{summary.train_petaflops:.4g} PFLOPs"),
        ("wall time without validation", f"{summary.seconds:.0f} s on {summary.world_size} process(es)"),
        ("images/s", f"{summary.images_per_second:.1f}"),
        ("nominal speed-up in FLOPs over full-size training", f"{summary.nominal_speedup_flops:.2f}"),
        ("measured speed-up against its baseline", _ratio(summary.speedup_against_baseline)),
        ("peak memory", None if summary.peak_memory_mb is None else f"{summary.peak_memory_mb:.0f} MiB"),
    ]


def _results(summary: Summary | None) -> str:
    if isinstance(summary, PretrainSummary):
        rows = [("loss, first to last", _change(summary.first_loss, summary.last_loss))]
        rows.append(("kNN top-1, before to after", _change(summary.knn_top1_before, summary.knn_top1_after)))
    elif isinstance(summary, (ClassifierSummary, SupervisedSummary)):
        interval = summary.top1_interval_95
        rows = [
            ("top-1", None if summary.top1 is None else f"{summary.top1:.4f}"),
            ("95 % interval of the choice of images", f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else None),
            ("top-5", None if summary.top5 is None else f"{summary.top5:.4f}"),
            ("validation images", _count(summary.num_val)),
        ]
    else:
        return _no_summary()
    return _table(rows)


def _origin_rows(metadata: Mapping[str, str], summary: Summary | None) -> list[tuple[str, Any]]:
    start = None if summary is None or summary.initial_weights is None else summary.initial_weights.file
    return [
        ("source file", metadata.get("source")),
        ("step", f"{metadata['step']} of {metadata.get('num_steps', '?')}" if "step" in metadata else None),
        ("initial weights", start or ("random" if summary is not None else None)),
        ("seed", metadata.get("seed")),
        ("mae_et version", metadata.get("mae_et_version")),
        ("SHA-256 of the encoder", metadata.get("encoder_sha256")),
    ]


def _no_summary() -> str:
    return "No summary of a finished training belongs to this file."


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    lines = [f"| {_cell(key)} | {_ABSENT if value is None else _cell(value)} |" for key, value in rows]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _cell(value: Any) -> str:
    """Escapes what Markdown or HTML would interpret, because names of files and classes may come from anywhere."""
    text = re.sub(r"\s+", " ", str(value))
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)


def _is_plain(value: Any) -> bool:
    return value is not None and not isinstance(value, (dict, list))


def _joined(metadata: Mapping[str, str], keys: tuple[str, ...]) -> str | None:
    return ", ".join(metadata.get(key, "?") for key in keys) if keys[0] in metadata else None


def _px(value: str | None) -> str | None:
    return None if value is None else f"{value} px"


def _count(value: int | str | None) -> str | None:
    return None if value is None else f"{int(value):,}"


def _ratio(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def _change(before: float | None, after: float | None) -> str | None:
    return None if after is None else f"{before:.4f} to {after:.4f}" if before is not None else f"{after:.4f}"
