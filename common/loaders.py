"""Training batches, step-indexed: which images make up step k, and how each is augmented, follows from the seed alone.

An endless stream of positions 0, 1, 2, ... runs through shuffled passes over a list of images. Step k of a batch of B
takes positions k*B to k*B + B - 1; a process takes its share of them. The random numbers of an image follow from its
position.
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
from common.splits.split import Split, split_of

# (image uint8 [3,H,W], label uint8 [H,W] or None, random numbers) -> the same two, augmented and cropped; what follows
# them, if anything, reaches the training step as the batch's `details`
Transform = Callable[[torch.Tensor, torch.Tensor | None, np.random.Generator], tuple]


@dataclass
class Batch:
    """Images of one stream.

    Attributes:
        image: uint8 [B,3,H,W], not normalized.
        label: int64 [B,H,W], 255 = ignore; None in the unlabeled stream.
        names: Ids of the images.
        positions: Their positions in the stream: what random numbers of later augmentation are derived from.
        skipped: What was wrong with images that others stand in for.
        details: What else the transform says of each image, on the host; nothing for most.
    """

    image: torch.Tensor
    label: torch.Tensor | None
    names: list[str]
    positions: list[int]
    skipped: tuple[str, ...] = ()
    details: list[Any] = field(default_factory=list)

    def pin_memory(self) -> "Batch":
        """What a loader calls for a GPU: copies from page-locked memory do not wait."""
        label = None if self.label is None else self.label.pin_memory()
        return replace(self, image=self.image.pin_memory(), label=label)

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; there, channel planes are made of the decoder's pixels, and int64 of labels."""
        label = None if self.label is None else self.label.to(device, non_blocking=True).long()
        return replace(self, image=self.image.to(device, non_blocking=True).contiguous(), label=label)


class TrainingImages(Dataset):
    """Images (and labels) of a list, augmented by `transform`, addressed by (index, position).

    Args:
        reader: Reader of the dataset.
        names: Ids of the images.
        transform: Augmentation of one image.
        seed: Seed of the run.
        stream: `labeled`, `unlabeled`, ...: streams draw independent random numbers.
        with_label: Whether label files are read; those of unlabeled images never are.

    Raises:
        UserError: the list is empty, or an image, or a label that will be read, is missing (the first one is named).
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
        # Where bad files are skipped, the next image of the list stands in: the same one on any number of processes.
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
        # Raised here it would reach the user as a worker's traceback; the run raises it in the main process.
        return bad[0]


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of (index, position) for one process.

    Args:
        length: Number of images.
        batch: Images of this process in one backward pass.
        processes, rank: How many processes share a pass, and which one this is.
        first_pass: Backward passes already done (steps times accumulation).
        seed, stream: What the order of the images follows from.
    """

    def __init__(
        self, length: int, batch: int, processes: int, rank: int, first_pass: int, seed: int, stream: str
    ) -> None:
        self.length, self.batch, self.processes, self.rank = length, batch, processes, rank
        self.first_pass, self.seed, self.stream = first_pass, seed, stream

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        number = self.first_pass
        while True:
            start = (number * self.processes + self.rank) * self.batch
            yield [(self._index(position), position) for position in range(start, start + self.batch)]
            number += 1

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, self.length)
        return int(_order(self.seed, self.stream, epoch, self.length)[offset])


class StepBatches:
    """Iterator over the batches of a stream on `device`, from a given step on.

    Args:
        images: The stream's images.
        run: Gives device, processes, accumulation, workers and the step to begin with.
        first_step: The first step that takes a batch, where the stream is not needed before.
        batch_size: Images of this process in one backward pass; by default as many as labeled ones.
        done: Steps that have taken a batch, where not every one before the run's does.

    Raises:
        UserError: on reaching an image that cannot be read.
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
        sampler = StepSampler(
            len(images), batch_size or run.batch_size, run.processes, run.rank, first_pass, images.seed, images.stream
        )
        workers = run.config.data.workers
        self._run = run
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


def open_data(config: Any, accelerator: Accelerator) -> tuple[Reader, Split]:
    """The reader and the lists of a script's config, checked before training.

    Raises:
        UserError: no such tree or list, a list that is empty, classes that do not match `model.num_classes`, a missing
            image or label for validation (the first one is named).
    """
    data = config.data
    with accelerator.main_process_first():  # the built-in data are made by one process
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
            f"{data.lists}: {len(seen)} validation images are also trained on, {seen[0]} for one: "
            "mend the lists, or accept it with data.allow_overlap"
        )
    check_files(reader, split.valid, with_label=True)
    return reader, split


def check_files(reader: Reader, names: Sequence[str], with_label: bool) -> None:
    """Make sure before training that every image, and with `with_label` every label, is there and is a picture.

    Only headers are read. `python -m common.check_data` decodes everything.

    Raises:
        UserError: naming the first file that is missing or no picture, or both where sizes differ.
    """
    with ThreadPoolExecutor(16) as pool:  # mostly waiting for a disk
        for _ in pool.map(lambda name: reader.check_size(name, with_label), names):
            pass


def ignore_signals(worker: int) -> None:
    """Let a loader's worker live through the signals that a whole process group gets: the training process stops it."""
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
