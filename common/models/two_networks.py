"""The two networks of CPS or CPCL in one module, as DDP wants what is trained."""

from torch import Tensor, nn

from common.config import ModelConfig
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
            labeled, unlabeled: Normalised images [B,3,H,W].

        Returns:
            `labeled1`, `unlabeled1`, `labeled2`, `unlabeled2`: logits [B,C,h,w] of either network.
        """
        return {
            f"{name}{number}": network(image)
            for number, network in ((1, self.first), (2, self.second))
            for name, image in (("labeled", labeled), ("unlabeled", unlabeled))
        }
