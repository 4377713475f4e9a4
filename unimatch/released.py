"""Translate the config files of UniMatch's and UniMatch V2's repositories, and describe the checkpoints they write.

python unimatch/released.py FILE.yaml --out mine.json
"""

from typing import Any

from common.config.files import Translation
from common.errors import UserError
from common.evaluation.released_checkpoints import Release
from common.released.configs import Rule, Settings, choice, main_translate, root_of, same, translate_keys, whole
from common.released.weights import UNIMATCH_V2_UNUSED, segmenter_from_unimatch
from common.released.yaml_configs import load_plain_yaml

PROCESSES = 4  # of the released runs; their files state the batch per process
REQUIRED = ("dataset", "nclass", "crop_size", "epochs", "batch_size", "lr", "lr_multi", "backbone")
# Settings that follow from the dataset alone.
DATASETS: dict[str, Settings] = {
    "pascal": {
        "data.dataset": "voc",
        "data.root": "data/VOCdevkit/VOC2012",
        "data.split": "splits/unimatch/pascal/366",
    },
    "cityscapes": {
        "data.dataset": "cityscapes",
        "data.root": "data/cityscapes",
        "data.split": "splits/unimatch/cityscapes/1_8",
        "method.sliding_window": True,
    },
    "ade20k": {
        "data.dataset": "ade20k",
        "data.root": "data/ADEChallengeData2016",
        "data.split": "splits/unimatch/ade20k/1_8",
    },
    "coco": {"data.dataset": "coco", "data.root": "data/coco", "data.split": "splits/unimatch/coco/1_128"},
}
RESNETS = {
    name: {"model.backbone": name, "model.stem": "deep", "model.pretrained": True} for name in ("resnet50", "resnet101")
}
DINOV2 = {
    f"dinov2_{size}": {
        "model.backbone": f"vit_{size}_patch14_dinov2",
        "model.dinov2_positions": True,
        "model.pretrained": True,
    }
    for size in ("small", "base", "large", "giant")
}
# Settings of a version of the method that its scripts hard-code.
V1: Settings = {
    "model.head": "v3plus_unimatch",
    "optim.name": "sgd",
    "optim.weight_decay": 1e-4,
    "optim.momentum": 0.9,
    "optim.nesterov": False,
}
V2: Settings = {"model.head": "dpt", "optim.name": "adamw", "optim.weight_decay": 0.01, "method.alpha": 0.996}
ALWAYS: Settings = {"data.scale_range": [0.5, 2.0]}


def translate(text: str) -> Translation | None:
    """Translate a config file of either release; None if `text` is something else.

    Raises:
        UserError: unsafe YAML, a key that the releases do not have, a missing key, or an unknown value.
    """
    flat = load_plain_yaml(text)
    if flat is None or not {"nclass", "lr_multi"} <= set(flat):
        return None
    return translate_keys(flat, KEYS, REQUIRED, ALWAYS, "UniMatch's releases")


def _crop(key: str, flat: Settings) -> Settings:
    return {"data.crop_size": [whole(flat, key)] * 2}


def _root(key: str, flat: Settings) -> Settings:
    return {"data.root": root_of(flat[key], choice(flat, "dataset", DATASETS)["data.root"])}


def _batch(key: str, flat: Settings) -> Settings:
    return {"optim.batch_size": whole(flat, key) * PROCESSES}


def _rates(key: str, flat: Settings) -> Settings:
    """Convert the encoder's rate and the factor of all others to the others' rate and the factor of the encoder."""
    lr, factor = flat["lr"], flat["lr_multi"]
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 for value in (lr, factor)):
        raise UserError(f"lr is {lr!r} and lr_multi {factor!r}; both must be numbers above 0")
    return {"optim.lr": float(f"{lr * factor:.12g}"), "optim.encoder_lr_scale": float(f"{1 / factor:.12g}")}


def _loss(key: str, flat: Settings) -> Settings:
    return choice(flat, key, {"CELoss": {"method.ohem": False}, "OHEM": {"method.ohem": True}})


def _ignore(key: str, flat: Settings) -> str:
    if flat[key] != 255:
        raise UserError(f"{key} is {flat[key]!r}; the releases support only 255")
    return "ignored: ignored pixels are 255 here"


def _min_kept(key: str, flat: Settings) -> Settings:
    return {"method.ohem_min_kept": max(1, whole(flat, key) // whole(flat, "batch_size"))}


def _backbone(key: str, flat: Settings) -> Settings:
    settings = choice(flat, key, RESNETS | DINOV2)
    is_v2 = str(flat[key]).lower() in DINOV2
    return settings | (V2 if is_v2 else V1)


def _head(key: str, flat: Settings) -> str:
    return choice(flat, key, dict.fromkeys(("deeplabv3plus", "dpt"), "ignored: model.head follows from the backbone"))


def _stride(key: str, flat: Settings) -> Settings:
    if flat[key] != [False, False, True]:
        raise UserError(f"{key} is {flat[key]!r}; only [False, False, True], output stride 16, is supported")
    return {"model.output_stride": 16}


def _frozen(key: str, flat: Settings) -> Settings:
    if not isinstance(flat[key], bool):
        raise UserError(f"{key} is {flat[key]!r}; it must be True or False")
    return {"model.freeze_encoder": flat[key]}


def _dataset(key: str, flat: Settings) -> Settings:
    return choice(flat, key, DATASETS)


def _dilations(key: str, flat: Settings) -> Settings:
    value: Any = flat[key]
    if not isinstance(value, list) or len(value) != 3:
        raise UserError(f"{key} is {value!r}; it must be a list of three rates")
    return {"model.rates": value}


KEYS: dict[str, Rule] = {
    **same({"nclass": "model.num_classes", "epochs": "run.epochs", "conf_thresh": "method.conf_thresh"}),
    **same({"criterion.kwargs.thresh": "method.ohem_threshold"}),
    "dataset": _dataset,
    "data_root": _root,
    "crop_size": _crop,
    "batch_size": _batch,
    "lr": _rates,
    "lr_multi": lambda key, flat: "see lr",
    "criterion.name": _loss,
    "criterion.kwargs.ignore_index": _ignore,
    "criterion.kwargs.min_kept": _min_kept,
    "model": _head,
    "backbone": _backbone,
    "replace_stride_with_dilation": _stride,
    "dilations": _dilations,
    "lock_backbone": _frozen,
}
RELEASE = Release(
    segmenter_from_unimatch,
    configs={
        ("v3plus_unimatch", 21): "unimatch/configs/pascal_unimatch_resnet101.json",
        ("v3plus_unimatch", 19): "unimatch/configs/cityscapes_unimatch_resnet101.json",
        ("v3plus_unimatch", 150): "unimatch/configs/ade20k_unimatch_resnet101.json",
        ("v3plus_unimatch", 81): "unimatch/configs/coco_unimatch_resnet101.json",
        ("dpt", 21): "unimatch/configs/pascal_unimatch_v2_dinov2_base.json",
        ("dpt", 19): "unimatch/configs/cityscapes_unimatch_v2_dinov2_base.json",
        ("dpt", 150): "unimatch/configs/ade20k_unimatch_v2_dinov2_base.json",
        ("dpt", 81): "unimatch/configs/coco_unimatch_v2_dinov2_base.json",
    },
    entries=("model_ema", "model"),
    heads=UNIMATCH_V2_UNUSED,
    translate=translate,
    role_entries={"teacher": "model_ema", "student": "model"},
)

if __name__ == "__main__":
    main_translate("unimatch", translate)
