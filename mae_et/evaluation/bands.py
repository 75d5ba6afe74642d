"""Reconstruction error of a masked autoencoder by radial frequency band.

A mask would spoil the spectrum: its edges spread each frequency over all others. So the error is taken from images that
consist of predictions alone. The model sees each image several times, under masks that remove each patch at least once,
and each patch comes from the first pass that removes it.

Shapes: n images, C channels, S px, L patches, P values of a patch, K bands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mae_et.frequency import band_power
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.sizes import num_visible_patches
from mae_et.models.targets import denormalize_patches, patch_stats, patchify, unpatchify


@torch.inference_mode()
def band_errors(
    model: MaskedAutoencoder, images: Tensor, mask_ratio: float, noise: Tensor, std: Sequence[float], num_bands: int
) -> Tensor:
    """Measures by band how far the predictions are from the pixels, and how much there was to predict.

    The second power is that of the error of a prediction of zeros: without `norm_pix_loss` the images around the mean
    colour of the data set, with it the images around the means of their patches, because predictions are denormalized with
    the mean and the deviation of the original patches. So the ratio of both is 1 for a model that knows nothing, and 0 for
    exact predictions; a model whose predictions are worse than zeros has more than 1.

    Args:
        model: in eval mode, with pixel targets.
        images: [n, C, S, S], normalized.
        mask_ratio: fraction of the patches that a pass removes.
        noise: [n, L], which orders the patches of each image: see `predict_all_patches`.
        std: of the normalization; errors are measured in pixels from 0 to 1.
        num_bands: K, as for `band_power`.
    Returns:
        [n, 2, K]: power of the error and power to predict, summed over the channels.
    Raises:
        ValueError: if the model predicts no pixels.
    """
    if model.target != "pixels":
        raise ValueError(f"the model predicts {model.target}, not pixels: it has no error by frequency band")
    patches = patchify(images, model.patch_size).float()
    predicted = predict_all_patches(model, images, mask_ratio, noise).float()
    if model.norm_pix_loss:
        predicted, known = denormalize_patches(predicted, patches), patch_stats(patches)[0]
    else:
        known = patches.new_zeros(())
    grid = (images.shape[-2] // model.patch_size, images.shape[-1] // model.patch_size)
    scale = torch.tensor(std, device=images.device).view(-1, 1, 1)
    powers = [
        band_power(unpatchify(error, model.patch_size, grid) * scale, num_bands).sum(dim=1)
        for error in (patches - predicted, patches - known)
    ]
    return torch.stack(powers, dim=1)


def predict_all_patches(model: MaskedAutoencoder, images: Tensor, mask_ratio: float, noise: Tensor) -> Tensor:
    """Predicts each patch from a pass that removed it.

    With R removed patches a pass, ceil(L / R) passes cover all patches: 2 for a mask ratio from .5 to 1.

    Args:
        model: in eval mode.
        images: [n, C, S, S], normalized.
        mask_ratio: as in `MaskedAutoencoder.forward`.
        noise: [n, L]. Pass j removes the patches whose rank in it is jR to (j + 1)R - 1, counted around the end.
    Returns:
        [n, L, P].
    """
    ranks = noise.argsort(dim=1).argsort(dim=1)
    num_patches = ranks.shape[1]
    num_removed = num_patches - num_visible_patches(num_patches, mask_ratio)
    filled: Tensor | None = None
    covered = torch.zeros_like(ranks, dtype=torch.bool)
    for first in range(0, num_patches, num_removed):
        order = (ranks - first - num_removed) % num_patches  # the removed patches have the largest values
        predicted, mask = model.predict(images, mask_ratio, order)
        new = mask.bool() & ~covered
        filled = predicted if filled is None else torch.where(new[..., None], predicted, filled)
        covered |= new
    assert filled is not None
    return filled
