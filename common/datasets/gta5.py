"""GTA5 (Richter et al., Playing for Data), with the classes of Cityscapes: the source domain of domain adaptation."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.datasets import cityscapes
from common.datasets.source import (
    IGNORE,
    UNKNOWN,
    Source,
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
# Colours of the Cityscapes label table, which GTA5 shares, that are not evaluated: unlabelled, static, dynamic, ground,
# parking, rail track, guard rail, bridge, tunnel, caravan, trailer. The licence plate has the colour of cars.
VOID_COLORS = (
    (0, 0, 0), (20, 20, 20), (111, 74, 0), (81, 0, 81), (250, 170, 160), (230, 150, 140), (180, 165, 180),
    (150, 100, 100), (150, 120, 90), (0, 0, 90), (0, 0, 110),
)  # fmt: skip
# Grey labels come from the memory-bank release, whose preparation script writes 250 for void.
GREY_TABLE = table_of(range(len(cityscapes.CLASSES)), (250, IGNORE))


class GTA5(Source):
    """Ids such as `00001`, in `images/<id>.png` and `labels/<id>.png`, or in `{train,val}` below each.

    Labels are told by their colour, in RGB or palette PNGs; grey PNGs hold train ids already. The published data have
    no validation part, so the flat tree has none. Raises UserError when no tree is found.
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

    def read_label(self, name: str) -> Tensor:
        path = self.label_path(name)
        picture = open_label(path)
        if picture.mode in ("RGB", "RGBA"):
            return torch.from_numpy(_from_colors(np.asarray(picture)[..., :3], path))
        if picture.mode != "P":
            return torch.from_numpy(apply_table(self._label_table(path), stored_ids(picture, path), path))
        colors = np.array(picture.getpalette("RGB"), np.uint32).reshape(-1, 3)
        table = np.full(256, UNKNOWN, np.uint8)
        table[: len(colors)] = _color_table()[_packed(colors)]
        return torch.from_numpy(apply_table(table, stored_ids(picture, path), path))

    def _image_candidates(self, name: str) -> list[Path]:
        return [self._root / "images" / subset / f"{name}.png" for subset in self._subsets]

    def _label_candidates(self, name: str) -> list[Path]:
        return [self._root / "labels" / subset / f"{name}.png" for subset in self._subsets]

    def _label_table(self, path: Path) -> np.ndarray:
        return GREY_TABLE


def _from_colors(colors: np.ndarray, path: Path) -> np.ndarray:
    """uint8 [H, W] class ids of colours uint8 [H, W, 3]. Raises UserError naming a colour that is not in the table."""
    label = _color_table()[_packed(colors)]
    unknown = label == UNKNOWN
    if unknown.any():
        color = tuple(map(int, colors[unknown][0]))
        raise UserError(
            f"label {path} holds the colour {color}, which GTA5 does not define: mend it, or paint it black"
        )
    return label


def _packed(colors: np.ndarray) -> np.ndarray:
    """One number for a colour [..., 3]: red, green and blue from the highest byte down."""
    wide = colors.astype(np.uint32)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


@cache
def _color_table() -> np.ndarray:
    """uint8 [2**24]: class id, 255 or `UNKNOWN` of every colour. 16 MB that make reading a label one look-up."""
    table = np.full(1 << 24, UNKNOWN, np.uint8)
    table[_packed(np.array(cityscapes.COLORS))] = np.arange(len(cityscapes.COLORS))
    table[_packed(np.array(VOID_COLORS))] = IGNORE
    return table
