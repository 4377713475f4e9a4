"""Choose method, network, crop, batch and length from the images, their masks and the memory that is there."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from common.splits.split import Split

PASSES = 60  # over the longer list of training images
GIGABYTE = 2**30


@dataclass(frozen=True)
class Network:
    """A network and what trains it.

    Attributes:
        model, optim: Values of the config's sections.
        largest_crop: Side of the largest crop; the network takes multiples of `multiple`.
        bytes_per_pixel: Memory for the activations of one labeled and one unlabeled image per pixel of the crop,
            measured in fp32 with UniMatch, the method here that takes most: three views of the unlabeled image.
        steps: Shortest and longest run.
    """

    model: dict[str, Any]
    optim: dict[str, Any]
    largest_crop: int
    multiple: int
    bytes_per_pixel: int
    largest_batch: int
    steps: tuple[int, int]


SGD = {"lr": 3.2e-3}
RESNET18 = {"backbone": "resnet18", "head": "v3plus", "output_stride": 16}
DINOV2 = {"backbone": "vit_small_patch14_dinov2", "head": "dpt"}
DINOV2_OPTIM = {"name": "adamw", "lr": 2e-4, "encoder_lr_scale": 0.025, "weight_decay": 0.01}
ON_CPU = Network(RESNET18, SGD, 256, 16, 4000, 8, (200, 1000))
ON_SMALL_GPU = Network(RESNET18, SGD, 320, 16, 4000, 16, (1000, 20_000))
ON_GPU = Network(DINOV2, DINOV2_OPTIM, 518, 14, 10_000, 16, (1000, 40_000))
LARGE_GPU = 12 * GIGABYTE
SMALLEST_CROP = 32
# Below this crop the usual rates 6, 12 and 18 of the ASPP reach beyond its features.
SMALL_CROP, SMALL_RATES = 112, [1, 2, 3]
UNIMATCH, SUPERVISED = "unimatch", "supervised"


@dataclass(frozen=True)
class Machine:
    """The device that trains, and its memory in bytes."""

    is_gpu: bool
    memory: int

    def __str__(self) -> str:
        return f"{'GPU' if self.is_gpu else 'CPU'} with {self.memory / GIGABYTE:.0f} GB"


def this_machine() -> Machine:
    """The first GPU; without one, the CPU."""
    if torch.cuda.is_available():
        return Machine(True, torch.cuda.get_device_properties(0).total_memory)
    return Machine(False, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def choose_method(split: Split) -> tuple[str, str]:
    """Folder of the method, and the reason: UniMatch if at least as many images have no mask as have one."""
    labeled, unlabeled = len(split.labeled), len(split.unlabeled)
    if unlabeled >= labeled:
        return UNIMATCH, f"{unlabeled} images have no mask, {labeled} have one to learn from"
    return SUPERVISED, f"{labeled} images have a mask to learn from, {unlabeled} have none"


def choose_config(
    data: dict[str, Any], split: Split, num_classes: int, sides: Iterable[int], machine: Machine
) -> dict[str, Any]:
    """Config for every script.

    Args:
        data: Values of the `data` section without sizes.
        split: The lists.
        num_classes: Number of classes.
        sides: Shorter side of each training image.
        machine: The device and its memory.

    The crop is the largest multiple that fits half of the images, at most `largest_crop`. The batch is the largest
    power of two whose activations take half of the memory. The run makes 60 passes over the longer list, within bounds.
    """
    network = _network(machine)
    ordered = sorted(sides)
    side = min(network.largest_crop, max(SMALLEST_CROP, ordered[len(ordered) // 2]))
    crop = max(network.multiple, side // network.multiple * network.multiple)
    batch = 2
    while 2 * batch <= network.largest_batch and 2 * batch * crop**2 * network.bytes_per_pixel <= machine.memory / 2:
        batch *= 2
    shortest, longest = network.steps
    steps = min(longest, max(shortest, PASSES * max(len(split.labeled), len(split.unlabeled)) // batch))
    rates = {"rates": SMALL_RATES} if crop < SMALL_CROP and network.model["head"] == "v3plus" else {}
    return {
        "data": data | {"crop_size": [crop, crop], "workers": min(4, os.cpu_count() or 1)},
        "model": network.model | rates | {"num_classes": num_classes},
        "optim": network.optim | {"batch_size": batch},
        "run": {"steps": steps},
    }


def _network(machine: Machine) -> Network:
    if not machine.is_gpu:
        return ON_CPU
    return ON_GPU if machine.memory >= LARGE_GPU else ON_SMALL_GPU
