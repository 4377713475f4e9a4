"""Datasets: `open_source` finds the tree that a config names."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from common.config import DataConfig
from common.datasets.cityscapes import Cityscapes
from common.datasets.folder import Folder
from common.datasets.gta5 import GTA5
from common.datasets.shapes import CLASSES, is_drawn, make_shapes
from common.datasets.source import Source
from common.datasets.splits import candidates, choose_class_covering, complete, write_split
from common.datasets.voc import CLASSES as VOC_CLASSES
from common.datasets.voc import VOC
from common.errors import UserError

__all__ = ["Source", "named_classes", "open_second", "open_source"]


def open_source(data: DataConfig) -> Source:
    """The source that `data` names.

    The built-in data (`shapes`) are made on first use, and so is their split, class-covering, where `data.split` is
    <data.root>/splits/<labels>/<seed>.

    Raises UserError when the tree is not found.
    """
    if data.dataset == "voc":
        return VOC(data.root)
    if data.dataset == "cityscapes":
        return Cityscapes(data.root)
    if data.dataset == "gta5":
        return GTA5(data.root)
    if data.dataset == "folder":
        return Folder(data.root, data.image_dir, data.label_dir, data.classes)
    return _built_in(Path(data.root).expanduser(), Path(data.split).expanduser() if data.split else None)


def named_classes(data: DataConfig, num_classes: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and colours of the classes of `data`, without looking at its files; numbers where names are not known."""
    known = {"cityscapes": (Cityscapes.classes, Cityscapes.palette), "gta5": (GTA5.classes, GTA5.palette)}
    names, palette = known.get(data.dataset, (VOC_CLASSES, VOC.palette))
    return (names if len(names) == num_classes else tuple(f"class {i}" for i in range(num_classes))), palette


def open_second(data: DataConfig, dataset: str, root: str | None) -> Source:
    """The source of other data with the same classes, for domain adaptation.

    Args:
        data: The config's section, of the data that are there.
        dataset: Kind of the others.
        root: Their folder; of the built-in data by default that of `data` with `_b` behind it. They are made on first
            use, in the second domain.

    Raises UserError when the tree is not found, is that of `data`, or has other classes.
    """
    if root is None and dataset != "shapes":
        raise UserError(f"{dataset} as the source of adaptation: set the folder, source_root, too")
    path = Path(root or f"{data.root.rstrip('/')}_b").expanduser()
    if path.resolve() == Path(data.root).expanduser().resolve():
        raise UserError(f"{path} is data.root itself: adaptation takes a source of another folder")
    if dataset == "shapes" and not is_drawn(path):
        make_shapes(path, "voc", domain="b")
    first, second = open_source(data), open_source(replace(data, dataset=dataset, root=str(path), split=None))
    if first.classes != second.classes:
        raise UserError(f"{path} has other classes than {data.root}: {len(second.classes)} and {len(first.classes)}")
    second.skip_bad_files = data.skip_bad_files
    return second


def _built_in(root: Path, split: Path | None) -> VOC:
    if not is_drawn(root):
        make_shapes(root, "voc")
    source = VOC(root, CLASSES)
    if split and split.parent.parent.resolve() == (root / "splits").resolve() and not split.exists():
        labels, seed = split.parent.name, split.name
        if not (labels.isdigit() and seed.isdigit()):
            raise UserError(f"split {split} of the built-in data: give {root}/splits/<labels>/<seed>, both numbers")
        write_split(split, complete(source, choose_class_covering(source, candidates(source), int(labels), int(seed))))
    return source
