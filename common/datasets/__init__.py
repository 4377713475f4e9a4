"""Datasets: `open_reader` finds the tree that a config names."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from common.config.sections import DataConfig
from common.datasets.cityscapes import Cityscapes
from common.datasets.folder import Folder
from common.datasets.gta5 import GTA5
from common.datasets.reader import Reader
from common.datasets.shapes import CLASSES, is_drawn, make_shapes
from common.datasets.voc import CLASSES as VOC_CLASSES
from common.datasets.voc import VOC
from common.errors import UserError

__all__ = ["Reader", "named_classes", "open_reader", "open_source_domain"]


def open_reader(data: DataConfig) -> Reader:
    """The source that `data` names.

    The built-in data (`shapes`) are made on first use.

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
    root = Path(data.root).expanduser()
    if not is_drawn(root):
        make_shapes(root, "voc")
    return VOC(root, CLASSES)


def named_classes(data: DataConfig, num_classes: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and colors of the classes of `data`, without looking at its files; numbers where names are not known."""
    known = {"cityscapes": (Cityscapes.classes, Cityscapes.palette), "gta5": (GTA5.classes, GTA5.palette)}
    names, palette = known.get(data.dataset, (VOC_CLASSES, VOC.palette))
    return (names if len(names) == num_classes else tuple(f"class {i}" for i in range(num_classes))), palette


def open_source_domain(data: DataConfig, dataset: str, root: str | None) -> Reader:
    """The source of other data with the same classes, for domain adaptation.

    Args:
        data: The config's section, of the data that are there.
        dataset: Kind of the others.
        root: Their folder, by default the one that `data.root` lies in; of the built-in data, which are made on first
            use in the second domain, by default `data.root` with `_b` behind it.

    Raises UserError when the tree is not found, is that of `data`, or has other classes.
    """
    built_in = dataset == "shapes"
    first = Path(data.root).expanduser()
    second = Path(root).expanduser() if root else first.with_name(f"{first.name}_b") if built_in else first.parent
    if first.resolve() == second.resolve():
        raise UserError(f"the source of adaptation is data.root itself, {second}: give another source_root")
    if built_in and not is_drawn(second):
        make_shapes(second, "voc", domain="b")
    target = open_reader(data)
    if not second.is_dir():
        raise UserError(f"the source of adaptation, {second}, is not a folder: set source_root to where its data lie")
    try:
        reader = open_reader(replace(data, dataset=dataset, root=str(second), split=None))
    except UserError as error:
        raise UserError(f"{error}; set source_root to where the source of adaptation lies") from None
    if target.classes != reader.classes:
        raise UserError(f"{second} has other classes than {first}: {len(reader.classes)} and {len(target.classes)}")
    reader.skip_bad_files = data.skip_bad_files
    return reader
