"""Checkpoints as PRCL's repository writes them."""

from collections.abc import Mapping

from torch import Tensor

from common.config.files import Translation
from common.evaluation.released_checkpoints import Release
from common.released.configs import Settings, ignored, same, translate_keys, whole
from common.released.weights import PRCL_CSS_HEADS, deeplab_from_prcl_css
from common.released.yaml_configs import ALWAYS, REQUIRED, RULES, batch_size, read_released_yaml


def segmenter_of(state: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The segmenter with our keys; there is one network."""
    return deeplab_from_prcl_css(state)


RELEASE = Release(
    segmenter_of,
    configs={("v3plus", 21): "prcl/configs/voc.json", ("v3plus", 19): "prcl/configs/cityscapes.json"},
    entries=("ema", "ema_model", "model"),  # the teacher, which the paper evaluates, before the student
    heads=PRCL_CSS_HEADS,
)


PROCESSES = 8  # of the released runs; the file for Cityscapes does not say it


def translate(text: str) -> Translation | None:
    """A config file of the release in our words; None where `text` is something else.

    Raises:
        UserError: unsafe YAML, a key that the release does not have, one that is missing, or an unknown value.
    """
    flat = read_released_yaml(text)
    if flat is None:
        return None
    required = (*REQUIRED, "Training_Setting.epoch")
    return translate_keys(flat, KEYS, required, ALWAYS | {"model.output_stride": 16}, "PRCL's release")


def _batch_size(key: str, flat: Settings) -> Settings:
    told = "Distributed.world_size" in flat
    return batch_size(flat, whole(flat, "Distributed.world_size") if told else PROCESSES)


KEYS = {
    **RULES,
    **same(
        {
            "EMA.alpha": "method.alpha",
            "Optim.uncer_lr": "method.uncer_lr",
            "Training_Setting.epoch": "run.epochs",
            "Prcl_Loss.un_threshold": "method.un_threshold",
            "Prcl_Loss.strong_threshold": "method.strong_threshold",
            "Prcl_Loss.weak_threshold": "method.weak_threshold",
            "Prcl_Loss.temp": "method.temp",
            "Prcl_Loss.num_queries": "method.num_queries",
            "Prcl_Loss.num_negatives": "method.num_negatives",
        }
    ),
    **ignored("Prcl_Loss.is_available", "the release reads it nowhere; method.max_value 0 leaves the loss out"),
    **ignored("Prcl_Loss.warm_up", "the release reads it nowhere"),
    **ignored("Distributed.world_size", "counts in optim.batch_size; `accelerate launch` says how many processes"),
    "Dataset.batch_size": _batch_size,
}
