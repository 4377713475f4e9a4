"""Scores against a plain loop over pixels."""

import math

import numpy as np
import pytest
import torch

from common.metrics import ConfusionMatrix


def loop_matrix(prediction: np.ndarray, label: np.ndarray, num_classes: int) -> np.ndarray:
    matrix = np.zeros((num_classes, num_classes), np.int64)
    for p, g in zip(prediction.ravel(), label.ravel()):
        if 0 <= g < num_classes:
            matrix[g, p] += 1
    return matrix


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_matrix_counts_what_a_loop_counts(dtype):
    rng = np.random.default_rng(0)
    confusion, expected = ConfusionMatrix(5), np.zeros((5, 5), np.int64)
    for _ in range(3):
        prediction, label = rng.integers(0, 5, (2, 7, 9)), rng.choice([0, 1, 2, 3, 4, 255], (2, 7, 9))
        confusion.update(torch.tensor(prediction, dtype=dtype), torch.tensor(label, dtype=dtype))
        expected += loop_matrix(prediction, label, 5)
    assert confusion.matrix.dtype == torch.int64
    assert np.array_equal(confusion.matrix.numpy(), expected)


def test_scores_of_a_worked_example():
    confusion = ConfusionMatrix(4)
    label = torch.tensor([0, 0, 0, 0, 1, 1, 255, 255])
    prediction = torch.tensor([0, 0, 0, 2, 1, 0, 3, 1])
    confusion.update(prediction, label)
    scores = confusion.scores()
    # Class 2 is predicted but never labeled: it counts, as 0. Class 3 is predicted on ignored pixels only: it does not.
    assert scores.per_class_iou[:3] == (3 / 5, 1 / 2, 0)
    assert math.isnan(scores.per_class_iou[3])
    assert scores.classes_counted == 3
    assert scores.miou == pytest.approx((3 / 5 + 1 / 2) / 3, abs=1e-15)
    assert scores.pixel_accuracy == pytest.approx(4 / 6)


def test_nothing_labeled_gives_nan_and_no_class():
    confusion = ConfusionMatrix(3)
    confusion.update(torch.zeros(4, 4, dtype=torch.long), torch.full((4, 4), 255))
    scores = confusion.scores()
    assert scores.classes_counted == 0
    assert math.isnan(scores.miou) and math.isnan(scores.pixel_accuracy)


def test_counts_beyond_the_range_of_float32():
    confusion = ConfusionMatrix(2)
    confusion.matrix[0, 0] = 2**24
    confusion.update(torch.tensor([0]), torch.tensor([0]))
    assert confusion.matrix[0, 0] == 2**24 + 1
