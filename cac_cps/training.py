"""Parts of training that the three scripts share: crops, augmentation, labeled loss, optimizer."""

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
    """Build the crop of labeled images, and of the unlabeled images of CPS.

    Raises:
        UserError: `method.scales` is empty.
    """
    data, method = config.data, config.method
    if method.base_size is None:
        if not method.scales:
            raise UserError("method.scales is empty; give at least one scale")
        return ScaleChoiceCrop(data.crop_size, method.scales)
    return LongerSideCrop(data.crop_size, method.base_size, data.scale_range)


def pair_crop(config: Config) -> PairCrop:
    """Build CAC's crop of unlabeled images; without `method.base_size` the longer side at scale 1 is the crop's."""
    data, method = config.data, config.method
    base = method.base_size or max(data.crop_size)
    return PairCrop(data.crop_size, base, method.cac.scale_range, method.cac.iou_bound)


def make_labeled_images(reader: Reader, names: list[str], config: Config) -> TrainingImages:
    """Build the stream of labeled images."""
    return TrainingImages(reader, names, single_crop(config), config.run.seed, "labeled", with_label=True)


def make_unlabeled_images(reader: Reader, names: list[str], config: Config, stream: str) -> TrainingImages:
    """Build a stream of CPS's unlabeled images: one crop per image, as of labeled images."""
    return TrainingImages(reader, names, single_crop(config), config.run.seed, stream, with_label=False)


def augment_labeled(batch: Batch, config: Config) -> Tensor:
    """Normalize the images of a labeled batch, after color jitter if `method.jitter` is set: [B,3,H,W]."""
    if not config.method.jitter:
        return normalize(batch.image)
    # The spelling is part of the seed: runs stay the same.
    rngs = generators(config.run.seed, "labeled colours", batch.positions)
    return normalize(apply_photometric_batch(batch.image / 255, [draw_photometric(rng, JITTER) for rng in rngs]))


def labeled_loss(logits: Tensor, label: Tensor, config: Config) -> Tensor:
    """Cross-entropy of logits [B,C,H,W] with a label [B,H,W], over the hard pixels if `method.cps.ohem` is set."""
    return supervised_loss(logits, label, CPS_OHEM if config.method.cps.ohem else None, config.optim.supervised_loss)


def make_optimizer(config: Config, network: nn.Module, lr: float | None = None) -> torch.optim.Optimizer:
    """Build one optimizer, with a separate learning rate for backbones and optionally no weight decay for norms.

    Args:
        config: The script's config.
        network: Module with all trained parameters.
        lr: Learning rate that replaces `optim.lr`.
    """
    optim, lr = config.optim, lr or config.optim.lr
    sides: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in network.named_parameters():
        sides["encoder" in name.split(".")].append(parameter)
    groups = []
    for parameters in sides.values():  # two groups even at one rate, as in older checkpoints
        parts = [{"params": parameters}] if config.method.decay_norms else decay_groups(parameters)
        groups += [part | {"lr": lr} for part in parts]
    return build_optimizer(optim, network, groups)


def check_unlabeled(names: list[str], folder: str) -> None:
    """Make sure that the unlabeled list is not empty.

    Args:
        names: Ids of the unlabeled images.
        folder: Origin of the list, for the message.

    Raises:
        UserError: the list is empty.
    """
    if not names:
        raise UserError(f"{folder}: the unlabeled list is empty; add images to it, or train with supervised/train.py")
