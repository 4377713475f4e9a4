"""Read the YAML config files of PRCL's and CSS's releases, which share one layout, and translate their common keys."""

import re
from pathlib import Path
from typing import Any

import yaml

from common.config.files import flatten
from common.errors import UserError
from common.released.configs import Rule, Settings, choice, ignored, only, root_of, same, whole

PYTHON = "tag:yaml.org,2002:python/"
NUMBER = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")

DATASETS: dict[str, Settings] = {
    "VOC": {"data.dataset": "voc", "data.scale_range": [0.5, 1.5]},
    "CityScapes": {"data.dataset": "cityscapes", "data.scale_range": [1.0, 1.0]},
}
ROOTS = {"VOC": "data/VOCdevkit/VOC2012", "CityScapes": "data/cityscapes"}
SPLITS = {"VOC": "splits/voc", "CityScapes": "splits/cityscapes"}


class _PlainLoader(yaml.SafeLoader):
    """YAML's own types and PyYAML's tuples, which the releases use; no tag that runs code, and no aliases."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise UserError(f"line {event.start_mark.line + 1}: the alias *{event.anchor} is refused; write the value")
        return super().compose_node(parent, index)


def _refuse(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> None:
    line = node.start_mark.line + 1
    raise UserError(f"line {line}: the tag !!python/{suffix} is refused; only !!python/tuple is accepted")


_PlainLoader.add_multi_constructor(PYTHON, _refuse)
_PlainLoader.add_constructor(PYTHON + "tuple", yaml.SafeLoader.construct_sequence)
# YAML 1.1 reads 5e-4 as a string.
_PlainLoader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+0123456789"))


def read_released_yaml(text: str) -> Settings | None:
    """Read a config file with the layout of the two releases to dotted keys; None if `text` is something else.

    Raises:
        UserError: not YAML, a Python tag other than the tuple's, or an alias.
    """
    flat = load_plain_yaml(text)
    top = {key.split(".")[0] for key in flat or ()}
    return flat if {"Network", "Dataset", "Training_Setting"} <= top else None


def load_plain_yaml(text: str) -> Settings | None:
    """Read a YAML mapping to dotted keys; None if `text` is JSON or no mapping.

    Raises:
        UserError: not YAML, a Python tag other than the tuple's, or an alias.
    """
    if text.lstrip().startswith("{"):  # JSON, of this project
        return None
    try:
        values = yaml.load(text, _PlainLoader)
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f"line {place.line + 1}: " if place else ""
        raise UserError(f"neither JSON nor YAML: {line}{getattr(error, 'problem', None) or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"neither JSON nor YAML: {error}") from None
    return flatten(values) if isinstance(values, dict) else None


def batch_size(flat: Settings, processes: int) -> Settings:
    """Convert the batch size per process to the total over all processes."""
    return {"optim.batch_size": whole(flat, "Dataset.batch_size") * processes}


def _dataset(key: str, flat: Settings) -> Settings:
    return choice(flat, key, DATASETS)


def _root(key: str, flat: Settings) -> Settings:
    return {"data.root": root_of(flat[key], choice(flat, "Dataset.name", ROOTS))}


def _split(key: str, flat: Settings) -> Settings:
    name = f"{flat['Dataset.num_labels']}/{flat['Seed']}"
    named = Path(str(flat.get("Dataset.txt_dir", "")), name)
    folder = named if named.is_dir() else Path(choice(flat, "Dataset.name", SPLITS), name)
    return {"data.split": str(folder)}


ALWAYS: Settings = {"model.backbone": "resnet101", "model.pretrained": True}
REQUIRED = (
    "Network.num_class",
    "Optim.lr",
    "Dataset.name",
    "Dataset.data_dir",
    "Dataset.num_labels",
    "Dataset.batch_size",
    "Dataset.crop_size",
    "Dataset.scale_size",
    "Seed",
)
RULES: dict[str, Rule] = {
    **same(
        {
            "Network.num_class": "model.num_classes",
            "Optim.lr": "optim.lr",
            "Optim.weight_decay": "optim.weight_decay",
            "Dataset.crop_size": "data.crop_size",
            "Dataset.scale_size": "method.scale_range",
            "Dataset.mix_mode": "method.mix_mode",
            "Seed": "run.seed",
            "Ramp_Scheduler.begin_epoch": "method.begin_epoch",
            "Ramp_Scheduler.max_epoch": "method.max_epoch",
            "Ramp_Scheduler.max_value": "method.max_value",
            "Ramp_Scheduler.min_value": "method.min_value",
            "Ramp_Scheduler.ramp_mult": "method.ramp_mult",
        }
    ),
    **only({"Network.name": ("DeepLabv3Plus", "the default of model.head")}),
    **ignored("Lr_Scheduler.name Lr_Scheduler.step_size Lr_Scheduler.gamma", "the schedule is always PolyLR"),
    **ignored("Training_Setting.save_dir", "runs go to run.dir"),
    **ignored("Distributed.gpu_id", "`accelerate launch` chooses the GPUs"),
    "Dataset.name": _dataset,
    "Dataset.data_dir": _root,
    "Dataset.txt_dir": _split,
    "Dataset.num_labels": _split,
}
