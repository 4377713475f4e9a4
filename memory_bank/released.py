"""Translate the config files of memory bank's repository, and convert its checkpoints: segmenter, heads, selectors.

python memory_bank/released.py FILE.json --out mine.json
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.config.files import Translation, flatten, read_commented_json
from common.errors import UserError
from common.evaluation.released_checkpoints import Release
from common.models.weights import UNREACHED, read_torch
from common.released.configs import Rule, Settings, main_translate, only, same, translate_keys
from common.released.weights import MEMORY_BANK_HEADS, deeplab_from_memory_bank

# Prefixes of the two heads' keys, released -> this project.
HEADS = {
    f"{head}_head.{index}.": f"{head}.{name}."
    for head in ("projection", "prediction")
    for index, name in (("0", "first"), ("1", "norm"), ("3", "last"))
}
# The same for selectors; the number of a class and a dot follow.
SELECTORS = {"contrastive_class_selector_memory": "memory_selectors.", "contrastive_class_selector_": "selectors."}
# Tensors of each class's selector, released -> this project, where those of all classes are stacked.
STACKED = {
    "0.weight": "first_weight",
    "0.bias": "first_bias",
    "1.weight": "weight",
    "1.bias": "bias",
    "1.running_mean": "running_mean",
    "1.running_var": "running_var",
    "1.num_batches_tracked": "num_batches_tracked",
    "3.weight": "last_weight",
    "3.bias": "last_bias",
}

# Mean of red, green and blue that is subtracted from the images of a dataset; in the order BGR with COCO weights.
MEANS = {
    "pascal_voc": (122.6789143, 116.66876762, 104.00698793),
    "cityscapes": (73.15835921, 82.90891754, 72.39239876),
    "other": (127.5, 127.5, 127.5),
}


def heads_from_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the heads and selectors of a released network to the state dict of `Heads`; other keys are left out.

    Raises:
        UserError: selectors that lack a class, or have an unknown key.
    """
    renamed: dict[str, Tensor] = {}
    classes: dict[str, dict[int, Tensor]] = {}
    for key, value in state.items():
        if prefix := next((prefix for prefix in HEADS if key.startswith(prefix)), None):
            renamed[HEADS[prefix] + key.removeprefix(prefix)] = value
        elif prefix := next((prefix for prefix in SELECTORS if key.startswith(prefix)), None):
            found = re.fullmatch(r"(\d+)\.(.+)", key.removeprefix(prefix))
            if found is None or found[2] not in STACKED:
                raise UserError(f"not a released network of memory bank: {key}")
            classes.setdefault(SELECTORS[prefix] + STACKED[found[2]], {})[int(found[1])] = value
    for name, tensors in classes.items():
        if set(tensors) != set(range(len(tensors))):
            raise UserError(f"not a released network of memory bank: {name} of some classes is missing")
        stacked = torch.stack([tensors[index] for index in range(len(tensors))])
        renamed[name] = stacked.squeeze(1) if name.endswith(("last_weight", "last_bias")) else stacked
    return renamed


COCO_WEIGHTS = "data/resnet101COCO-41f33a49.pth"
# Settings that follow from the dataset alone. The first existing root counts, this project's before the release's.
DATASETS: dict[str, Settings] = {
    "cityscapes": {
        "data.dataset": "cityscapes",
        "data.root": ("data/cityscapes", "../data/CityScapes", "../data/Cityscapes"),
        "data.order_dir": "splits/city",
        "model.num_classes": 19,
        "method.class_balance": True,
    },
    "pascal_voc": {
        "data.dataset": "voc",
        "data.root": ("data/VOCdevkit/VOC2012", "../data/VOC2012"),
        "data.order_dir": "splits/voc",
        "model.num_classes": 21,
        "method.bank_rows_factor": 7.0,
        "method.mix_background": False,
    },
}
# Settings that hold for every config of the release.
ALWAYS: Settings = {"data.scale_range": [1.0, 1.0], "optim.nesterov": False}

# Released keys that keep their meaning.
SAME = {
    "training.batch_size": "optim.batch_size",
    "training.num_workers": "data.workers",
    "training.momentum": "optim.momentum",
    "training.weight_decay": "optim.weight_decay",
    "training.num_iterations": "run.steps",
    "training.learning_rate": "optim.lr",
    "training.lr_schedule_power": "optim.poly_power",
    "training.use_teacher_train": "method.use_teacher_train",
    "training.save_teacher_test": "method.save_teacher_test",
    "training.data.split_id_list": "data.split_id",
    "training.data.labeled_samples": "data.labeled_samples",
    "seed": "run.seed",
    "utils.val_per_iter": "run.eval_every",
}
# Keys with a single valid value, and its meaning here.
ONLY = {
    "model": ("deeplab", "`version` chooses the head"),
    "training.optimizer": ("sgd", "the default of optim.name"),
    "training.lr_schedule": ("poly", "the only schedule"),
}
REQUIRED = (
    "version",
    "dataset",
    "training.batch_size",
    "training.num_iterations",
    "training.learning_rate",
    "training.pretraining",
    "training.data.split_id_list",
    "training.data.labeled_samples",
    "training.data.input_size",
)


def translate(text: str) -> Translation | None:
    """Translate a config file of the release; None if `text` is something else.

    Raises:
        UserError: see `translate_values`.
    """
    try:
        values = read_commented_json(text)
    except ValueError:
        return None
    if not isinstance(values, dict) or not isinstance(values.get("training"), dict) or "run" in values:
        return None
    return translate_values(values)


def translate_values(values: Mapping[str, Any]) -> Translation:
    """Translate a config of the release.

    Args:
        values: Nested values of its JSON file.

    Raises:
        UserError: a key that the release does not have, a missing key, or an unknown value.
    """
    flat = flatten(dict(values))
    translation = translate_keys(flat, KEYS, REQUIRED, ALWAYS, "memory bank's release")
    folder = flat.get("utils.checkpoint_dir")
    return translation if folder is None else replace(translation, runs=str(folder))


def config_in(file: Path) -> Translation | None:
    """Translate the config inside a checkpoint of the release; None if there is none.

    The backbone follows from the weights: the release trains DeepLabV3+ with a ResNet-50, and with a ResNet-101 for
    domain adaptation.

    Raises:
        UserError: see `translate_values`; a file that is not a checkpoint.
    """
    stored = read_torch(file) if file.suffix != ".safetensors" else None
    if not isinstance(stored, Mapping) or not isinstance(stored.get("config"), Mapping):
        return None
    translation = translate_values(stored["config"])
    deep = any(key.startswith("layer3.22.") for key in stored.get("model", ()))
    translation.values["model"]["backbone"] = "resnet101" if deep else "resnet50"
    return translation


def _dataset(key: str, flat: Settings) -> Settings:
    settings = dict(DATASETS[_dataset_name(flat)])
    roots = settings["data.root"]
    return settings | {"data.root": next((root for root in roots if Path(root).is_dir()), roots[0])}


def _dataset_name(flat: Settings) -> str:
    name = "pascal_voc" if flat["dataset"] == "pascal" else flat["dataset"]
    if name not in DATASETS:
        raise UserError(f"dataset is {name!r}; the release supports cityscapes and pascal_voc (or pascal)")
    return name


def _version(key: str, flat: Settings) -> Settings:
    """Choose the network; DeepLabV2's head depends on the pretraining, and it sees Cityscapes at half size."""
    if _is_v2(flat):
        half = {"method.half_size": True} if _dataset_name(flat) == "cityscapes" else {}
        head = "v2_coco" if _is_coco(flat) else "v2"
        return {"model.backbone": "resnet101", "model.head": head, "model.output_stride": 8} | half
    return {"model.backbone": "resnet50", "model.head": "v3plus_memory_bank", "model.output_stride": 16}


def _is_v2(flat: Settings) -> bool:
    version = str(flat["version"])
    if version not in ("2", "3"):
        raise UserError(f"version is {version!r}; the release supports 2 (DeepLabV2) and 3 (DeepLabV3+)")
    return version == "2"


def _pretraining(key: str, flat: Settings) -> Settings:
    settings: Settings = {"model.input_mean": list(MEANS[_dataset_name(flat)])}
    if not _is_coco(flat):
        return settings | {"model.pretrained": True}
    if not _is_v2(flat):
        raise UserError(f"{key} is COCO with version 3; COCO weights exist only for DeepLabV2 (version 2)")
    return settings | {"model.pretrained": COCO_WEIGHTS, "model.bgr": True}


def _is_coco(flat: Settings) -> bool:
    name = flat["training.pretraining"]
    if name not in ("COCO", "imagenet"):
        raise UserError(f"training.pretraining is {name!r}; the release supports COCO and imagenet")
    return name == "COCO"


def _input_size(key: str, flat: Settings) -> Settings:
    try:
        height, width = (int(side) for side in str(flat[key]).strip("()[]").split(","))
    except ValueError:
        raise UserError(f'{key} is {flat[key]!r}; give height and width of a crop, e.g. "512,512"') from None
    return {"data.crop_size": [height, width]}


def _save_every(key: str, flat: Settings) -> Settings | str:
    """Drop an interval longer than the run, as in the released configs: a run without checkpoints cannot resume."""
    steps, length = flat[key], flat["training.num_iterations"]
    if isinstance(steps, int) and isinstance(length, int) and steps > length:
        return "ignored, longer than the run: checkpoints are written at every evaluation"
    return {"run.save_every": steps}


KEYS: dict[str, Rule] = {
    **same(SAME),
    **only(ONLY),
    "dataset": _dataset,
    "version": _version,
    "training.pretraining": _pretraining,
    "training.data.input_size": _input_size,
    "ignore_label": lambda key, flat: "ignored: ignored pixels are 255 here, whatever value the label files use",
    "utils.save_checkpoint_every": _save_every,
    "utils.checkpoint_dir": lambda key, flat: f"folder of runs trained from this file: {flat[key]}/<name of the file>",
    "utils.save_best_model": lambda key, flat: "ignored: the best checkpoint is always kept",
}
# DeepLabV2's weights do not reveal their pretraining, which determines the preprocessing: the stored config does.
RELEASE = Release(
    deeplab_from_memory_bank,
    configs={
        ("v3plus_memory_bank", 21): "memory_bank/configs/configSSL_pascal_1_8_split0_v3.json",
        ("v3plus_memory_bank", 19): "memory_bank/configs/configSSL_city_1_8_split0_v3.json",
    },
    heads=MEMORY_BANK_HEADS + UNREACHED,
    config_in=config_in,
    translate=translate,
)

if __name__ == "__main__":
    main_translate("memory_bank", translate)
