"""Images a second that one loader worker delivers, beside bare decoding of the same files.

    python benchmarks/loader.py
    python benchmarks/loader.py --config prcl/configs/cityscapes.json --size 1024 2048

On built-in images of VOC's size (or the one given), cropped and scaled as a paper's config says.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from common.datasets.loaders import CropTransform, StepBatches, TrainingImages
from common.datasets.shapes import CLASSES, make_shapes
from common.datasets.voc import VOC
from common.errors import UserError, told

IMAGES, BATCH = 32, 8


def decode(source: VOC, names: list[str], with_label: bool) -> None:
    """Every file read and decoded, nothing else."""
    for name in names:
        for path in [source.image_path(name)] + ([source.label_path(name)] if with_label else []):
            with Image.open(path) as picture:
                picture.load()


def batches(source: VOC, names: list[str], transform: CropTransform, with_label: bool) -> Iterator:
    """What a worker of the training does, in this process."""
    config = SimpleNamespace(optim=SimpleNamespace(accumulation=1), data=SimpleNamespace(workers=0))
    run = SimpleNamespace(config=config, batch_size=BATCH, processes=1, rank=0, step=0, device=torch.device("cpu"))
    return StepBatches(TrainingImages(source, names, transform, 0, "benchmark", with_label), run)


def take(stream: Iterator) -> None:
    """As many images as `decode` decodes."""
    for _ in range(IMAGES // BATCH):
        next(stream)


def rate(work: Callable[[], object]) -> float:
    """Images a second of the processor's time: what else the machine does is not counted."""
    started = time.process_time()
    work()
    return IMAGES / (time.process_time() - started)


@told
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("prcl/configs/voc.json"))
    parser.add_argument("--size", type=int, nargs=2, default=(375, 500), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--repeats", type=int, default=5)
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
        table = Table("stream", "decoding alone", "a worker", "share", title=f"images a second, {crop} crops")
        for name, transform, with_label in (
            ("labeled", CropTransform(crop, data.get("scale_range", (0.5, 1.5)), flip=True), True),
            ("unlabeled", CropTransform(crop), False),
        ):
            stream_batches = batches(source, names, transform, with_label)
            works = (
                partial(decode, source, names, with_label),
                partial(take, stream_batches),
            )
            rates = [[rate(work) for work in works] for _ in range(options.repeats)]
            decoding, working = (statistics.median(column) for column in zip(*rates))
            table.add_row(name, f"{decoding:.0f}", f"{working:.0f}", f"{working / decoding:.0%}")
        Console().print(table)


if __name__ == "__main__":
    main()
