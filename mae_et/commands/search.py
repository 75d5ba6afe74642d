"""Searches a curriculum for a training: which bandwidth in which stage, under a limit of compute."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mae_et.config.files import add_config_arguments
from mae_et.config.overrides import apply_overrides
from mae_et.config.schema import from_dict
from mae_et.config.search import SearchConfig
from mae_et.config.training_files import load_training_config

if TYPE_CHECKING:
    from mae_et.runs.search import SearchRecord
    from mae_et.tasks.search import Estimate

EXAMPLE = """examples:
  mae-et search imagenette --algorithm sequential --work-dir work_dirs/search --dry-run
  mae-et search imagenette --algorithm sequential --work-dir work_dirs/search
  mae-et search imagenette --algorithm bayesian --work-dir work_dirs/bayesian --trials 40
  mae-et pretrain imagenette --cfg-options curriculum.file=work_dirs/search/curriculum.py

The same command resumes a search that was stopped or killed. Start it several times, also on several machines with a common
disk, to share the trials; CUDA_VISIBLE_DEVICES gives each process its GPU. docs/guides/search.md says what the algorithms do
and which of the settings are this project's.

exit codes: 0 done; 1 error; 2 faulty config or option; 75 stopped by SIGTERM or Ctrl-C with everything saved
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument("--work-dir", help="where the search is written; default: work_dirs/NAME_OF_CONFIG_ALGORITHM")
    for name, field in SearchConfig.model_fields.items():
        default = field.get_default()
        said = (
            ""
            if default in (None, ())
            else f" Default: {default:.3g}."
            if isinstance(default, float)
            else f" Default: {default}."
        )
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            required=name == "algorithm",
            metavar="96,128,..." if name == "candidates" else name.split("_")[-1].upper(),
            help=f"{field.description}{'' if name == 'algorithm' else said}".replace("%", "%%"),
        )
    parser.add_argument("--dry-run", action="store_true", help="print the cost and stop")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    return parser


def main(args: argparse.Namespace) -> None:
    settings = read_settings(args)
    config = load_training_config(args.config, args.cfg_options)
    from mae_et.tasks.search import CurriculumSearch  # after the config is checked: this import takes seconds

    work_dir = Path(args.work_dir or f"work_dirs/{Path(args.config).stem}_{settings.algorithm}")
    search = CurriculumSearch(config, settings, work_dir)
    estimate = search.estimate()
    print("\n".join(estimate_lines(estimate)), flush=True)
    if not args.dry_run:
        print("\n".join(result_lines(search.run(args.device), work_dir)))


def read_settings(args: argparse.Namespace) -> SearchConfig:
    """Returns the settings of a command line.

    Raises:
        ConfigError: with all faults of the options.
    """
    values: dict[str, Any] = {}
    given = {name: text for name in SearchConfig.model_fields if (text := getattr(args, name)) is not None}
    apply_overrides(SearchConfig, values, given, "options of the search")
    return from_dict(SearchConfig, values, "options of the search")


def estimate_lines(estimate: Estimate) -> list[str]:
    """Returns what a search will do and cost, as text."""
    settings = estimate.settings
    least, most = estimate.equivalent_epochs
    trials = " to ".join(str(number) for number in sorted(set(estimate.num_trials)))
    cost = f"{least:.2f}" if most - least < 0.005 else f"{least:.2f} to {most:.2f}"
    relative = sorted({f"{one / estimate.baseline_epochs:.2f}" for one in (least, most)}, key=float)
    what = {
        "sequential": "branches are scored after a proxy at full size of "
        f"{settings.proxy_epochs or 0:.3g} equivalent epochs (all proxies: {estimate.proxy_epochs:.2f})",
        "backward": "every trial is a full run; how many there are depends on the scores",
        "bayesian": f"{settings.trials} curricula by Optuna's {settings.sampler}; pruned ones cost less",
    }[settings.algorithm]
    budget = "the baseline" if settings.algorithm == "backward" else "the curriculum"
    return [
        f"search: {settings.algorithm}, {settings.stages} stages, candidates {', '.join(map(str, settings.candidates))} px",
        f"budget of {budget}: {estimate.curriculum_epochs:.2f} equivalent epochs (baseline: {estimate.baseline_epochs:g})",
        f"score: {settings.score}; {settings.repeats} seed{'s' * (settings.repeats > 1)} for each candidate, noise from "
        f"{max(settings.noise_seeds, settings.repeats)} seeds",
        f"trials: {trials}; {what}",
        f"cost: {cost} equivalent epochs, {' to '.join(relative)} times the baseline",
    ]


def result_lines(record: SearchRecord, work_dir: Path) -> list[str]:
    """Returns what a search found and cost, as text."""
    found = record.found
    assert found is not None
    planned = " to ".join(f"{cost:.2f}" for cost in sorted(set(record.planned_equivalent_epochs)))
    stages = ", ".join(f"{row.bandwidth} px for {row.compute_fraction:.1%}" for row in found.stages)
    score = "unknown" if found.score is None else f"{found.score:.5g}"
    return [
        f"found: {stages}; {found.equivalent_epochs:.2f} equivalent epochs, score {score} (noise {found.noise:.3g}, margin "
        f"{found.margin:.3g})",
        f"why: {found.why}",
        f"cost: {found.spent_equivalent_epochs:.2f} equivalent epochs in {found.num_trials} trials (planned: {planned}), "
        f"{found.seconds / 60:.1f} min of training",
        f"all files are in {work_dir}; use the curriculum with --cfg-options curriculum.file={work_dir / 'curriculum.py'}",
    ]
