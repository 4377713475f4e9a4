"""What the three scripts share: the config, the data, the optimizer and the protocol of evaluation."""

from dataclasses import dataclass, field
from typing import Optional

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from cac_cps.released import translate
from common.config.sections import DataConfig, ModelConfig, OptimConfig, RunConfig
from common.evaluation.inference import Protocol


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
        jitter: Change the colors of labeled images.
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


def protocol_of(config: Config) -> Protocol:
    """Whole images padded to multiples of 8; for the head of original CPS a sliding window of the crop's size."""
    return Protocol(crop=tuple(config.data.crop_size)) if config.model.head == "v3plus_cps" else Protocol(multiple=8)


def cps_weight(config: Config, cutmix: bool) -> float:
    """The weight of the cross pseudo supervision: the config's, or what original CPS has for the dataset."""
    if config.method.cps.weight is not None:
        return config.method.cps.weight
    on_cityscapes = config.data.dataset == "cityscapes"
    return (5.0 if on_cityscapes else 1.0) if cutmix else (6.0 if on_cityscapes else 1.5)
