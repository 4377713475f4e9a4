"""Translate the config.py of CPCL's repository, and describe the checkpoints it writes.

python cpcl/released.py config.py --out mine.json
"""

import ast
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config.files import Translation
from common.errors import UserError
from common.evaluation.released_checkpoints import Release
from common.released.configs import (
    Rule,
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
from common.released.weights import deeplab_from_cps

NAMES = ("C", "config", "cfg")  # names of one object in the release
ASSIGNED = re.compile(rf"^\s*({'|'.join(NAMES)})\.\w+\s*=", re.MULTILINE)


@dataclass(frozen=True)
class Experiment:
    """Values that follow from the dataset alone.

    Attributes:
        images: Number of training images.
        folder: Folder of the data, below the release's `volna` and below `data` here.
        lists: Folder of the lists, below `folder`.
        settings: Settings of this project.
    """

    images: int
    folder: str
    lists: str
    settings: Settings = field(default_factory=dict)


# Class weights of the loss on hard pixels for Cityscapes, from the released training script.
CLASS_WEIGHT = (
    (0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023)
    + (0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507)
)  # fmt: skip
EXPERIMENTS = {
    "21": Experiment(10582, "pascal_voc", "subset_train_aug", {"data.dataset": "voc"}),
    "19": Experiment(
        2975,
        "city",
        "config_new/subset_train",
        {
            "data.dataset": "cityscapes",
            "method.ohem": True,
            "method.ohem_threshold": 0.7,
            "method.ohem_min_kept": 50000,
            "method.ohem_class_weight": list(CLASS_WEIGHT),
        },
    ),
}
EVALUATED = {
    "21": 1,
    "19": 2,
}  # epochs between evaluations, as in cpcl/configs; the release has none in training
# Settings that hold for every config of the release.
ALWAYS: Settings = {
    "model.backbone": "resnet50",
    "model.stem": "deep",
    "model.head": "v3plus_cps",
    "model.pretrained": True,
    "optim.nesterov": False,
}
REQUIRED = ("labeled_ratio", "num_classes", "image_height", "image_width", "lr", "batch_size", "nepochs")


def translate(text: str) -> Translation | None:
    """Translate a `config.py` of the release; None if `text` is something else.

    Raises:
        UserError: not Python, a key that the release does not have, a missing key, a key that is not written as a
            literal, or an unknown value.
    """
    if text.lstrip().startswith("{") or not ASSIGNED.search(text):
        return None
    literals, others = read_assignments(text)
    for name, line in others.items():
        if name in SAME or name in REQUIRED:
            raise UserError(f"line {line}: C.{name} is conditional or not a literal, and no code is run; write a value")
    translation = translate_keys(literals, RULES, REQUIRED, ALWAYS, "CPCL's release")
    computed = [(name, f"(line {line})", _outcome(name)) for name, line in others.items()]
    translation.rows[-1:-1] = computed
    return translation


def read_assignments(text: str) -> tuple[Settings, dict[str, int]]:
    """Read the assignments `C.name = ...` without running any code.

    If one branch of an `if` assigns a literal to a name and the other one does not, the literal counts: the released
    files read environment variables that way.

    Returns:
        The literals, and the line of every other assigned name.

    Raises:
        UserError: not Python, or the config is changed in another way.
    """
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise UserError(f"line {error.lineno}: not Python: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"not Python: {error}") from None
    for node in ast.walk(tree):
        if _changes_unseen(node):
            raise UserError(f"line {node.lineno}: values are only read from C.name = VALUE; write it that way")
    return _of_block(tree.body)


def _of_block(statements: list[ast.stmt]) -> tuple[Settings, dict[str, int]]:
    literals: Settings = {}
    others: dict[str, int] = {}
    for statement in statements:
        found, rest = _of_statement(statement)
        for name in rest:
            literals.pop(name, None)
        for name in found:
            others.pop(name, None)
        literals |= found
        others |= rest
    return literals, others


def _of_statement(statement: ast.stmt) -> tuple[Settings, dict[str, int]]:
    if isinstance(statement, ast.If):
        first, second = _of_block(statement.body), _of_block(statement.orelse)
        found = {
            name: value
            for (literals, _), (_, others) in ((first, second), (second, first))
            for name, value in literals.items()
            if name in others
        }
        return found, {name: line for name, line in _assigned(statement).items() if name not in found}
    assigned = _assigned(statement)
    if isinstance(statement, ast.Assign) and all(_name(target) for target in statement.targets):
        try:
            value = json.loads(json.dumps(ast.literal_eval(statement.value)))  # tuples become lists
        except (ValueError, TypeError, RecursionError, MemoryError):
            return {}, assigned
        return dict.fromkeys(assigned, value), {}
    return {}, assigned


def _assigned(statement: ast.stmt) -> dict[str, int]:
    """Find every name of the config that a statement may change, with its line."""
    stored = [node for node in ast.walk(statement) if isinstance(node, ast.Attribute) and _name(node)]
    return {node.attr: node.lineno for node in stored if not isinstance(node.ctx, ast.Load)}


def _changes_unseen(node: ast.AST) -> bool:
    """Detect `C["name"] = ...`, `C.update(...)` and `setattr(C, ...)`."""
    if isinstance(node, ast.Subscript):
        return _config(node.value) and not isinstance(node.ctx, ast.Load)
    if not isinstance(node, ast.Call):
        return False
    by_method = isinstance(node.func, ast.Attribute) and _config(node.func.value)
    by_setattr = isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr")
    return by_method or (by_setattr and any(map(_config, node.args)))


def _config(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in NAMES


def _name(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and _config(node.value)


def _outcome(name: str) -> str:
    if name in RULES:
        return "ignored, not a literal: derived from other keys, or the default"
    return "ignored: not a literal"


def _experiment(flat: Settings) -> Experiment:
    return choice(flat, "num_classes", EXPERIMENTS)


def _dataset(key: str, flat: Settings) -> Settings:
    return _experiment(flat).settings | {"model.num_classes": flat[key]}


def _lists(key: str, flat: Settings) -> Settings:
    """Find root and lists, where the file names them if it does."""
    experiment, ratio = _experiment(flat), whole(flat, "labeled_ratio")
    given = flat.get("dataset_path") or f"{flat.get('volna', '')}DATA/{experiment.folder}"
    root = root_of(given, f"data/{experiment.folder}")
    names = {
        kind: str(Path(root, experiment.lists, f"train_aug_{kind}_1-{ratio}.txt")) for kind in ("labeled", "unlabeled")
    }
    return {
        "data.root": root,
        "data.labeled_list": flat.get("train_source", names["labeled"]),
        "data.unlabeled_list": flat.get("unsup_source", names["unlabeled"]),
    }


def _steps(flat: Settings) -> int:
    """Count the steps per epoch: the whole batches of the longer list."""
    images = _experiment(flat).images
    labeled = flat.get("num_train_imgs", images // whole(flat, "labeled_ratio"))
    counts = {"num_train_imgs": labeled, "num_unsup_imgs": flat.get("num_unsup_imgs", images - labeled)} | flat
    longer = max(whole(counts, "num_train_imgs"), whole(counts, "num_unsup_imgs"))
    longer = whole({"max_samples": longer} | flat, "max_samples")
    rule = max(1, longer // whole(flat, "batch_size"))
    return whole({"niters_per_epoch": rule} | flat, "niters_per_epoch")


def _length(key: str, flat: Settings) -> Settings:
    """Read length and intervals. Every second epoch (counted from 0) has a snapshot after a sixth of the run."""
    epochs, steps = whole(flat, "nepochs"), _steps(flat)
    every = whole({"snapshot_iter": 2} | flat, "snapshot_iter")
    first = (epochs // 6 // every + 1) * every
    settings = {
        "run.epochs": epochs,
        "run.steps_per_epoch": steps,
        "run.snapshot_every": every * steps,
        "run.snapshot_from": (first + 1) * steps,
    }
    between = choice(flat, "num_classes", EVALUATED)
    return settings | ({"run.eval_every": between * steps} if between > 1 else {})


def _crop(key: str, flat: Settings) -> Settings:
    return {"data.crop_size": [whole(flat, "image_height"), whole(flat, "image_width")]}


def _pretrained(key: str, flat: Settings) -> Settings:
    """Use the file if it exists; any other path, as the release has one, means ImageNet weights."""
    path: Any = flat[key]
    return {"model.pretrained": path if Path(str(path)).is_file() else True}


SAME = {
    "seed": "run.seed",
    "lr": "optim.lr",
    "batch_size": "optim.batch_size",
    "lr_power": "optim.poly_power",
    "momentum": "optim.momentum",
    "weight_decay": "optim.weight_decay",
    "unsup_weight": "method.unsup_weight",
    "train_scale_array": "method.train_scale_array",
    "cutmix_mask_prop_range": "method.cutmix_mask_prop_range",
    "cutmix_boxmask_n_boxes": "method.cutmix_boxmask_n_boxes",
    "num_workers": "data.workers",
}
COUNTS = ("num_train_imgs", "num_unsup_imgs", "max_samples", "niters_per_epoch")
MASKS = "the only way of drawing boxes"
RULES: dict[str, Rule] = {
    **same(SAME),
    **only(
        {
            "cutmix_boxmask_fixed_aspect_ratio": (False, MASKS),
            "cutmix_boxmask_by_size": (False, MASKS),
            "cutmix_boxmask_outside_bounds": (False, MASKS),
            "cutmix_boxmask_no_invert": (False, MASKS),
            "warm_up_epoch": (0, "there is no warm-up"),
            "bn_eps": (1e-5, "the default of batch norm"),
            "bn_momentum": (0.1, "the default of batch norm"),
            "eval_scale_array": ([1], "images are evaluated at their own size"),
            "eval_flip": (False, "images are evaluated without flipping"),
        }
    ),
    **ignored(
        "repo_name abs_dir root_dir log_dir log_dir_link snapshot_dir train_log_file val_log_file link_val_log_file",
        "everything goes to the run folder",
    ),
    **ignored("device", "`accelerate launch` chooses the GPUs"),
    **ignored("image_mean image_std", "ImageNet statistics"),
    **ignored("background", "defined by the dataset"),
    **ignored("eval_stride_rate", "2/3, as released"),
    **ignored("eval_crop_size", "windows have the size of the crop"),
    **ignored("eval_source", "the validation images are the dataset's own"),
    **ignored("img_root_folder gt_root_folder", "set by data.root"),
    **ignored(
        "test_source demo_source num_eval_imgs eval_iter record_info_iter display_iter", "the release never reads it"
    ),
    "num_classes": _dataset,
    "labeled_ratio": _lists,
    **dict.fromkeys(("volna", "dataset_path"), lambda key, flat: "in data.root, if there are data"),
    **dict.fromkeys(("train_source", "unsup_source"), lambda key, flat: "in data.labeled_list, data.unlabeled_list"),
    "nepochs": _length,
    "snapshot_iter": lambda key, flat: "in run.snapshot_every, run.snapshot_from",
    **dict.fromkeys(COUNTS, lambda key, flat: "in run.steps_per_epoch"),
    "image_height": _crop,
    "image_width": lambda key, flat: "in data.crop_size",
    "pretrained_model": _pretrained,
}
RELEASE = Release(
    deeplab_from_cps,
    configs={
        ("v3plus_cps", 21): "cpcl/configs/voc_resnet50_1over8.json",
        ("v3plus_cps", 19): "cpcl/configs/city_resnet50_1over8.json",
    },
    translate=translate,
)

if __name__ == "__main__":
    main_translate("cpcl", translate)
