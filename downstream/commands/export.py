"""Writes the weights of a run, or any others, for another library: backbones, classifiers, segmentors."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from downstream.commands.train import TASKS
from mae_et.cli import image_size
from mae_et.config.shipped import find_config
from mae_et.errors import UserError

if TYPE_CHECKING:
    from mae_et.storage.onnx_program import OnnxFile

LAYOUTS = {
    "timm": "timm's VisionTransformer",
    "mae": "the official MAE, with the decoder (.pth for the official code)",
    "mmdet": "the ViTDet backbone of mmdetection, without cls token and final norm (.pth)",
    "mmseg": "the MAE backbone of mmsegmentation (.pth)",
    "huggingface": "a folder for transformers: ViTMAEForPreTraining, ViTForImageClassification, ViTModel, or a class of DINO",
    "onnx": "an ONNX file, compared in onnxruntime (extra mae_et[onnx]); see below",
}
OWN_OPTIONS = {
    "num_heads": ("huggingface", "onnx"),
    **dict.fromkeys(("image_size", "dynamic", "config", "part", "cfg_options", "trust_checkpoint"), ("onnx",)),
}
DENSE_ONLY = ("part", "cfg_options", "trust_checkpoint")
NOT_DENSE = ("entry", "num_heads", "card")

EXAMPLE = "layouts:\n" + "".join(f"  {name:<11}  {what}\n" for name, what in LAYOUTS.items())
EXAMPLE += """
examples:
  mae-et export work_dirs/demo work_dirs/demo/vitdet.pth --layout mmdet
  mae-et export work_dirs/demo work_dirs/demo/hf --layout huggingface
  mae-et export work_dirs/demo work_dirs/demo/encoder.onnx --layout onnx --dynamic size --card work_dirs/demo/card.md
  mae-et export work_dirs/detection pyramid.onnx --layout onnx --part neck
  mae-et export work_dirs/segmentation/iter_400.pth segmentor.onnx --layout onnx --config segmentation/demo --dynamic size

ONNX files hold an encoder or a classifier. Of a work dir or checkpoint of `mae-et train` they hold the backbone of the
detector, with or without its neck, or the whole segmentor.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    source = "the folder of a run, a checkpoint, or any MAE or ViT file; onnx: also a detector or segmentor"
    add("source", metavar="SOURCE", help=source)
    add("out", metavar="OUT", help="OUT.safetensors, OUT.pth or OUT.onnx, or a folder for huggingface")
    add("--layout", choices=LAYOUTS, default="timm", help="default: timm")
    add("--entry", metavar="NAME", help='entry or prefix of a file with several models, e.g. "model_ema" or "teacher"')
    add("--num-heads", metavar="H", type=int, help="huggingface, onnx: where SOURCE does not record it")
    add("--image-size", metavar="S", type=image_size, help="onnx: px, side or H,W; default: that of SOURCE, else 224")
    dynamic = "onnx: what is free at run time: nothing, the number of images, or also their size; default: batch"
    add("--dynamic", choices=["none", "batch", "size"], help=dynamic)
    trained = parser.add_argument_group("onnx, detectors and segmentors")
    add_own = trained.add_argument
    config = "config of the training: a file or the name of a shipped one; default: the one beside the checkpoint"
    add_own("--config", metavar="CONFIG", help=config)
    part = "the backbone, backbone and neck, or a whole segmentor; default: backbone of a detector, whole segmentor"
    add_own("--part", choices=["backbone", "neck", "segmentor"], help=part)
    add_own("--cfg-options", nargs="+", metavar="KEY=VALUE", help="override keys of the config")
    trust = "let the checkpoint run code while it is loaded, as any pickle may"
    add_own("--trust-checkpoint", action="store_true", default=None, help=trust)
    card = "write a model card in Markdown; default: OUT/README.md for huggingface, else none"
    add("--card", metavar="FILE", type=Path, help=card)
    return parser


def main(args: argparse.Namespace) -> None:
    own = {name: getattr(args, name) for name in OWN_OPTIONS if getattr(args, name) is not None}
    for name in own:
        if args.layout not in OWN_OPTIONS[name]:
            raise UserError(f"{_option(name)} has no effect with --layout {args.layout}: remove it")
    is_dense = args.layout == "onnx" and _is_dense(args)
    for name in NOT_DENSE if is_dense else DENSE_ONLY:
        if getattr(args, name) is not None:
            kind = "is" if is_dense else "is not"
            raise UserError(f"{_option(name)} has no effect: {args.source} {kind} a detector or segmentor. Remove it")
    metadata, loading = _export(args, own, is_dense)
    step = f", step {metadata['step']} of {metadata['num_steps']}" if {"step", "num_steps"} <= metadata.keys() else ""
    sizes = ", ".join(f"{key} {metadata[key]}" for key in ("embed_dim", "depth", "patch_size") if key in metadata)
    print(f"wrote {args.out} in layout {args.layout} ({sizes or metadata.get('architecture', 'unnamed')}{step})")
    if loading:
        print(loading)
    card = args.card or (Path(args.out) / "README.md" if args.layout == "huggingface" else None)
    if card is not None:
        _write_card(card, args, metadata, loading)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_dense(args: argparse.Namespace) -> bool:
    """Returns whether SOURCE is a work dir or checkpoint of `mae-et train`; mmengine leaves a file `last_checkpoint`."""
    source = Path(args.source)
    if args.config is not None:
        return True
    if source.is_dir():
        return (
            (source / "last_checkpoint").is_file() or any(source.glob("iter_*.pth")) or any(source.glob("epoch_*.pth"))
        )
    return source.name.startswith(("iter_", "epoch_", "best_")) and (source.parent / "last_checkpoint").is_file()


def _export(args: argparse.Namespace, own: Mapping[str, object], is_dense: bool) -> tuple[dict[str, str], str]:
    """Returns the metadata of the file and the code that loads it."""
    from mae_et.storage.metadata import loading_lines  # here and below: imports torch, which takes seconds

    options: dict[str, Any] = dict(own)
    if args.layout == "huggingface":
        from mae_et.storage.huggingface import export_hugging_face

        metadata = export_hugging_face(args.source, args.out, args.entry, **options)
        name = metadata["hugging_face_class"]
        return metadata, f"from transformers import {name}\n\nmodel = {name}.from_pretrained({str(args.out)!r})"
    if args.layout == "onnx":
        file = _export_dense(args, options) if is_dense else _export_encoder(args, options)
        shapes = {
            name: " x ".join(map(str, shape)) for name, shape in {"images": file.input_shape, **file.outputs}.items()
        }
        names = ", ".join(file.outputs)
        return file.metadata, (
            "".join(f"# {name} [{shape}]\n" for name, shape in shapes.items())
            + f"# largest difference to torch: {file.difference:.1e}\n"
            f"import onnxruntime\n\nsession = onnxruntime.InferenceSession({str(args.out)!r})\n"
            f'{names}{"," if len(file.outputs) == 1 else ""} = session.run(None, {{"images": images}})'
        )
    from mae_et.storage.backbone import export

    metadata = export(args.source, args.out, args.layout, args.entry)
    if args.layout != "timm":
        return metadata, ""
    if "num_heads" in metadata:
        return metadata, loading_lines(metadata, args.out)
    return metadata, "# the source does not record its number of attention heads: set num_heads when you load the file"


def _export_encoder(args: argparse.Namespace, options: Mapping[str, Any]) -> OnnxFile:
    from mae_et.storage.onnx_file import export_onnx

    return export_onnx(args.source, args.out, entry=args.entry, **options)


def _export_dense(args: argparse.Namespace, options: dict[str, Any]) -> OnnxFile:
    from downstream.compat.packages import check_packages

    check_packages()
    from downstream.compat.trust import trust_checkpoints
    from downstream.export import export_dense

    trust_checkpoints(bool(options.pop("trust_checkpoint", False)))
    config = options.pop("config", None)
    config = None if config is None else find_config(config, TASKS)
    return export_dense(
        args.source, args.out, config_path=config, overrides=options.pop("cfg_options", None), **options
    )


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
