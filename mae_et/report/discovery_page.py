"""Writes the page of a discovery study: what the runs show, in words, tables and figures."""

from __future__ import annotations

from pathlib import Path

from mae_et.config.filters import SPECTRUM_SIZE
from mae_et.models.sizes import size_text
from mae_et.report.discovery import RULE, StudyData, read_study
from mae_et.report.discovery_drawing import write_drawing
from mae_et.report.discovery_sections import SECTIONS, metric_words
from mae_et.report.text import markdown, markdown_table
from mae_et.storage.atomic import atomic_path

TITLES = {
    "train_filtered": "Training on low-pass images",
    "val_filtered": "One model, scored on low-pass images over its training",
    "low_high": "Low-pass against high-pass images",
    "prefix": "Crop, filter or weak augmentation in the first part only",
    "bands": "Reconstruction error by frequency band",
}
UNITS = (
    f"A radius r is in px of the spectrum of a {SPECTRUM_SIZE} px image: r = {SPECTRUM_SIZE // 2} is the Nyquist limit of an "
    "axis. The filters do not change the size of the images. Radii, times of measurement, parts and the rules below are settings "
    "of this project, not of a paper."
)


def write_page(work_dir: Path) -> Path:
    """Draws the figures of a study again from its runs and writes discovery.md.

    Args:
        work_dir: holds study.json and runs/; gets discovery.md and figures/.
    Returns:
        The page.
    Raises:
        UserError: if there is no study.
    """
    study = read_study(work_dir)
    parts = [_head(study)]
    for name in study.record.studies:
        text, drawings = SECTIONS[name](study)
        parts.append(f"## {TITLES[name]}\n\n{text}")
        for drawing in drawings:
            write_drawing(drawing, work_dir / "figures")
            parts.append(
                f"![{markdown(drawing.alt)}](figures/{drawing.name}.png)\n\nNumbers: "
                f"[{drawing.name}.csv](figures/{drawing.name}.csv)\n"
            )
    parts.append(_cost(study))
    page = work_dir / "discovery.md"
    with atomic_path(page) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8", errors="backslashreplace")
    return page


def _head(study: StudyData) -> str:
    record = study.record
    lines = [
        "# Which frequencies are learned first\n",
        f"Model {markdown(record.model)}, images {markdown(record.data)} at {size_text(record.image_size)} px, "
        f"{len({run.seed for run in record.runs})} seed(s). {UNITS}\n",
    ]
    if record.num_val:
        lines.append(
            f"Accuracy: {metric_words(study)} on {record.num_val:,} validation images"
            + (
                "; bank and queries are filtered alike, the network sees no labels"
                if record.metric.startswith("knn")
                else "; training and validation images are filtered as each figure says"
            )
            + ". Bands around the curves are one standard error.\n"
        )
        lines.append(f"{RULE}\n")
    lines += [f"Note: {markdown(note)}.\n" for note in record.notes]
    if study.unfinished:
        lines.append(f"**Not finished, and in no figure: {markdown(', '.join(study.unfinished))}.**\n")
    return "\n".join(lines)


def _cost(study: StudyData) -> str:
    """Returns the table of the runs."""
    rows = [
        [
            run.name,
            f"{run.num_steps:,}",
            f"{run.equivalent_epochs:.4g}",
            f"{run.real_epochs:.4g}",
            f"{run.petaflops:.3g}",
        ]
        for run in study.record.runs
    ]
    header = ["run", "steps", "equivalent epochs", "real epochs", "PFLOP"]
    total = sum(run.equivalent_epochs for run in study.record.runs)
    return (
        f"## The runs\n\nTogether {total:.4g} equivalent epochs, without the measurements. Each run is in `runs/`, with its "
        "config.\n\n" + markdown_table(header, rows, [True, False, False, False, False])
    )
