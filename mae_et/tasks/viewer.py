"""A backbone that looks at images: what all kinds of `mae-et show` share.

Shapes: n images, C channels, gh x gw patches, D width.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

from mae_et.data.eval_loader import eval_loader
from mae_et.data.sources.named_files import NamedFiles, open_files
from mae_et.data.sources.shard_names import is_shard_name
from mae_et.data.sources.source import ImageSource
from mae_et.data.sources.spec import open_source
from mae_et.data.sources.table import is_table
from mae_et.data.stream import choose_num_workers, reading
from mae_et.errors import CheckpointError, UserError
from mae_et.evaluation.drawing import Drawing
from mae_et.lowfreq import crop_and_normalize
from mae_et.models.resize import change_input_size
from mae_et.models.sizes import Size, as_size, recorded_size
from mae_et.models.strict import misfit
from mae_et.models.timm_backbone import create_backbone
from mae_et.runs.output import open_output
from mae_et.storage.metadata import stored_range
from mae_et.storage.weights import find_weights, read_stored
from mae_et.tasks.features import FeatureOptions, check_reading, normalisation, open_encoder
from mae_et.tasks.predict import report_bad_images


@dataclass(frozen=True)
class ShowOptions:
    """Options that all pictures share."""

    image_size: int | Size | None = None  # px, side or (H, W); None: the backbone's, else 224
    crop_ratio: float | None = None  # share of the shorter side that is kept; None: the backbone's, else 0.875
    batch_size: int = 32
    num_workers: int | None = None  # loader processes; None: from the cores
    device: str | None = None  # "cpu" or "cuda"; None: CUDA where there is one
    channels: Sequence[int] | None = None  # one or three to draw; None: the first three, or the first of one or two
    overwrite: bool = False  # replace earlier results in the output folder

    def __post_init__(self) -> None:
        check_reading(self.batch_size, self.num_workers, self.image_size, self.crop_ratio)


class Viewer:
    """A backbone that looks at image files.

    Args:
        backbone: a file or folder of any ViT, the backbone of a supervised run, or "random".
        options: how images are prepared.
    Raises:
        CheckpointError: if the file holds no backbone of a known kind.
        UserError: if there are no such channels to draw.
    """

    def __init__(self, backbone: str, options: ShowOptions) -> None:
        self.name, self.options = backbone, options
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model, metadata, self.image_size, self.in_chans = _open_any(backbone, options.image_size)
        self.model: Any = model.to(self.device).eval()
        self.mean, self.std = normalisation(metadata, self.in_chans)
        self.value_range = stored_range(metadata)
        self.drawing = Drawing(self.mean, self.std, self.value_range is not None, options.channels)
        recorded = float(metadata.get("eval_crop_ratio", 0.875))
        self.crop_ratio = recorded if options.crop_ratio is None else options.crop_ratio

    @torch.inference_mode()
    def look(
        self, source: ImageSource, function: Callable[[Tensor], Tensor], keep_inputs: bool = True
    ) -> tuple[Tensor, list[int], Tensor]:
        """Applies a function to all readable images; the others are logged.

        Args:
            source: the images.
            function: [n, C, H, W] normalised -> [n, ...].
            keep_inputs: return the inputs too.
        Returns:
            The outputs in float32 on the CPU, the indices of their images, and the inputs as drawn, [n, c, H, W] in [0, 1], or
            none.
        Raises:
            DataError: if no image can be read.
        """
        workers = choose_num_workers(self.options.num_workers, 1, self.device.type == "cuda")
        loader = eval_loader(
            source, range(len(source)), self.image_size, self.options.batch_size, workers, self.crop_ratio
        )
        outputs, places, inputs, bad = [], [], [], {}
        with reading(loader) as batches, tqdm(total=len(source), unit="image", desc="features", disable=None) as bar:
            for batch in batches:
                bad.update({image.index: image.reason for image in batch.bad_images})
                if len(batch.images):
                    pixels = batch.images.to(self.device)
                    normal = crop_and_normalize(pixels, self.image_size, self.mean, self.std)
                    outputs.append(function(normal).float().cpu())
                    places += batch.places.tolist()
                    inputs.append(self.drawing(batch.images) if keep_inputs else batch.images[:0])
                bar.update(len(batch.labels) + len(batch.bad_images))
        report_bad_images(source, bad)
        found = torch.cat(outputs)
        if not found.isfinite().all():
            raise UserError(f"a feature of {self.name} is not finite: the backbone may be damaged")
        return found, places, torch.cat(inputs)

    def patches(self, images: Tensor) -> Tensor:
        """Returns the features of the patches after the final norm, [n, gh, gw, D]; the last map of a convolutional net."""
        if isinstance(self.model, VisionTransformer):
            tokens = self.model.forward_features(images)[:, self.model.num_prefix_tokens :]
            return tokens.unflatten(1, tuple(self.model.patch_embed.grid_size))
        maps = self.model.forward_intermediates(images, 1, norm=True, output_fmt="NCHW", intermediates_only=True)
        return maps[-1].permute(0, 2, 3, 1)

    def embedding(self, images: Tensor) -> Tensor:
        """Returns the mean of the patch features, [n, D], as in the kNN accuracy of a pre-training."""
        return self.patches(images).mean(dim=(1, 2))


def opened(
    backbone: str, images: Sequence[str], out: Path, options: ShowOptions, owned: Sequence[str]
) -> tuple[Viewer, NamedFiles]:
    """Opens a backbone and the images that it looks at, and makes the folder of the results; see `open_output`."""
    viewer = Viewer(backbone, options)
    source = open_files(images, viewer.in_chans, viewer.value_range)
    open_output(out, options.overwrite, owned)
    return viewer, source


def open_labelled(words: Sequence[str], viewer: Viewer) -> ImageSource:
    """Opens images like `open_files`, but one word that is a source of data gives its labels too."""
    only = words[0] if len(words) == 1 else ""
    if only and not glob.has_magic(only) and (not os.path.isfile(only) or is_table(only) or is_shard_name(only)):
        return open_source(only, viewer.in_chans, value_range=viewer.value_range)
    return open_files(words, viewer.in_chans, viewer.value_range)


def _open_any(backbone: str, image_size: int | Size | None) -> tuple[nn.Module, Mapping[str, str], Size, int]:
    """Builds a plain ViT, or the timm model of a supervised run without its head.

    Returns:
        The model, the metadata of its file, (H, W) and C.
    """
    if backbone != "random":
        path = find_weights(backbone)
        state, metadata, _ = read_stored(path)
        if metadata.get("objective") == "supervised" and "architecture" in metadata:
            size, channels = recorded_size(metadata), int(metadata.get("in_chans", 3))
            options = json.loads(metadata.get("model_options", "{}"))
            timm_model = create_backbone(metadata["architecture"], size, num_classes=0, in_chans=channels, **options)
            wanted = timm_model.state_dict()
            if faults := misfit({key: value for key, value in state.items() if key in wanted}, wanted):
                raise CheckpointError(f"{path} does not fit its metadata; {faults}")
            timm_model.load_state_dict(state, strict=False)  # a classifier has a head as well
            change_input_size(timm_model, None, None, image_size or size)
            return timm_model, metadata, as_size(image_size or size), channels
    encoder, recorded = open_encoder(backbone, FeatureOptions(image_size=image_size))
    return encoder, recorded, as_size(encoder.patch_embed.img_size), encoder.in_chans
