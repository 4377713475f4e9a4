"""The trained network, its pseudo-labels and the embeddings it offers the bank."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from common import IGNORE
from common.config.sections import ModelConfig
from common.evaluation.inference import evaluation_mode
from common.images import flatten_pixels
from common.losses import label_and_confidence, upsample
from common.models import build_network
from memory_bank.bank import correct_and_confident, nearest_labels
from memory_bank.config import Config
from memory_bank.heads import Heads
from memory_bank.processes import summed


class MemoryBankNetwork(nn.Module):
    """Everything that is trained: a DeepLab, and heads and selectors on rows of its features.

    Scale and shift of the backbone's batch norms stay what they are; their statistics go on.

    Args:
        model: The config's `model` section.
        embedding_dim: Length F of a row in the bank.
    """

    def __init__(self, model: ModelConfig, embedding_dim: int) -> None:
        super().__init__()
        self.segmenter = build_network(model)
        for module in self.segmenter.encoder.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.requires_grad_(False)
        self.heads = Heads(self.segmenter.feature_channels, model.num_classes, embedding_dim)

    def forward(self, images: dict[str, Tensor], labels: dict[str, Tensor] | None) -> dict[str, dict[str, Tensor]]:
        """One forward a step; batches pass apart, which keeps the paper's batch-norm statistics.

        Args:
            images: Normalized images [B,3,H,W] by name, in the order in which they pass.
            labels: int64 [B,H,W] by the same names, in the order in which their rows pass the heads; None before the
                contrastive loss begins.

        Returns:
            `logits`: [B,C,h,w] by name. `rows`: [B*h*w,F] and `classes`: int64 [B*h*w] by name, for the contrastive
            loss. `idle`: a zero that depends on heads and selectors, from which processes wait for gradients.
        """
        features = {name: self.segmenter.features(image) for name, image in images.items()}
        logits = {name: self.segmenter.classifier(feature) for name, feature in features.items()}
        if labels is None:
            learning = [parameter.sum() for parameter in self.heads.parameters() if parameter.requires_grad]
            return {"logits": logits, "idle": {"heads": 0.0 * torch.stack(learning).sum()}}
        small = {name: nearest_labels(label, features[name].shape[-2:]) for name, label in labels.items()}
        rows = {name: self.heads(features[name], label) for name, label in small.items()}
        return {"logits": logits, "rows": rows, "classes": {name: label.flatten() for name, label in small.items()}}


@torch.no_grad()
def pseudo_labels(
    network: MemoryBankNetwork, image: Tensor, size: tuple[int, int], autocast: Callable
) -> tuple[Tensor, Tensor]:
    """Class [B,H,W] and its probability [B,H,W] for normalized images, in the mode the network is in."""
    with autocast():
        logits = network.segmenter(image)
    return label_and_confidence(upsample(logits, size, network.segmenter.align_corners))


@torch.no_grad()
def rows_for_bank(
    network: MemoryBankNetwork, image: Tensor, label: Tensor, threshold: float, autocast: Callable
) -> tuple[Tensor, Tensor]:
    """What labeled images offer the bank, in the mode the network is in.

    Args:
        network: The teacher, or the student.
        image: Normalized, [B,3,H,W].
        label: int64 [B,H,W].
        threshold: See `correct_and_confident`.
        autocast: Mixed precision.

    Returns:
        Rows [B*h*w,F] and their classes [B*h*w], 255 for those that may not enter. A single row on all processes does
        not: nothing can normalize it.
    """
    with autocast():
        feature = network.segmenter.features(image)
        logits = network.segmenter.classifier(feature)
    classes = correct_and_confident(logits, label, threshold, network.segmenter.align_corners).flatten()
    enough = summed((classes != IGNORE).sum()) > 1
    classes = torch.where(enough, classes, IGNORE)
    with autocast():
        rows = network.heads.projection(flatten_pixels(feature), classes != IGNORE)
    return rows.float(), classes


@contextmanager
def labeler(student: MemoryBankNetwork, teacher: MemoryBankNetwork, config: Config) -> Iterator[MemoryBankNetwork]:
    """The network that gives pseudo-labels and rows for the bank: the teacher as it is, or the student evaluating."""
    if config.method.use_teacher_train:
        yield teacher
        return
    with evaluation_mode(student):
        yield student
