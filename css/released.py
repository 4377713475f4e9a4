"""Translate the config files of CSS's repository, and describe the checkpoints it writes.

python css/released.py FILE.yaml --out mine.json
"""

from common.config.files import Translation
from common.evaluation.released_checkpoints import Release
from common.released.configs import Settings, choice, ignored, main_translate, same, translate_keys
from common.released.weights import PRCL_CSS_ENTRIES, PRCL_CSS_HEADS, deeplab_from_prcl_css
from common.released.yaml_configs import ALWAYS, REQUIRED, RULES, batch_size, read_released_yaml

PROCESSES = 4  # from the command lines of the released scripts, whatever a file states
STEPS = {"run.steps": 80000, "run.eval_every": 2000}  # run.steps is from the command lines too
HARD_PIXELS = {"VOC": {}, "CityScapes": {"method.ohem": True}}


def translate(text: str) -> Translation | None:
    """Translate a config file of the release; None if `text` is something else.

    Raises:
        UserError: unsafe YAML, a key that the release does not have, a missing key, or an unknown value.
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
    # Only the baseline reads these, with a value that no similarity reaches; the others use their command lines.
    **ignored(
        "Loss.un_threshold Loss.strong_threshold Loss.weak_threshold",
        "only ori_pseudo.py reads it; the defaults here are the other scripts', and --method.<name> overrides them",
    ),
    **ignored("Loss.is_available", "the release never reads it; method.max_value 0 disables the loss"),
    **ignored("Loss.warm_up", "the release never reads it; set --method.warm_up"),
    **ignored("Training_Setting.epoch", "the release never reads it; run.steps is its --total_iter"),
    **ignored("Distributed.world_size", "the release never reads it; `accelerate launch` sets the processes"),
    "Dataset.name": _dataset,
    "Dataset.batch_size": lambda key, flat: batch_size(flat, PROCESSES),
}
RELEASE = Release(
    deeplab_from_prcl_css,
    configs={("v3plus", 21): "css/configs/voc.json", ("v3plus", 19): "css/configs/cityscapes.json"},
    entries=PRCL_CSS_ENTRIES,
    heads=PRCL_CSS_HEADS,
    translate=translate,
)

if __name__ == "__main__":
    main_translate("css", translate)
