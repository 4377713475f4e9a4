"""Datasets: `open_reader` opens the dataset of a config."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from common.config.sections import DataConfig
from common.datasets.ade20k import ADE20K
from common.datasets.cityscapes import Cityscapes
from common.datasets.coco import COCO, COCOStuff
from common.datasets.folder import Folder
from common.datasets.gta5 import GTA5
from common.datasets.reader import Reader
from common.datasets.shapes import CLASSES, is_drawn, make_shapes
from common.datasets.voc import CLASSES as VOC_CLASSES
from common.datasets.voc import VOC
from common.errors import UserError

__all__ = ["Reader", "named_classes", "open_reader", "open_source_domain"]

PUBLIC: dict[str, type[Reader]] = {
    "voc": VOC,
    "cityscapes": Cityscapes,
    "gta5": GTA5,
    "ade20k": ADE20K,
    "coco": COCO,
    "coco_stuff": COCOStuff,
}


def open_reader(data: DataConfig) -> Reader:
    """Open the dataset of a config's `data` section. The built-in data (`shapes`) are made on first use.

    Raises:
        UserError: the tree is not found.
    """
    if data.dataset in PUBLIC:
        return PUBLIC[data.dataset](data.root)
    if data.dataset == "folder":
        return Folder(data.root, data.image_dir, data.label_dir, data.classes, data.image_range)
    root = Path(data.root).expanduser()
    if not is_drawn(root):
        make_shapes(root, "voc")
    return VOC(root, CLASSES)


def named_classes(data: DataConfig, num_classes: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and palette (uint8 [256, 3]) of the classes of `data`, without reading its files.

    Names are `class 0`, `class 1`, ... if the number of classes is not that of the dataset.
    """
    reader = PUBLIC.get(data.dataset, VOC)
    names = VOC_CLASSES if reader is VOC else reader.classes
    return (names if len(names) == num_classes else tuple(f"class {i}" for i in range(num_classes))), reader.palette


def open_source_domain(data: DataConfig, dataset: str, root: str | None) -> Reader:
    """Open the source domain of domain adaptation: another dataset with the same classes.

    Args:
        data: The config's section, which describes the target domain.
        dataset: Kind of the source dataset.
        root: Folder of the source dataset; by default the folder that contains `data.root`. Built-in data of the second
            domain are made on first use, by default in `data.root` with the suffix `_b`.

    Raises:
        UserError: the tree is not found, is that of `data`, or has other classes.
    """
    built_in = dataset == "shapes"
    first = Path(data.root).expanduser()
    second = Path(root).expanduser() if root else first.with_name(f"{first.name}_b") if built_in else first.parent
    if first.resolve() == second.resolve():
        raise UserError(f"the source of adaptation is data.root itself, {second}: set source_root to another folder")
    if built_in and not is_drawn(second):
        make_shapes(second, "voc", domain="b")
    target = open_reader(data)
    if not second.is_dir():
        raise UserError(
            f"the source of adaptation, {second}, is not a folder: set source_root to the folder of the dataset"
        )
    try:
        reader = open_reader(replace(data, dataset=dataset, root=str(second), split=None))
    except UserError as error:
        raise UserError(f"{error}; set source_root to the folder of the source of adaptation") from None
    if target.classes != reader.classes:
        raise UserError(f"{second} has other classes than {first}: {len(reader.classes)} and {len(target.classes)}")
    reader.skip_bad_files = data.skip_bad_files
    return reader
