"""ResNets of timm as dilated backbones that return their first and their last stage."""

import logging
from dataclasses import dataclass, field

import timm
from torch import nn

from common.errors import UserError

DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


@dataclass(frozen=True)
class Dilation:
    """Where a backbone dilates instead of striding.

    Args:
        stride: Stride of layer4's output. timm's rule (also torchvision's) gives a stage that lost its stride the
            dilation it stands for, except in its first 3x3 convolution, which keeps the dilation of the stage before.
        dilation: Stages (`layer3`, `layer4`) whose 3x3 convolutions have these dilations instead, one a block; the last
            one is also that of all further blocks.
        ceil_mode: The max-pool rounds up, which makes the features of an even input one pixel larger (512 -> 129).
        stride_first: A stage strides in the first convolution of its first block, as Caffe's ResNets do; in timm's it
            is the 3x3 one of a bottleneck.
    """

    stride: int
    dilation: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ceil_mode: bool = False
    stride_first: bool = False


# (stem, output_stride) of a config -> what PRCL and CSS do with it. With the deep stem their layer3 and layer4 never
# stride, so the features have stride 8 either way; `output_stride` then chooses the dilations (and the ASPP's rates).
GEOMETRIES = {
    ("plain", 16): Dilation(16),
    ("plain", 8): Dilation(8),
    ("deep", 16): Dilation(8, {"layer4": (2,)}, ceil_mode=True),
    ("deep", 8): Dilation(8, {"layer3": (2,), "layer4": (4,)}, ceil_mode=True),
}
# What CAC, CPS and CPCL do with either stem: stride 16, and dilations that double from block to block.
MULTI_GRID = Dilation(16, {"layer4": (2, 4, 8)})
# Memory bank: all blocks of a stage have its dilation, the first one too. The last is that of weights from COCO.
UNIFORM_16 = Dilation(16, {"layer4": (2,)})
UNIFORM_8 = Dilation(8, {"layer3": (2,), "layer4": (4,)})
CAFFE_8 = Dilation(8, UNIFORM_8.dilation, ceil_mode=True, stride_first=True)


def build_resnet(
    backbone: str,
    stem: str = "plain",
    output_stride: int = 16,
    download: bool | str = False,
    geometry: Dilation | None = None,
) -> nn.Module:
    """A ResNet without its classifier, randomly initialized (timm's Kaiming rule) or with timm's ImageNet weights.

    `forward(image [B,3,H,W])` returns `[low, high]`: layer1's output at stride 4 and layer4's at stride 16 or 8.
    `feature_info.channels()` are their channels: 64 and 512 up to resnet34, 256 and 2048 above. The keys are timm's
    and torchvision's (`conv1.weight`, `bn1.*`, `layer1.0.conv1.weight`, ...; deep: `conv1.0`, `.1`, `.3`, `.4`, `.6`).

    Args:
        backbone: resnet18, resnet34, resnet50, resnet101 or resnet152.
        stem: `plain`, one 7x7 convolution, or `deep`, three 3x3 ones with 64, 64 and 128 channels (PSPNet's).
        output_stride: 16 or 8; see `GEOMETRIES`.
        download: Fetch ImageNet weights: those of a timm name (`resnet101.a1h_in1k`), or with True torchvision's first
            ones, which the papers start from; for `deep`, Gluon's.
        geometry: In place of that of `GEOMETRIES`; its stride must be `output_stride`.

    Raises:
        UserError: unknown backbone, stem or stride; weights that do not exist or cannot be downloaded.
    """
    if backbone not in DEPTHS:
        raise UserError(f"model.backbone is {backbone!r}; it must be one of {', '.join(DEPTHS)}")
    if (stem, output_stride) not in GEOMETRIES:
        raise UserError(
            f"model.stem is {stem!r} with model.output_stride {output_stride!r}; "
            "stems are plain and deep, strides 8 and 16"
        )
    if geometry is not None and output_stride != geometry.stride:
        raise UserError(
            f"model.output_stride {output_stride} does not go with this model.head, whose stride is {geometry.stride}"
        )
    geometry = geometry or GEOMETRIES[stem, output_stride]
    deep = {"stem_type": "deep", "stem_width": 64} if stem == "deep" else {}
    options = {"features_only": True, "out_indices": (1, 4), "output_stride": geometry.stride} | deep
    network = (
        _download(backbone, stem, download, options)
        if download
        else timm.create_model(backbone, pretrained=False, **options)
    )
    network["maxpool"].ceil_mode = geometry.ceil_mode
    for stage, dilations in geometry.dilation.items():
        for index, block in enumerate(network[stage]):
            _set_dilation(block, dilations[min(index, len(dilations) - 1)])
    if geometry.stride_first:
        for stage in ("layer2", "layer3", "layer4"):
            first = network[stage][0]
            first.conv1.stride, first.conv2.stride = first.downsample[0].stride, (1, 1)
    return network


def _download(backbone: str, stem: str, given: bool | str, options: dict) -> nn.Module:
    usual = f"{backbone}.tv_in1k" if stem == "plain" else f"{backbone}s.gluon_in1k"
    name = given if isinstance(given, str) else usual
    if not name.startswith(backbone):
        raise UserError(f"model.pretrained {name} is not of model.backbone {backbone}")
    if not timm.is_model_pretrained(name):
        raise UserError(
            f"there are no ImageNet weights to download for {backbone} with model.stem {stem!r}; "
            "set model.pretrained to the path of a local file, or to false"
        )
    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    hub_log.setLevel(logging.ERROR)  # it repeats every attempt of a failing download in two lines
    try:
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # timm, the hub's client and the network below them have no base class in common
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise UserError(
            f"the ImageNet weights {name} could not be downloaded ({reason}); "
            "set model.pretrained to the path of a local file, or to false"
        ) from error
    finally:
        hub_log.setLevel(level)


def _set_dilation(block: nn.Module, dilation: int) -> None:
    for module in block.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.dilation = module.padding = (dilation, dilation)
