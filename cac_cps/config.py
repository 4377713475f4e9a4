"""Configuration that CAC and CPS share: hyper-parameters, epoch length and evaluation protocol."""

from dataclasses import dataclass, field
from typing import Optional, Union

from common.config.lengths import Share
from common.config.sections import BaseConfig
from common.config.types import (
    ClosedUnitInterval,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Scale,
    Size,
    whole_number,
)
from common.errors import UserError
from common.evaluation.inference import Protocol

STEPS_PER_EPOCH = 1157  # for every dataset and split, as released
ENCODER_LR_SCALE = 0.1
PastSteps = whole_number(0, 2**10)


@dataclass
class CAC:
    """CAC's hyper-parameters, named as in its config files.

    Args:
        supervised: CAC's name for `labels_only`.
        weight_unsup: Weight of the contrastive loss.
        epoch_start_unsup: Number of first epochs that use labeled images only, or a share of the run, e.g. "30%".
        pos_thresh_value: Confidence that a positive cell must exceed in the other crop, which serves as its target.
        temp: Temperature of the contrastive loss.
        selected_num: Cells of each crop that enter the bank per step, over all processes.
        step_save: Number of past steps whose cells the bank keeps, besides the current step.
        proj_final_dim: Dimensions of the embedding.
        scale_range: Smallest and largest random scale of the longer side of an unlabeled image.
        iou_bound: Smallest and largest intersection over union of the two crops of an image.
    """

    supervised: bool = False
    weight_unsup: NonNegativeFloat = 0.1
    epoch_start_unsup: Union[NonNegativeFloat, Share] = 5.0
    pos_thresh_value: ClosedUnitInterval = 0.75
    temp: PositiveFloat = 0.1
    selected_num: PositiveInt = 12800
    step_save: PastSteps = 1
    proj_final_dim: Size = 128
    scale_range: tuple[Scale, Scale] = (0.8, 2.0)
    iou_bound: tuple[ClosedUnitInterval, ClosedUnitInterval] = (0.1, 1.0)


@dataclass
class CPS:
    """CPS's hyper-parameters.

    Args:
        weight: Weight of the cross pseudo supervision; by default 1.5 (Cityscapes 6), and with CutMix 1 (Cityscapes 5).
        lr: Learning rate at the first step, if CPS has another one than CAC; by default `optim.lr`.
        ohem: Compute the labeled loss on hard pixels only, as original CPS does on Cityscapes.
    """

    weight: Optional[NonNegativeFloat] = None
    lr: Optional[PositiveFloat] = None
    ohem: bool = False


@dataclass
class Method:
    """Hyper-parameters shared by the three scripts, and one section for each of the two methods.

    Args:
        base_size: Length of an image's longer side at scale 1, in pixels; null crops as original CPS does, at a scale
            drawn from `scales`.
        scales: Random scales of original CPS's crops, equally likely.
        jitter: Augment labeled images with color jitter.
        backbone_lr_scale: Former key of `optim.encoder_lr_scale`, to which its value moves.
        decay_norms: Apply weight decay to batch-norm parameters and biases too.
        cac: Section of train.py.
        cps: Section of train_semiseg.py and train_semiseg_cutmix.py.
        labels_only: Train on labeled images only: the same network, augmentation and schedule without unlabeled images.
    """

    base_size: Optional[Size] = None
    scales: tuple[Scale, ...] = (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)
    jitter: bool = False
    backbone_lr_scale: Optional[PositiveFloat] = None
    decay_norms: bool = True
    cac: CAC = field(default_factory=CAC)
    cps: CPS = field(default_factory=CPS)
    labels_only: bool = False

    def __post_init__(self) -> None:
        self.labels_only = self.labels_only or self.cac.supervised


@dataclass
class Config(BaseConfig):
    method: Method

    def __post_init__(self) -> None:
        former, scale = self.method.backbone_lr_scale, self.optim.encoder_lr_scale
        if None not in (former, scale) and former != scale:
            raise UserError(
                f"method.backbone_lr_scale {former:g} and optim.encoder_lr_scale {scale:g} are one setting: leave the "
                "former out, or set it to null"
            )
        given = scale if former is None else former
        self.optim.encoder_lr_scale = ENCODER_LR_SCALE if given is None else given
        self.method.backbone_lr_scale = None


def protocol_of(config: Config) -> Protocol:
    """Return the evaluation protocol: whole images padded to multiples of 8, or original CPS's sliding window."""
    return Protocol(crop=tuple(config.data.crop_size)) if config.model.head == "v3plus_cps" else Protocol(multiple=8)


def cps_weight(config: Config, cutmix: bool) -> float:
    """Return the weight of the cross pseudo supervision: the config's, or original CPS's for the dataset."""
    if config.method.cps.weight is not None:
        return config.method.cps.weight
    on_cityscapes = config.data.dataset == "cityscapes"
    return (5.0 if on_cityscapes else 1.0) if cutmix else (6.0 if on_cityscapes else 1.5)
