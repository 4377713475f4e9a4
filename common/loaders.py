"""Training batches, indexed by step: the seed alone determines the images of step k and their augmentation.

A stream is an endless sequence of positions 0, 1, 2, ... that runs through shuffled passes over a list of images. With
batches of B images, step k takes positions k*B to k*B + B - 1, and each process takes its share of them. The random
numbers of an image depend on its position.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, Sampler

from common.datasets import open_reader
from common.datasets.reader import Reader
from common.errors import UserError
from common.seeding import generator
from common.splits.split import Split, classes_in, split_of

# (image uint8 [3,H,W], label uint8 [H,W] or None, generator) -> image and label, augmented and cropped, and optional
# further values, which reach the training step as the batch's `details`
Transform = Callable[[torch.Tensor, torch.Tensor | None, np.random.Generator], tuple]


@dataclass
class Batch:
    """Images of one stream.

    Attributes:
        image: uint8 [B,3,H,W], not normalized.
        label: int64 [B,H,W], 255 = ignore; None in the unlabeled stream.
        names: Ids of the images.
        positions: Their positions in the stream, from which later augmentation derives its random numbers.
        skipped: Messages about unreadable images, which others replace in this batch.
        details: Further values that the transform returned for each image, on the host; empty for most transforms.
    """

    image: torch.Tensor
    label: torch.Tensor | None
    names: list[str]
    positions: list[int]
    skipped: tuple[str, ...] = ()
    details: list[Any] = field(default_factory=list)

    def pin_memory(self) -> "Batch":
        """Copy to page-locked memory, from which copies to a GPU are asynchronous; called by the loader."""
        label = None if self.label is None else self.label.pin_memory()
        return replace(self, image=self.image.pin_memory(), label=label)

    def to(self, device: torch.device) -> "Batch":
        """Copy to `device`; only there, images become contiguous [B,3,H,W] and labels int64."""
        label = None if self.label is None else self.label.to(device, non_blocking=True).long()
        return replace(self, image=self.image.to(device, non_blocking=True).contiguous(), label=label)


class TrainingImages(Dataset):
    """Augmented images (and labels) of a list, indexed by (index in the list, position in the stream).

    Args:
        reader: Reader of the dataset.
        names: Ids of the images.
        transform: Augmentation of one image.
        seed: Seed of the run.
        stream: Name of the stream, e.g. `labeled`; streams draw independent random numbers.
        with_label: Read label files; False for unlabeled images, whose labels are never opened.

    Raises:
        UserError: the list is empty, or an image, or a label that will be read, is missing (the message names the
            first one).
    """

    def __init__(
        self, reader: Reader, names: list[str], transform: Transform, seed: int, stream: str, with_label: bool
    ) -> None:
        self.reader, self.names, self.transform = reader, names, transform
        self.seed, self.stream, self.with_label = seed, stream, with_label
        if not names:
            raise UserError(f"the {stream} list is empty: there is nothing to train on")
        if not reader.skip_bad_files:
            check_files(reader, names, with_label)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: tuple[int, int]) -> "Batch | UserError":
        index, position = key
        bad: list[UserError] = []
        # Where bad files are skipped, the next image of the list replaces one: the same for any number of processes.
        for following in range(len(self.names) if self.reader.skip_bad_files else 1):
            name = self.names[(index + following) % len(self.names)]
            try:
                image, label = self.reader.read_pair(name) if self.with_label else (self.reader.read_image(name), None)
            except UserError as error:
                bad.append(error)
                continue
            rng = generator(self.seed, self.stream, position)
            image, label, *details = self.transform(image, label, rng)
            return Batch(image, label, [name], [position], tuple(map(str, bad[:1])), details)
        # Returned, not raised: a worker would print a traceback; the run raises it in the main process.
        return bad[0]


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of (index, position) for one process.

    Args:
        length: Number of images.
        batch: Images per process and backward pass.
        processes, rank: Number of processes, and index of this one.
        first_pass: Backward passes already done (steps times accumulation).
        seed, stream: Seed and name of the stream, which determine the order of the images.
        pools: Indices of the images of each class: a position draws a class, then one of its images. Without pools,
            passes over all images follow each other.
    """

    def __init__(
        self,
        length: int,
        batch: int,
        processes: int,
        rank: int,
        first_pass: int,
        seed: int,
        stream: str,
        pools: Sequence[np.ndarray] = (),
    ) -> None:
        self.length, self.batch, self.processes, self.rank = length, batch, processes, rank
        self.first_pass, self.seed, self.stream, self.pools = first_pass, seed, stream, pools

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        number = self.first_pass
        while True:
            start = (number * self.processes + self.rank) * self.batch
            yield [(self._index(position), position) for position in range(start, start + self.batch)]
            number += 1

    def _index(self, position: int) -> int:
        if self.pools:
            rng = generator(self.seed, f"class of {self.stream}", position)
            return int(rng.choice(self.pools[rng.integers(len(self.pools))]))
        epoch, offset = divmod(position, self.length)
        return int(_order(self.seed, self.stream, epoch, self.length)[offset])


class StepBatches:
    """Iterator over the batches of a stream on the run's device, from the run's step on.

    Args:
        images: Images of the stream.
        run: The `Run`: device, processes, accumulation, workers and step.
        first_step: First step that takes a batch, if later than step 0.
        batch_size: Images per process and backward pass; by default the number of labeled ones.
        done: Number of earlier steps that took a batch, if not all of them did.

    Raises:
        UserError: an image cannot be read; raised when its batch is reached.
    """

    def __init__(
        self,
        images: TrainingImages,
        run,
        first_step: int = 0,
        batch_size: int | None = None,
        done: int | None = None,
    ) -> None:
        first_pass = (max(run.step, first_step) if done is None else done) * run.config.optim.accumulation
        pools = images_by_class(images) if run.config.data.class_balanced and images.with_label else ()
        sampler = StepSampler(
            len(images),
            batch_size or run.process_batch_size,
            run.processes,
            run.rank,
            first_pass,
            images.seed,
            images.stream,
            pools,
        )
        workers = run.config.data.workers
        self._run = run
        # Not prepared by Accelerate: the sampler already gives each process its share, and a resumed run its step.
        self._loader = DataLoader(
            images,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=ignore_signals,
            pin_memory=run.device.type == "cuda",
            prefetch_factor=4 if workers else None,
        )
        self._batches = iter(self._loader)

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._run.register_batch(batch)
        return batch.to(self._run.device)

    def __iter__(self) -> "StepBatches":
        return self


def images_by_class(images: TrainingImages) -> list[np.ndarray]:
    """Indices of the images that show a class, for every class that any image shows. Reads all labels.

    Raises:
        UserError: a label cannot be read.
    """
    with ThreadPoolExecutor(16) as pool:
        occurs = np.stack(list(pool.map(lambda name: classes_in(images.reader, name), images.names)))
    return [np.flatnonzero(column) for column in occurs.T if column.any()]


def open_data(config: Any, accelerator: Accelerator) -> tuple[Reader, Split]:
    """Open the dataset and the split of a script's config, and check them before training.

    Raises:
        UserError: a dataset or list that does not exist, an empty list, classes that do not match `model.num_classes`,
            a missing image or label for validation (the message names the first one).
    """
    data = config.data
    with accelerator.main_process_first():  # one process creates the built-in data
        reader = open_reader(data)
        reader.skip_bad_files = data.skip_bad_files
        split = split_of(data, reader)
    if len(reader.classes) != config.model.num_classes:
        raise UserError(
            f"model.num_classes is {config.model.num_classes}, but {data.root} has {len(reader.classes)} classes "
            f"({', '.join(reader.classes[:4])}, ...)"
        )
    seen = sorted(set(split.valid) & {*split.labeled, *split.unlabeled})
    if seen and not data.allow_overlap:
        raise UserError(
            f"{data.lists}: {len(seen)} validation images are also trained on, e.g. {seen[0]}: "
            "correct the lists, or set data.allow_overlap to accept this"
        )
    check_files(reader, split.valid, with_label=True)
    return reader, split


def check_files(reader: Reader, names: Sequence[str], with_label: bool) -> None:
    """Check before training that every image, and with `with_label` every label, exists and is a picture.

    Reads only headers; `python -m common.check_data` decodes the whole files.

    Raises:
        UserError: a file is missing or not a picture, or an image and its label differ in size; the message names the
            first one.
    """
    with ThreadPoolExecutor(16) as pool:  # they mostly wait for the disk
        for _ in pool.map(lambda name: reader.check_size(name, with_label), names):
            pass


def ignore_signals(worker: int) -> None:
    """Make a loader's worker ignore signals sent to the whole process group: the training process stops it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@lru_cache(maxsize=4)
def _order(seed: int, stream: str, epoch: int, length: int) -> np.ndarray:
    return generator(seed, f"order of {stream}", epoch).permutation(length)


def _collate(items: "list[Batch | UserError]") -> "Batch | UserError":
    for item in items:
        if isinstance(item, UserError):
            return item
    labels = [item.label for item in items]
    return Batch(
        torch.stack([item.image.movedim(0, -1) for item in items]).movedim(-1, 1),
        None if labels[0] is None else torch.stack(labels),
        [name for item in items for name in item.names],
        [position for item in items for position in item.positions],
        tuple(reason for item in items for reason in item.skipped),
        [detail for item in items for detail in item.details],
    )
