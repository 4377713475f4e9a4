"""Confusion matrix, and the scores computed from it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Scores of one evaluation, between 0 and 1.

    Attributes:
        per_class_iou: IoU of each class; NaN where the class is neither labeled nor predicted (union 0).
        miou: Mean IoU over the classes that occur; NaN if there are none.
        classes_counted: Number of the classes that occur.
        pixel_accuracy: Share of the labeled pixels that are predicted correctly; NaN without a labeled pixel.
    """

    per_class_iou: tuple[float, ...]
    miou: float
    classes_counted: int
    pixel_accuracy: float

    @property
    def miou_without_first(self) -> float:
        """Mean IoU over the classes that occur, without the first one, often the background; NaN if there are none."""
        return torch.tensor(self.per_class_iou[1:], dtype=torch.float64).nanmean().item()


def count_ids(ids: Tensor, size: int) -> Tensor:
    """Count how often each of the ids 0..size-1 occurs, without synchronizing with the device; larger ids are dropped.

    Args:
        ids: int64 of any shape, not negative.
        size: Number of counts.

    Returns:
        int64 [size].
    """
    flat = ids.flatten().clamp(max=size)
    # Not bincount: it reads the largest value from the device, which synchronizes.
    counts = torch.zeros(size + 1, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(0, flat, flat.new_ones(1).expand_as(flat))[:size]


class ConfusionMatrix:
    """Counts pixels by label (row) and prediction (column).

    Args:
        num_classes: C.
        device: Device of the counts and of the tensors given to `update`.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.num_classes = num_classes
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add the pixels of one batch, without synchronizing with the device.

        Args:
            prediction: Class ids of any integer type and shape, all below C.
            label: The same shape; pixels outside 0..C-1 (255 = ignore) are not counted.
        """
        prediction, label = prediction.flatten().long(), label.flatten().long()
        counted = (label >= 0) & (label < self.num_classes)
        # Ignored pixels go to an extra bin, which is dropped: selecting the others would need their number on the host.
        cell = torch.where(counted, label * self.num_classes + prediction, self.num_classes**2)
        self.matrix += count_ids(cell, self.num_classes**2).view_as(self.matrix)

    def scores(self) -> Scores:
        """Compute the scores of all pixels counted so far."""
        matrix = self.matrix.cpu().double()
        right, labeled = matrix.diagonal(), matrix.sum(1)
        union = labeled + matrix.sum(0) - right
        iou = torch.where(union > 0, right / union, math.nan)
        return Scores(
            per_class_iou=tuple(iou.tolist()),
            miou=iou.nanmean().item(),
            classes_counted=int((union > 0).sum()),
            pixel_accuracy=(right.sum() / labeled.sum()).item(),
        )
