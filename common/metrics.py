"""Confusion matrix and the scores read from it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Scores of one evaluation, as shares (0 to 1).

    Args:
        per_class_iou: IoU of each class; NaN where the class is neither labeled nor predicted (union 0).
        miou: Mean over the classes that occur; NaN where none does.
        classes_counted: How many classes that mean is over.
        pixel_accuracy: Share of the labeled pixels that are right; NaN without a labeled pixel.
    """

    per_class_iou: tuple[float, ...]
    miou: float
    classes_counted: int
    pixel_accuracy: float

    @property
    def miou_without_first(self) -> float:
        """Mean IoU over the classes that occur but for the first one, which may be the background; NaN for none."""
        return torch.tensor(self.per_class_iou[1:], dtype=torch.float64).nanmean().item()


class ConfusionMatrix:
    """Counts pixels by label (row) and prediction (column).

    Args:
        num_classes: C.
        device: Where the counts are kept; `update` takes tensors of that device.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.num_classes = num_classes
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add the pixels of one batch, without waiting for the device.

        Args:
            prediction: Class ids of any integer type and shape, all below C.
            label: The same shape; pixels outside 0..C-1 (255 = ignore) are not counted.
        """
        prediction, label = prediction.flatten().long(), label.flatten().long()
        counted = (label >= 0) & (label < self.num_classes)
        # Ignored pixels go to one bin more, which is dropped: selecting the others would need their number on the host.
        cell = torch.where(counted, label * self.num_classes + prediction, self.num_classes**2)
        counts = self.matrix.new_zeros(self.num_classes**2 + 1)
        # bincount would ask the device for the largest value, and so wait for it.
        counts.scatter_add_(0, cell, counted.new_ones(1, dtype=torch.int64).expand_as(cell))
        self.matrix += counts[:-1].view_as(self.matrix)

    def scores(self) -> Scores:
        """Scores of all pixels counted so far."""
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
