"""PASCAL VOC 2012, in the published layout, with the augmented labels of SBD, or in the layout of the CPS release."""

from pathlib import Path

import numpy as np

from common.datasets.reader import Reader, Subset, existing_root, no_layout, read_lines, table_of, voc_palette
from common.errors import UserError

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

DEVKIT_PLACES = (".", "VOC2012", "VOCdevkit/VOC2012", "VOCtrainval_11-May-2012/VOCdevkit/VOC2012")
CPS_PLACES = (".", "pascal_voc", "DATA/pascal_voc")
# In order of preference: the 10,582 training labels of SBD, else the 1,464 of VOC itself.
LABEL_FOLDERS = ("SegmentationClassAug", "SegmentationClass")


class VOC(Reader):
    """Ids such as `2011_000068`. Supported layouts, under `root` or in the usual folders below it:

    - `JPEGImages/<id>.jpg` and `SegmentationClassAug/<id>.png`, else `SegmentationClass/<id>.png`;
    - `{train_aug,val}/image/<id>.jpg` and `{train_aug,val}/label/<id>.png` (CPS, CPCL).

    Labels are palette or gray PNGs of 0..20 and 255. Training images are those in ImageSets/Segmentation/train_aug.txt
    if that list exists, else all that have a label and are not in val.txt.

    Raises:
        UserError: no tree is found.
    """

    palette = voc_palette()

    def __init__(self, root: str | Path, classes: tuple[str, ...] = CLASSES) -> None:
        root = existing_root(root)
        self.classes = classes
        self._table = table_of(range(len(classes)))
        self._cps = False
        devkits = [root / place for place in DEVKIT_PLACES if (root / place / "JPEGImages").is_dir()]
        releases = [root / place for place in CPS_PLACES if (root / place / "train_aug" / "image").is_dir()]
        if devkits:
            self._root = devkits[0]
            present = [folder for folder in LABEL_FOLDERS if (self._root / folder).is_dir()]
            self._labels = present[0] if present else None
            self.layout = f"{self._root}: JPEGImages, {self._labels or 'no folder of labels'}"
        elif releases:
            self._root = releases[0]
            self._cps = True
            self.layout = f"{self._root}: {{train_aug,val}}/{{image,label}}"
        else:
            wanted = [f"{place}/JPEGImages" for place in DEVKIT_PLACES] + [
                f"{place}/train_aug/image" for place in CPS_PLACES
            ]
            raise no_layout("VOC", root, wanted)

    def names(self, subset: Subset) -> list[str]:
        if self._cps:
            return _stems(self._root / {"train": "train_aug", "val": "val"}[subset] / "label")
        if subset == "val":
            return self._list("val")
        if self._list_path("train_aug").is_file():
            return self._list("train_aug")
        if self._labels is None:
            raise UserError(f"no labels in {self._root}: looked for the folders {', '.join(LABEL_FOLDERS)}")
        return sorted(set(_stems(self._root / self._labels)) - set(self._list("val")))

    def _image_candidates(self, name: str) -> list[Path]:
        if self._cps:
            return [self._root / folder / "image" / f"{name}.jpg" for folder in ("train_aug", "val")]
        return [self._root / "JPEGImages" / f"{name}.jpg"]

    def _label_candidates(self, name: str) -> list[Path]:
        if self._cps:
            return [self._root / folder / "label" / f"{name}.png" for folder in ("train_aug", "val")]
        return [self._root / self._labels / f"{name}.png"] if self._labels else []

    def _label_table(self, path: Path) -> np.ndarray:
        return self._table

    def _list_path(self, name: str) -> Path:
        return self._root / "ImageSets" / "Segmentation" / f"{name}.txt"

    def _list(self, name: str) -> list[str]:
        path = self._list_path(name)
        if not path.is_file():
            raise UserError(f"no list {path}: get it from the VOC 2012 download")
        return sorted(read_lines(path))


def _stems(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.png"))
