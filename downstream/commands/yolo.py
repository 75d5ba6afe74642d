"""Converts boxes and polygons in YOLO's format to COCO annotations, which detectors read.

The images stay where they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = """example:
  mae-et yolo /data/mine/data.yaml /data/mine/annotations
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="DATA.yaml", type=Path, help="describes the set: path, train, val, test, names")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder that gets train.json, val.json and test.json")
    return parser


def main(args: argparse.Namespace) -> None:
    from downstream.checks.findings import report
    from downstream.datasets.yolo import read_yolo, to_coco, write_coco

    data = read_yolo(args.data)
    converted = {split: to_coco(data, split) for split in data.splits}
    report([findings for _, findings in converted.values()])
    for split, (content, _) in converted.items():
        write_coco(content, args.out / f"{split}.json")
    dataset = f'data_root="{data.root}", data_prefix=dict(img=""), metainfo=dict(classes={tuple(data.names)!r})'
    print("For the config, see docs/guides/transfer.md:")
    for split in converted:
        print(f'{split}: dict(ann_file="{(args.out / f"{split}.json").resolve()}", {dataset})')
