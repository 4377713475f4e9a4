"""A backbone for runs that are about everything but the network: each stage of ResNet one block, an eighth as wide."""

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from common.models import resnet

NARROW = "resnet10_narrow"
default_cfgs = generate_default_cfgs({NARROW: {}})  # timm looks for this name; without it every run gets a warning


@register_model
def resnet10_narrow(pretrained: bool = False, **kwargs) -> nn.Module:
    """Build the backbone as timm's other ResNets are built; there are no pretrained weights."""
    widths = {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 64)}
    return build_model_with_cfg(ResNet, NARROW, pretrained, block=BasicBlock, **widths, **kwargs)


resnet.DEPTHS = (*resnet.DEPTHS, NARROW)
