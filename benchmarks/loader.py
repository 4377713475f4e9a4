"""Images per second of one loader worker, compared with bare decoding of the same files.

    python benchmarks/loader.py
    python benchmarks/loader.py --config prcl/configs/cityscapes.json --size 1024 2048

Measured on built-in images of VOC's size (or of --size), cropped and scaled as in the config. "Both" is the mix that a
step of most papers takes: equally many labeled and unlabeled images.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from common.augment.views import CropTransform
from common.datasets.shapes import CLASSES, make_shapes
from common.datasets.voc import VOC
from common.errors import UserError, report_errors
from common.loaders import TrainingImages

IMAGES = 32


def decode(source: VOC, names: list[str], with_label: bool) -> None:
    """Read and decode every file, nothing else."""
    for name in names:
        for path in [source.image_path(name)] + ([source.label_path(name)] if with_label else []):
            with Image.open(path) as picture:
                picture.load()


def work(images: TrainingImages) -> None:
    """Do the work of a loader worker: read, check, scale and crop every image."""
    for index in range(IMAGES):
        images[index, index]


def seconds(task: Callable[[], object]) -> float:
    """Processor seconds per image; other load on the machine does not count."""
    started = time.process_time()
    task()
    return (time.process_time() - started) / IMAGES


def cells(decoding: float, working: float) -> tuple[str, str, str]:
    """Table cells from seconds per image: images per second of both, and the worker's share of the decoding speed."""
    return f"{1 / decoding:.0f}", f"{1 / working:.0f}", f"{decoding / working:.0%}"


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("prcl/configs/voc.json"))
    parser.add_argument("--size", type=int, nargs=2, default=(375, 500), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    try:
        data = json.loads(options.config.read_text())["data"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"config {options.config} cannot be read: {error}") from None
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_shapes(Path(folder), "voc", train=IMAGES, val=1, size=tuple(options.size))
        source = VOC(folder, CLASSES)
        names = source.names("train")
        crop = data["crop_size"]
        table = Table("stream", "decoding alone", "a worker", "share", title=f"images per second, {crop} crops")
        total = [0.0, 0.0]
        for name, transform, with_label in (
            ("labeled", CropTransform(crop, data.get("scale_range", (0.5, 1.5))), True),
            ("unlabeled", CropTransform(crop), False),
        ):
            images = TrainingImages(source, names, transform, 0, "benchmark", with_label)
            tasks = (partial(decode, source, names, with_label), partial(work, images))
            measured = [[seconds(task) for task in tasks] for _ in range(options.repeats)]
            least = [min(column) for column in zip(*measured)]  # least disturbed by other load
            total = [before + one / 2 for before, one in zip(total, least)]
            table.add_row(name, *cells(*least))
        table.add_row("both", *cells(*total))
        Console().print(table)


if __name__ == "__main__":
    main()
