"""The published settings of every paper, with images made up in memory: no dataset is needed to measure them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from common import loaders
from common.config.sections import DataConfig
from common.datasets import named_classes
from common.datasets.reader import Reader
from common.errors import UserError
from common.splits.split import Split

ROOT = Path(__file__).parent.parent
SIZES = {"voc": (375, 500), "cityscapes": (1024, 2048)}  # height and width of most images
CLASSES = {"voc": 21, "cityscapes": 19}
TRAINING_IMAGES = {"voc": 10_582, "cityscapes": 2975}
LABELED = 8  # one image of so many has a label
DIFFERENT = 4  # images in memory; the others repeat them
ADDED = {  # losses that begin later in a run
    "cac_cps/train.py": {"method.cac.epoch_start_unsup": 0},
    "memory_bank/train.py": {"method.bank_start": 0, "method.contrast_start": 0},
}


@dataclass(frozen=True)
class Setting:
    """One published setting.

    Attributes:
        paper: Name for the tables.
        script: Training script, e.g. `prcl/train.py`.
        config: Its config file, relative to the project.
    """

    paper: str
    script: str
    config: str

    @property
    def dataset(self) -> str:
        """`VOC` or `Cityscapes`."""
        name = Path(self.config).name
        return "Cityscapes" if name.startswith(("city", "configSSL_city")) else "VOC"

    def arguments(self, folder: Path, steps: int) -> list[str]:
        """Command line of a run of so many steps in `folder`, with all losses from the first step on."""
        run = {"run.dir": folder, "run.steps": steps, "run.eval_every": steps, "run.save_every": steps}
        run |= {"run.log_every": steps, "run.snapshot_from": "null", "data.workers": 0, "model.pretrained": "false"}
        settings = run | ADDED.get(self.script, {})
        flags = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
        return ["--config", str(ROOT / self.config), *flags]


def _of(paper: str, script: str, *configs: str) -> list[Setting]:
    folder = script.split("/")[0]
    return [Setting(paper, script, f"{folder}/configs/{config}.json") for config in configs]


PLAIN = ("voc", "cityscapes", "voc_dinov2_small", "cityscapes_dinov2_small")
CAC = ("voc_cac_deeplabv3+_resnet101_1over8_datalist0", "city_cac_deeplabv3+_resnet101_1over8_datalist0")
CPS = ("voc_cps_resnet50_1over8", "city_cps_resnet50_1over8")
CPCL = ("voc_resnet101_1over8", "city_resnet50_1over8", *PLAIN[2:])
BANK = ("configSSL_pascal_1_8_split0_COCO", "configSSL_city_1_8_split0_COCO", *PLAIN[2:])
SETTINGS = [
    *_of("labels only", "supervised/train.py", *PLAIN),
    *_of("CSS", "css/train.py", *PLAIN),
    *_of("PRCL", "prcl/train.py", *PLAIN),
    *_of("CAC", "cac_cps/train.py", *CAC, *PLAIN[2:]),
    *_of("CPS", "cac_cps/train_semiseg.py", *CPS),
    *_of("CutMix-CPS", "cac_cps/train_semiseg_cutmix.py", *CPS),
    *_of("CPCL", "cpcl/train.py", *CPCL),
    *_of("Memory bank", "memory_bank/train.py", *BANK),
    *_of("FixMatch", "unimatch/train_fixmatch.py", "pascal_fixmatch_resnet101", "cityscapes_fixmatch_resnet101"),
    *_of("UniMatch", "unimatch/train.py", "pascal_unimatch_resnet101", "cityscapes_unimatch_resnet101"),
    *_of(
        "UniMatch V2",
        "unimatch/train_v2.py",
        *(f"{data}_unimatch_v2_dinov2_{size}" for size in ("small", "base") for data in ("pascal", "cityscapes")),
    ),
]


def settings_named(words: Sequence[str]) -> list[Setting]:
    """Settings of which paper, script or config contains one of the words; all without words.

    Raises:
        UserError: a word that none contains.
    """
    texts = {setting: f"{setting.paper} {setting.script} {setting.config}".lower() for setting in SETTINGS}
    for word in words:
        if not any(word.lower() in text for text in texts.values()):
            raise UserError(f"no setting is named {word}; give words as in prcl or cityscapes_unimatch")
    return [one for one, text in texts.items() if not words or any(word.lower() in text for word in words)]


@cache
def pictures(dataset: str, size: tuple[int, int] | None) -> tuple[list[Tensor], list[Tensor]]:
    """Random images uint8 [3,H,W] and labels uint8 [H,W] with the classes of a dataset, and its size by default."""
    height, width = size or SIZES[dataset]
    rng = np.random.default_rng(0)
    # Patches as large as objects are, as a label of noise would have no region for ClassMix to cut out.
    patches = rng.integers(CLASSES[dataset], size=(DIFFERENT, -(-height // 64), -(-width // 64)), dtype=np.uint8)
    labels = np.ascontiguousarray(patches.repeat(64, 1).repeat(64, 2)[:, :height, :width])
    images = rng.integers(64, size=(DIFFERENT, height, width, 3), dtype=np.uint8) + 8 * labels[..., None]
    return list(torch.from_numpy(images).movedim(-1, 1)), list(torch.from_numpy(labels))


class MadeUp(Reader):
    """Random images and labels of a dataset's size and classes, in memory.

    Args:
        data: The config's `data` section.
        size: Height and width; by default those of the dataset.
    """

    layout = "made up"

    def __init__(self, data: DataConfig, size: tuple[int, int] | None = None) -> None:
        self._dataset = data.dataset
        self.classes, self.palette = named_classes(data, CLASSES[data.dataset])
        self._images, self._labels = pictures(data.dataset, size)

    def names(self, subset: str) -> list[str]:
        return [f"{subset}_{number}" for number in range(TRAINING_IMAGES[self._dataset] if subset == "train" else 1)]

    def split(self) -> Split:
        """Labels for one image of `LABELED`."""
        train = self.names("train")
        return Split(train[::LABELED], sorted({*train} - {*train[::LABELED]}), self.names("val"))

    def check_size(self, name: str, with_label: bool) -> None:
        pass

    def read_image(self, name: str) -> Tensor:
        return self._images[int(name.split("_")[1]) % DIFFERENT]

    def read_label(self, name: str) -> Tensor:
        return self._labels[int(name.split("_")[1]) % DIFFERENT]

    def read_pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.read_image(name), self.read_label(name)

    def _image_candidates(self, name: str) -> list[Path]:
        return [Path(name)]

    _label_candidates = _image_candidates

    def _label_table(self, path: Path) -> np.ndarray:
        return np.arange(256, dtype=np.uint8)


@contextmanager
def made_up_data(size: tuple[int, int] | None = None) -> Iterator[None]:
    """Context in which every config finds made-up images in place of its dataset."""
    for dataset in SIZES:
        pictures(dataset, size)  # made now, with values, also where the run itself is on a fake GPU
    readers: list[MadeUp] = []

    def open_reader(data: DataConfig) -> Reader:
        readers.append(MadeUp(data, size))
        return readers[-1]

    def picture_size(name: Path, what: str) -> tuple[int, int]:
        height, width = readers[-1].read_label(name.name).shape
        return width, height

    with ExitStack() as stack:
        stack.enter_context(patch.object(loaders, "open_reader", open_reader))
        stack.enter_context(patch.object(loaders, "split_of", lambda data, reader: reader.split()))
        stack.enter_context(patch("common.evaluation.evaluate.picture_size", picture_size))
        stack.enter_context(patch.object(MadeUp, "image_path", lambda reader, name: Path(name)))
        yield
