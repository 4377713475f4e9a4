"""Metadata needed to use a trained network: class names, palette, inference protocol.

The training writes it to the run folder's `run.json`, so that prediction needs neither the data nor the paper's code.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.datasets.reader import voc_palette
from common.engine.run_folder import RUN_FILE, update_run_file
from common.errors import UserError
from common.evaluation.inference import Protocol

OLD_FILE = "usage.json"  # held the metadata before run.json did


@dataclass(frozen=True)
class MetaInfo:
    """Metadata of a trained network.

    Args:
        classes: Names, by class id.
        palette: uint8 [256,3], RGB colors by class id.
        protocol: Protocol that the run is evaluated with.
    """

    classes: tuple[str, ...]
    palette: np.ndarray
    protocol: Protocol

    def to_dict(self) -> dict[str, Any]:
        """Plain values: `classes`, `colors` (one RGB triple per class) and `protocol`."""
        colors = self.palette[: len(self.classes)].tolist()
        return {"classes": list(self.classes), "colors": colors, "protocol": asdict(self.protocol)}


def write_metainfo(folder: Path, metainfo: MetaInfo) -> None:
    """Write the metadata into `run.json` of a run folder; its other fields stay.

    Raises:
        OSError: the file cannot be written.
    """
    update_run_file(folder, metainfo.to_dict())


def read_metainfo(folder: Path, num_classes: int) -> MetaInfo | None:
    """Read the metadata of a run folder; None where there is none because the run has not been evaluated yet.

    Args:
        folder: Run folder. In folders of earlier versions `usage.json` holds the metadata.
        num_classes: C of the run's network.

    Raises:
        UserError: the file is damaged, or is for another number of classes.
    """
    path = folder / RUN_FILE
    content = _read(path)
    if "classes" not in content:
        path = folder / OLD_FILE
        content = _read(path)
    if not content:
        return None
    try:
        metainfo = _from_dict(content)
    except (ValueError, KeyError, TypeError):
        raise _damaged(path) from None
    if len(metainfo.classes) != num_classes:
        raise UserError(
            f"{path} names {len(metainfo.classes)} classes, but the network of {folder} has {num_classes}; "
            "restore the file or the config.json that belongs to it"
        )
    return metainfo


def default_metainfo(num_classes: int) -> MetaInfo:
    """Metadata for a run without any: numbered classes, VOC's colors, whole images."""
    return MetaInfo(tuple(f"class {index}" for index in range(num_classes)), voc_palette(), Protocol())


def _read(path: Path) -> dict[str, Any]:
    """Content of a JSON file; empty where the file does not exist."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        raise _damaged(path) from None


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged; restore it, or delete it to predict with numbered classes on whole images")


def _from_dict(content: dict[str, Any]) -> MetaInfo:
    colors = content["colors"] if "colors" in content else content["colours"]  # in runs before 2026-11
    palette = voc_palette()
    palette[: len(colors)] = colors
    settings = content["protocol"]
    crop = settings["crop"] and tuple(settings["crop"])
    protocol = Protocol(**settings | {"crop": crop, "scales": tuple(settings["scales"])})
    return MetaInfo(tuple(content["classes"]), palette, protocol)
