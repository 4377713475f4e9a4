"""Run a trained network on images, or export it to one file.

    python -m common.predict runs/prcl/demo photos --out predictions
    python -m common.predict runs/prcl/demo --export network.pt2     # or network.onnx

docs/predict.md explains both.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from common.datasets.folder import IMAGE_SUFFIXES
from common.datasets.reader import picture_size, read_picture
from common.engine.devices import accelerator_on
from common.errors import OUT_OF_MEMORY, UserError, report_errors
from common.evaluation.auto_labels import MIN_CONFIDENCE, AutoLabels, open_auto_labels
from common.evaluation.batches import ProgressReport, same_size_batches
from common.evaluation.export import export_network
from common.evaluation.flags import add_protocol_flags, protocol_from
from common.evaluation.inference import Protocol, predict
from common.evaluation.predictor import Predictor, load_predictor, load_trained
from common.visual import overlay, save_label

__all__ = ["Predictor", "load_predictor", "main"]

KINDS = {"overlay": ".png", "mask": ".png", "probability": ".npy", "pseudo_label": ".png"}
Read = Callable[[Path], Tensor]


@report_errors
def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(argv)
    if (args.images is None) == (args.export is None):
        raise UserError("give either images (a folder or a file) or --export FILE")
    if args.images is not None and args.out is None:
        raise UserError("--out FOLDER is missing: the folder to write pictures to")
    if (args.min_confidence is not None or args.masks is not None) and "pseudo_label" not in args.save:
        raise UserError("--min-confidence and --masks go with --save pseudo_label")
    if args.half and args.export is None:
        raise UserError("--half goes with --export FILE: images are predicted in the precision of the run")
    trained = load_trained(args.run, args.which)
    network, metainfo = trained.network, trained.metainfo
    accelerator = accelerator_on(args.devices, trained.config.run.precision, argv)
    if not trained.is_evaluated:
        accelerator.print(
            f"note: {trained.run} has not been evaluated yet: using numbers as class names, VOC's colors, whole images"
        )
    protocol = protocol_from(args, metainfo.protocol)
    accelerator.print(f"{trained.file} ({protocol.describe()})")
    if args.export is not None:
        export_network(network, replace(metainfo, protocol=protocol), args.export, args.half)
        classes = len(metainfo.classes)
        accelerator.print(f"written to {args.export}: from images to probabilities of {classes} classes")
        return
    files, data = find_images(args.images, args.out), trained.config.data
    labels = None
    if "pseudo_label" in args.save:
        least = MIN_CONFIDENCE if args.min_confidence is None else args.min_confidence
        labels = open_auto_labels(args.out, files, data, metainfo, least, args.masks, accelerator)
    network.to(accelerator.device)
    read = partial(read_picture, value_range=data.image_range)
    results = Results(args.out, args.save, metainfo.palette, labels)
    counts = _predict_all(network, files, read, args.batch_size, results, protocol, accelerator)
    done, bad = accelerator.reduce(torch.tensor(counts, device=accelerator.device), "sum").tolist()
    accelerator.print(f"{done} of {len(files)} images: {', '.join(args.save)} in {args.out}")
    if labels is not None:
        accelerator.print(*labels.finish(data, accelerator), sep="\n")
    accelerator.end_training()
    if bad:
        raise UserError(f"{bad} of {len(files)} images could not be read; they are listed above")


def find_images(given: Path, out: Path) -> dict[str, Path]:
    """Find one image, or all images in a folder and its subfolders.

    Args:
        given: Image or folder.
        out: Folder of the results, which is left out.

    Returns:
        Files by name: the path below the folder, without suffix.

    Raises:
        UserError: no such file or folder, no image in it, or two images with the same name.
    """
    if given.is_file():
        return {given.stem: given}
    if not given.is_dir():
        raise UserError(f"images {given}: there is no such file or folder")
    found: dict[str, Path] = {}
    for path in sorted(given.rglob("*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file() or out.resolve() in path.resolve().parents:
            continue
        name = path.relative_to(given).with_suffix("").as_posix()
        if name in found:
            raise UserError(f"{found[name]} and {path} would be written to the same file: rename one")
        found[name] = path
    if not found:
        raise UserError(f"no images in {given}: supported suffixes are {', '.join(IMAGE_SUFFIXES)}")
    return found


@dataclass(frozen=True)
class Results:
    """Files of predicted images.

    Attributes:
        out: Folder to write to; each kind has a subfolder.
        kinds: Keys of `KINDS`.
        palette: uint8 [256,3].
        labels: Writer of pseudo-labels, if `kinds` has them.
    """

    out: Path
    kinds: Sequence[str]
    palette: np.ndarray
    labels: AutoLabels | None = None

    def write(self, name: str, image: Tensor, probability: Tensor) -> None:
        """Write all kinds for image uint8 [3,H,W] with probability [C,H,W]. Raises UserError if it is impossible."""
        label = probability.argmax(0)
        try:
            for kind in self.kinds:
                path = self.out / kind / f"{name}{KINDS[kind]}"
                path.parent.mkdir(parents=True, exist_ok=True)
                if kind == "mask":
                    save_label(label, self.palette, path)
                elif kind == "overlay":
                    overlay(image, label, self.palette).save(path)
                elif kind == "pseudo_label":
                    self.labels.write(name, probability)
                else:
                    np.save(path, probability.half().numpy())
        except OSError as error:
            raise UserError(f"pictures cannot be written to {self.out}: {error.strerror or error}") from None


def _predict_all(
    network: nn.Module,
    files: dict[str, Path],
    read: Read,
    batch_size: int | None,
    results: Results,
    protocol: Protocol,
    accelerator: Accelerator,
) -> tuple[int, int]:
    """Predict and write this process's share of the images. Returns the numbers of predicted and of unreadable ones."""
    names = list(files)[accelerator.process_index :: accelerator.num_processes]
    done = bad = 0
    with (
        ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool,
        ProgressReport("predicting", len(names), accelerator.is_main_process) as progress,
    ):
        writing: list[Future] = []
        for readable, images, failures in _batches(names, files, read, batch_size, pool):
            for failure in failures:
                progress.print(f"warning: {failure}")
            if images is not None:
                probabilities = _predict(network, images.to(accelerator.device), protocol, accelerator)
                for future in writing:  # the previous batch, written while this one was predicted
                    future.result()
                writing = [
                    pool.submit(results.write, name, image, probability)
                    for name, image, probability in zip(readable, images, probabilities)
                ]
            done, bad = done + len(readable), bad + len(failures)
            progress.advance(len(readable) + len(failures))
        for future in writing:
            future.result()
    return done, bad


def _predict(network: nn.Module, images: Tensor, protocol: Protocol, accelerator: Accelerator) -> Tensor:
    """Predict probabilities [B,C,H,W] on the CPU. Raises UserError where the device's memory is too small."""
    height, width = images.shape[-2:]
    try:
        with accelerator.autocast():
            return predict(network, images, (height, width), protocol).cpu()
    except RuntimeError as error:
        if any(words in str(error) for words in OUT_OF_MEMORY):
            raise UserError(
                f"not enough memory for {len(images)} image(s) of {width}x{height}: "
                "lower --batch-size, slide a window (--sliding 512), or use -d cpu"
            ) from None
        raise


def _batches(
    names: Sequence[str], files: dict[str, Path], read: Read, batch_size: int | None, pool: ThreadPoolExecutor
) -> Iterator[tuple[list[str], Tensor | None, list[str]]]:
    """Read batches of same-size images, one batch ahead.

    Yields:
        Names, images uint8 [B,3,H,W] (None where none can be read), and one message per image that cannot be read.
    """
    sizes: list[tuple[str, tuple[int, int]]] = []
    failures = []
    for name in names:
        try:
            sizes.append((name, picture_size(files[name], "image")))
        except UserError as error:
            failures.append(str(error))
    if failures:
        yield [], None, failures
    ahead: list[tuple[str, Future]] = []
    for batch in same_size_batches(sizes, batch_size):
        current, ahead = ahead, [(name, pool.submit(read, files[name])) for name in batch]
        if current:
            yield _decoded(current)
    if ahead:
        yield _decoded(ahead)


def _decoded(batch: list[tuple[str, Future]]) -> tuple[list[str], Tensor | None, list[str]]:
    """Wait for the images of a batch; returned as `_batches` yields them."""
    images, failures = {}, []
    for name, future in batch:
        try:
            images[name] = future.result()
        except UserError as error:
            failures.append(str(error))
    return list(images), torch.stack(list(images.values())) if images else None, failures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m common.predict",
        description="Run one checkpoint of a trained network on images, or export it to one file.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, help="run folder, or a checkpoint in one")
    parser.add_argument("images", nargs="?", type=Path, help="folder of images, or one image")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder to write pictures to")
    parser.add_argument(
        "--save",
        nargs="+",
        choices=KINDS,
        default=["overlay", "mask"],
        help="overlay: image under the classes' colors; mask: PNG of class ids; probability: float16 [C,H,W] as .npy; "
        "pseudo_label: PNG of the confident pixels, to train on (docs/auto_labels.md)",
    )
    parser.add_argument(
        "--min-confidence",
        type=_share,
        metavar="P",
        help=f"with --save pseudo_label: smallest confidence of a labeled pixel, by default {MIN_CONFIDENCE}",
    )
    parser.add_argument(
        "--masks", type=Path, metavar="FOLDER", help="with --save pseudo_label: masks drawn by people, which are kept"
    )
    add_protocol_flags(parser)
    parser.add_argument(
        "--batch-size",
        type=_count,
        metavar="N",
        help="images of one size that are predicted together; by default as many as make a megapixel",
    )
    parser.add_argument(
        "--export", type=Path, metavar="FILE", help="write the network to FILE.pt2 (torch.export) or FILE.onnx"
    )
    parser.add_argument("--half", action="store_true", help="with --export: in half precision (fp16)")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be above 0")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError("must be between 0 and 1")
    return number


if __name__ == "__main__":
    main()
