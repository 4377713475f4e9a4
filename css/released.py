"""Checkpoints as CSS's repository writes them."""

from collections.abc import Mapping

from torch import Tensor

from common.config.files import Translation
from common.evaluation.released_checkpoints import Release
from common.released.configs import Settings, choice, ignored, same, translate_keys
from common.released.weights import PRCL_CSS_HEADS, deeplab_from_prcl_css
from common.released.yaml_configs import ALWAYS, REQUIRED, RULES, batch_size, read_released_yaml


def segmenter_of(state: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The segmenter with our keys; there is one network."""
    return deeplab_from_prcl_css(state)


RELEASE = Release(
    segmenter_of,
    configs={("v3plus", 21): "css/configs/voc.json", ("v3plus", 19): "css/configs/cityscapes.json"},
    entries=("ema", "ema_model", "model"),  # the teacher, which the paper evaluates, before the student
    heads=PRCL_CSS_HEADS,
)


PROCESSES = 4  # of the released scripts' command lines, whatever their files say
STEPS = {"run.steps": 80000, "run.eval_every": 2000}  # the first of them also from there
HARD_PIXELS = {"VOC": {}, "CityScapes": {"method.ohem": True}}


def translate(text: str) -> Translation | None:
    """A config file of the release in our words; None where `text` is something else.

    Raises:
        UserError: unsafe YAML, a key that the release does not have, one that is missing, or an unknown value.
    """
    flat = read_released_yaml(text)
    if flat is None:
        return None
    always = ALWAYS | STEPS | {"model.output_stride": 8}
    return translate_keys(flat, KEYS, REQUIRED, always, "CSS's release")


def _dataset(key: str, flat: Settings) -> Settings:
    return RULES[key](key, flat) | choice(flat, key, HARD_PIXELS)


KEYS = {
    **RULES,
    **same(
        {
            "EMA.alpha": "method.alpha_t",
            "Loss.temp": "method.temp",
            "Loss.alpha": "method.alpha_p",
            "Loss.num_queries": "method.num_queries",
            "Loss.num_negatives": "method.num_negatives",
        }
    ),
    # Of the baseline alone, with a value that no similarity reaches; the others take theirs from the command line.
    **ignored(
        "Loss.un_threshold Loss.strong_threshold Loss.weak_threshold",
        "read by ori_pseudo.py alone; the others' defaults are ours, and --method.<name> gives another",
    ),
    **ignored("Loss.is_available", "the release reads it nowhere; method.max_value 0 leaves the loss out"),
    **ignored("Loss.warm_up", "the release reads it nowhere; --method.warm_up"),
    **ignored("Training_Setting.epoch", "the release reads it nowhere: run.steps is that of --total_iter"),
    **ignored("Distributed.world_size", "the release reads it nowhere; `accelerate launch` says how many processes"),
    "Dataset.name": _dataset,
    "Dataset.batch_size": lambda key, flat: batch_size(flat, PROCESSES),
}
