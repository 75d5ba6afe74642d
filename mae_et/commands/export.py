"""Writes the backbone or classifier of a run, a checkpoint or any weights for another library."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mae_et.cli import image_size

LAYOUTS = {
    "timm": "timm's VisionTransformer",
    "mae": "the official MAE, with the decoder (.pth for the official code)",
    "mmdet": "the ViTDet backbone of mmdetection, without cls token and final norm (.pth)",
    "mmseg": "the MAE backbone of mmsegmentation (.pth)",
    "huggingface": "a folder for transformers: ViTMAEForPreTraining, ViTForImageClassification or ViTModel",
    "onnx": "an ONNX file of the encoder or classifier, compared in onnxruntime (extra mae_et[onnx])",
}
OWN_OPTIONS = {"num_heads": ("huggingface", "onnx"), "image_size": ("onnx",), "dynamic": ("onnx",)}

EXAMPLE = "layouts:\n" + "".join(f"  {name:<11}  {what}\n" for name, what in LAYOUTS.items())
EXAMPLE += """
examples:
  mae-et export work_dirs/demo work_dirs/demo/vitdet.pth --layout mmdet
  mae-et export work_dirs/demo work_dirs/demo/hf --layout huggingface
  mae-et export work_dirs/demo work_dirs/demo/encoder.onnx --layout onnx --dynamic size --card work_dirs/demo/card.md
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="the folder of a run, a checkpoint, or any MAE or ViT file")
    add("out", metavar="OUT", help="OUT.safetensors, OUT.pth or OUT.onnx, or a folder for huggingface")
    add("--layout", choices=LAYOUTS, default="timm", help="default: timm")
    add("--entry", metavar="NAME", help='entry or prefix of a file with several models, e.g. "model_ema" or "teacher"')
    add("--num-heads", metavar="H", type=int, help="huggingface, onnx: where SOURCE does not record it")
    add("--image-size", metavar="S", type=image_size, help="onnx: px, side or H,W; default: that of SOURCE, else 224")
    dynamic = "onnx: what is free at run time: nothing, the number of images, or also their size; default: batch"
    add("--dynamic", choices=["none", "batch", "size"], help=dynamic)
    card = "write a model card in Markdown; default: OUT/README.md for huggingface, else none"
    add("--card", metavar="FILE", type=Path, help=card)
    return parser


def main(args: argparse.Namespace) -> None:
    from mae_et.errors import UserError

    own = {name: getattr(args, name) for name in OWN_OPTIONS if getattr(args, name) is not None}
    for name in own:
        if args.layout not in OWN_OPTIONS[name]:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} has no effect with --layout {args.layout}: remove it")
    metadata, loading = _export(args, own)
    step = f", step {metadata['step']} of {metadata['num_steps']}" if {"step", "num_steps"} <= metadata.keys() else ""
    sizes = ", ".join(f"{key} {metadata[key]}" for key in ("embed_dim", "depth", "patch_size") if key in metadata)
    print(f"wrote {args.out} in layout {args.layout} ({sizes or metadata.get('architecture', 'unnamed')}{step})")
    if loading:
        print(loading)
    card = args.card or (Path(args.out) / "README.md" if args.layout == "huggingface" else None)
    if card is not None:
        _write_card(card, args, metadata, loading)


def _export(args: argparse.Namespace, own: Mapping[str, object]) -> tuple[dict[str, str], str]:
    """Returns the metadata of the file and the code that loads it."""
    from mae_et.storage.metadata import loading_lines  # here and below: imports torch, which takes seconds

    options: dict[str, Any] = dict(own)
    if args.layout == "huggingface":
        from mae_et.storage.huggingface import export_hugging_face

        metadata = export_hugging_face(args.source, args.out, args.entry, **options)
        name = metadata["hugging_face_class"]
        return metadata, f"from transformers import {name}\n\nmodel = {name}.from_pretrained({str(args.out)!r})"
    if args.layout == "onnx":
        from mae_et.storage.onnx_file import export_onnx

        file = export_onnx(args.source, args.out, entry=args.entry, **options)
        shapes = [" x ".join(map(str, shape)) for shape in (file.input_shape, file.output_shape)]
        return file.metadata, (
            f"# images [{shapes[0]}] -> {file.output} [{shapes[1]}]; largest difference to torch: {file.difference:.1e}\n"
            f"import onnxruntime\n\nsession = onnxruntime.InferenceSession({str(args.out)!r})\n"
            f'({file.output},) = session.run(None, {{"images": images}})'
        )
    from mae_et.storage.backbone import export

    metadata = export(args.source, args.out, args.layout, args.entry)
    if args.layout != "timm":
        return metadata, ""
    if "num_heads" in metadata:
        return metadata, loading_lines(metadata, args.out)
    return metadata, "# the source does not record its number of attention heads: set num_heads when you load the file"


def _write_card(card: Path, args: argparse.Namespace, metadata: Mapping[str, str], loading: str) -> None:
    from mae_et.report.model_card import model_card
    from mae_et.runs.record_files import read_summary
    from mae_et.storage.atomic import atomic_path

    source = Path(args.source).resolve()
    run = source if source.is_dir() else source.parent
    run = run.parent if run.name == "checkpoints" else run
    summary, path = None, run / "summary.json"
    if metadata.get("step") != metadata.get("num_steps"):
        print(f"{path} is not used: SOURCE is of an earlier step than the end of the run")
    elif path.is_file():
        try:
            summary = read_summary(path)
        except (OSError, ValueError) as error:
            print(f"{path} is not used: {error}")
    card.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(card) as temporary:
        temporary.write_text(model_card(metadata, summary, run.name, loading), encoding="utf-8")
    print(f"wrote the model card {card}" + ("" if summary else ", without cost and results"))
