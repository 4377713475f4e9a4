"""Atrous spatial pyramid pooling (ASPP) of DeepLabV3+, and the convolutions that it is built from."""

import torch
from torch import Tensor, nn


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1, three dilated 3x3 and a globally pooled branch, joined by a 1x1.

    The pooled branch normalizes one value per image and channel, so training needs at least two images in a batch.

    Args:
        in_channels: Channels of the backbone's last stage.
        rates: Dilations of the three 3x3 branches.
        channels: Channels of each branch and of the result.
    """

    def __init__(self, in_channels: int, rates: tuple[int, int, int], channels: int) -> None:
        super().__init__()
        dilated = [conv_bn_relu(in_channels, channels, 3, rate) for rate in rates]
        self.branches = nn.ModuleList([conv_bn_relu(in_channels, channels, 1), *dilated])
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_bn_relu(in_channels, channels, 1))
        self.project = conv_bn_relu(5 * channels, channels, 1)

    def forward(self, high: Tensor) -> Tensor:
        """[B,in_channels,h,w] -> [B,channels,h,w]."""
        pooled = self.pooled(high).expand(-1, -1, *high.shape[-2:])
        return self.project(torch.cat([*(branch(high) for branch in self.branches), pooled], dim=1))


class CPSASPP(nn.Module):
    """ASPP of CPS and CPCL: the four local branches are joined first, then the pooled one is added to them.

    The local branches share one batch norm; a leaky ReLU follows every norm. Takes the arguments of `ASPP`.
    """

    def __init__(self, in_channels: int, rates: tuple[int, int, int], channels: int) -> None:
        super().__init__()
        dilated = [convolution(in_channels, channels, 3, rate) for rate in rates]
        self.branches = nn.ModuleList([convolution(in_channels, channels, 1), *dilated])
        self.norm = norm_leaky(4 * channels)
        self.reduce = convolution(4 * channels, channels, 1)
        into, out = convolution(in_channels, channels, 1), convolution(channels, channels, 1)
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), into, *norm_leaky(channels), out)
        self.project = norm_leaky(channels)

    def forward(self, high: Tensor) -> Tensor:
        """[B,in_channels,h,w] -> [B,channels,h,w]."""
        local = self.reduce(self.norm(torch.cat([branch(high) for branch in self.branches], dim=1)))
        return self.project(local + self.pooled(high))


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1) -> nn.Sequential:
    """Convolution that keeps the size (no bias), batch norm, ReLU."""
    first = convolution(in_channels, out_channels, kernel_size, dilation)
    return nn.Sequential(first, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def convolution(in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1) -> nn.Conv2d:
    """Convolution that keeps the size, without bias."""
    padding = dilation * (kernel_size // 2)
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False)


def norm_leaky(channels: int) -> nn.Sequential:
    """Batch norm and a leaky ReLU (slope 0.01)."""
    return nn.Sequential(nn.BatchNorm2d(channels), nn.LeakyReLU(inplace=True))
