"""The training loop at 96 px from image files, all in one process: ours with fast loading and replay against a plain one.

The plain loop loads as the authors do (Pillow to 224, Lanczos to 96, ToTensor, Normalize) and takes the plain MAE step with
PyTorch's default AdamW. Ours is tools/pretrain.py's, with data.loading = "fast" and replay (R = 4), both as shown in the docs.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import tempfile
import time
from pathlib import Path

from benches.files import write_images
from benches.loader import reference_batches
from benches.measuring import Comparison, Times, compare
from benches.step import make_optimizer, plain_step

from mae_et.config.schema import PretrainConfig, from_dict
from mae_et.data.sources.spec import open_source
from mae_et.models.mae import build_mae
from mae_et.tasks.pretrain import pretrain

SIDE, BATCH = 96, 32


def add_loop_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", metavar="DATA", help="folder or shards; default: 256 generated photos, 338x500")
    parser.add_argument("--steps", type=int, default=32, metavar="N", help=f"of {BATCH} images (default: %(default)s)")


def bench_loop(args: argparse.Namespace) -> list[Comparison]:
    logging.getLogger("mae_et").setLevel(logging.WARNING)
    variants = {
        "ours": {"loading": "fast", "mode": "mix"},
        "without replay": {"loading": "fast", "mode": "off"},
        "exact, without replay": {"loading": "exact", "mode": "off"},
    }
    times = {name: Times([], []) for name in ("plain", *variants)}
    with tempfile.TemporaryDirectory() as temporary:
        images = args.images or str(write_images(Path(temporary) / "images", 256, "338x500", quality=95))
        for i in range(args.rounds + 1):
            for name in list(times)[:: -1 if i % 2 else 1]:
                cpu = time.process_time()
                if name == "plain":
                    seconds = plain_loop(images, args.steps)
                else:
                    seconds = our_loop(images, args.steps, Path(temporary) / f"{i} {name}", **variants[name])
                if i:  # the first round warms up
                    times[name].wall.append(seconds)
                    times[name].cpu.append(time.process_time() - cpu)
    goals = {"ours": 1.8}
    return [
        compare(f"{args.steps} steps of ViT-tiny at {SIDE}, {name}", times, name, "plain", goals.get(name))
        for name in variants
    ]


def our_loop(images: str, num_steps: int, work_dir: Path, loading: str, mode: str) -> float:
    """Returns the seconds that the loop took, start-up and pictures left out."""
    equivalent_epochs = num_steps * BATCH * (SIDE / 224) ** 2 / len(open_source(images))
    config = from_dict(
        PretrainConfig,
        {
            "data": {"train": images, "loading": loading, "num_workers": 0},
            "model": {"size": "tiny"},
            "curriculum": {
                "preset": "custom",
                "stages": [{"compute_fraction": 1.0, "bandwidth": SIDE}],
                "equivalent_epochs": equivalent_epochs,
                "warmup_equivalent_epochs": 0.0,
            },
            "batch": {"global_batch_size": BATCH},
            "replay": {"mode": mode},
            "run": {"precision": "fp32", "save_interval": 10**9, "log_interval": 10**6},
        },
    )
    return pretrain(config, work_dir, device="cpu")["seconds"]


def plain_loop(images: str, num_steps: int) -> float:
    """Returns the seconds of a plain loop over the same number of steps."""
    source = open_source(images)
    model = build_mae("tiny", img_size=SIDE, norm_pix_loss=True).train()
    optimizer = make_optimizer(model, fused=None)
    passes = (reference_batches(source, len(source), SIDE) for _ in itertools.count())
    start = time.perf_counter()
    for batch in itertools.islice(itertools.chain.from_iterable(passes), num_steps):
        plain_step(model, optimizer, batch)
    return time.perf_counter() - start
