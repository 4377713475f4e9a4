"""ADE20K with the 150 classes of the scene parsing challenge (ADEChallengeData2016)."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import IGNORE
from common.datasets.reader import (
    Reader,
    Subset,
    apply_table,
    existing_root,
    no_layout,
    open_label,
    stored_ids,
    table_of,
    voc_palette,
)
from common.errors import UserError

# The first of the names in objectInfo150.txt, which is part of the download, in its order.
CLASSES = (
    "wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass", "cabinet", "sidewalk",
    "person", "earth", "door", "table", "mountain", "plant", "curtain", "chair", "car", "water", "painting", "sofa",
    "shelf", "house", "sea", "mirror", "rug", "field", "armchair", "seat", "fence", "desk", "rock", "wardrobe", "lamp",
    "bathtub", "railing", "cushion", "base", "box", "column", "signboard", "chest of drawers", "counter", "sand",
    "sink", "skyscraper", "fireplace", "refrigerator", "grandstand", "path", "stairs", "runway", "case", "pool table",
    "pillow", "screen door", "stairway", "river", "bridge", "bookcase", "blind", "coffee table", "toilet", "flower",
    "book", "hill", "bench", "countertop", "stove", "palm", "kitchen island", "computer", "swivel chair", "boat", "bar",
    "arcade machine", "hovel", "bus", "towel", "light", "truck", "tower", "chandelier", "awning", "streetlight",
    "booth", "television", "airplane", "dirt track", "apparel", "pole", "land", "bannister", "escalator", "ottoman",
    "bottle", "buffet", "poster", "stage", "van", "ship", "fountain", "conveyer belt", "canopy", "washer", "plaything",
    "swimming pool", "stool", "barrel", "basket", "waterfall", "tent", "bag", "minibike", "cradle", "oven", "ball",
    "food", "step", "tank", "trade name", "microwave", "pot", "animal", "bicycle", "lake", "dishwasher", "screen",
    "blanket", "sculpture", "hood", "sconce", "vase", "traffic light", "tray", "ashcan", "fan", "pier", "crt screen",
    "plate", "monitor", "bulletin board", "shower", "radiator", "glass", "clock", "flag",
)  # fmt: skip

PLACES = (".", "ADEChallengeData2016")
FOLDERS = {"train": "training", "val": "validation"}
UNLABELED = 0  # stored value of pixels outside the 150 classes
TABLE = table_of(range(1, len(CLASSES) + 1), (UNLABELED,))


class ADE20K(Reader):
    """Ids such as `ADE_train_00000001`, in `images/{training,validation}/<id>.jpg` under `root` or below
    `ADEChallengeData2016`; labels in `annotations/{training,validation}/<id>.png`.

    A label stores 0 for pixels to be ignored and 1..150 for the classes 0..149. The value 255 is an error: it occurs
    only in labels that were converted to 0..149 before, which would be read with every class off by one.

    Raises:
        UserError: no tree is found.
    """

    classes = CLASSES
    palette = voc_palette()

    def __init__(self, root: str | Path) -> None:
        root = existing_root(root)
        found = [root / place for place in PLACES if (root / place / "images" / "training").is_dir()]
        if not found:
            raise no_layout("ADE20K", root, [f"{place}/images/training" for place in PLACES])
        self._root = found[0]
        self.layout = f"{self._root}: {{images,annotations}}/{{training,validation}}"

    def names(self, subset: Subset) -> list[str]:
        return sorted(path.stem for path in (self._root / "images" / FOLDERS[subset]).glob("*.jpg"))

    def _decode_label(self, path: Path) -> Tensor:
        stored = stored_ids(open_label(path), path)
        if (largest := stored.max(initial=UNLABELED)) > len(CLASSES):
            converted = ", as in masks that were converted to 0..149" if largest == IGNORE else ""
            raise UserError(
                f"label {path} holds {largest}{converted}; ADE20K stores 1 to {len(CLASSES)}, and 0 for pixels to be "
                "ignored: restore the published file"
            )
        return torch.from_numpy(apply_table(TABLE, stored, path))

    def _image_candidates(self, name: str) -> list[Path]:
        return [self._root / "images" / folder / f"{name}.jpg" for folder in FOLDERS.values()]

    def _label_candidates(self, name: str) -> list[Path]:
        return [self._root / "annotations" / folder / f"{name}.png" for folder in FOLDERS.values()]

    def _label_table(self, path: Path) -> np.ndarray:
        return TABLE
