"""What someone who applies a run's network needs besides its config: names and colors of the classes, the protocol.

`usage.json` in the run folder says so, for where neither the data nor the paper's code is at hand.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from common.datasets.reader import voc_palette
from common.engine.log import replace_file
from common.errors import UserError
from common.evaluation.inference import Protocol

FILE = "usage.json"


@dataclass(frozen=True)
class MetaInfo:
    """Args:
    classes: Names, by class id.
    palette: uint8 [256,3].
    protocol: How images are put through the network.
    """

    classes: tuple[str, ...]
    palette: np.ndarray
    protocol: Protocol


def write_metainfo(folder: Path, metainfo: MetaInfo) -> None:
    """Write `usage.json` of a run, unless it stands there already.

    Raises:
        OSError: it cannot be written.
    """
    colors = metainfo.palette[: len(metainfo.classes)].tolist()
    content = {"classes": list(metainfo.classes), "colors": colors, "protocol": asdict(metainfo.protocol)}
    text = json.dumps(content) + "\n"
    path = folder / FILE
    if not (path.is_file() and path.read_text() == text):
        replace_file(path, text)


def read_metainfo(folder: Path, num_classes: int) -> MetaInfo | None:
    """The `usage.json` of a run folder; None where there is none, as of a run that was not yet evaluated.

    Raises:
        UserError: it is damaged, or of another number of classes.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        names, settings = content["classes"], content["protocol"]
        colors = content["colors"] if "colors" in content else content["colours"]  # of runs before 2026-11
        palette = voc_palette()
        palette[: len(colors)] = colors
        crop = settings["crop"] and tuple(settings["crop"])
        protocol = Protocol(**settings | {"crop": crop, "scales": tuple(settings["scales"])})
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; remove it to go without names of classes") from None
    if len(names) != num_classes:
        raise UserError(f"{path} names {len(names)} classes, but the network of {folder} has {num_classes}")
    return MetaInfo(tuple(names), palette, protocol)


def default_metainfo(num_classes: int) -> MetaInfo:
    """Numbers for names, VOC's colors, whole images."""
    return MetaInfo(tuple(f"class {index}" for index in range(num_classes)), voc_palette(), Protocol())
