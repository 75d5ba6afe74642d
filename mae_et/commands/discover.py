"""Shows which frequencies a network learns first on your images: plans, runs and draws the discovery study.

The runs are ordinary runs in WORK_DIR/runs. Finished ones are kept and the one that was interrupted resumes, so the same
command continues a study. The page is WORK_DIR/discovery.md, with its figures and a CSV file beside each.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from mae_et.config.files import add_config_arguments
from mae_et.config.training_files import load_training_config
from mae_et.errors import UserError
from mae_et.runs.study import StudyName

if TYPE_CHECKING:
    from mae_et.tasks.discovery import Study

EXAMPLE = """studies:
  train_filtered  runs on low-pass images of each radius against a run on full images
  val_filtered    one run on full images, measured on low-pass images of each radius
  low_high        the same run, measured on low-pass and on high-pass images
  prefix          a filter, a crop or weak augmentation in the first part of the run only
  bands           reconstruction error of a masked autoencoder by frequency band

examples:
  mae-et discover imagenette --study bands val_filtered low_high --work-dir work_dirs/discover --dry-run
  mae-et discover photos --study train_filtered --radii 20 60 --work-dir work_dirs/discover --cfg-options data.train=/data/photos

A radius is in px of the spectrum of a 224 px image, at any image size: 112 is the Nyquist limit. The defaults are settings of
this project. The guide is docs/guides/discover.md.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--study", nargs="+", required=True, choices=get_args(StudyName), help="one or several; see below"
    )
    parser.add_argument(
        "--work-dir", required=True, type=Path, metavar="DIR", help="for the runs, the figures and the page"
    )
    parser.add_argument(
        "--radii", nargs="+", type=float, metavar="R", help="of the low-pass filters; default: 20 40 60 80 112"
    )
    parser.add_argument(
        "--high-radii",
        nargs="+",
        type=float,
        metavar="R",
        help="of the high-pass filters of low_high; default: 8 16 32 64",
    )
    parser.add_argument(
        "--shape", choices=["circle", "square"], default="circle", help="of the filters; default: circle"
    )
    parser.add_argument(
        "--bandwidths",
        nargs="*",
        type=int,
        metavar="B",
        help="of the crop in prefix, px; default: those of the preset etpp",
    )
    parser.add_argument(
        "--parts", nargs="+", type=float, metavar="PART", help="of the images shown, for prefix; default: 0.25 0.5 0.75"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="N", help="one run each; default: run.seed of the config"
    )
    parser.add_argument("--evaluations", type=int, default=20, metavar="N", help="accuracies of each run; default: 20")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="print the runs and their cost, and stop")
    only.add_argument("--figures-only", action="store_true", help="draw again what is in the work dir, and stop")
    return parser


def main(args: argparse.Namespace) -> None:
    if args.figures_only:
        draw(args.work_dir)
        return
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("a study runs its trainings in one process, one after the other: start it without torchrun")
    config = load_training_config(args.config, args.cfg_options)
    from mae_et.tasks.discovery import StudyOptions, plan_study, run_study  # takes seconds

    given = {
        "radii": args.radii, "high_radii": args.high_radii, "bandwidths": args.bandwidths, "parts": args.parts,
        "seeds": args.seeds or [config.run.seed],
    }  # fmt: skip
    options = StudyOptions(
        studies=tuple(name for name in get_args(StudyName) if name in args.study),
        shape=args.shape,
        num_evaluations=args.evaluations,
        **{name: tuple(values) for name, values in given.items() if values is not None},
    )
    study = plan_study(config, options)
    print(table(study, args.work_dir))
    if not args.dry_run:
        run_study(study, args.work_dir, args.device)
        draw(args.work_dir)


def draw(work_dir: Path) -> None:
    from mae_et.report.discovery_page import write_page

    print(f"the study: {write_page(work_dir)}")


def table(study: Study, work_dir: Path) -> str:
    """Returns the runs with their cost and state as text."""
    from mae_et.tasks.discovery import status

    states = [status(run, work_dir) for run in study.runs]
    rows = [
        ["run", "steps", "equiv. epochs", "real epochs", "PFLOP", "views", "state"],
        *(
            [
                run.record.name, f"{run.plan.num_steps:,}", f"{run.record.equivalent_epochs:.4g}",
                f"{run.record.real_epochs:.4g}", f"{run.record.petaflops:.3g}", str(run.num_views), state,
            ]
            for run, state in zip(study.runs, states, strict=True)
        ),
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    first, *others = widths
    lines = ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows]
    total = sum(run.record.equivalent_epochs for run in study.runs)
    left = sum(
        run.record.equivalent_epochs for run, state in zip(study.runs, states, strict=True) if state != "finished"
    )
    return "\n".join(
        [
            *lines,
            "views: times that each accuracy encodes its images: unfiltered, and once for each filter",
            f"together {total:.4g} equivalent epochs of {study.runs[0].plan.dataset_size:,} images at full size, without the "
            f"accuracies; not finished: {left:.4g}",
            *(f"note: {note}" for note in study.record.notes),
        ]
    )
