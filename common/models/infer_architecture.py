"""Infer backbone, head and number of classes from a state dict."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from common.errors import UserError

# (number of blocks in each of the four stages, are they bottlenecks) -> backbone.
DEPTHS = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
# Width of a DINOv2 under DPT -> backbone; its stem is plain.
DINOV2 = {
    384: "vit_small_patch14_dinov2",
    768: "vit_base_patch14_dinov2",
    1024: "vit_large_patch14_dinov2",
    1536: "vit_giant_patch14_dinov2",
}
# Key of the last weight -> values of `model.head` whose networks have that key.
HEADS = {
    "classifier.3.weight": ("v3plus",),
    "classifier.1.weight": ("v3plus_cac", "v3plus_memory_bank"),
    "classifier.weight": ("v3plus_cps", "v3plus_unimatch"),
    "classifier.2.weight": ("dpt",),
    "classifier.branches.0.weight": ("v2", "v2_coco"),
}


@dataclass(frozen=True)
class InferredArchitecture:
    """Values of the `model` section that follow from a state dict.

    Attributes:
        backbone, stem, num_classes: As in the section.
        heads: The values of `model.head` whose networks have these keys.
        channels: As in the section; None for DeepLabV2 and DPT, which do not use it.
    """

    backbone: str
    stem: str
    heads: tuple[str, ...]
    num_classes: int
    channels: int | None


def infer_backbone(state: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Infer `model.backbone` and `model.stem` from weights with torchvision's keys; None if they are not a ResNet's."""
    blocks = tuple(
        len({key.split(".")[1] for key in state if key.startswith(f"{stage}.")})
        for stage in ("layer1", "layer2", "layer3", "layer4")
    )
    depth = DEPTHS.get((blocks, "layer1.0.conv3.weight" in state))
    stem = "plain" if "conv1.weight" in state else "deep" if "conv1.0.weight" in state else None
    return (depth, stem) if depth and stem else None


def infer_architecture(state: Mapping[str, Tensor], source: str) -> InferredArchitecture:
    """Infer the architecture from a state dict with this project's keys.

    Args:
        state: State dict of the whole network.
        source: Origin of the weights, for the message.

    Raises:
        UserError: `build_network` makes no network with these keys.
    """
    encoder = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
    backbone = infer_backbone(encoder) or _infer_dinov2(encoder)
    last = next((key for key in HEADS if key in state and state[key].dim() == 4), None)
    if backbone is None or last is None:
        raise UserError(f"{source} does not hold a network of this project: give a --config that describes the network")
    width = next((state[key].shape[0] for key in ("aspp.project.0.weight", "aspp.reduce.weight") if key in state), None)
    return InferredArchitecture(*backbone, HEADS[last], state[last].shape[0], width)


def _infer_dinov2(encoder: Mapping[str, Tensor]) -> tuple[str, str] | None:
    token = encoder.get("body.cls_token")
    name = None if token is None else DINOV2.get(token.shape[-1])
    return (name, "plain") if name else None
