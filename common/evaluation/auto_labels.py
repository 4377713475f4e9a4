"""Masks from a network's confident pixels, with masks drawn by people kept, as a dataset to train on.

docs/auto_labels.md shows the loop of labeling, training and correcting.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from common import IGNORE
from common.config.sections import DataConfig
from common.datasets import open_reader
from common.datasets.class_list import ClassList, read_classes
from common.datasets.folder import IMAGE_SUFFIXES, Folder
from common.datasets.patterns import NAME_FIELD
from common.errors import UserError
from common.evaluation.metainfo import MetaInfo
from common.splits.split import Split, read_split, valid_of, write_split
from common.visual import IGNORE_COLOR, save_label

FOLDER, CLASS_FILE, SPLIT = "pseudo_label", "classes.txt", "split"  # below --out
MIN_CONFIDENCE = 0.9


@dataclass
class AutoLabels:
    """Writer of masks, in the ids and colors of the dataset that the network was trained on.

    Masks are palette PNGs: pixel values are class ids and 255 for ignore, and their colors are those of the class list,
    so that datasets of ids and datasets of colors can both read them. `open_auto_labels` makes one.

    Attributes:
        out: Folder of the masks, the class list and the split.
        files: Images by name.
        palette: uint8 [256,3].
        ignore_color: Color of ignored pixels.
        min_confidence: Smallest confidence of a labeled pixel.
        people: Reader of the masks that people have drawn; None if there are none.
        ids: Ids of the images in the dataset that the network was trained on, by name; a pattern such as
            `{name}_image.png` gives other ids than the names of the files.
        shares: Share of labeled pixels, by name, of the images that this process has labeled.
    """

    out: Path
    files: dict[str, Path]
    palette: np.ndarray
    ignore_color: tuple[int, ...]
    min_confidence: float
    people: Folder | None = None
    ids: dict[str, str] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)

    def is_drawn(self, name: str) -> bool:
        """True if people have drawn a mask of the image."""
        return self.people is not None and self.people.has_label(self.id_of(name))

    def id_of(self, name: str) -> str:
        """Id of an image in the lists."""
        return self.ids.get(name, name)

    def write(self, name: str, probability: Tensor) -> None:
        """Write the mask of an image: the one drawn by people, else the confident pixels of probability [C,H,W].

        Raises:
            UserError: the drawn mask cannot be read.
            OSError: the mask cannot be written.
        """
        if self.is_drawn(name):
            label = self.people.read_label(self.id_of(name))
        else:
            confidence, prediction = probability.max(0)
            label = prediction.masked_fill(confidence < self.min_confidence, IGNORE)
            self.shares[name] = (label != IGNORE).float().mean().item()
        save_label(label, self.palette, self._path(name), self.ignore_color)

    def finish(self, data: DataConfig, accelerator: Accelerator) -> list[str]:
        """Write the split, and describe the result in lines; every process must call it after its last `write`.

        Labeled images are those with a drawn mask, without the run's validation images, and those with a confident
        pixel; all images without a drawn mask are also unlabeled. Validation images are those of the run that have a
        drawn mask.

        Args:
            data: Config section of the run.
            accelerator: Devices and processes.

        Raises:
            UserError: no image is labeled.
        """
        shares = dict(gather_object(list(self.shares.items())))
        # Images that could not be read have no mask.
        drawn = [self.id_of(name) for name in self.files if self.is_drawn(name) and self._path(name).is_file()]
        valid = [name for name in _valid_names(data) if name in set(drawn)]
        learned = sorted(self.id_of(name) for name, share in shares.items() if share > 0)
        labeled = sorted({*drawn, *learned} - {*valid})
        if not labeled:
            raise UserError(f"no pixel reaches the confidence {self.min_confidence:g}: lower --min-confidence")
        if accelerator.is_main_process:
            write_split(self.out / SPLIT, Split(labeled, sorted(map(self.id_of, shares)), valid))
        mean = 100 * float(np.mean([share for share in shares.values() if share > 0])) if learned else 0.0
        counts = f"{len(learned)} images labeled ({mean:.1f} % of their pixels)"
        counts += f", {len(shares) - len(learned)} without a confident pixel, {len(drawn)} masks of people kept"
        lists = f"{self.out / SPLIT}: {len(labeled)} labeled, {len(shares)} unlabeled, {len(valid)} for validation"
        return [counts, lists, self._how_to_train(data, bool(valid))]

    def _path(self, name: str) -> Path:
        return self.out / FOLDER / f"{name}.png"

    def _how_to_train(self, data: DataConfig, has_valid: bool) -> str:
        """Settings with which a training script reads the result."""
        root, labels = Path(data.root).expanduser().resolve(), (self.out / FOLDER).resolve()
        inside = labels.is_relative_to(root)
        settings = {"data.label_dir": labels.relative_to(root) if inside else labels}
        if data.dataset != "folder":
            settings |= {
                "data.dataset": "folder",
                "data.image_dir": next(iter(self.files.values())).parent.resolve(),
                "data.classes": (self.out / CLASS_FILE).resolve(),
            }
        settings |= {"data.split": self.out / SPLIT, "data.allow_overlap": "true"}
        line = "train with " + " ".join(f"--{key} {value}" for key, value in settings.items())
        if not has_valid:
            line += "\nnote: list images for validation in " + str(self.out / SPLIT / "valid_filename.txt")
            line += "; their masks are read from the same folder, so give --masks"
        return line


def open_auto_labels(
    out: Path,
    files: dict[str, Path],
    data: DataConfig,
    metainfo: MetaInfo,
    min_confidence: float,
    masks: Path | None,
    accelerator: Accelerator,
) -> AutoLabels:
    """Prepare a folder for masks, and check everything that can be wrong before images are predicted.

    Args:
        out: Folder for masks, class list and split.
        files: Images by name.
        data: Config section of the run.
        metainfo: Class names and colors of the run.
        min_confidence: Smallest confidence of a labeled pixel.
        masks: Folder of the masks that people have drawn, as `data.label_dir`; None if there are none.
        accelerator: Devices and processes; every process must call this.

    Raises:
        UserError: images in subfolders or of a kind that datasets do not have, masks in `out` already, a class list
            that is missing or has no color to ignore, a drawn mask of another size than its image.
    """
    nested = next((path for name, path in files.items() if "/" in name), None)
    if nested is not None:
        raise UserError(f"{nested} is in a subfolder: pseudo-labels are for the images of one folder (data.image_dir)")
    other = next((path for path in files.values() if path.suffix.lower() not in IMAGE_SUFFIXES), None)
    if other is not None:
        raise UserError(f"{other}: pseudo-labels are for images to train on, which end in {', '.join(IMAGE_SUFFIXES)}")
    if any((out / FOLDER).glob("*")):
        raise UserError(f"{out / FOLDER} has masks already, perhaps corrected ones: give another --out")
    content, found = _class_list(data, metainfo)
    palette, ignore_color = metainfo.palette.copy(), IGNORE_COLOR
    if found is not None and found.colors:
        palette[: len(found.colors)], ignore_color = found.colors, found.ignored_colors[0]
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / CLASS_FILE).write_text(content, encoding="utf-8")
        except OSError as error:
            raise UserError(f"masks cannot be written to {out}: {error.strerror}") from None
    accelerator.wait_for_everyone()
    labels = AutoLabels(out, files, palette, ignore_color, min_confidence, ids=_ids(files, data))
    if masks is not None:
        labels.people = Folder(out, _image_pattern(files, data), str(masks.expanduser().absolute()), CLASS_FILE)
        drawn = [labels.id_of(name) for name in files if labels.is_drawn(name)]
        if not drawn:
            raise UserError(f"--masks {masks}: no mask there belongs to one of the images")
        for name in drawn:
            labels.people.check_size(name, with_label=True)
    return labels


def _image_pattern(files: dict[str, Path], data: DataConfig) -> str:
    """Pattern of the run's images where it names the files of a folder dataset, else the folder of the images."""
    if _is_pattern(data):
        return str(Path(data.root).expanduser().absolute() / data.image_dir)
    return str(next(iter(files.values())).parent.absolute())


def _ids(files: dict[str, Path], data: DataConfig) -> dict[str, str]:
    """Ids by name, of images whose name differs from their id in the run's dataset."""
    if not _is_pattern(data):
        return {}
    reader = open_reader(data)
    return {name: reader.id_of(str(path)) for name, path in files.items()}


def _is_pattern(data: DataConfig) -> bool:
    return data.dataset == "folder" and NAME_FIELD in data.image_dir


def _class_list(data: DataConfig, metainfo: MetaInfo) -> tuple[str, ClassList | None]:
    """Text of the class list of a run, and its content where the run's dataset has one.

    Raises:
        UserError: the list is missing, has other classes than the run, or colors but none to ignore.
    """
    if data.dataset != "folder":
        return "".join(f"{name}\n" for name in metainfo.classes), None
    path = Path(data.root).expanduser() / data.classes
    found = read_classes(path)
    if len(found.names) != len(metainfo.classes):
        raise UserError(f"class list {path} has {len(found.names)} names, but the network {len(metainfo.classes)}")
    if found.colors and not found.ignored_colors:
        free = next(color for color in ((0, 0, 0), (255, 255, 255), (1, 1, 1)) if color not in found.colors)
        line = " ".join(map(str, ("ignore", *free)))
        raise UserError(f"class list {path} has no color for pixels without a label: add the line `{line}`")
    return path.read_text(encoding="utf-8-sig"), found


def _valid_names(data: DataConfig) -> list[str]:
    """Ids of the run's validation images; none where its lists are gone."""
    try:
        if data.split is not None:
            return read_split(data.split, allow_overlap=True).valid
        return valid_of(data, open_reader(data)) if data.dataset == "folder" else []
    except UserError:
        return []
