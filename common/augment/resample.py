"""Weighted sums of rows and columns: resizing and blurring a whole batch, with weights per image, in few operators."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.images import to_device


@dataclass(frozen=True)
class Taps:
    """Sources of each row of a result and their weights, per image.

    Attributes:
        index: int64 [B,rows,K], or [1,rows,K] if it is the same for all images.
        weight: float32 [B,rows,K].
    """

    index: np.ndarray
    weight: np.ndarray


def resample(image: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """Replace rows, then columns, of `image` [B,C,H,W], float, by weighted sums of its own: [B,C,rows,columns].

    The taps follow the image to its device in one copy each.
    """
    return _sum_rows(_sum_rows(image, rows).mT, columns).mT.contiguous()


def _sum_rows(image: Tensor, taps: Taps) -> Tensor:
    batch, channels, height, width = image.shape
    planes = torch.arange(0, batch * channels * height, height, device=image.device).view(batch, channels, 1, 1)
    index = (planes + to_device(taps.index, image.device).unsqueeze(1)).flatten(0, 2)
    weight = to_device(taps.weight, image.device).unsqueeze(1).expand(-1, channels, -1, -1)
    # The one operator that adds up few weighted rows without a copy per tap; it is made for word embeddings.
    source, weight = image.reshape(-1, width), weight.reshape(index.shape).to(image.dtype)
    return F.embedding_bag(index, source, mode="sum", per_sample_weights=weight).view(batch, channels, -1, width)


def triangle_taps(size: int, sizes: np.ndarray, wanted: np.ndarray) -> Taps:
    """Taps of bilinear resizing with antialiasing, as torch's `interpolate(..., antialias=True)`.

    Args:
        size: Rows of the source.
        sizes: Rows of the resized image, int [B,1].
        wanted: Rows of the resized image that are in the result, int [B,rows].
    """
    scale = size / sizes
    reach = np.maximum(scale, 1.0)
    center = scale * (wanted + 0.5)
    first = np.maximum((center - reach + 0.5).astype(np.int64), 0)
    end = np.minimum((center + reach + 0.5).astype(np.int64), size)
    index = first[..., None] + np.arange((end - first).max())
    weight = np.maximum(1 - np.abs(index + 0.5 - center[..., None]) / reach[..., None], 0) * (index < end[..., None])
    weight /= weight.sum(-1, keepdims=True)
    return Taps(np.minimum(index, size - 1), weight.astype(np.float32))


def box_blur_taps(size: int, weights: np.ndarray) -> Taps:
    """Taps of three equal filters in a row, each on an image whose edges are repeated.

    Args:
        size: Rows of source and result.
        weights: Weights of the rows at distances 0 to R on each side, float [B,R+1].
    """
    reach = weights.shape[1] - 1
    short = min(size, 6 * reach + 1)  # in a longer image the rows far from the edges are alike
    rows = np.arange(short)
    once = np.zeros((len(weights), short, short))
    for distance in range(-reach, reach + 1):
        once[:, rows, (rows + distance).clip(0, short - 1)] += weights[:, abs(distance), None]
    first = (np.arange(size) - short // 2).clip(0, size - short)
    weight = (once @ once @ once)[:, np.arange(size) - first]
    return Taps((first[:, None] + rows)[None], weight.astype(np.float32))
