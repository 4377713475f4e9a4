"""Configuration of UniMatch, UniMatch V2 and FixMatch: hyper-parameters and evaluation protocol."""

from dataclasses import dataclass
from typing import Literal, Optional

from common.config.lengths import Decay
from common.config.sections import BaseConfig, ModelConfig
from common.config.types import ClosedUnitInterval, PositiveInt
from common.evaluation.inference import Protocol
from common.losses import OHEM
from common.models.encoders import describe_encoder


@dataclass
class Method:
    """Hyper-parameters of the three scripts, named as in the released configs where those have them.

    Args:
        conf_thresh: Confidence from which a pixel of an unlabeled image counts in the losses.
        ohem: Compute the supervised loss on hard pixels only (Cityscapes; `criterion` of the released configs).
        ohem_threshold: Probability of its class up to which a labeled pixel is hard.
        ohem_min_kept: Smallest number of labeled pixels per image that are kept.
        alpha: Largest EMA decay of the teacher, which train_v2.py needs and train.py has not. In train_fixmatch.py the
            teacher labels the unlabeled images (UniMatch V2's baseline); by default, without one, the trained network
            does (UniMatch's baseline).
        comp_drop: Complementary dropout of train_v2.py with one draw of channels for all taps (`shared`), or one per
            tap (`per_level`); by default `shared` for plain ViTs and `per_level` for hierarchical encoders.
        spare: Share of the unlabeled images whose features train_v2.py does not drop.
        sliding_window: Evaluate by a sliding window of the crop's size (Cityscapes).
        labels_only: Train on labeled images only: the same network, augmentation and schedule without unlabeled images.
    """

    conf_thresh: ClosedUnitInterval = 0.95
    ohem: bool = False
    ohem_threshold: ClosedUnitInterval = 0.7
    ohem_min_kept: PositiveInt = 100_000
    alpha: Optional[Decay] = None
    comp_drop: Optional[Literal["shared", "per_level"]] = None
    spare: ClosedUnitInterval = 0.5
    sliding_window: bool = False
    labels_only: bool = False


@dataclass
class Config(BaseConfig):
    method: Method


def hard_pixels(method: Method) -> OHEM | None:
    """Settings of the supervised loss; None for the mean over all pixels."""
    return OHEM(method.ohem_threshold, method.ohem_min_kept) if method.ohem else None


def protocol_of(config: Config) -> Protocol:
    """Evaluation protocol: whole images, or a sliding window whose probabilities are summed.

    Sides of whole images become multiples of what the encoder takes, 14 for DINOv2, by resizing.
    """
    if config.method.sliding_window:
        return Protocol(crop=tuple(config.data.crop_size), summed="probabilities")
    return Protocol(multiple=side_multiple(config.model), fit="resize")


def side_multiple(model: ModelConfig) -> int:
    """Number of pixels of which image sides must be multiples; 1 for DeepLabs on ResNets."""
    return describe_encoder(model.backbone).multiple if model.head == "dpt" else 1


def steps_per_epoch(unlabeled_images: int, batch_size: int) -> int:
    """Count the steps of an epoch by the papers' rule: one pass over the unlabeled images, at least one step."""
    return max(1, unlabeled_images // batch_size)
