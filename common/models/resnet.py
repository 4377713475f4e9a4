"""ResNets of timm as dilated backbones that return their first and their last stage."""

import logging
from dataclasses import dataclass, field

import timm
from torch import nn

from common.errors import UserError

DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


@dataclass(frozen=True)
class Dilation:
    """Placement of strides and dilations in a backbone.

    Attributes:
        stride: Stride of layer4's output. timm's rule (also torchvision's) gives a stage that lost its stride the
            dilation that replaces it, except in its first 3x3 convolution, which keeps the dilation of the stage
            before.
        stages: Dilations of the 3x3 convolutions of a stage (`layer3`, `layer4`) that replace those of timm's rule, one
            per block; the last one also applies to all further blocks.
        ceil_mode: Round up in the max-pool, which makes the features of an even input one pixel larger (512 -> 129).
        stride_first: Stride in the first convolution of a stage's first block, as Caffe's ResNets do; timm strides in
            the 3x3 convolution of a bottleneck.
    """

    stride: int
    stages: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ceil_mode: bool = False
    stride_first: bool = False


# (stem, output_stride) of a config -> the dilation of PRCL and CSS. With the deep stem their layer3 and layer4 never
# stride, so the features have stride 8 either way; `output_stride` then chooses the dilations (and the ASPP's rates).
DILATIONS = {
    ("plain", 32): Dilation(32),
    ("plain", 16): Dilation(16),
    ("plain", 8): Dilation(8),
    ("deep", 16): Dilation(8, {"layer4": (2,)}, ceil_mode=True),
    ("deep", 8): Dilation(8, {"layer3": (2,), "layer4": (4,)}, ceil_mode=True),
}
# CAC, CPS and CPCL, with either stem: stride 16, and dilations that double from block to block.
MULTI_GRID = Dilation(16, {"layer4": (2, 4, 8)})
# Memory bank: all blocks of a stage have its dilation, including the first. CAFFE_8 belongs to weights from COCO.
UNIFORM_16 = Dilation(16, {"layer4": (2,)})
# UniMatch, with the deep stem: timm's rule.
TORCHVISION_16 = Dilation(16)
UNIFORM_8 = Dilation(8, {"layer3": (2,), "layer4": (4,)})
CAFFE_8 = Dilation(8, UNIFORM_8.stages, ceil_mode=True, stride_first=True)


def build_resnet(
    backbone: str,
    stem: str = "plain",
    output_stride: int = 16,
    download: bool | str = False,
    dilation: Dilation | None = None,
    drop_path: float = 0.0,
) -> nn.Module:
    """Build a ResNet without its classifier, with random weights (timm's Kaiming rule) or timm's ImageNet weights.

    `forward(image [B,3,H,W])` returns `[low, high]`: layer1's output at stride 4 and layer4's at `output_stride`.
    `feature_info.channels()` are their channels: 64 and 512 up to resnet34, 256 and 2048 above. Keys are named as in
    timm and torchvision (`conv1.weight`, `bn1.*`, `layer1.0.conv1.weight`, ...; deep: `conv1.0`, `.1`, `.3`, `.4`,
    `.6`).

    Args:
        backbone: resnet18, resnet34, resnet50, resnet101 or resnet152.
        stem: `plain`, one 7x7 convolution, or `deep`, three 3x3 convolutions with 64, 64 and 128 channels (PSPNet).
        output_stride: 32, 16 or 8; see `DILATIONS`.
        download: ImageNet weights to download: a timm name (`resnet101.a1h_in1k`), or True for torchvision's first
            weights, from which the papers start (`deep`: Gluon's weights).
        dilation: Used instead of `DILATIONS`; its stride must be `output_stride`.
        drop_path: Probability of dropping a residual branch of the last block; it grows with the depth of the block.

    Raises:
        UserError: unknown backbone, stem or stride; weights that do not exist or cannot be downloaded.
    """
    if backbone not in DEPTHS:
        raise UserError(f"model.backbone is {backbone!r}; it must be one of {', '.join(DEPTHS)}")
    if (stem, output_stride) not in DILATIONS:
        raise UserError(
            f"model.stem is {stem!r} with model.output_stride {output_stride!r}; "
            "the stem must be plain or deep, the stride 8, 16 or (plain) 32"
        )
    if dilation is not None and output_stride != dilation.stride:
        raise UserError(
            f"model.output_stride is {output_stride}, but the backbone of this model.head has stride "
            f"{dilation.stride}; set model.output_stride to {dilation.stride}"
        )
    dilation = dilation or DILATIONS[stem, output_stride]
    deep = {"stem_type": "deep", "stem_width": 64} if stem == "deep" else {}
    options = {"features_only": True, "out_indices": (1, 4), "output_stride": dilation.stride} | deep
    # timm starts the last norm of every block at 0, so that a block with frozen norms stays dead; torchvision and the
    # papers' code start at 1.
    options["zero_init_last"] = False
    if drop_path:
        options["drop_path_rate"] = drop_path
    network = (
        _download(backbone, stem, download, options)
        if download
        else timm.create_model(backbone, pretrained=False, **options)
    )
    network["maxpool"].ceil_mode = dilation.ceil_mode
    for stage, dilations in dilation.stages.items():
        for index, block in enumerate(network[stage]):
            _set_dilation(block, dilations[min(index, len(dilations) - 1)])
    if dilation.stride_first:
        for stage in ("layer2", "layer3", "layer4"):
            first = network[stage][0]
            first.conv1.stride, first.conv2.stride = first.downsample[0].stride, (1, 1)
    return network


def default_weights(backbone: str, stem: str = "plain") -> str:
    """timm name of the weights from which the papers start."""
    return f"{backbone}.tv_in1k" if stem == "plain" else f"{backbone}s.gluon_in1k"


def _download(backbone: str, stem: str, weights: bool | str, options: dict) -> nn.Module:
    name = weights if isinstance(weights, str) else default_weights(backbone, stem)
    if not name.startswith(backbone):
        raise UserError(f"model.pretrained {name} holds weights of another network than model.backbone {backbone}")
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
