"""The released checkpoints in ours: segmenter, heads and selectors; the means of the released configs."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from common.errors import UserError
from common.models.weights import deeplab_from_memory_bank

# Prefixes of the two heads' keys, released -> ours.
HEADS = {
    f"{theirs}_head.{index}.": f"{ours}.{name}."
    for theirs, ours in (("projection", "projection"), ("prediction", "prediction"))
    for index, name in (("0", "first"), ("1", "norm"), ("3", "last"))
}
# The same for selectors; a class's number and a dot follow.
SELECTORS = {"contrastive_class_selector_memory": "memory_selectors.", "contrastive_class_selector_": "selectors."}
# What each class's selector holds, released -> ours, where the classes are stacked.
STACKED = {
    "0.weight": "first_weight",
    "0.bias": "first_bias",
    "1.weight": "weight",
    "1.bias": "bias",
    "1.running_mean": "running_mean",
    "1.running_var": "running_var",
    "1.num_batches_tracked": "num_batches_tracked",
    "3.weight": "last_weight",
    "3.bias": "last_bias",
}

# Mean of red, green and blue that is taken off the images of a dataset; with weights from COCO in the order BGR.
MEANS = {
    "pascal_voc": (122.6789143, 116.66876762, 104.00698793),
    "cityscapes": (73.15835921, 82.90891754, 72.39239876),
    "other": (127.5, 127.5, 127.5),
}


def heads_from_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of our `Heads` out of a released network's, whose other keys are left out.

    Raises:
        UserError: selectors that lack a class, or hold something unknown.
    """
    renamed: dict[str, Tensor] = {}
    classes: dict[str, dict[int, Tensor]] = {}
    for key, value in state.items():
        if prefix := next((prefix for prefix in HEADS if key.startswith(prefix)), None):
            renamed[HEADS[prefix] + key.removeprefix(prefix)] = value
        elif prefix := next((prefix for prefix in SELECTORS if key.startswith(prefix)), None):
            found = re.fullmatch(r"(\d+)\.(.+)", key.removeprefix(prefix))
            if found is None or found[2] not in STACKED:
                raise UserError(f"not a released network of memory bank: {key}")
            classes.setdefault(SELECTORS[prefix] + STACKED[found[2]], {})[int(found[1])] = value
    for name, tensors in classes.items():
        if set(tensors) != set(range(len(tensors))):
            raise UserError(f"not a released network of memory bank: {name} of some classes is missing")
        stacked = torch.stack([tensors[index] for index in range(len(tensors))])
        renamed[name] = stacked.squeeze(1) if name.endswith(("last_weight", "last_bias")) else stacked
    return renamed


def segmenter_of(state: Mapping[str, Tensor], network: int) -> dict[str, Tensor]:
    """The segmenter of a released checkpoint, as `common.eval_cli` asks for it; there is one network."""
    return deeplab_from_memory_bank(state)
