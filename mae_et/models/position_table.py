"""The position table of a ViT: its grid, its rows without a patch, and the table for another grid.

Shapes: gh x gw grid, L = gh gw patches, R registers, D width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from mae_et.errors import CheckpointError
from mae_et.models.architecture import PATCHES, count_cls_tokens, count_registers
from mae_et.models.pos_embed import is_sincos_table, sincos_grid, sincos_pos_embed
from mae_et.models.sizes import recorded_size

log = logging.getLogger(__name__)


def fit_position_embedding(
    table: Tensor,
    grid_size: tuple[int, int],
    embed_dim: int,
    where: str = "the file",
    recorded: tuple[int, int] | None = None,
) -> Tensor:
    """Returns the position embedding for another grid.

    Args:
        table: [1, 1 + L, D]; the first row belongs to the cls token.
        grid_size: (gh, gw) of the result, in patches.
        embed_dim: D.
        where: the file, for messages.
        recorded: grid of the table by the metadata of the file; None: unknown.
    Returns:
        [1, 1 + gh gw, D]: recomputed if the table is the fixed sine-cosine table, else resampled (bicubic).
    Raises:
        CheckpointError: if the table has another shape, or is learnt and its grid is unknown.
    """
    grid = table_grid(table, embed_dim, where, recorded)
    if sincos_grid(table) is not None:
        return sincos_pos_embed(embed_dim, grid_size)
    if grid != tuple(grid_size):
        log.info("%s: the learnt position embedding is resampled from %d x %d to %d x %d", where, *grid, *grid_size)
    return resample_abs_pos_embed(table.float(), list(grid_size), list(grid), num_prefix_tokens=1)


def recorded_grid(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[int, int] | None:
    """Returns the grid (gh, gw) of a file's position table by the image size in its metadata; None if it records none."""
    kernel = state.get(PATCHES)
    if "image_size" not in metadata or kernel is None or kernel.ndim != 4:
        return None
    height, width = recorded_size(metadata)
    return height // kernel.shape[2], width // kernel.shape[3]


def table_grid(
    table: Tensor, embed_dim: int, where: str = "the file", recorded: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Returns the grid (gh, gw) of a position table: of the fixed table that it equals, else as recorded, else a square.

    Args and errors: as for `fit_position_embedding`.
    """
    if table.ndim != 3 or table.shape[1] < 2 or table.shape[0] != 1 or table.shape[2] != embed_dim:
        raise CheckpointError(
            f"{where}: pos_embed {tuple(table.shape)} is not a table for a cls token and a grid at width {embed_dim}"
        )
    num_patches = table.shape[1] - 1
    if (fixed := sincos_grid(table)) is not None:
        return fixed
    if recorded is not None and recorded[0] * recorded[1] == num_patches:
        return recorded
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise CheckpointError(
            f"{where}: pos_embed {tuple(table.shape)} is not a table for a cls token and a square grid at width {embed_dim}, "
            "and the file does not record its image_size, which would give another grid: export it again from its checkpoint"
        )
    return side, side


def with_register_rows(table: Tensor, num_registers: int) -> Tensor:
    """Inserts zero rows for registers behind the row of the cls token: timm's ViT adds a position to each token.

    Args:
        table: [1, 1 + L, D].
        num_registers: R, further cls tokens included.
    Returns:
        [1, 1 + R + L, D].
    """
    zeros = table.new_zeros(1, num_registers, table.shape[2])
    return torch.cat([table[:, :1], zeros, table[:, 1:]], dim=1)


def with_plain_table(
    state: Mapping[str, Tensor], where: str = "the file", recorded: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Gives the position table one row for the cls token and one for each patch, which leaves all features as they are.

    timm has two other forms. A table with rows for registers: they are added to the registers. A table of the patches alone
    (`no_embed_class`, as in DINOv2 with registers): it gets a zero row for the cls token. Of several cls tokens, each may have
    a row; it is added to the token.

    Args:
        state: timm's names.
        where: the file, for messages.
        recorded: grid of the table by the metadata of the file; None: unknown.
    Returns:
        The state. A table of no known form stays as it is.
    Raises:
        CheckpointError: if the number of rows fits two forms.
    """
    table, num_cls_tokens, num_registers = state.get("pos_embed"), count_cls_tokens(state), count_registers(state)
    num_prefix = num_cls_tokens + num_registers
    if table is None or table.ndim != 3 or table.shape[0] != 1 or is_sincos_table(table):
        return dict(state)
    possible = list(dict.fromkeys((1, num_prefix, 0)))
    fixed = [rows for rows in possible if is_sincos_table(_with_cls_row(table, rows))]
    forms = fixed or [rows for rows in possible if _is_form(table, rows, recorded)]
    if len(forms) > 1:
        raise CheckpointError(
            f"{where}: pos_embed {tuple(table.shape)} can begin with {' or '.join(map(str, forms))} rows without a "
            f"patch, with {num_registers} registers, and the file does not record its image_size, which would decide: choose "
            "another file"
        )
    if not forms or forms[0] == 1:
        return dict(state)
    plain = _with_cls_row(table, forms[0])
    if not forms[0]:
        return {**state, "pos_embed": plain}
    rows = table[:, num_cls_tokens:num_prefix]
    folded = {"reg_token": state["reg_token"] + rows.to(state["reg_token"].dtype)} if num_registers else {}
    if num_cls_tokens > 1:
        folded["cls_token"] = state["cls_token"] + table[:, :num_cls_tokens].to(state["cls_token"].dtype)
        plain = torch.cat([torch.zeros_like(plain[:, :1]), plain[:, 1:]], dim=1)
    return {**state, **folded, "pos_embed": plain}


def _with_cls_row(table: Tensor, num_rows: int) -> Tensor:
    """Returns the row of the cls token, zeros if there is none, and those of the patches, which follow `num_rows` rows."""
    first = table[:, :1] if num_rows else table.new_zeros(1, 1, table.shape[2])
    return torch.cat([first, table[:, num_rows:]], dim=1)


def _is_form(table: Tensor, num_rows: int, recorded: tuple[int, int] | None) -> bool:
    """Returns whether all but the first rows of a table can be those of a grid of patches."""
    num_patches = table.shape[1] - num_rows
    if num_patches < 1:
        return False
    if recorded is not None:
        return num_patches == recorded[0] * recorded[1]
    return math.isqrt(num_patches) ** 2 == num_patches
