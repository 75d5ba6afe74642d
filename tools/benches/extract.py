"""tools/extract.py against the forward pass alone."""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

import extract
import torch
from benches.files import write_images
from benches.measuring import Comparison, compare, measure
from torch import Tensor

from mae_et.models.vit import random_vit
from mae_et.storage.backbone import write_backbone


def bench_extract(rounds: int, num_images: int = 128, batch: int = 32) -> list[Comparison]:
    """Features of image files on disk, from the command line's words to the finished file, against the network alone."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_images(Path(temporary) / "images", num_images, 160)
        for size, image_size, num_workers in (("tiny", 160, 0), ("tiny", 160, 1), ("small", 160, 0)):
            model = random_vit(image_size, size).eval()
            path = Path(temporary) / f"{size}.safetensors"
            write_backbone(model.state_dict(), path, "timm", {"image_size": str(image_size)})
            words = [path, folder, "--out", path.with_suffix(".npy"), "--batch-size", batch, "--device", "cpu"]
            args = extract.make_parser().parse_args([*map(str, words), "--num-workers", str(num_workers)])
            images = torch.randn(num_images, 3, image_size, image_size)

            def ours(args: argparse.Namespace = args) -> None:
                for written in (args.out, args.out.with_suffix(".json")):
                    written.unlink(missing_ok=True)
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    extract.main(args)

            @torch.inference_mode()
            def bare(model: Any = model, images: Tensor = images) -> None:
                for part in images.split(batch):
                    model.forward_features(part)[:, 1:].mean(dim=1)

            times = measure({"ours": ours, "bare": bare}, rounds)
            title = f"{num_images} files, ViT-{size} at {image_size}, loader processes {num_workers}, against the forward pass"
            rows.append(compare(title, times, "ours", "bare", 0.9))
    return rows
