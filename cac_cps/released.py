"""Translate the config files of CAC's repository, and convert the checkpoints of CAC and CPS.

python cac_cps/released.py FILE.json --out mine.json
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from cac_cps.config import STEPS_PER_EPOCH
from common.config.files import Translation, flatten, read_commented_json
from common.errors import UserError
from common.evaluation.released_checkpoints import Release
from common.released.configs import (
    Settings,
    choice,
    ignored,
    main_translate,
    only,
    root_of,
    same,
    translate_keys,
    whole,
)
from common.released.weights import CAC_HEADS, deeplab_from_cac, deeplab_from_cps


def segmenter_of(state: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Convert the segmenter of a published checkpoint to this project's keys.

    Args:
        state: Weights of CAC, of CPS in CAC's code base, or of original CPS.
        number: Network 1 or 2 of CPS; CAC has one network.

    Raises:
        UserError: keys of another network, or a missing second network.
    """
    is_cac = any(key.removeprefix("module.").startswith("encoder.backbone.") for key in state)
    return deeplab_from_cac(state) if is_cac and number == 1 else deeplab_from_cps(state, number)


CITY_LR, CITY_CPS_LR = 0.1, 0.04  # CPS in CAC's code base was trained on Cityscapes with its own rate
DATASETS: dict[str, Settings] = {
    "voc": {"data.dataset": "voc", "model.num_classes": 21},
    "cityscapes": {"data.dataset": "cityscapes", "model.num_classes": 19},
}
ROOTS = {"voc": "data/VOCdevkit/VOC2012", "cityscapes": "data/cityscapes"}
LISTS = {"voc": "voc_splits", "cityscapes": "city_splits"}
# Settings that hold for every config of the release.
ALWAYS: Settings = {
    "data.scale_range": [0.5, 2.0],
    "model.head": "v3plus_cac",
    "model.pretrained": True,
    "optim.nesterov": False,
    "method.backbone_lr_scale": 0.1,
    "method.cac.scale_range": [0.8, 2.0],
}
REQUIRED = (
    "dataset",
    "data_dir",
    "datalist",
    "n_labeled_examples",
    "n_gpu",
    "model.layers",
    "model.selected_num",
    "optimizer.args.lr",
    "train_supervised.batch_size",
    "train_supervised.crop_size",
    "train_supervised.base_size",
    "trainer.epochs",
)
UNUSED = "the release never reads it"


def translate(text: str) -> Translation | None:
    """Translate a config file of the release; None if `text` is something else.

    Raises:
        UserError: a key that the release does not have, a missing key, or an unknown value.
    """
    try:
        values = read_commented_json(text)
    except ValueError:
        return None
    if not isinstance(values, dict) or "train_supervised" not in values or "run" in values:
        return None
    flat = flatten(values)
    translation = translate_keys(flat, RULES, REQUIRED, ALWAYS, "CAC's release")
    folder = flat.get("trainer.save_dir")
    return translation if folder is None else replace(translation, runs=str(folder))


def _dataset(key: str, flat: Settings) -> Settings:
    return choice(flat, key, DATASETS)


def _root(key: str, flat: Settings) -> Settings:
    return {"data.root": root_of(flat[key], choice(flat, "dataset", ROOTS))}


def _lists(key: str, flat: Settings) -> Settings:
    """Find the list where `splits/adopt.py` writes it, or else in the folder of the release."""
    name = f"{choice(flat, 'dataset', LISTS)}{flat['datalist']}"
    labels = whole(flat, "n_labeled_examples")
    adopted, original = Path("splits", name), Path("dataloaders", name)
    folder = original if original.is_dir() and not adopted.is_dir() else adopted
    return {"data.split": f"{folder}/{labels}"}


def _backbone(key: str, flat: Settings) -> Settings:
    return {"model.backbone": choice(flat, key, {"50": "resnet50", "101": "resnet101"})}


def _supervised(flat: Settings) -> bool:
    """Read `model.supervised` and `model.semi`, exactly one of which is true."""
    semi = flat.get("model.semi", not flat.get("model.supervised", False))
    supervised = flat.get("model.supervised", not semi)
    if not isinstance(semi, bool) or supervised is not (not semi):
        raise UserError("one of model.supervised and model.semi must be true, and the other one false")
    return supervised


def _mode(key: str, flat: Settings) -> Settings:
    return {"method.cac.supervised": _supervised(flat)}


def _length(key: str, flat: Settings) -> Settings:
    """Read the length; in supervised runs an epoch is one pass over the labeled images, the default here."""
    return {"run.epochs": flat[key]} | ({} if _supervised(flat) else {"run.steps_per_epoch": STEPS_PER_EPOCH})


def _cells(key: str, flat: Settings) -> Settings:
    """Convert the number of cells per process to the total over all processes."""
    return {"method.cac.selected_num": whole(flat, key) * whole(flat, "n_gpu")}


def _lr(key: str, flat: Settings) -> Settings:
    has_cps_lr = flat[key] == CITY_LR and choice(flat, "dataset", LISTS) == LISTS["cityscapes"]
    return {"optim.lr": flat[key]} | ({"method.cps.lr": CITY_CPS_LR} if has_cps_lr else {})


def _crop(key: str, flat: Settings) -> Settings:
    return {"data.crop_size": [whole(flat, key)] * 2}


def _workers(key: str, flat: Settings) -> Settings | str:
    """Convert the loader workers shared by all processes to those of each process."""
    if flat[key] == 0:
        return {"data.workers": 0}
    return {"data.workers": max(1, whole(flat, key) // whole(flat, "n_gpu"))}


def _as_labeled(key: str, flat: Settings) -> str:
    """Check that crops and batches of unlabeled images equal those of labeled ones, as here."""
    labeled = key.replace("train_unsupervised", "train_supervised")
    if flat[key] != flat.get(labeled):
        raise UserError(f"{key} is {flat[key]!r}; it must equal {labeled}, {flat.get(labeled)!r}")
    return f"equal to {labeled}"


def _cadence(key: str, flat: Settings) -> Settings | str:
    epochs = whole(flat, key)
    if epochs == 1 or _supervised(flat):
        return "ignored: a run is evaluated after every epoch"
    return {"run.eval_every": epochs * STEPS_PER_EPOCH}


SAME = {
    "random_seed": "run.seed",
    "model.proj_final_dim": "method.cac.proj_final_dim",
    "model.pos_thresh_value": "method.cac.pos_thresh_value",
    "model.weight_unsup": "method.cac.weight_unsup",
    "model.epoch_start_unsup": "method.cac.epoch_start_unsup",
    "model.temp": "method.cac.temp",
    "model.step_save": "method.cac.step_save",
    "optimizer.args.weight_decay": "optim.weight_decay",
    "optimizer.args.momentum": "optim.momentum",
    "train_supervised.batch_size": "optim.batch_size",
    "train_supervised.base_size": "method.base_size",
    "train_supervised.jitter": "method.jitter",
    "train_unsupervised.iou_bound": "method.cac.iou_bound",
    "trainer.log_per_iter": "run.log_every",
}
# Keys with a single valid value, and its meaning here.
ONLY = {
    "lr_scheduler": ("Poly", "the only schedule"),
    "use_weak_lables": (False, "labels of unlabeled images are never read"),
    "model.supervised_w": (1, "the weight of the labeled loss"),
    "model.downsample": (True, "the only resolution of the embedding"),
    "model.out_dim": (256, "the default of model.channels"),
    "model.backbone": ("deeplab_v3+", "set by model.head"),
    "model.stride": (8, "pixels per cell"),
    "optimizer.type": ("SGD", "the default of optim.name"),
    "train_supervised.shuffle": (True, "images are always shuffled"),
    "train_supervised.scale": (True, "set by data.scale_range"),
    "train_supervised.augment": (True, "labeled images are always augmented"),
    "train_supervised.flip": (True, "images are always flipped at random"),
    "train_unsupervised.shuffle": (True, "images are always shuffled"),
    "train_unsupervised.stride": (8, "pixels per cell"),
    "trainer.val": (True, "a run is always evaluated"),
}
RULES = {
    **same(SAME),
    **only(ONLY),
    **ignored("name experim_name", "the run folder has the name of the config file"),
    **ignored(
        "diff_lrs ramp_up unsupervised_w ignore_index weakly_loss_w pretrained model.sup_loss trainer.save_period "
        "trainer.tensorboardX train_supervised.rotate train_supervised.blur train_unsupervised.rotate "
        "train_unsupervised.blur train_unsupervised.scale train_unsupervised.flip train_unsupervised.augment "
        "train_unsupervised.jitter",
        UNUSED,
    ),
    **ignored("train_supervised.data_dir train_unsupervised.data_dir val_loader.data_dir", "set by data.root"),
    **ignored("train_supervised.split train_unsupervised.split val_loader.split", "set by data.split"),
    **ignored("train_unsupervised.num_workers val_loader.num_workers", "equal to train_supervised.num_workers"),
    **ignored(
        "val_loader.batch_size val_loader.crop_size val_loader.base_size val_loader.val val_loader.shuffle",
        "whole images are evaluated one by one",
    ),
    **ignored("trainer.monitor", "the best checkpoint is the one with the highest mIoU"),
    **ignored("trainer.early_stop", "no run is stopped early"),
    **ignored("trainer.log_dir", "logs go to the run folder"),
    **ignored("n_gpu", "counted in method.cac.selected_num; `accelerate launch` sets the processes"),
    "dataset": _dataset,
    "data_dir": _root,
    "datalist": _lists,
    "n_labeled_examples": lambda key, flat: "in data.split",
    "model.layers": _backbone,
    "model.supervised": _mode,
    "model.semi": _mode,
    "model.selected_num": _cells,
    "optimizer.args.lr": _lr,
    "train_supervised.crop_size": _crop,
    "train_supervised.num_workers": _workers,
    "train_unsupervised.batch_size": _as_labeled,
    "train_unsupervised.crop_size": _as_labeled,
    "train_unsupervised.base_size": _as_labeled,
    "trainer.save_dir": lambda key, flat: f"folder of runs trained from this file: {flat[key]}/<name of the file>",
    "trainer.epochs": _length,
    "trainer.val_per_epochs": _cadence,
}
RELEASE = Release(
    segmenter_of,
    configs={
        ("v3plus_cac", 21): "cac_cps/configs/voc_cac_deeplabv3+_resnet50_1over8_datalist0.json",
        ("v3plus_cac", 19): "cac_cps/configs/city_cac_deeplabv3+_resnet50_1over8_datalist0.json",
        ("v3plus_cps", 21): "cac_cps/configs/voc_cps_resnet50_1over8.json",
        ("v3plus_cps", 19): "cac_cps/configs/city_cps_resnet50_1over8.json",
    },
    heads=CAC_HEADS,
    translate=translate,
)

if __name__ == "__main__":
    main_translate("cac_cps", translate)
