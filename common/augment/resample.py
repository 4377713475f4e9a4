"""Weighted sums of rows and columns: resizing and blurring a whole batch, with weights per image, in few operators."""

from collections.abc import Callable
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
    """Replace rows, then columns, of `image` [B,C,H,W], float, by weighted sums of its own: [B,C,rows,columns]."""
    image = _sum_rows(image, rows)
    index, weight = (
        to_device(np.moveaxis(each, 2, 0).copy(), image.device) for each in (columns.index, columns.weight)
    )
    index, weight = index[:, :, None, None].expand(-1, -1, *image.shape[1:3], -1), weight[:, :, None, None]
    result = image.gather(3, index[0]).mul_(weight[0])
    for one, of_one in zip(index[1:], weight[1:]):
        result.addcmul_(image.gather(3, one), of_one)
    return result


def filter_rows_and_columns(image: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """`resample` of `image` [B,C,H,W] with K neighbors of each row and column, K odd, the middle one itself."""
    image, width = _sum_rows(image, rows), image.shape[3]
    weight = to_device(columns.weight.transpose(0, 2, 1).copy(), image.device)[:, None, None]
    reach = weight.shape[3] // 2
    # Shifted by views: columns are not copied.
    padded = F.pad(image, (reach, reach))
    result = padded[..., :width] * weight[..., 0, :]
    for shift in range(1, 2 * reach + 1):
        result.addcmul_(padded[..., shift : shift + width], weight[..., shift, :])
    return result


def _sum_rows(image: Tensor, taps: Taps) -> Tensor:
    batch, channels, height, width = image.shape
    planes = torch.arange(0, batch * channels * height, height, device=image.device).view(batch, channels, 1, 1)
    index = (planes + to_device(taps.index, image.device).unsqueeze(1)).flatten(0, 2)
    weight = to_device(taps.weight, image.device).unsqueeze(1).expand(-1, channels, -1, -1).reshape(index.shape)
    # The one operator that adds up weighted rows without a copy per tap; it was made for word embeddings.
    source = image.reshape(-1, width)
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


def filter_taps(size: int, weights: np.ndarray, times: int, edge: Callable[[np.ndarray, int], np.ndarray]) -> Taps:
    """Taps of a symmetric filter made `times` times in a row; K neighbors of each row, the middle one itself.

    Args:
        size: Rows of source and result.
        weights: Weights of the rows at distances 0 to R on each side, float [B,R+1].
        times: Number of passes; K = 2 x R x times + 1.
        edge: Maps positions beyond the edges of a number of rows to rows, for every pass.
    """
    reach = weights.shape[1] - 1
    short = min(size, 2 * reach * times + 1)  # in a longer image the rows far from the edges are alike
    rows = np.arange(short)
    once = np.zeros((len(weights), short, short))
    for distance in range(-reach, reach + 1):
        once[:, rows, edge(rows + distance, short)] += weights[:, abs(distance), None]
    row = np.arange(size)[:, None]
    first = (row - short // 2).clip(0, size - short)
    neighbor = row + np.arange(-reach * times, reach * times + 1)
    inside = (neighbor >= first) & (neighbor < first + short)
    weight = np.linalg.matrix_power(once, times)[:, row - first, (neighbor - first).clip(0, short - 1)] * inside
    return Taps(neighbor.clip(0, size - 1)[None], weight.astype(np.float32))


def repeated(position: np.ndarray, size: int) -> np.ndarray:
    """Rows of an image at `position`; beyond its edges, the row at the edge."""
    return position.clip(0, size - 1)


def reflected(position: np.ndarray, size: int | np.ndarray) -> np.ndarray:
    """Rows of an image at `position`; beyond its edges it is reflected as often as needed, edges not repeated."""
    period = np.maximum(2 * (size - 1), 1)
    position = position % period
    return np.minimum(position, period - position)
