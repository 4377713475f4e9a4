"""The trained network, its pseudo-labels, and the embeddings that may enter the bank."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from common import IGNORE
from common.config.sections import ModelConfig
from common.engine.run import Run
from common.evaluation.inference import evaluation_mode
from common.images import flatten_pixels, normalize
from common.losses import label_and_confidence, upsample, zero_loss
from common.models import build_network
from memory_bank.bank import correct_and_confident, nearest_labels
from memory_bank.config import Config
from memory_bank.heads import Heads
from memory_bank.processes import summed


class MemoryBankNetwork(nn.Module):
    """The trained network: a DeepLab and, on its features, heads and selectors.

    Args:
        model: The config's `model` section.
        embedding_dim: Length F of an embedding.
        freeze_norms: Scale and shift of the backbone's batch norms keep their values, as released for pretrained
            weights; their running statistics are updated all the same.
    """

    def __init__(self, model: ModelConfig, embedding_dim: int, freeze_norms: bool) -> None:
        super().__init__()
        self.segmenter = build_network(model)
        for module in self.segmenter.encoder.modules():
            if freeze_norms and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.requires_grad_(False)
        self.heads = Heads(self.segmenter.feature_channels, model.num_classes, embedding_dim)

    def forward(self, images: dict[str, Tensor], labels: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Run the one forward of a step; separate passes of the batches keep the paper's batch-norm statistics.

        Args:
            images: Normalized images [B,3,H,W] by name, in the order of their forward passes.
            labels: int64 [B,H,W] by the same names, in the order in which their embeddings pass the heads; None before
                the contrastive loss starts.

        Returns:
            For each name of `images` its logits [B,C,h,w]; for each name of `labels` also `<name>_embeddings`
            [B*h*w,F] and `<name>_classes` int64 [B*h*w]. `idle` is a zero, which without labels depends on heads and
            selectors, because distributed processes wait for the gradient of every parameter.
        """
        features = {name: self.segmenter.features(image) for name, image in images.items()}
        output = {name: self.segmenter.classifier(feature) for name, feature in features.items()}
        if labels is None:
            return output | {"idle": zero_loss(self.heads)}
        for name, label in labels.items():
            small = nearest_labels(label, features[name].shape[-2:])
            output[f"{name}_embeddings"] = self.heads(features[name], small)
            output[f"{name}_classes"] = small.flatten()
        return output | {"idle": torch.zeros((), device=small.device)}


@contextmanager
def labeling_network(
    student: MemoryBankNetwork, teacher: MemoryBankNetwork, config: Config
) -> Iterator[MemoryBankNetwork]:
    """Yield the network for pseudo-labels and bank candidates: the teacher, or the student in evaluation mode."""
    if config.method.use_teacher_train:
        yield teacher
        return
    with evaluation_mode(student):
        yield student


@torch.no_grad()
def pseudo_labels(network: MemoryBankNetwork, image: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    """The class [B,H,W] and its probability [B,H,W] for images in [0,1]. Does not change the network's mode."""
    with run.autocast():
        logits = network.segmenter(normalize(image))
    return label_and_confidence(upsample(logits, image.shape[-2:], network.segmenter.align_corners))


@torch.no_grad()
def bank_candidates(
    network: MemoryBankNetwork, image: Tensor, label: Tensor, threshold: float, autocast: Callable
) -> tuple[Tensor, Tensor]:
    """Embeddings of labeled pixels that may enter the bank. Does not change the network's mode.

    Args:
        network: The labeling network.
        image: Normalized, [B,3,H,W].
        label: int64 [B,H,W].
        threshold: Probability in [0,1], see `correct_and_confident`.
        autocast: Context manager for mixed precision.

    Returns:
        Embeddings [B*h*w,F] and their classes [B*h*w], 255 where an embedding may not enter. A single candidate over
        all processes is dropped, because batch norm needs two.
    """
    with autocast():
        feature = network.segmenter.features(image)
        logits = network.segmenter.classifier(feature)
    classes = correct_and_confident(logits, label, threshold, network.segmenter.align_corners).flatten()
    classes = torch.where(summed((classes != IGNORE).sum()) > 1, classes, IGNORE)
    with autocast():
        embeddings = network.heads.projection(flatten_pixels(feature), classes != IGNORE)
    return embeddings.float(), classes
