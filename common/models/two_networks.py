"""The two networks of CPS or CPCL in one module, as DDP wants what is trained, and what they say of a mixture."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from common.augment import mix
from common.config.sections import ModelConfig
from common.losses import upsample
from common.models.deeplab import build_network


class TwoNetworks(nn.Module):
    """Two DeepLabV3+ of one config, alike but for the random weights they start from.

    Args:
        model: The config's `model` section.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.first, self.second = build_network(model), build_network(model)

    def forward(self, labeled: Tensor, unlabeled: Tensor) -> dict[str, Tensor]:
        """One forward a step; the two batches pass apart, which keeps the paper's batch-norm statistics.

        Args:
            labeled, unlabeled: Normalized images [B,3,H,W].

        Returns:
            `labeled1`, `unlabeled1`, `labeled2`, `unlabeled2`: logits [B,C,h,w] of either network.
        """
        return {
            f"{name}{number}": network(image)
            for number, network in ((1, self.first), (2, self.second))
            for name, image in (("labeled", labeled), ("unlabeled", unlabeled))
        }


@torch.no_grad()
def predict_mixture(
    network: nn.Module,
    images: tuple[Tensor, Tensor],
    mask: Tensor,
    autocast: Callable[[], AbstractContextManager],
    predict: Callable[[Tensor], Sequence[Tensor]],
) -> tuple[Tensor, ...]:
    """What a network says of a mixture, put together from what it says of both images: as mixing logits would.

    The network is in training mode, and its batch norm takes in both batches, one after the other.

    Args:
        network: Network 1 or 2.
        images: Normalized [B,3,H,W] of either stream.
        mask: Bool [B,H,W], True where the mixture is of the second stream.
        autocast: The context of a forward.
        predict: Maps [B,H,W] of logits [B,C,H,W].

    Returns:
        Those maps, of the mixture.
    """
    found = []
    for image in images:
        with autocast():
            logits = network(image)
        found.append(predict(upsample(logits, image.shape[-2:], network.align_corners)))
    return tuple(mix(second, first, mask) for first, second in zip(*found, strict=True))
