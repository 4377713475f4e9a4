"""GTA5 (Richter et al., Playing for Data), with the classes of Cityscapes: the source domain of domain adaptation."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.datasets import cityscapes
from common.datasets.label_colors import Color, map_colors
from common.datasets.reader import (
    IGNORE,
    Reader,
    Subset,
    apply_table,
    existing_root,
    no_layout,
    open_label,
    stored_ids,
    table_of,
)
from common.errors import UserError

PLACES = (".", "GTA5", "gta5")
# Colors of the Cityscapes label table, which GTA5 shares, that are not evaluated: unlabeled, static, dynamic, ground,
# parking, rail track, guard rail, bridge, tunnel, caravan, trailer. The license plate has the color of cars.
VOID_COLORS = (
    (0, 0, 0), (20, 20, 20), (111, 74, 0), (81, 0, 81), (250, 170, 160), (230, 150, 140), (180, 165, 180),
    (150, 100, 100), (150, 120, 90), (0, 0, 90), (0, 0, 110),
)  # fmt: skip
# Gray labels come from the memory-bank release, whose preparation script writes 250 for void.
GRAY_TABLE = table_of(range(len(cityscapes.CLASSES)), (250, IGNORE))


class GTA5(Reader):
    """Ids such as `00001`, in `images/<id>.png` and `labels/<id>.png`, or in `{train,val}` below each.

    Classes are identified by their colors in RGB or palette PNGs; gray PNGs contain train ids. A label in `label_ids`,
    translated to train ids once, is preferred to that in `labels`. The published data have no validation part, so the
    flat tree has none.

    Raises:
        UserError: no tree is found.
    """

    classes = cityscapes.CLASSES
    palette = cityscapes.class_colors()

    def __init__(self, root: str | Path) -> None:
        root = existing_root(root)
        found = [root / place for place in PLACES if (root / place / "images").is_dir()]
        if not found:
            raise no_layout("GTA5", root, [f"{place}/images" for place in PLACES])
        self._root = found[0]
        self._subsets = ("train", "val") if (self._root / "images" / "train").is_dir() else (".",)
        below = "/{train,val}" if len(self._subsets) > 1 else ""
        self.layout = f"{self._root}: images{below}, labels{below}"

    def names(self, subset: Subset) -> list[str]:
        if len(self._subsets) == 1 and subset == "val":
            return []
        folder = self._root / "images" / (subset if len(self._subsets) > 1 else ".")
        return sorted(path.stem for path in folder.glob("*.png"))

    def _decode_label(self, path: Path) -> Tensor:
        label, unknown = class_ids(open_label(path), path)
        if unknown:
            color = next(iter(unknown))
            raise UserError(
                f"label {path} contains the color {color}, which GTA5 does not define: correct it, or paint it black"
            )
        return torch.from_numpy(label)

    def _image_candidates(self, name: str) -> list[Path]:
        return [self._root / "images" / subset / f"{name}.png" for subset in self._subsets]

    def _label_candidates(self, name: str) -> list[Path]:
        places = [(folder, subset) for folder in ("label_ids", "labels") for subset in self._subsets]
        return [self._root / folder / subset / f"{name}.png" for folder, subset in places]

    def _label_table(self, path: Path) -> np.ndarray:
        return GRAY_TABLE


def class_ids(picture: Image.Image, path: Path) -> tuple[np.ndarray, Counter[Color]]:
    """Class ids of the decoded label `picture` of any kind.

    Returns:
        uint8 [H, W], 255 also for colors that GTA5 does not define; and the number of pixels of each such color.

    Raises:
        UserError: a gray picture contains values other than class ids, or a palette picture indices that its palette
            lacks; the message names `path`.
    """
    if picture.mode in ("RGB", "RGBA", "P"):
        return map_colors(picture, path, cityscapes.COLORS, VOID_COLORS)
    return apply_table(GRAY_TABLE, stored_ids(picture, path), path), Counter()
