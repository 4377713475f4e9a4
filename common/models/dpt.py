"""DPT head (Ranftl et al., ICCV 2021) on four taps of an encoder, as UniMatch V2 has it: no batch norm anywhere."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config.sections import ModelConfig
from common.models.encoders import Encoder
from common.models.segmenter import Segmenter

# Width of the fusion blocks and of the four projected taps, by the encoder's width (UniMatch V2's S, B, L and g).
WIDTHS = {
    384: (64, (48, 96, 192, 384)),
    768: (128, (96, 192, 384, 768)),
    1024: (256, (256, 512, 1024, 1024)),
    1536: (384, (1536, 1536, 1536, 1536)),
}


def widths_for(encoder_width: int) -> tuple[int, tuple[int, ...]]:
    """Fusion width and widths of the projected taps: those of the widest published encoder that is not wider.

    Departure: encoders of other widths than the four published ones take the row below, at least that of DINOv2-S.
    """
    fitting = [width for width in WIDTHS if width <= encoder_width]
    return WIDTHS[max(fitting, default=min(WIDTHS))]


class DPTDecoder(nn.Module):
    """Project four taps, bring them to strides that halve, and fuse them from the coarsest to the finest.

    Args:
        channels: Channels of the taps, from the first block or the largest map on.
        is_plain: Taps of one stride (a ViT) are resized by 4, 2, 1 and 1/2 first; those of a hierarchical encoder
            have the strides 4, 8, 16, 32 already.

    Attributes:
        width: Channels of the result.
    """

    def __init__(self, channels: Sequence[int], is_plain: bool) -> None:
        super().__init__()
        self.width, widths = widths_for(channels[-1])
        self.projects = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(channels, widths, strict=True))
        self.resizes = nn.ModuleList(_resizes(widths) if is_plain else [nn.Identity() for _ in widths])
        self.layers = nn.ModuleList(nn.Conv2d(width, self.width, 3, padding=1, bias=False) for width in widths)
        self.fusions = nn.ModuleList(FusionBlock(self.width, has_skip=index < 3) for index in range(4))

    def forward(self, taps: Sequence[Tensor]) -> Tensor:
        """Taps [B,C,h,w] -> [B,width,H,W], twice the size of the first tap after resizing."""
        steps = zip(taps, self.projects, self.resizes, self.layers, strict=True)
        maps = [layer(resize(project(tap))) for tap, project, resize, layer in steps]
        height, width = maps[0].shape[-2:]
        sizes = [(2 * height, 2 * width), *(one.shape[-2:] for one in maps[:-1])]
        fused = self.fusions[3](maps[3], None, sizes[3])
        for index in (2, 1, 0):
            fused = self.fusions[index](fused, maps[index], sizes[index])
        return fused


class FusionBlock(nn.Module):
    """Add a skip map, refine, enlarge, and mix channels.

    Args:
        width: Channels.
        has_skip: The coarsest block has none. Released files hold a unit for it that is never used.
    """

    def __init__(self, width: int, has_skip: bool) -> None:
        super().__init__()
        self.skip_unit = ResidualUnit(width) if has_skip else None
        self.unit = ResidualUnit(width)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, feature: Tensor, skip: Tensor | None, size: Sequence[int]) -> Tensor:
        """[B,width,h,w], and a skip map of the same size or None -> [B,width,*size]."""
        if skip is not None:
            feature = feature + self.skip_unit(skip)
        return self.out(F.interpolate(self.unit(feature), size=size, mode="bilinear", align_corners=True))


class ResidualUnit(nn.Module):
    """ReLU, 3x3, ReLU, 3x3, plus the input. Args: width: Channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, feature: Tensor) -> Tensor:
        """[B,width,h,w] -> the same shape."""
        return feature + self.conv2(torch.relu(self.conv1(torch.relu(feature))))


class DPT(Segmenter):
    """Encoder, DPT decoder and classifier. `features` is the result of the fusion.

    `model.channels` is the width of a paper's own heads; the decoder's widths follow the encoder.

    Args:
        encoder: Encoder with four taps.
        model: The config's `model` section.
    """

    def __init__(self, encoder: Encoder, model: ModelConfig) -> None:
        super().__init__(encoder, model.align_corners)
        self.decoder = DPTDecoder(encoder.channels, encoder.info.is_plain)
        self.feature_channels = self.decoder.width
        self.classifier = dpt_classifier(self.feature_channels, model.num_classes)

    def decode(self, taps: Sequence[Tensor]) -> Tensor:
        """Four taps -> [B,feature_channels,h,w], twice the first map's size: stride 1.75 of DINOv2, 2 of others."""
        return self.decoder(taps)


def dpt_classifier(width: int, num_classes: int) -> nn.Sequential:
    """3x3 convolution, ReLU, 1x1 convolution on the decoder's features."""
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, num_classes, 1))


def _resizes(widths: Sequence[int]) -> list[nn.Module]:
    return [
        nn.ConvTranspose2d(widths[0], widths[0], 4, stride=4),
        nn.ConvTranspose2d(widths[1], widths[1], 2, stride=2),
        nn.Identity(),
        nn.Conv2d(widths[3], widths[3], 3, stride=2, padding=1),
    ]
