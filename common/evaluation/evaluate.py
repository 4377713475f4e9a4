"""Evaluation of a network on labeled images, the same in training and from the command line.

Labels keep their native size, and every image is counted once. Batches do not depend on the number of processes, so
the scores do not either.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common import IGNORE
from common.datasets.reader import Reader, picture_size
from common.engine.run_folder import RUN_FILE
from common.errors import UserError
from common.evaluation.batches import ProgressReport, same_size_batches
from common.evaluation.inference import Protocol, predict, sum_logits
from common.evaluation.metainfo import MetaInfo, write_metainfo
from common.loaders import ignore_signals
from common.metrics import ConfusionMatrix, Scores
from common.splits.split import Split
from common.visual import Sample, panel

if TYPE_CHECKING:
    from common.engine.run import Run

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
    """Score a network on labeled images; every process must call it, and gets the scores of all images.

    Args:
        network: On `accelerator.device`, wrapped or not. It runs in evaluation mode and is left as it was.
        reader: Reads images and labels.
        names: Ids of the images, each counted once.
        num_classes: C of the network.
        accelerator: Device and processes.
        protocol: Window, scales and flip.
        batch_size: Images of one size that are predicted together, by default as many as make a megapixel. It
            changes speed and memory, not scores.
        workers: Processes that decode images; at most one per processor is used.
        bar: Show progress as a bar (where nothing else draws one), otherwise as plain lines if it takes long.
        stop: Function called before every batch; True ends the evaluation.

    Returns:
        The scores; None where `stop` returned True on any process.

    Raises:
        UserError: no images; an image or label that is missing, damaged, or of another size than its counterpart.
    """
    if not names:
        raise UserError("nothing to evaluate: the list of validation images is empty")
    # The wrapper of several processes would synchronize at every forward and hang where one has fewer batches.
    network = accelerator.unwrap_model(network, keep_torch_compile=False)
    sizes = ((name, picture_size(reader.image_path(name), "image")) for name in names)
    batches = same_size_batches(sizes, batch_size)[accelerator.process_index :: accelerator.num_processes]
    confusion = ConfusionMatrix(num_classes, accelerator.device)
    failure: UserError | None = None
    stopped = False
    try:
        for images, labels in _load(reader, batches, workers, accelerator, bar):
            if stopped := stop is not None and stop():
                break
            with accelerator.autocast():
                logits, _ = sum_logits(network, images, tuple(labels.shape[-2:]), protocol)
            confusion.update(logits.argmax(1), labels)
    except UserError as error:
        failure = error
    # Where one process cannot read a file, all must end: the others would wait for it below.
    ends = torch.tensor([failure is not None, stopped], dtype=torch.int64, device=accelerator.device)
    any_failed, any_stopped = accelerator.reduce(ends, "sum").tolist()
    if any_failed:
        raise failure or UserError("another process could not read an image or label of the validation list")
    if any_stopped:
        return None
    confusion.matrix = accelerator.reduce(confusion.matrix, "sum")
    return confusion.scores()


def evaluate_run(
    network: nn.Module, reader: Reader, split: Split, run: "Run", protocol: Protocol = Protocol()
) -> Scores | None:
    """Evaluate on the validation list during training; None where a signal stopped the run meanwhile.

    The metadata needed to use the network is written to the run folder.
    """
    if run.is_main:
        try:
            write_metainfo(run.folder, MetaInfo(reader.classes, reader.palette, protocol))
        except OSError as error:
            run.log.print(f"warning: {run.folder / RUN_FILE} could not be written ({error.strerror}); going on")
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
    """Predict images one after the other, for pictures; yields image, label, prediction and confidence.

    Args:
        network: The unwrapped network, on `device`.
        reader: Reads images and labels.
        names: Ids of the images.
        protocol: Window, scales and flip.
        device: Where to predict; the samples are on the CPU.
        with_label: Read the label files; False for unlabeled images, whose files are never opened.
        threshold: Confidence from which a prediction is a pseudo-label; None leaves pseudo-labels out.
        maps: Function from an image [1,3,H,W] to `Sample.maps`, but [1,H,W].

    Raises:
        UserError: an image, or a label to be read, is missing or damaged (and `data.skip_bad_files` is not set).
    """
    for name in names:
        try:
            image, label = reader.read_pair(name) if with_label else (reader.read_image(name), None)
        except UserError:
            if reader.skip_bad_files:  # the training reports them
                continue
            raise
        probability = predict(network, image[None].to(device), tuple(image.shape[-2:]), protocol)[0]
        confidence, prediction = (tensor.cpu() for tensor in probability.max(0))
        pseudo_label = None if threshold is None else prediction.masked_fill(confidence < threshold, IGNORE)
        more_maps = {} if maps is None else maps(image[None].to(device))
        more_maps = {key: values[0].cpu() for key, values in more_maps.items()}
        yield Sample(name, image, prediction, label, confidence, pseudo_label, more_maps)


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
        network: The evaluated network, wrapped or not.
        reader: Reads images and labels.
        split: Lists of images.
        run: The run; the picture goes to its folder.
        threshold: Confidence from which a prediction on an unlabeled image is shown as pseudo-label; None shows none.
        maps: Further columns; see `sample_predictions`.
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
    """Select up to `PANEL_IMAGES` names, evenly over the list, as neighbors are often frames of one scene."""
    count = min(PANEL_IMAGES, len(names))
    return [names[index * len(names) // count] for index in range(count)]


def _load(
    reader: Reader, batches: list[list[str]], workers: int, accelerator: Accelerator, bar: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Load images and labels to the device, and show the progress of the main process.

    Raises:
        UserError: an image or label cannot be read.
    """
    device = accelerator.device
    total = sum(map(len, batches))
    with ProgressReport("evaluating", total, accelerator.is_main_process, bar) as progress:
        for loaded in _loader(reader, batches, workers, device):
            if isinstance(loaded, UserError):
                raise loaded
            images, labels = (tensor.to(device, non_blocking=True) for tensor in loaded)
            yield images, labels
            progress.advance(len(images))


def _loader(reader: Reader, batches: list[list[str]], workers: int, device: torch.device) -> DataLoader:
    return DataLoader(
        _LabeledImages(reader),
        batch_sampler=batches,
        num_workers=min(workers, len(batches), os.cpu_count() or 1),
        collate_fn=_collate,
        worker_init_fn=ignore_signals,
        pin_memory=device.type == "cuda",
        # Drawing the workers' seed from the global generator would change the training after an evaluation.
        generator=torch.Generator(),
    )


class _LabeledImages(Dataset):
    """Pairs (image, label) by name; a `UserError` is returned, as raising it would show a worker's traceback."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor] | UserError:
        try:
            return self.reader.read_pair(name)
        except UserError as error:
            return error


def _collate(items: list[tuple[Tensor, Tensor] | UserError]) -> tuple[Tensor, Tensor] | UserError:
    for item in items:
        if isinstance(item, UserError):
            return item
    images, labels = zip(*items)
    return torch.stack(images), torch.stack(labels)
