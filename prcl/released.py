"""Checkpoints as PRCL's repository writes them."""

from collections.abc import Mapping

from torch import Tensor

from common.models.weights import PRCL_CSS_HEADS, deeplab_from_prcl_css
from common.release import Release


def segmenter_of(state: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The segmenter with our keys; there is one network."""
    return deeplab_from_prcl_css(state)


RELEASE = Release(
    segmenter_of,
    configs={("short", 21): "prcl/configs/voc.json", ("short", 19): "prcl/configs/cityscapes.json"},
    entries=("ema", "ema_model", "model"),  # the teacher, which the paper evaluates, before the student
    heads=PRCL_CSS_HEADS,
)
