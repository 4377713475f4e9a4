"""DeepLabV3+ (Chen et al., 2018) in the variants of the papers, and DeepLabV2 (Chen et al., 2017)."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config.sections import ModelConfig
from common.errors import UserError
from common.images import imagenet_statistics
from common.models.aspp import ASPP, CPSASPP, conv_bn_relu
from common.models.infer_architecture import infer_backbone
from common.models.resnet import CAFFE_8, MULTI_GRID, UNIFORM_8, UNIFORM_16, Dilation, build_resnet
from common.models.weights import load_state, read_backbone

LOW_CHANNELS = 48
RATES = {16: (6, 12, 18), 8: (12, 24, 36)}
RATES_V2 = (6, 12)  # of four: the forward of the released networks returns before it adds the last two


class DeepLab(nn.Module):
    """Backbone and classifier of the DeepLab versions below, which define `features` and `classifier`.

    Args:
        backbone: resnet18, resnet34, resnet50, resnet101 or resnet152.
        stem, output_stride, download, dilation: See `build_resnet`.
        align_corners: How features and logits are enlarged.

    Attributes:
        input: Applied to every image first; the identity, or an `InputNormalization`.
        feature_channels: Channels of `features`.

    Raises:
        UserError: see `build_resnet`.
    """

    feature_channels: int
    classifier: nn.Module

    def __init__(
        self,
        backbone: str,
        stem: str,
        output_stride: int,
        align_corners: bool,
        download: bool | str,
        dilation: Dilation | None,
    ) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.input = nn.Identity()
        self.encoder = build_resnet(backbone, stem, output_stride, download, dilation)

    def features(self, image: Tensor) -> Tensor:
        """[B,3,H,W], normalized -> input of the classifier [B,feature_channels,h,w]."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> Tensor:
        """[B,3,H,W], normalized -> logits [B,num_classes,h,w]."""
        return self.classifier(self.features(image))


@dataclass(frozen=True)
class V3PlusVariant:
    """The parts in which the papers' DeepLabV3+ differ; the defaults are those of PRCL and CSS.

    Attributes:
        aspp: `ASPP` or `CPSASPP`.
        dilation: Dilation of the backbone; by default that of `build_resnet` for stem and stride.
        decoder: Two 3x3 convolutions before a 1x1 classifier; by default the classifier is a `conv_head`.
        aspp_dropout: Dropout rate after the ASPP; here and below, 0 adds no layer.
        decoder_dropout: Dropout rate between the decoder's convolutions.
        head_dropout: Dropout rate before the 1x1 classifier; used with `decoder`.
        init: Initialization of the weights of convolutions outside the backbone; by default torch's.
    """

    aspp: type[nn.Module] = ASPP
    dilation: Dilation | None = None
    decoder: bool = False
    aspp_dropout: float = 0.0
    decoder_dropout: float = 0.0
    head_dropout: float = 0.0
    init: Callable[[Tensor], Any] | None = None


class DeepLabV3Plus(DeepLab):
    """Dilated ResNet, ASPP, and a decoder that adds the backbone's first stage at stride 4.

    All convolutions but the last are without bias and followed by batch norm and ReLU.

    Args:
        backbone, stem, align_corners, download: As `DeepLab`.
        num_classes: Channels of the logits.
        output_stride: 16 (ASPP rates 6, 12, 18; PRCL) or 8 (12, 24, 36; CSS). With the deep stem the features have
            stride 8 in both cases and the value chooses dilations and rates only. 16 for variants with a dilation.
        channels: Width of ASPP, decoder and heads; the papers' is 256.
        rates: Dilations of the ASPP's 3x3 branches; None takes those of the output stride.
        variant: The paper's choices.

    Raises:
        UserError: see `build_resnet`.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        stem: str = "plain",
        output_stride: int = 16,
        channels: int = 256,
        rates: tuple[int, int, int] | None = None,
        align_corners: bool = True,
        download: bool | str = False,
        variant: V3PlusVariant = V3PlusVariant(),
    ) -> None:
        super().__init__(backbone, stem, output_stride, align_corners, download, variant.dilation)
        low_channels, high_channels = self.encoder.feature_info.channels()
        self.aspp = variant.aspp(high_channels, rates or RATES[output_stride], channels)
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

    def features(self, image: Tensor) -> Tensor:
        """Input of the classifier, and of a paper's own heads.

        Args:
            image: [B,3,H,W], normalized.

        Returns:
            At stride 4 (321 -> 81, 512 -> 128 or, with the deep stem of PRCL and CSS, 129): [B,channels,h,w] after the
            decoder, or without one [B,48+channels,h,w], 48 channels from layer1 before those of the ASPP.
        """
        low, high = self.encoder(self.input(image))
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


class DeepLabV2(DeepLab):
    """DeepLabV2 (Chen et al., 2017) on a ResNet of stride 8, without its three scales.

    Convolutions of the head start from N(0, 0.01).

    Args:
        backbone, stem, align_corners, download: As `DeepLab`.
        num_classes: Channels of the logits.
        output_stride: 8.
        channels: Not used: there is nothing between backbone and classifier.
        rates: None; the dilations of the classifiers are `RATES_V2`.
        dilation: `UNIFORM_8`, or `CAFFE_8` for weights that Caffe trained on COCO.

    Raises:
        UserError: see `build_resnet`; rates are given.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        stem: str = "plain",
        output_stride: int = 8,
        channels: int = 256,
        rates: tuple[int, int, int] | None = None,
        align_corners: bool = True,
        download: bool | str = False,
        dilation: Dilation = UNIFORM_8,
    ) -> None:
        if rates is not None:
            raise UserError(
                f"model.rates is {list(rates)}, but it applies to DeepLabV3+ only: leave it out; the rates of "
                f"DeepLabV2 are {', '.join(map(str, RATES_V2))}"
            )
        super().__init__(backbone, stem, output_stride, align_corners, download, dilation)
        self.feature_channels = self.encoder.feature_info.channels()[-1]
        self.classifier = SummedClassifiers(self.feature_channels, num_classes, RATES_V2)
        init_outside_backbone(self, small_normal)

    def features(self, image: Tensor) -> Tensor:
        """[B,3,H,W], normalized -> layer4's output [B,2048,h,w] at stride 8 (321 -> 41, 512 -> 64; `v2_coco` 65)."""
        return self.encoder(self.input(image))[-1]


class InputNormalization(nn.Module):
    """Convert images normalized for ImageNet, which every network receives, to what other pretrained weights need.

    Args:
        mean: Mean of red, green and blue (0 to 255). It is subtracted and the result divided by 255; there is no
            division by a standard deviation.
        bgr: Return the channels in the order blue, green, red.
    """

    def __init__(self, mean: tuple[float, float, float], bgr: bool) -> None:
        super().__init__()
        imagenet_mean, imagenet_std = imagenet_statistics(torch.device("cpu"))
        self.bgr = bgr
        self.register_buffer("scale", imagenet_std.clone(), persistent=False)
        self.register_buffer("shift", imagenet_mean - torch.tensor(mean).view(3, 1, 1) / 255, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """[B,3,H,W] -> [B,3,H,W]."""
        image = image * self.scale + self.shift
        return image.flip(1) if self.bgr else image


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


V3PLUS_CAC = V3PlusVariant(
    dilation=MULTI_GRID, decoder=True, aspp_dropout=0.5, decoder_dropout=0.5, head_dropout=0.1, init=kaiming_normal
)
V3PLUS_CPS = V3PlusVariant(CPSASPP, MULTI_GRID, decoder=True, init=kaiming_normal)
V3PLUS_MEMORY_BANK = V3PlusVariant(
    dilation=UNIFORM_16, decoder=True, aspp_dropout=0.5, head_dropout=0.1, init=small_normal
)
NETWORKS = {  # by `model.head`
    "v3plus": DeepLabV3Plus,
    "v3plus_cac": partial(DeepLabV3Plus, variant=V3PLUS_CAC),
    "v3plus_cps": partial(DeepLabV3Plus, variant=V3PLUS_CPS),
    "v3plus_memory_bank": partial(DeepLabV3Plus, variant=V3PLUS_MEMORY_BANK),
    "v2": DeepLabV2,
    "v2_coco": partial(DeepLabV2, dilation=CAFFE_8),
}


def build_network(model: ModelConfig) -> DeepLab:
    """Build the network of a config's `model` section. Its random initial weights follow from torch's seed.

    Raises:
        UserError: a value that the network does not support; ImageNet weights that cannot be downloaded or read, or
            that do not fit.
    """
    is_timm_name = isinstance(model.pretrained, str) and timm.is_model_pretrained(model.pretrained)
    network = NETWORKS[model.head](
        model.backbone,
        model.num_classes,
        model.stem,
        model.output_stride,
        model.channels,
        model.rates,
        model.align_corners,
        download=model.pretrained if is_timm_name else model.pretrained is True,
    )
    if model.input_mean is not None:
        network.input = InputNormalization(model.input_mean, model.bgr)
    if isinstance(model.pretrained, str) and not is_timm_name:
        _load_pretrained(network, model)
    return network


def _load_pretrained(network: DeepLab, model: ModelConfig) -> None:
    """Load a local file into the backbone, and into DeepLabV2's classifiers if the number of classes is the same."""
    source, target = f"model.pretrained {model.pretrained}", f"{model.backbone} with the {model.stem} stem"
    backbone, classifier, left_out = read_backbone(model.pretrained)
    found = infer_backbone(backbone)
    if found and found != (model.backbone, model.stem):
        raise UserError(f"{source} does not fit {target}: the file holds a {found[0]} with the {found[1]} stem")
    load_state(network.encoder, backbone, source, target)
    own = network.classifier.state_dict()
    if own.keys() == classifier.keys() and all(own[key].shape == value.shape for key, value in classifier.items()):
        network.classifier.load_state_dict(classifier)
    elif classifier:
        left_out.append(f"the classifiers of {next(iter(classifier.values())).shape[0]} classes")
    if left_out and int(os.environ.get("RANK", 0)) == 0:
        print(f"note: unused weights in {source}: {', '.join(left_out)}")


def _dropout(rate: float) -> list[nn.Module]:
    return [nn.Dropout(rate)] if rate else []


def conv_head(in_channels: int, channels: int, out_channels: int) -> nn.Sequential:
    """Head on `DeepLabV3Plus.features`: 3x3 convolution to `channels`, batch norm, ReLU, 1x1 convolution."""
    return nn.Sequential(*conv_bn_relu(in_channels, channels, 3), nn.Conv2d(channels, out_channels, 1))
