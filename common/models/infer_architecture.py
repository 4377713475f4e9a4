"""Which network a state dict is of, told by its keys and shapes."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from common.errors import UserError

# Blocks of the four stages, and whether they are bottlenecks.
DEPTHS = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
# The last weight of a network -> the values of `model.head` it may be of.
HEADS = {
    "classifier.3.weight": ("short",),
    "classifier.1.weight": ("deeplab", "v3"),
    "classifier.weight": ("cps",),
    "classifier.branches.0.weight": ("v2", "v2_coco"),
}


@dataclass(frozen=True)
class InferredArchitecture:
    """What weights say of the `model` section: heads are those with these keys, DeepLabV2 has no `channels`."""

    backbone: str
    stem: str
    heads: tuple[str, ...]
    num_classes: int
    channels: int | None


def infer_backbone(state: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """`model.backbone` and `model.stem` of a ResNet's weights, named as torchvision does; None if they are of none."""
    blocks = tuple(
        len({key.split(".")[1] for key in state if key.startswith(f"{stage}.")})
        for stage in ("layer1", "layer2", "layer3", "layer4")
    )
    depth = DEPTHS.get((blocks, "layer1.0.conv3.weight" in state))
    stem = "plain" if "conv1.weight" in state else "deep" if "conv1.0.weight" in state else None
    return (depth, stem) if depth and stem else None


def infer_architecture(state: Mapping[str, Tensor], source: str) -> InferredArchitecture:
    """The network of weights with our keys.

    Args:
        source: Where they come from, for the message.

    Raises:
        UserError: it is none that `build_network` makes.
    """
    encoder = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
    backbone = infer_backbone(encoder)
    last = next((key for key in HEADS if key in state and state[key].dim() == 4), None)
    if backbone is None or last is None:
        raise UserError(f"{source} is of no network that is known here: give a --config that describes it")
    width = next((state[key].shape[0] for key in ("aspp.project.0.weight", "aspp.reduce.weight") if key in state), None)
    return InferredArchitecture(*backbone, HEADS[last], state[last].shape[0], width)
