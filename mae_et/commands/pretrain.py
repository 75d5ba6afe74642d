"""Pre-trains a masked autoencoder under the EfficientTrain++ curriculum."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mae_et.config.files import add_config_arguments, load_config
from mae_et.config.schema import PretrainConfig
from mae_et.models.sizes import size_text

# The published claim is the accuracy of 1600 epochs for the compute of 400. Less is another budget, no speed-up.
MAX_CLAIMED_SPEEDUP = 4.5
EXAMPLE = """examples:
  mae-et pretrain demo
  mae-et pretrain photos --work-dir work_dirs/photos --cfg-options data.train=/data/photos
  torchrun --nproc_per_node 8 -m mae_et pretrain mae_base_etpp_400e_imagenet

exit codes: 0 done; 1 error; 2 faulty config; 75 stopped by SIGTERM or Ctrl-C with everything saved
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument("--work-dir", help="where the run is written; default: work_dirs/NAME_OF_CONFIG")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="resume from the newest checkpoint in the work dir; start if there is none",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    return parser


def main(args: argparse.Namespace) -> None:
    config = load_config(PretrainConfig, args.config, args.cfg_options)
    from mae_et.tasks.pretrain import pretrain  # after the config is checked: this import takes seconds

    work_dir = Path(args.work_dir or f"work_dirs/{Path(args.config).stem}")
    summary = pretrain(config, work_dir, args.resume, args.device)
    if summary:
        print_summary(summary, work_dir)


def print_summary(summary: dict[str, Any], work_dir: Path) -> None:
    minutes = summary["seconds"] / 60
    print(
        f"{summary['num_images']} images in {minutes:.1f} min; "
        f"loss {summary['first_loss']:.3f} -> {summary['last_loss']:.3f}"
    )
    for line in speed_lines(summary):
        print(line)
    if summary["knn_top1_after"] is not None:
        before, after = summary["knn_top1_before"], summary["knn_top1_after"]
        print(f"kNN accuracy of the features: {before:.1%} untrained -> {after:.1%} trained")
    pictures = sorted((work_dir / "reconstructions").glob("*.png"))
    if pictures:
        print(f"reconstructions: {pictures[-1]}")
    print(f"backbone: {work_dir / 'backbone.safetensors'}; all files are in {work_dir}")


def speed_lines(summary: dict[str, Any]) -> list[str]:
    """Returns the speed-up of the run beside the ideal, and a line for each stage that is a tenth or more below the ideal."""
    lines = []
    if summary["speedup_against_baseline"] is not None and summary["nominal_speedup"] < MAX_CLAIMED_SPEEDUP:
        lines.append(
            f"speed-up over {summary['baseline_equivalent_epochs']:g} full-size epochs (computed from this run's full-size "
            f"speed): {summary['speedup_against_baseline']:.2f}x; ideal: {summary['nominal_speedup']:.2f}x by area, "
            f"{summary['nominal_speedup_flops']:.2f}x by counted FLOPs"
        )
    for stage in summary["stages"]:
        share = stage["speed_over_ideal_by_flops"]
        if share is not None and share <= 0.9:
            lines.append(
                f"  bandwidth {size_text(stage['input_size'])}: {stage['images_per_second']:.0f} images/s, "
                f"{stage['speed_over_full_size']:.1f}x full size (ideal: {stage['ideal_by_area']:.1f}x by area, "
                f"{stage['ideal_by_flops']:.1f}x by counted FLOPs), {stage['waiting_fraction']:.0%} of the time waiting for data"
            )
    if summary["mfu"] is not None:
        lines.append(f"model FLOPs utilisation: {summary['mfu']:.1%} of {summary['peak_tflops']:g} TFLOP/s a GPU")
    return lines
