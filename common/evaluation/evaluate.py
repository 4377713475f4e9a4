"""Evaluation of a network on labeled images, the same in training and from the command line.

Labels keep their native size, and every image is counted once. Batches are the same on any number of processes, so the
scores are too.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common import IGNORE
from common.datasets.reader import Reader, picture_size
from common.errors import UserError
from common.evaluation.inference import Protocol, predict, sum_logits
from common.evaluation.metainfo import FILE as USAGE_FILE
from common.evaluation.metainfo import MetaInfo, write_metainfo
from common.loaders import ignore_signals
from common.metrics import ConfusionMatrix, Scores
from common.splits.split import Split
from common.visual import Sample, panel

if TYPE_CHECKING:
    from common.engine.run import Run

PROGRESS_SECONDS = 5.0  # seconds without a word
MAX_BATCH_PIXELS = 2**20
PANEL_IMAGES = 3  # images of each kind in a panel


def evaluate(
    network: nn.Module,
    reader: Reader,
    names: Sequence[str],
    num_classes: int,
    accelerator: Accelerator,
    protocol: Protocol = Protocol(),
    batch_size: int | None = None,
    workers: int = 4,
    bar: bool = False,
    stop: Callable[[], bool] | None = None,
) -> Scores | None:
    """Scores of a network; every process must call it, and every process gets the scores of all images.

    Args:
        network: On `accelerator.device`, wrapped or not. It runs in evaluation mode and is left as it was.
        reader: Reads images and labels.
        names: Ids of the images, each counted once.
        num_classes: C of the network.
        accelerator: Gives device and processes.
        protocol: Window, scales and flip.
        batch_size: Images of one size that are predicted together, by default as many as make a megapixel. It
            changes speed and memory, not scores.
        workers: Processes that decode images; no more than there are processors.
        bar: Show progress as a bar (where nothing else draws one); otherwise as plain lines if it takes long.
        stop: Asked after every batch whether to give up.

    Returns:
        The scores; None where `stop` said so on any process.

    Raises:
        UserError: no images; an image or label that is missing, damaged, or of another size than its counterpart.
    """
    if not names:
        raise UserError("nothing to evaluate: the list of validation images is empty")
    # The wrapper of several processes would synchronize at every forward and hang where one has fewer batches.
    network = accelerator.unwrap_model(network, keep_torch_compile=False)
    batches = _same_size_batches(reader, names, batch_size)
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    confusion = ConfusionMatrix(num_classes, accelerator.device)
    told = _progress(_loader(reader, mine, workers, accelerator.device), mine, bar, accelerator.is_main_process)
    bad: UserError | None = None
    stopped = False
    try:
        for images, labels in told:
            if stopped := stop is not None and stop():
                break
            images, labels = (tensor.to(accelerator.device, non_blocking=True) for tensor in (images, labels))
            with accelerator.autocast():
                logits, _ = sum_logits(network, images, tuple(labels.shape[-2:]), protocol)
            confusion.update(logits.argmax(1), labels)
    except UserError as error:
        bad = error
    # Where one process cannot read a file, all must end: the others would wait for it below.
    ends = torch.tensor([bad is not None, stopped], dtype=torch.int64, device=accelerator.device)
    failed, cut_short = accelerator.reduce(ends, "sum").tolist()
    if failed:
        raise bad or UserError("another process could not read an image or label of the validation list")
    if cut_short:
        return None
    confusion.matrix = accelerator.reduce(confusion.matrix, "sum")
    return confusion.scores()


def evaluate_run(
    network: nn.Module, reader: Reader, split: Split, run: "Run", protocol: Protocol = Protocol()
) -> Scores | None:
    """`evaluate` on the validation list, during training; None where a signal asked the run to stop meanwhile.

    What applying the network takes besides its config is written to the run folder.
    """
    if run.is_main:
        try:
            write_metainfo(run.folder, MetaInfo(reader.classes, reader.palette, protocol))
        except OSError as error:
            run.log.print(f"warning: {run.folder / USAGE_FILE} could not be written ({error.strerror}); going on")
    classes, workers = run.config.model.num_classes, run.config.data.workers
    return evaluate(
        network, reader, split.valid, classes, run.accelerator, protocol, workers=workers, stop=run.stop_requested
    )


def sample_predictions(
    network: nn.Module,
    reader: Reader,
    names: Sequence[str],
    protocol: Protocol,
    device: torch.device,
    with_label: bool = True,
    threshold: float | None = None,
    maps: Callable[[Tensor], Mapping[str, Tensor]] | None = None,
) -> Iterator[Sample]:
    """Images, labels, predictions and confidences, one image after the other, for pictures.

    Args:
        network: The unwrapped network, on `device`.
        reader: Reads images and labels.
        names: Ids of the images.
        protocol: Window, scales and flip.
        device: Where to predict; the samples are on the CPU.
        with_label: Whether label files are read; those of unlabeled images never are.
        threshold: Confidence from which a prediction is a pseudo-label; None leaves pseudo-labels out.
        maps: Gives `Sample.maps`, but [1,H,W], of an image [1,3,H,W].

    Raises:
        UserError: an image, or a label to be read, is missing or damaged (and `data.skip_bad_files` is not set).
    """
    for name in names:
        try:
            image, label = reader.read_pair(name) if with_label else (reader.read_image(name), None)
        except UserError:
            if reader.skip_bad_files:  # training tells them
                continue
            raise
        probability = predict(network, image[None].to(device), tuple(image.shape[-2:]), protocol)[0]
        confidence, prediction = (tensor.cpu() for tensor in probability.max(0))
        pseudo_label = None if threshold is None else prediction.masked_fill(confidence < threshold, IGNORE)
        more = {} if maps is None else maps(image[None].to(device))
        more = {key: values[0].cpu() for key, values in more.items()}
        yield Sample(name, image, prediction, label, confidence, pseudo_label, more)


def save_panel(
    network: nn.Module,
    reader: Reader,
    split: Split,
    run: "Run",
    threshold: float | None = None,
    maps: Callable[[Tensor], Mapping[str, Tensor]] | None = None,
    protocol: Protocol = Protocol(),
) -> None:
    """Write the picture of an evaluation: some validation images, then some unlabeled ones (without their labels).

    The images are the same at every step of a run, so that pictures can be compared. A full disk does not end the run.

    Args:
        threshold: Confidence from which a prediction on an unlabeled image is shown as pseudo-label; None shows none.
        maps: What else to show of an image; see `sample_predictions`.
        protocol: Window, scales and flip.
    """
    if not run.is_main or run.stop_requested():
        return
    network = run.accelerator.unwrap_model(network, keep_torch_compile=False)
    samples = [
        *sample_predictions(network, reader, evenly_spaced(split.valid), protocol, run.device, maps=maps),
        *sample_predictions(
            network, reader, evenly_spaced(split.unlabeled), protocol, run.device, False, threshold, maps
        ),
    ]
    title = f"{run.folder.name}, step {run.step}: valid, then unlabeled images ({protocol.describe()})"
    path = run.picture_path()
    try:
        panel(samples, reader.palette, reader.classes, title).save(path)
    except OSError as error:
        run.log.print(f"warning: picture {path} could not be written ({error.strerror}); going on")


def evenly_spaced(names: Sequence[str]) -> list[str]:
    """Up to `PICTURED` names, evenly over the list: neighbors are often frames of one scene."""
    count = min(PANEL_IMAGES, len(names))
    return [names[index * len(names) // count] for index in range(count)]


class _LabeledImages(Dataset):
    """(image, label) of a name; a `UserError` is returned, since raised it would show as a worker's traceback."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor] | UserError:
        try:
            return self.reader.read_pair(name)
        except UserError as error:
            return error


def _loader(reader: Reader, batches: list[list[str]], workers: int, device: torch.device) -> DataLoader:
    return DataLoader(
        _LabeledImages(reader),
        batch_sampler=batches,
        num_workers=min(workers, len(batches), os.cpu_count() or 1),
        collate_fn=_collate,
        worker_init_fn=ignore_signals,
        pin_memory=device.type == "cuda",
        # The workers' seed would be drawn from the global generator, and an evaluation change the training after it.
        generator=torch.Generator(),
    )


def _collate(items: list[tuple[Tensor, Tensor] | UserError]) -> tuple[Tensor, Tensor] | UserError:
    for item in items:
        if isinstance(item, UserError):
            return item
    images, labels = zip(*items)
    return torch.stack(images), torch.stack(labels)


def _same_size_batches(reader: Reader, names: Sequence[str], batch_size: int | None) -> list[list[str]]:
    """Names grouped by the size in the image's header, in batches."""
    sizes: dict[tuple[int, int], list[str]] = {}
    for name in names:
        sizes.setdefault(picture_size(reader.image_path(name), "image"), []).append(name)
    batches = []
    for (width, height), group in sizes.items():
        count = batch_size or max(1, MAX_BATCH_PIXELS // (width * height))
        batches += [group[start : start + count] for start in range(0, len(group), count)]
    return batches


def _progress(loader: DataLoader, batches: list[list[str]], bar: bool, tells: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches; one process tells how far its share is, once it takes long."""
    total, done, last = sum(map(len, batches)), 0, time.monotonic()
    with Progress(disable=not (tells and bar and sys.stdout.isatty()), transient=True) as progress:
        task = progress.add_task("evaluating", total=total)
        for loaded, names in zip(loader, batches):
            if isinstance(loaded, UserError):
                raise loaded
            yield loaded
            done += len(names)
            progress.update(task, completed=done)
            if tells and progress.disable and time.monotonic() - last > PROGRESS_SECONDS and done < total:
                last = time.monotonic()
                print(f"evaluating: {100 * done // total} % done", flush=True)
