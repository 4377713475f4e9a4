"""Networks of all papers, built from the config's `model` section."""

from common.models.deeplab import DeepLabV3Plus, build_network, conv_head

__all__ = ["DeepLabV3Plus", "build_network", "conv_head"]
