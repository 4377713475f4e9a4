"""What the three scripts share: the config, the data, the optimizer and the protocol of evaluation."""

from dataclasses import dataclass, field
from typing import Optional

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from cac_cps.crops import JITTER, LongerSideCrop, PairCrop
from cac_cps.their_config import translate
from common.augment import ScaleChoiceCrop, apply_photometric_batch, draw_photometric, normalize
from common.config import DataConfig, ModelConfig, OptimConfig, RunConfig
from common.datasets.loaders import Batch, TrainingImages, Transform
from common.datasets.source import Source
from common.errors import UserError
from common.inference import Protocol
from common.losses import cross_entropy, ohem_cross_entropy
from common.optim import build_optimizer, decay_groups
from common.seeding import generators

OHEM_THRESHOLD, OHEM_PIXELS = 0.7, 50_000  # of original CPS on Cityscapes; pixels an image


@dataclass
class CAC:
    """CAC's hyper-parameters, named as in its config files.

    Args:
        supervised: Labeled images only.
        weight_unsup: Weight of the contrastive loss.
        epoch_start_unsup: Epochs at the start that learn from labeled images alone.
        pos_thresh_value: Confidence that the teaching view of a place must exceed.
        temp: Temperature.
        selected_num: Cells of either view that go to the bank a step, over all processes.
        step_save: Past steps the bank holds besides the current one.
        proj_final_dim: Dimensions of the embedding.
        scale_range: Of the longer side of unlabeled images.
        iou_bound: Smallest and largest intersection over union of two crops.
    """

    supervised: bool = False
    weight_unsup: NonNegativeFloat = 0.1
    epoch_start_unsup: NonNegativeFloat = 5.0
    pos_thresh_value: ClosedUnitInterval = 0.75
    temp: PositiveFloat = 0.1
    selected_num: PositiveInt = 12800
    step_save: NonNegativeInt = 1
    proj_final_dim: PositiveInt = 128
    scale_range: tuple[PositiveFloat, PositiveFloat] = (0.8, 2.0)
    iou_bound: tuple[ClosedUnitInterval, ClosedUnitInterval] = (0.1, 1.0)


@dataclass
class CPS:
    """CPS's hyper-parameters.

    Args:
        weight: Weight of the cross pseudo supervision; by default 1.5, on Cityscapes 6, with CutMix 1 and 5.
        lr: Learning rate at the first step where CPS has another than CAC; by default `optim.lr`.
        ohem: Mine hard pixels in the labeled loss, as original CPS does on Cityscapes.
    """

    weight: Optional[NonNegativeFloat] = None
    lr: Optional[PositiveFloat] = None
    ohem: bool = False


@dataclass
class Method:
    """What the scripts share, and the section of each.

    Args:
        base_size: Length of the longer side at scale 1, pixels; null cuts as original CPS does, at one of `scales`.
        scales: Of original CPS's crops.
        jitter: Change the colours of labeled images.
        backbone_lr_scale: Learning rate of the backbone in terms of `optim.lr`.
        decay_norms: Weight decay on batch norm and biases too.
        cac: Section of train.py.
        cps: Section of train_semiseg.py and train_semiseg_cutmix.py.
    """

    base_size: Optional[PositiveInt] = None
    scales: tuple[PositiveFloat, ...] = (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)
    jitter: bool = False
    backbone_lr_scale: PositiveFloat = 0.1
    decay_norms: bool = True
    cac: CAC = field(default_factory=CAC)
    cps: CPS = field(default_factory=CPS)


@dataclass
class Config:
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    method: Method
    run: RunConfig

    from_released = staticmethod(translate)


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


def labeled_images(source: Source, names: list[str], config: Config) -> TrainingImages:
    """The stream of labeled images."""
    return TrainingImages(source, names, single_crop(config), config.run.seed, "labeled", with_label=True)


def unlabeled_images(source: Source, names: list[str], config: Config, stream: str) -> TrainingImages:
    """A stream of CPS's unlabeled images: one crop each, cut as those of labeled images."""
    return TrainingImages(source, names, single_crop(config), config.run.seed, stream, with_label=False)


def labeled_input(batch: Batch, config: Config) -> Tensor:
    """What a network sees of a labeled batch: normalised [B,3,H,W], with changed colours where the config says so."""
    if not config.method.jitter:
        return normalize(batch.image)
    rngs = generators(config.run.seed, "labeled colours", batch.positions)
    return normalize(apply_photometric_batch(batch.image / 255, [draw_photometric(rng, JITTER) for rng in rngs]))


def labeled_loss(logits: Tensor, label: Tensor, config: Config) -> Tensor:
    """Cross-entropy [] of a labeled batch, with hard pixels mined where the config says so. Arguments as there."""
    if not config.method.cps.ohem:
        return cross_entropy(logits, label)
    return ohem_cross_entropy(logits, label, OHEM_THRESHOLD, OHEM_PIXELS * len(label))


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


def protocol_of(config: Config) -> Protocol:
    """Whole images padded to multiples of 8; for the head of original CPS a sliding window of the crop's size."""
    return Protocol(crop=tuple(config.data.crop_size)) if config.model.head == "cps" else Protocol(multiple=8)


def cps_weight(config: Config, cutmix: bool) -> float:
    """The weight of the cross pseudo supervision: the config's, or what original CPS has for the dataset."""
    if config.method.cps.weight is not None:
        return config.method.cps.weight
    on_cityscapes = config.data.dataset == "cityscapes"
    return (5.0 if on_cityscapes else 1.0) if cutmix else (6.0 if on_cityscapes else 1.5)


def check_unlabeled(names: list[str], folder: str) -> None:
    """Make sure there is something to learn from without labels.

    Raises:
        UserError: the unlabeled list is empty.
    """
    if not names:
        raise UserError(f"{folder}: the unlabeled list is empty; use supervised/train.py")
