"""Cityscapes, in the published layout and in the layouts of the papers' releases."""

from itertools import chain
from pathlib import Path

import numpy as np

from common import IGNORE
from common.datasets.reader import Reader, Subset, existing_root, no_layout, table_of
from common.errors import UserError

# The index in each of these is the class id (train id). Source: the label table of the Cityscapes scripts.
CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
COLORS = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
    (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70),
    (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
)  # fmt: skip
# Label ids that are not evaluated. The license plate is -1 there, which a PNG holds as 255, and 34 in some tools.
VOID_LABEL_IDS = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30, 34, IGNORE)

LABEL_ID_TABLE = table_of(LABEL_IDS, VOID_LABEL_IDS)
TRAIN_ID_TABLE = table_of(range(len(CLASSES)))

IMAGE_SUFFIX = "_leftImg8bit"
LABEL_ID_SUFFIX = "_gtFine_labelIds.png"
# In order of preference where a tree holds several; all but the first hold train ids.
LABEL_SUFFIXES = (LABEL_ID_SUFFIX, "_gtFine_labelTrainIds.png", "_gtFine_trainIds.png")
CPS_LABEL_SUFFIX = "_gtFine.png"

PLACES = (".", "cityscapes", "Cityscapes", "CityScapes")
IMAGE_FOLDERS = ("leftImg8bit", "leftImg8bit_trainvaltest/leftImg8bit")
LABEL_FOLDERS = ("gtFine", "gtFine_trainvaltest/gtFine", ".")
CPS_PLACES = (".", "city", "DATA/city")
# `train_extra` and `test` have no fine labels, but their images can be unlabeled ones.
SUBSETS = ("train", "val", "train_extra", "test")


def class_colors() -> np.ndarray:
    """Palette uint8 [256, 3]: the colors of the 19 classes; black for all other ids."""
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(COLORS)] = COLORS
    return colors


class Cityscapes(Reader):
    """Ids such as `aachen_000013_000019_leftImg8bit`. Supported layouts, under `root` or `cityscapes` below it:

    - images in `leftImg8bit/<subset>/<city>/<id>.png`, or that below `leftImg8bit_trainvaltest`;
      labels in `gtFine/<subset>/<city>/`, that below `gtFine_trainvaltest`, or `<subset>/<city>/` (PRCL), with suffixes
      `_gtFine_labelIds.png` (mapped to train ids here), `_gtFine_labelTrainIds.png` or `_gtFine_trainIds.png` (CSS);
    - `images/<subset>/<stem>.png` and `segmentation/<subset>/<stem>_gtFine.png` of train ids (CPS, CPCL).

    Label ids are preferred if a tree has both kinds.

    Raises:
        UserError: no tree is found.
    """

    classes = CLASSES
    palette = class_colors()

    def __init__(self, root: str | Path) -> None:
        root = existing_root(root)
        bases = [(root / place, folder) for place in PLACES for folder in IMAGE_FOLDERS]
        found = [(base, base / folder) for base, folder in bases if (base / folder).is_dir()]
        releases = [root / place for place in CPS_PLACES if (root / place / "images" / "train").is_dir()]
        self._cps = not found
        if found:
            base, self._images = found[0]
            self._labels = _folder_of_subsets([base / folder for folder in LABEL_FOLDERS])
        elif releases:
            self._images = releases[0] / "images"
            self._labels = _folder_of_subsets([releases[0] / "segmentation"])
        else:
            wanted = [f"{place}/{folder}" for place in PLACES for folder in IMAGE_FOLDERS]
            raise no_layout("Cityscapes", root, wanted + [f"{place}/images/train" for place in CPS_PLACES])

    @property
    def layout(self) -> str:
        names = chain(self.names("train"), self.names("val"))
        label = next((self.label_path(name) for name in names if self.has_label(name)), None)
        if label is None:
            return f"{self._images}; no labels"
        kind = "label ids, mapped to train ids" if label.name.endswith(LABEL_ID_SUFFIX) else "train ids"
        return f"{self._images}; labels in {self._labels} such as {label.name} ({kind})"

    def names(self, subset: Subset) -> list[str]:
        if self._cps:
            return sorted(path.stem + IMAGE_SUFFIX for path in (self._images / subset).glob("*.png"))
        return sorted(path.stem for path in (self._images / subset).glob(f"*/*{IMAGE_SUFFIX}.png"))

    def id_of(self, path: str) -> str:
        return Path(path).stem.removesuffix(IMAGE_SUFFIX) + IMAGE_SUFFIX  # CPS's lists omit the suffix

    def _image_candidates(self, name: str) -> list[Path]:
        stem = _stem(name)
        if self._cps:
            return [self._images / subset / f"{stem}.png" for subset in SUBSETS]
        city = stem.split("_", 1)[0]
        return [self._images / subset / city / f"{name}.png" for subset in SUBSETS]

    def _label_candidates(self, name: str) -> list[Path]:
        if self._labels is None:
            return []
        # Labels lie in the same subset (and city) as their image.
        folder = self._labels / self.image_path(name).parent.relative_to(self._images)
        return [folder / f"{_stem(name)}{suffix}" for suffix in ((CPS_LABEL_SUFFIX,) if self._cps else LABEL_SUFFIXES)]

    def _label_table(self, path: Path) -> np.ndarray:
        return LABEL_ID_TABLE if path.name.endswith(LABEL_ID_SUFFIX) else TRAIN_ID_TABLE


def _folder_of_subsets(candidates: list[Path]) -> Path | None:
    return next((folder for folder in candidates if any((folder / subset).is_dir() for subset in SUBSETS)), None)


def _stem(name: str) -> str:
    if not name.endswith(IMAGE_SUFFIX):
        raise UserError(
            f"{name} is not a Cityscapes id: ids end with {IMAGE_SUFFIX}, e.g. aachen_000013_000019{IMAGE_SUFFIX}"
        )
    return name.removesuffix(IMAGE_SUFFIX)
