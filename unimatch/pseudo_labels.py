"""Pseudo-labels of the weakly augmented images, the same in all three scripts."""

import torch
from torch import Tensor, nn

from common import IGNORE
from common.engine.run import Run
from common.evaluation.inference import evaluation_mode
from common.images import normalize
from common.losses import label_and_confidence, upsample


@torch.no_grad()
def pseudo_labels(network: nn.Module, image: Tensor, padding: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    """Classes [B,H,W], 255 in the padding, and confidences [B,H,W] of a network in evaluation mode.

    Args:
        network: Segmenter of the teacher, or the trained one, not wrapped.
        image: [B,3,H,W], in [0,1].
        padding: [B,H,W], 255 where the crop is padded.
    """
    with evaluation_mode(network), run.autocast():
        logits = network(normalize(image))
    return targets(logits, padding, network.align_corners)


@torch.no_grad()
def targets(logits: Tensor, padding: Tensor, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Classes [B,H,W], 255 where `padding` [B,H,W] is 255, and confidences [B,H,W] of logits [B,C,h,w]."""
    label, confidence = label_and_confidence(upsample(logits, padding.shape[-2:], align_corners))
    return label.masked_fill(padding == IGNORE, IGNORE), confidence
