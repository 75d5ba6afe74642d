"""Scores backbones on all images of Imagenette: `python probe.py BACKBONE... --data IMAGENETTE --out scores.jsonl`.

The features are the means of the patch tokens at 112 px in bf16. kNN: k = 20, the 9,469 training photos are the bank. Linear:
logistic regression on standardized features. A backbone whose line is in the file already is skipped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from mae_et.evaluation.knn import knn_predict
from mae_et.evaluation.linear import linear_predict
from mae_et.tasks.features import FeatureOptions, extract

NUM_CLASSES = 10


def features(backbone: str, images: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the features [N, D] and labels [N] of a folder."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "features.npy"
        extract(
            backbone,
            str(images),
            out,
            FeatureOptions(precision="bf16", image_size=112, num_workers=0, crop_ratio=0.875),
        )
        labels = json.loads(out.with_suffix(".json").read_text())["labels"]
        return torch.from_numpy(np.load(out)), torch.tensor(labels)


def main() -> None:
    """Writes one line for each backbone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backbones", nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    done = {json.loads(line)["run"] for line in args.out.read_text().splitlines()} if args.out.exists() else set()
    for backbone in args.backbones:
        run = Path(backbone).parent.name
        if run in done:
            continue
        bank, labels = features(backbone, args.data / "train")
        queries, truth = features(backbone, args.data / "val")
        knn = (knn_predict(bank, labels, queries, (20,))[20] == truth).double().mean().item()
        linear = (linear_predict(bank, labels, queries, NUM_CLASSES) == truth).double().mean().item()
        line = json.dumps({"run": run, "knn": round(knn, 4), "linear": round(linear, 4)})
        print(line, flush=True)
        with args.out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
