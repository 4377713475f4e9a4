"""Networks of all papers, built from the config's `model` section."""

from common.models.build import build_network
from common.models.deeplab import DeepLabV3Plus, conv_head
from common.models.segmenter import Segmenter

__all__ = ["DeepLabV3Plus", "Segmenter", "build_network", "conv_head"]
