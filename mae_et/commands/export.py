"""Writes the backbone of a run, a checkpoint or any weights under the names of another library."""

from __future__ import annotations

import argparse

LAYOUTS = {
    "timm": "timm's VisionTransformer",
    "mae": "the official MAE, with the decoder (.pth for the official code)",
    "mmdet": "the ViTDet backbone of mmdetection, without cls token and final norm (.pth)",
    "mmseg": "the MAE backbone of mmsegmentation (.pth)",
}

EXAMPLE = "layouts:\n" + "".join(f"  {name:<6}  {what}\n" for name, what in LAYOUTS.items())
EXAMPLE += """
example:
  mae-et export work_dirs/demo work_dirs/demo/vitdet.pth --layout mmdet
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", help="the folder of a run, a checkpoint, or any MAE or ViT file")
    parser.add_argument("out", metavar="OUT", help="OUT.safetensors, or OUT.pth for a torch file")
    parser.add_argument("--layout", choices=LAYOUTS, default="timm", help="default: timm")
    parser.add_argument(
        "--entry", metavar="NAME", help='entry or prefix of a file with several models, e.g. "model_ema" or "teacher"'
    )
    return parser


def main(args: argparse.Namespace) -> None:
    from mae_et.storage.backbone import export  # imports torch, which takes seconds
    from mae_et.storage.metadata import loading_lines

    metadata = export(args.source, args.out, args.layout, args.entry)
    step = f", step {metadata['step']} of {metadata['num_steps']}" if {"step", "num_steps"} <= metadata.keys() else ""
    sizes = ", ".join(f"{key} {metadata[key]}" for key in ("embed_dim", "depth", "patch_size"))
    print(f"wrote {args.out} in layout {args.layout} ({sizes}{step})")
    if args.layout == "timm":
        if "num_heads" in metadata:
            print(loading_lines(metadata, args.out))
        else:
            print("the source does not record its number of attention heads: set num_heads when you load the file")
