"""DeepLabV3+ (Chen et al., 2018) as PRCL and CSS have it, with the longer decoders of the other papers; DeepLabV2."""

import os

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config.sections import ModelConfig
from common.errors import UserError
from common.images import imagenet_statistics
from common.models.infer_architecture import infer_backbone
from common.models.resnet import CAFFE_8, MULTI_GRID, UNIFORM_8, UNIFORM_16, Dilation, build_resnet
from common.models.weights import load_state, read_backbone

LOW_CHANNELS = 48
RATES = {16: (6, 12, 18), 8: (12, 24, 36)}
RATES_V2 = (6, 12)  # of four: the released networks return before the last two are added


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1, three dilated 3x3 and a globally pooled branch, joined by a 1x1.

    The pooled branch normalizes one value per image and channel: training needs two images or more in a batch.

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
    """The pyramid of CPS and CPCL: the four local branches are joined first, then the pooled one is added to them.

    The local branches share one batch norm; every norm is followed by a leaky ReLU. Arguments as `ASPP`.
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


class DeepLabV3Plus(nn.Module):
    """Dilated ResNet, ASPP, and a decoder that adds the backbone's first stage at stride 4.

    All convolutions but the last are without bias and followed by batch norm and ReLU; there is no dropout.

    Args:
        backbone: resnet18, resnet34, resnet50, resnet101 or resnet152.
        num_classes: Channels of the logits.
        stem: `plain` or `deep`, see `common.models.resnet`.
        output_stride: 16 (ASPP rates 6, 12, 18; PRCL) or 8 (12, 24, 36; CSS). With the deep stem the features have
            stride 8 in both cases and the value chooses dilations and rates only.
        channels: Width of ASPP and heads; the papers' is 256.
        rates: Dilations of the ASPP's 3x3 branches; None takes those of the output stride.
        align_corners: How features and logits are enlarged.
        download: Start the backbone from ImageNet weights: True, or a timm name.

    Raises:
        UserError: see `build_resnet`.
    """

    geometry: Dilation | None = None
    pyramid: type[nn.Module] = ASPP

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
    ) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.input = nn.Identity()
        self.encoder = build_resnet(backbone, stem, output_stride, download, self.geometry)
        low_channels, high_channels = self.encoder.feature_info.channels()
        self.aspp = self.pyramid(high_channels, rates or RATES[output_stride], channels)
        self.low = conv_bn_relu(low_channels, LOW_CHANNELS, 1)
        self.channels, self.feature_channels = channels, LOW_CHANNELS + channels
        self.classifier = conv_head(self.feature_channels, channels, num_classes)

    def features(self, image: Tensor) -> Tensor:
        """What the classifier, and a paper's own heads, see.

        Args:
            image: [B,3,H,W], normalized.

        Returns:
            [B,304,h,w] at stride 4 (321 -> 81, 512 -> 128 or, with the deep stem, 129): 48 channels from layer1, then
            256 from the ASPP.
        """
        low, high = self.encoder(self.input(image))
        low = self.low(low)
        context = F.interpolate(self.aspp(high), size=low.shape[-2:], mode="bilinear", align_corners=self.align_corners)
        return torch.cat([low, context], dim=1)

    def forward(self, image: Tensor) -> Tensor:
        """[B,3,H,W], normalized -> logits [B,num_classes,h,w] at stride 4."""
        return self.classifier(self.features(image))


class CACDeepLab(DeepLabV3Plus):
    """DeepLabV3+ as CAC has it: two 3x3 convolutions in the decoder, dropout 0.5 and 0.1, multi-grid backbone.

    `features` are those after the decoder: [B,channels,h,w]. Convolutions outside the backbone start from Kaiming's
    normal initialization. Arguments and errors as `DeepLabV3Plus`; `output_stride` is 16.
    """

    geometry = MULTI_GRID

    def __init__(self, backbone: str, num_classes: int, *args, **kwargs) -> None:
        super().__init__(backbone, num_classes, *args, **kwargs)
        self.aspp.project.append(nn.Dropout(0.5))
        first = conv_bn_relu(self.feature_channels, self.channels, 3)
        self.decoder = nn.Sequential(*first, nn.Dropout(0.5), *conv_bn_relu(self.channels, self.channels, 3))
        self.classifier = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(self.channels, num_classes, 1))
        self.feature_channels = self.channels
        init_heads(self)

    def features(self, image: Tensor) -> Tensor:
        """[B,3,H,W], normalized -> [B,channels,h,w] at stride 4."""
        return self.decoder(super().features(image))


class CPSDeepLab(DeepLabV3Plus):
    """DeepLabV3+ as original CPS and CPCL have it: `SummedASPP`, two 3x3 convolutions, no dropout, multi-grid backbone.

    The papers' has the deep stem. Otherwise as `CACDeepLab`.
    """

    geometry = MULTI_GRID
    pyramid = CPSASPP

    def __init__(self, backbone: str, num_classes: int, *args, **kwargs) -> None:
        super().__init__(backbone, num_classes, *args, **kwargs)
        first = conv_bn_relu(self.feature_channels, self.channels, 3)
        self.decoder = nn.Sequential(*first, *conv_bn_relu(self.channels, self.channels, 3))
        self.classifier = nn.Conv2d(self.channels, num_classes, 1)
        self.feature_channels = self.channels
        init_heads(self)

    def features(self, image: Tensor) -> Tensor:
        """[B,3,H,W], normalized -> [B,channels,h,w] at stride 4."""
        return self.decoder(super().features(image))


class MemoryBankDeepLab(DeepLabV3Plus):
    """DeepLabV3+ as memory bank has it: two 3x3 convolutions in the decoder, dropout before the 1x1 ones alone.

    `features` are those after the decoder: [B,channels,h,w]. Convolutions outside the backbone start from N(0, 0.01).
    Otherwise as `CACDeepLab`.
    """

    geometry = UNIFORM_16

    def __init__(self, backbone: str, num_classes: int, *args, **kwargs) -> None:
        super().__init__(backbone, num_classes, *args, **kwargs)
        self.aspp.project.append(nn.Dropout(0.5))
        first = conv_bn_relu(self.feature_channels, self.channels, 3)
        self.decoder = nn.Sequential(*first, *conv_bn_relu(self.channels, self.channels, 3))
        self.classifier = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(self.channels, num_classes, 1))
        self.feature_channels = self.channels
        init_small(self)

    def features(self, image: Tensor) -> Tensor:
        """[B,3,H,W], normalized -> [B,channels,h,w] at stride 4."""
        return self.decoder(super().features(image))


class SummedClassifiers(nn.Module):
    """DeepLabV2's head: dilated 3x3 classifiers whose logits are added.

    Args:
        in_channels: Channels of the backbone's last stage.
        num_classes: Channels of the logits.
        rates: One classifier a dilation.
    """

    def __init__(self, in_channels: int, num_classes: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [nn.Conv2d(in_channels, num_classes, 3, padding=rate, dilation=rate) for rate in rates]
        )

    def forward(self, feature: Tensor) -> Tensor:
        """[B,in_channels,h,w] -> [B,num_classes,h,w]."""
        return sum(branch(feature) for branch in self.branches)


class DeepLabV2(nn.Module):
    """DeepLabV2 (Chen et al., 2017) on a ResNet of stride 8, without its three scales.

    Convolutions of the head start from N(0, 0.01).

    Args:
        backbone, num_classes, stem, output_stride, align_corners, download: As `DeepLabV3Plus`; `output_stride` is 8.
        channels, rates: Not used: there is nothing between backbone and classifier, whose dilations are `RATES_V2`.

    Raises:
        UserError: see `build_resnet`; rates are given.
    """

    geometry = UNIFORM_8

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
    ) -> None:
        super().__init__()
        if rates is not None:
            raise UserError(f"model.rates are for DeepLabV3+; those of DeepLabV2 are {', '.join(map(str, RATES_V2))}")
        self.align_corners = align_corners
        self.input = nn.Identity()
        self.encoder = build_resnet(backbone, stem, output_stride, download, self.geometry)
        self.feature_channels = self.encoder.feature_info.channels()[-1]
        self.classifier = SummedClassifiers(self.feature_channels, num_classes, RATES_V2)
        init_small(self)

    def features(self, image: Tensor) -> Tensor:
        """[B,3,H,W], normalized -> layer4's output [B,2048,h,w] at stride 8 (321 -> 41, 512 -> 64; `v2_coco` 65)."""
        return self.encoder(self.input(image))[-1]

    def forward(self, image: Tensor) -> Tensor:
        """[B,3,H,W], normalized -> logits [B,num_classes,h,w] at stride 8."""
        return self.classifier(self.features(image))


class CaffeDeepLabV2(DeepLabV2):
    """DeepLabV2 with the backbone that weights trained on COCO in Caffe belong to; otherwise as `DeepLabV2`."""

    geometry = CAFFE_8


class InputNormalization(nn.Module):
    """Images normalized for ImageNet, which every network is given, as other pretrained weights want them.

    Args:
        mean: Of red, green and blue, 0 to 255: taken off, then the result is divided by 255 and no deviation.
        bgr: Channels come in the order blue, green, red.
    """

    def __init__(self, mean: tuple[float, float, float], bgr: bool) -> None:
        super().__init__()
        imagenet_mean, imagenet_std = imagenet_statistics(torch.device("cpu"))
        self.bgr = bgr
        self.register_buffer("scale", imagenet_std.clone(), persistent=False)
        self.register_buffer("shift", imagenet_mean - torch.tensor(mean).view(3, 1, 1) / 255, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """[B,3,H,W] -> the same."""
        image = image * self.scale + self.shift
        return image.flip(1) if self.bgr else image


NETWORKS = {  # by `model.head`
    "short": DeepLabV3Plus,
    "deeplab": CACDeepLab,
    "cps": CPSDeepLab,
    "v2": DeepLabV2,
    "v2_coco": CaffeDeepLabV2,
    "v3": MemoryBankDeepLab,
}


def init_heads(network: DeepLabV3Plus) -> None:
    """Kaiming's normal initialization (fan in, ReLU) of every convolution outside the backbone; biases stay."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and not name.startswith("encoder."):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


def init_small(network: DeepLabV3Plus | DeepLabV2) -> None:
    """N(0, 0.01) for the weights of every convolution outside the backbone; biases stay."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and not name.startswith("encoder."):
            nn.init.normal_(module.weight, std=0.01)


def build_network(model: ModelConfig) -> DeepLabV3Plus | DeepLabV2:
    """The network of a config's `model` section. torch's seed decides its random initial weights.

    Raises:
        UserError: a value the network does not know; ImageNet weights that cannot be downloaded, read or do not fit.
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


def _load_pretrained(network: DeepLabV3Plus | DeepLabV2, model: ModelConfig) -> None:
    """A local file into the backbone; DeepLabV2's classifiers too, where they have as many classes."""
    source, target = f"model.pretrained {model.pretrained}", f"{model.backbone} with the {model.stem} stem"
    backbone, classifier, left_out = read_backbone(model.pretrained)
    found = infer_backbone(backbone)
    if found and found != (model.backbone, model.stem):
        raise UserError(f"{source} does not fit {target}: it is a {found[0]} with the {found[1]} stem")
    load_state(network.encoder, backbone, source, target)
    own = network.classifier.state_dict()
    if own.keys() == classifier.keys() and all(own[key].shape == value.shape for key, value in classifier.items()):
        network.classifier.load_state_dict(classifier)
    elif classifier:
        left_out.append(f"its classifiers of {next(iter(classifier.values())).shape[0]} classes")
    if left_out and int(os.environ.get("RANK", 0)) == 0:
        print(f"note: not used of {source}: {', '.join(left_out)}")


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1) -> nn.Sequential:
    """A convolution that keeps the size, without bias, batch norm, ReLU."""
    first = convolution(in_channels, out_channels, kernel_size, dilation)
    return nn.Sequential(first, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def convolution(in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size, without bias."""
    padding = dilation * (kernel_size // 2)
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False)


def norm_leaky(channels: int) -> nn.Sequential:
    """Batch norm and a leaky ReLU (slope 0.01)."""
    return nn.Sequential(nn.BatchNorm2d(channels), nn.LeakyReLU(inplace=True))


def conv_head(in_channels: int, channels: int, out_channels: int) -> nn.Sequential:
    """A head on `DeepLabV3Plus.features`: 3x3 convolution to `channels`, batch norm, ReLU, 1x1 convolution."""
    return nn.Sequential(*conv_bn_relu(in_channels, channels, 3), nn.Conv2d(channels, out_channels, 1))
