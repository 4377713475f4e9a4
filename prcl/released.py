"""Translate the config files of PRCL's repository, and describe the checkpoints it writes.

python prcl/released.py FILE.yaml --out mine.json
"""

from common.config.files import Translation
from common.evaluation.released_checkpoints import Release
from common.released.configs import Settings, ignored, main_translate, same, translate_keys, whole
from common.released.weights import PRCL_CSS_ENTRIES, PRCL_CSS_HEADS, deeplab_from_prcl_css
from common.released.yaml_configs import ALWAYS, REQUIRED, RULES, batch_size, read_released_yaml

PROCESSES = 8  # of the released runs, for the Cityscapes file, which does not state them


def translate(text: str) -> Translation | None:
    """Translate a config file of the release; None if `text` is something else.

    Raises:
        UserError: unsafe YAML, a key that the release does not have, a missing key, or an unknown value.
    """
    flat = read_released_yaml(text)
    if flat is None:
        return None
    required = (*REQUIRED, "Training_Setting.epoch")
    return translate_keys(flat, KEYS, required, ALWAYS | {"model.output_stride": 16}, "PRCL's release")


def _batch_size(key: str, flat: Settings) -> Settings:
    stated = "Distributed.world_size" in flat
    return batch_size(flat, whole(flat, "Distributed.world_size") if stated else PROCESSES)


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
    **ignored("Prcl_Loss.is_available", "the release never reads it; method.max_value 0 disables the loss"),
    **ignored("Prcl_Loss.warm_up", "the release never reads it"),
    **ignored("Distributed.world_size", "counted in optim.batch_size; `accelerate launch` sets the processes"),
    "Dataset.batch_size": _batch_size,
}
RELEASE = Release(
    deeplab_from_prcl_css,
    configs={("v3plus", 21): "prcl/configs/voc.json", ("v3plus", 19): "prcl/configs/cityscapes.json"},
    entries=PRCL_CSS_ENTRIES,
    heads=PRCL_CSS_HEADS,
    translate=translate,
)

if __name__ == "__main__":
    main_translate("prcl", translate)
