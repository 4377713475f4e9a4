"""DeepLabV3+ (Chen et al., 2018) in the variants of the papers, and DeepLabV2 (Chen et al., 2017)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config.sections import ModelConfig
from common.errors import UserError
from common.models.aspp import ASPP, CPSASPP, conv_bn_relu
from common.models.encoders import Encoder
from common.models.segmenter import Segmenter

LOW_CHANNELS = 48
RATES = {32: (3, 6, 9), 16: (6, 12, 18), 8: (12, 24, 36)}
RATES_V2 = (6, 12)  # of four: the forward of the released networks returns before it adds the last two


@dataclass(frozen=True)
class V3PlusVariant:
    """The parts in which the papers' DeepLabV3+ differ; the defaults are those of PRCL and CSS.

    Attributes:
        aspp: `ASPP` or `CPSASPP`.
        decoder: Two 3x3 convolutions before a 1x1 classifier; by default the classifier is a `conv_head`.
        aspp_dropout: Dropout rate after the ASPP; here and below, 0 adds no layer.
        decoder_dropout: Dropout rate between the decoder's convolutions.
        head_dropout: Dropout rate before the 1x1 classifier; used with `decoder`.
        init: Initialization of the weights of convolutions outside the backbone; by default torch's.
    """

    aspp: type[nn.Module] = ASPP
    decoder: bool = False
    aspp_dropout: float = 0.0
    decoder_dropout: float = 0.0
    head_dropout: float = 0.0
    init: Callable[[Tensor], Any] | None = None


class DeepLabV3Plus(Segmenter):
    """Dilated encoder, ASPP, and a decoder that adds the encoder's tap at stride 4.

    All convolutions but the last are without bias and followed by batch norm and ReLU.

    Args:
        encoder: Encoder with two taps: stride 4, and the last.
        model: The config's `model` section. `output_stride` 16 (PRCL) stands for the ASPP rates 6, 12, 18, 8 (CSS) for
            12, 24, 36 and 32 for 3, 6, 9; `rates` replaces them. With the deep stem of PRCL and CSS the features have
            stride 8 for 16 and 8, and the value chooses dilations and rates only.
        variant: The paper's choices.
    """

    def __init__(self, encoder: nn.Module, model: ModelConfig, variant: V3PlusVariant = V3PlusVariant()) -> None:
        super().__init__(encoder, model.align_corners)
        low_channels, high_channels = tap_channels(encoder)
        channels, num_classes = model.channels, model.num_classes
        self.aspp = variant.aspp(high_channels, model.rates or RATES[model.output_stride], channels)
        self.low = conv_bn_relu(low_channels, LOW_CHANNELS, 1)
        joined = LOW_CHANNELS + channels
        # Also drawn where the decoder replaces it: the weights that a seed gives depend on every draw before them.
        self.classifier = conv_head(joined, channels, num_classes)
        self.decoder, self.feature_channels = nn.Identity(), joined
        if variant.aspp_dropout:
            self.aspp.project.append(nn.Dropout(variant.aspp_dropout))
        if variant.decoder:
            first, second = conv_bn_relu(joined, channels, 3), conv_bn_relu(channels, channels, 3)
            self.decoder = nn.Sequential(*first, *_dropout(variant.decoder_dropout), *second)
            last = nn.Conv2d(channels, num_classes, 1)
            self.classifier = nn.Sequential(*_dropout(variant.head_dropout), last) if variant.head_dropout else last
            self.feature_channels = channels
        if variant.init is not None:
            init_outside_backbone(self, variant.init)

    def decode(self, taps: Sequence[Tensor]) -> Tensor:
        """Input of the classifier, and of a paper's own heads.

        Args:
            taps: Of `encode`: [B,C,h,w] at stride 4, and the last.

        Returns:
            At stride 4 (321 -> 81, 512 -> 128 or, with the deep stem of PRCL and CSS, 129): [B,channels,h,w] after the
            decoder, or without one [B,48+channels,h,w], 48 channels from the first tap before those of the ASPP.
        """
        low, high = taps
        low = self.low(low)
        context = F.interpolate(self.aspp(high), size=low.shape[-2:], mode="bilinear", align_corners=self.align_corners)
        return self.decoder(torch.cat([low, context], dim=1))


class SummedClassifiers(nn.Module):
    """DeepLabV2's head: dilated 3x3 classifiers whose logits are added.

    Args:
        in_channels: Channels of the backbone's last stage.
        num_classes: Channels of the logits.
        rates: Dilation of each classifier.
    """

    def __init__(self, in_channels: int, num_classes: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [nn.Conv2d(in_channels, num_classes, 3, padding=rate, dilation=rate) for rate in rates]
        )

    def forward(self, feature: Tensor) -> Tensor:
        """[B,in_channels,h,w] -> [B,num_classes,h,w]."""
        return sum(branch(feature) for branch in self.branches)


class DeepLabV2(Segmenter):
    """DeepLabV2 (Chen et al., 2017), without its three scales.

    Convolutions of the head start from N(0, 0.01).

    Args:
        encoder: Encoder whose last tap is classified; of stride 8 in the papers.
        model: The config's `model` section. `channels` is not used: there is nothing between encoder and classifier.

    Raises:
        UserError: rates are given; the dilations of the classifiers are `RATES_V2`.
    """

    def __init__(self, encoder: nn.Module, model: ModelConfig) -> None:
        if model.rates is not None:
            raise UserError(
                f"model.rates is {list(model.rates)}, but it applies to DeepLabV3+ only: leave it out; the rates of "
                f"DeepLabV2 are {', '.join(map(str, RATES_V2))}"
            )
        super().__init__(encoder, model.align_corners)
        self.feature_channels = tap_channels(encoder)[-1]
        self.classifier = SummedClassifiers(self.feature_channels, model.num_classes, RATES_V2)
        init_outside_backbone(self, small_normal)

    def decode(self, taps: Sequence[Tensor]) -> Tensor:
        """The last tap; of a ResNet [B,2048,h,w] at stride 8 (321 -> 41, 512 -> 64; `v2_coco` 65)."""
        return taps[-1]


def tap_channels(encoder: nn.Module) -> Sequence[int]:
    """Channels of an encoder's taps."""
    return encoder.channels if isinstance(encoder, Encoder) else encoder.feature_info.channels()


def kaiming_normal(weight: Tensor) -> None:
    """Kaiming's normal initialization (fan in, ReLU), in place."""
    nn.init.kaiming_normal_(weight, nonlinearity="relu")


def small_normal(weight: Tensor) -> None:
    """N(0, 0.01), in place."""
    nn.init.normal_(weight, std=0.01)


def init_outside_backbone(network: nn.Module, init: Callable[[Tensor], Any]) -> None:
    """Apply `init` to the weights of all convolutions outside `encoder`; biases keep their values."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and not name.startswith("encoder."):
            init(module.weight)


V3PLUS_CAC = V3PlusVariant(decoder=True, aspp_dropout=0.5, decoder_dropout=0.5, head_dropout=0.1, init=kaiming_normal)
V3PLUS_CPS = V3PlusVariant(CPSASPP, decoder=True, init=kaiming_normal)
V3PLUS_MEMORY_BANK = V3PlusVariant(decoder=True, aspp_dropout=0.5, head_dropout=0.1, init=small_normal)
V3PLUS_UNIMATCH = V3PlusVariant(decoder=True)


def _dropout(rate: float) -> list[nn.Module]:
    return [nn.Dropout(rate)] if rate else []


def conv_head(in_channels: int, channels: int, out_channels: int) -> nn.Sequential:
    """Head on `DeepLabV3Plus.features`: 3x3 convolution to `channels`, batch norm, ReLU, 1x1 convolution."""
    return nn.Sequential(*conv_bn_relu(in_channels, channels, 3), nn.Conv2d(channels, out_channels, 1))
