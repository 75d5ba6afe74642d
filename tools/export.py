"""Writes a backbone file: `python tools/export.py CHECKPOINT OUT.safetensors [--layout timm|mae|mmdet|mmseg]`."""

import argparse

import _checkout  # noqa: F401

from mae_et.cli import run_tool

LAYOUTS = {
    "timm": "timm's VisionTransformer, e.g. timm.create_model('vit_base_patch16_224', num_classes=0)",
    "mae": "the official MAE, with the decoder",
    "mmdet": "the ViTDet backbone, without cls token and final norm",
    "mmseg": "mmsegmentation's MAE backbone",
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write the backbone of a checkpoint under the names that another library uses.",
        epilog="layouts: " + "; ".join(f"{name}: {what}" for name, what in LAYOUTS.items()),
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's step_*.pt, or any MAE or ViT file")
    parser.add_argument("out", metavar="OUT", help="OUT.safetensors, or OUT.pth for a torch file")
    parser.add_argument("--layout", choices=LAYOUTS, default="timm", help="default: timm")
    return parser


def main(args: argparse.Namespace) -> None:
    from mae_et.storage.backbone import export  # after the command line is checked: this import takes seconds

    metadata = export(args.checkpoint, args.out, args.layout)
    step = f", step {metadata['step']} of {metadata['num_steps']}" if "step" in metadata else ""
    print(
        f"wrote {args.out} in layout {args.layout} ({metadata.get('architecture', 'architecture not recorded')}{step})"
    )


if __name__ == "__main__":
    run_tool(main, make_parser())
