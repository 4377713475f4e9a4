"""Any folder of images beside a folder of labels."""

from pathlib import Path

import numpy as np

from common.datasets.source import UNKNOWN, Source, Subset, existing_root, read_lines, table_of, voc_palette
from common.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LABEL_SUFFIXES = (".png",)
SUBSET_FIELD = "{subset}"


class Folder(Source):
    """Ids are the stems of the image files. Labels are palette or 8-bit grey PNGs of 0..C-1 and 255.

    Args:
        root: folder of the dataset.
        image_dir: folder of the images (.jpg, .png, .webp) below `root`. `{subset}` in it stands for `train` and
            `val`: `images/{subset}`, or `{subset}` beside `{subset}annot`. Without it, `val.txt` below `root` lists the
            ids for validation, and all others are for training.
        label_dir: folder of the labels below `root`, in the same way. Files have the stem of their image, or all of
            them have the same ending after it (`0001TP_L.png`). Images for training may lack one.
        classes: text file below `root`, a class name a line, in the order of the ids.

    Raises UserError when a folder or the class list is missing or an id occurs twice.
    """

    palette = voc_palette()

    def __init__(self, root: str | Path, image_dir: str, label_dir: str, classes: str) -> None:
        root = existing_root(root)
        self._root = root
        self._image_dir, self._label_dir = image_dir, label_dir
        self.classes = _read_classes(root / classes)
        self._table = table_of(range(len(self.classes)))
        self._by_subset = SUBSET_FIELD in image_dir
        self._images = _files(root, image_dir, IMAGE_SUFFIXES)
        if not self._images:
            raise UserError(
                f"no images in {root / image_dir}: set data.image_dir; known endings are {', '.join(IMAGE_SUFFIXES)}"
            )
        self._labels = _files(root, label_dir, LABEL_SUFFIXES)
        self._ending = _common_ending(self._images, self._labels)
        self.layout = f"{root}: {image_dir}, {label_dir}" + (f"/*{self._ending}.png" if self._ending else "")

    def names(self, subset: Subset) -> list[str]:
        if self._by_subset:
            folder = self._root / self._image_dir.replace(SUBSET_FIELD, subset)
            return sorted(name for name, path in self._images.items() if path.parent == folder)
        listed = self._root / "val.txt"
        val = set(read_lines(listed)) if listed.is_file() else set()
        if subset == "train":
            return sorted(set(self._images) - val)
        if not val:
            raise UserError(
                f"no images for validation: list their ids in {listed}, or put {SUBSET_FIELD} in data.image_dir"
            )
        return sorted(val)

    def _image_candidates(self, name: str) -> list[Path]:
        return [self._images.get(name, self._root / self._image_dir / f"{name}.*")]

    def _label_candidates(self, name: str) -> list[Path]:
        file = name + self._ending
        return [self._labels.get(file, self._root / self._label_dir / f"{file}.png")]

    def _label_table(self, path: Path) -> np.ndarray:
        return self._table


def _read_classes(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise UserError(f"no class list {path}: write one name a line, in the order of the ids, and set data.classes")
    names = tuple(read_lines(path))
    if not 1 < len(names) <= UNKNOWN:
        raise UserError(f"class list {path} has {len(names)} names: it takes 2 to {UNKNOWN}")
    return names


def _files(root: Path, pattern: str, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files by stem, in `pattern` or in what it stands for. Raises UserError when a stem occurs twice."""
    found: dict[str, Path] = {}
    for folder in sorted({root / pattern.replace(SUBSET_FIELD, subset) for subset in ("train", "val")}):
        for path in sorted(folder.glob("*")):
            if path.suffix.lower() not in suffixes:
                continue
            if path.stem in found:
                raise UserError(f"{found[path.stem]} and {path} have the same id {path.stem}: rename one")
            found[path.stem] = path
    return found


def _common_ending(images: dict[str, Path], labels: dict[str, Path]) -> str:
    """What follows the image's stem in the names of the labels: nothing where any label has the stem of an image."""
    if images.keys() & labels.keys():
        return ""
    for label in sorted(labels):
        owners = [label[:end] for end in range(len(label), 0, -1) if label[:end] in images]
        if owners:
            return label.removeprefix(owners[0])
    return ""
