"""Pieces of a training step that the three scripts share: crops, labeled loss, optimizer."""

import torch
from torch import Tensor, nn

from cac_cps.config import Config
from cac_cps.crops import JITTER, LongerSideCrop, PairCrop
from common.augment import ScaleChoiceCrop, apply_photometric_batch, draw_photometric
from common.datasets.reader import Reader
from common.errors import UserError
from common.images import normalize
from common.loaders import Batch, TrainingImages, Transform
from common.losses import OHEM, supervised_loss
from common.optim import build_optimizer, decay_groups
from common.seeding import generators

CPS_OHEM = OHEM(threshold=0.7, min_kept=50_000)  # original CPS on Cityscapes


def single_crop(config: Config) -> Transform:
    """How one crop of an image is cut: labeled images always, unlabeled ones for CPS.

    Raises:
        UserError: no scale to choose from.
    """
    data, method = config.data, config.method
    if method.base_size is None:
        if not method.scales:
            raise UserError("method.scales is empty; give one scale or more")
        return ScaleChoiceCrop(data.crop_size, method.scales)
    return LongerSideCrop(data.crop_size, method.base_size, data.scale_range)


def pair_crop(config: Config) -> PairCrop:
    """How CAC cuts unlabeled images; without a `base_size` the longer side at scale 1 is the crop's."""
    data, method = config.data, config.method
    base = method.base_size or max(data.crop_size)
    return PairCrop(data.crop_size, base, method.cac.scale_range, method.cac.iou_bound)


def make_labeled_images(reader: Reader, names: list[str], config: Config) -> TrainingImages:
    """The stream of labeled images."""
    return TrainingImages(reader, names, single_crop(config), config.run.seed, "labeled", with_label=True)


def make_unlabeled_images(reader: Reader, names: list[str], config: Config, stream: str) -> TrainingImages:
    """A stream of CPS's unlabeled images: one crop each, cut as those of labeled images."""
    return TrainingImages(reader, names, single_crop(config), config.run.seed, stream, with_label=False)


def augment_labeled(batch: Batch, config: Config) -> Tensor:
    """What a network sees of a labeled batch: normalized [B,3,H,W], with changed colors where the config says so."""
    if not config.method.jitter:
        return normalize(batch.image)
    # The spelling is part of the seed: runs stay the same.
    rngs = generators(config.run.seed, "labeled colours", batch.positions)
    return normalize(apply_photometric_batch(batch.image / 255, [draw_photometric(rng, JITTER) for rng in rngs]))


def labeled_loss(logits: Tensor, label: Tensor, config: Config) -> Tensor:
    """Cross-entropy of logits [B,C,H,W] with a label [B,H,W], over the hard pixels if `method.cps.ohem` is set."""
    return supervised_loss(logits, label, CPS_OHEM if config.method.cps.ohem else None)


def make_optimizer(config: Config, network: nn.Module, lr: float | None = None) -> torch.optim.Optimizer:
    """One optimizer for all that is trained: backbones at a rate of their own, and norms perhaps without decay.

    Args:
        config: The script's.
        network: All that is trained.
        lr: In place of `optim.lr`.
    """
    optim, method, lr = config.optim, config.method, lr or config.optim.lr
    sides: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in network.named_parameters():
        sides["encoder" in name.split(".")].append(parameter)
    groups = []
    for is_backbone, parameters in sides.items():
        parts = [{"params": parameters}] if method.decay_norms else decay_groups(parameters)
        scale = method.backbone_lr_scale if is_backbone else 1.0
        groups += [part | {"lr": lr * scale} for part in parts]
    return build_optimizer(optim, groups)


def check_unlabeled(names: list[str], folder: str) -> None:
    """Make sure there is something to learn from without labels.

    Raises:
        UserError: the unlabeled list is empty.
    """
    if not names:
        raise UserError(f"{folder}: the unlabeled list is empty; use supervised/train.py")
