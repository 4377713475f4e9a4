"""The two networks of CPS or CPCL in one module, as DDP requires, and their predictions for a CutMix of images."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from common.augment import mix
from common.config.sections import ModelConfig
from common.losses import upsample
from common.models.build import build_network


class TwoNetworks(nn.Module):
    """Two networks of one config that differ in their random initial weights.

    Args:
        model: The config's `model` section.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.first, self.second = build_network(model), build_network(model)

    def forward(self, labeled: Tensor, unlabeled: Tensor | None = None) -> dict[str, Tensor]:
        """Forward of one step; the two batches pass separately, which keeps the paper's batch-norm statistics.

        Args:
            labeled, unlabeled: Normalized images [B,3,H,W]; None to learn from labels only.

        Returns:
            `labeled1`, `unlabeled1`, `labeled2`, `unlabeled2`: logits [B,C,h,w] of each network.
        """
        return {
            f"{name}{number}": network(image)
            for number, network in ((1, self.first), (2, self.second))
            for name, image in (("labeled", labeled), ("unlabeled", unlabeled))
            if image is not None
        }


@torch.no_grad()
def predict_mixture(
    network: nn.Module,
    images: tuple[Tensor, Tensor],
    mask: Tensor,
    autocast: Callable[[], AbstractContextManager],
    predict: Callable[[Tensor], Sequence[Tensor]],
) -> tuple[Tensor, ...]:
    """Predict both images of a mixture and mix the predictions, which is the same as mixing their logits.

    The network is in training mode: its batch-norm statistics are updated by both batches, one after the other.

    Args:
        network: Network 1 or 2.
        images: Normalized images [B,3,H,W] of stream 1 and of stream 2.
        mask: Bool [B,H,W], True where the mixture shows the second stream.
        autocast: Function that returns the context of a forward.
        predict: Function from logits [B,C,H,W] to maps [B,H,W].

    Returns:
        The maps of `predict`, mixed.
    """
    found = []
    for image in images:
        with autocast():
            logits = network(image)
        found.append(predict(upsample(logits, image.shape[-2:], network.align_corners)))
    return tuple(mix(second, first, mask) for first, second in zip(*found, strict=True))
