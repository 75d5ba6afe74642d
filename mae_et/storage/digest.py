"""SHA-256 digests of tensors: they identify weights and reveal changed values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor

from mae_et.errors import CheckpointError

HEADS = ("head.", "head_dist.", "fc.", "classifier.", "decoder_", "mask_token")  # of timm's classifiers and of the MAE


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of tensors: names, shapes and values in float32. It does not depend on the file format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def encoder_digest(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns {"encoder_sha256": digest} of the encoder in a state with timm's names; {} if there is none.

    By this digest a result names the pre-training that it comes from, independent of the name and place of the file.
    Heads and the decoder are left out. So are the position tables of a plain ViT, because they may be recomputed.
    """
    if any(key.startswith("blocks.") for key in state):
        encoder = {
            key: value
            for key, value in state.items()
            if key.startswith(("blocks.", "patch_embed.", "cls_token", "reg_token"))
        }
    else:
        encoder = {key: value for key, value in state.items() if not key.startswith(HEADS)}
    return {"encoder_sha256": state_digest(encoder)} if encoder else {}


def check_digest(recorded: str | None, actual: str, name: str, where: str) -> None:
    """Compares the digest that a file records with that of its tensors.

    Args:
        recorded: from the metadata; None: nothing to compare.
        actual: of the tensors.
        name: key of the metadata, for the message.
        where: the file, for the message.
    Raises:
        CheckpointError: if they differ.
    """
    if recorded is not None and recorded != actual:
        raise CheckpointError(
            f"{where}: the tensors do not match the metadata: {name} is recorded as {recorded}, but the tensors give "
            f"{actual}. The file is damaged or was edited: write it again from its checkpoint"
        )
