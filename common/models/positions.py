"""Position embeddings of DINOv2, resampled as its makers do."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError


def use_dinov2_positions(body: nn.Module, name: str) -> None:
    """Let a timm ViT resample its position table as facebookresearch's DINOv2 does: bicubic, scale (n + 0.1) / N,
    no antialias. timm resamples by size and with antialias: equal at the native size, not elsewhere.

    Released UniMatch V2 checkpoints were trained and scored with the former.

    Raises:
        UserError: the network has no position table with one class token.
    """
    if getattr(body, "pos_embed", None) is None or body.num_prefix_tokens != 1:
        raise UserError(f"model.dinov2_positions needs a ViT with a position table and a class token, not {name}")
    native = body.patch_embed.grid_size

    def add_positions(tokens: Tensor) -> Tensor:
        """[B,h,w,C] -> class token and patches with positions, [B,1+h*w,C]."""
        batch, height, width, _ = tokens.shape
        table = dinov2_positions(body.pos_embed, native, (height, width))
        return body.pos_drop(torch.cat([body.cls_token.expand(batch, -1, -1), tokens.flatten(1, 2)], dim=1) + table)

    body._pos_embed = add_positions  # timm has no public way to choose the interpolation


def dinov2_positions(table: Tensor, native: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Position embeddings [1,1+N,C] of the `native` grid for another `grid` of patches: [1,1+h*w,C].

    Raises:
        UserError: in an export, since the scale of this resampling cannot follow the image's size there.
    """
    if torch.compiler.is_exporting():
        raise UserError("model.dinov2_positions resamples by a scale that an exported network cannot compute")
    if grid == tuple(native):
        return table
    first, patches = table[:, :1].float(), table[:, 1:].float()
    square = patches.reshape(1, *native, -1).permute(0, 3, 1, 2)
    scale = tuple((new + 0.1) / old for new, old in zip(grid, native))
    resized = F.interpolate(square, scale_factor=scale, mode="bicubic", antialias=False)
    return torch.cat([first, resized.flatten(2).transpose(1, 2)], dim=1).to(table.dtype)
