"""Put a trained network to use: pictures of what it sees in any images, or the network as one file.

    python -m common.predict runs/prcl/demo photos --out seen
    python -m common.predict runs/prcl/demo --export seen.pt2

docs/predict.md explains both.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from rich.progress import Progress
from torch import Tensor, nn

from common.config import load_config
from common.config.sections import ModelConfig, RunConfig
from common.datasets.folder import IMAGE_SUFFIXES
from common.datasets.reader import picture_size, read_picture
from common.engine.devices import accelerator_on
from common.errors import OUT_OF_MEMORY, UserError, report_errors
from common.evaluation.cli import protocol_from
from common.evaluation.export import export_network
from common.evaluation.inference import Protocol, predict
from common.evaluation.metainfo import default_metainfo, read_metainfo
from common.evaluation.selection import CheckpointRef, find_targets
from common.models import build_network
from common.models.weights import load_state, read_state
from common.visual import overlay, save_label

KINDS = ("overlay", "mask", "probability")
SUFFIXES = (*IMAGE_SUFFIXES, ".bmp", ".tif", ".tiff")
PROGRESS_SECONDS = 5.0  # seconds without a word
MAX_BATCH_PIXELS = 2**20


@dataclass
class Sections:
    """What is read of any run's config."""

    model: ModelConfig
    run: RunConfig


@report_errors
def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(argv)
    if (args.images is None) == (args.export is None):
        raise UserError("give either images (a folder or a file) or --export FILE")
    if args.images is not None and args.out is None:
        raise UserError("--out FOLDER is missing: where the pictures go")
    run, target = find_checkpoint(args.run, args.which)
    config = load_config(Sections, run / "config.json", only_known=True)
    metainfo = read_metainfo(run, config.model.num_classes)
    accelerator = accelerator_on(args.devices, config.run.precision, argv)
    say = accelerator.print
    if metainfo is None:
        say(f"note: {run} was not evaluated yet: classes have numbers for names, and images are taken whole")
        metainfo = default_metainfo(config.model.num_classes)
    protocol = protocol_from(args, metainfo.protocol)
    network = build_network(replace(config.model, pretrained=False)).eval()
    load_state(network, read_state(target.file), str(target.file), f"the network of {run / 'config.json'}")
    say(f"{target.file} ({protocol.describe()})")
    if args.export is not None:
        export_network(network, replace(metainfo, protocol=protocol), args.export)
        say(f"written to {args.export}: an image in, probabilities of {len(metainfo.classes)} classes out")
        return
    files = find_images(args.images, args.out)
    network.to(accelerator.device)
    counts = _predict_all(network, files, args, metainfo.palette, protocol, accelerator)
    done, bad = accelerator.reduce(torch.tensor(counts, device=accelerator.device), "sum").tolist()
    say(f"{done} of {len(files)} images: {', '.join(args.save)} in {args.out}")
    accelerator.end_training()
    if bad:
        raise UserError(f"{bad} of {len(files)} images could not be read; they are named above")


def find_checkpoint(given: Path, which: str | None) -> tuple[Path, CheckpointRef]:
    """The run folder and the weights that are meant.

    Args:
        given: A run folder, a checkpoint of one, or its weight file.
        which: With a run folder one checkpoint as `-e` of eval.py names them; None for the best, else the last.

    Raises:
        UserError: no run there, no such checkpoint, or several.
    """
    if not given.exists():
        raise UserError(f"{given} does not exist; give a run folder or a checkpoint of one")
    run = next((path for path in (given, *given.absolute().parents) if (path / "config.json").is_file()), None)
    if run is None:
        raise UserError(f"{given} is no run folder, and lies in none: there is no config.json")
    if run != given and which is not None:
        raise UserError(f"-e {which} goes with a run folder; {given} is a checkpoint already")
    by_epoch = load_config(Sections, run / "config.json", only_known=True).run.epochs is not None
    targets, _ = find_targets(run, which if run == given else str(given), by_epoch)
    if len(targets) > 1:
        raise UserError(f"-e {which} stands for {len(targets)} checkpoints; give one")
    return run, targets[0]


def find_images(given: Path, out: Path) -> dict[str, Path]:
    """The images of a folder, also those further down, or one image: by name, the path below the folder without ending.

    What lies in `out` is left out.

    Raises:
        UserError: no such file or folder, no image in it, two images that would have one name.
    """
    if given.is_file():
        return {given.stem: given}
    if not given.is_dir():
        raise UserError(f"images {given}: there is no such file or folder")
    found: dict[str, Path] = {}
    for path in sorted(given.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or not path.is_file() or out.resolve() in path.resolve().parents:
            continue
        name = path.relative_to(given).with_suffix("").as_posix()
        if name in found:
            raise UserError(f"{found[name]} and {path} would be written under one name: rename one")
        found[name] = path
    if not found:
        raise UserError(f"no images in {given}: known endings are {', '.join(SUFFIXES)}")
    return found


def _predict_all(
    network: nn.Module,
    files: dict[str, Path],
    args: argparse.Namespace,
    palette: np.ndarray,
    protocol: Protocol,
    accelerator: Accelerator,
) -> tuple[int, int]:
    """Predict and write this process's share of the images. Returns how many, and how many could not be read."""
    names = list(files)[accelerator.process_index :: accelerator.num_processes]
    done = bad = 0
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool, _Told(len(names), accelerator) as progress:
        writing: list[Future] = []
        for chosen, images, faults in _batches(names, files, args.batch_size, pool):
            for fault in faults:
                progress.say(f"warning: {fault}")
            if chosen:
                probability = _predict(network, images.to(accelerator.device), protocol, accelerator)
                for future in writing:  # of the batch before, while this one was predicted
                    future.result()
                writing = [
                    pool.submit(_write, args.out, name, image, one, palette, args.save)
                    for name, image, one in zip(chosen, images, probability)
                ]
            done, bad = done + len(chosen), bad + len(faults)
            progress.advance(len(chosen) + len(faults))
        for future in writing:
            future.result()
    return done, bad


def _predict(network: nn.Module, images: Tensor, protocol: Protocol, accelerator: Accelerator) -> Tensor:
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
    names: Sequence[str], files: dict[str, Path], batch_size: int | None, pool: ThreadPoolExecutor
) -> Iterator[tuple[list[str], Tensor | None, list[str]]]:
    """Names and images uint8 [B,3,H,W] of one size, and what is wrong with others; decoded one batch ahead."""
    sizes: dict[tuple[int, int], list[str]] = {}
    faults = []
    for name in names:
        try:
            sizes.setdefault(picture_size(files[name], "image"), []).append(name)
        except UserError as error:
            faults.append(str(error))
    if faults:
        yield [], None, faults
    ahead: list[tuple[str, Future]] = []
    for part in _parts(sizes, batch_size):
        now, ahead = ahead, [(name, pool.submit(read_picture, files[name])) for name in part]
        yield from _decoded(now)
    yield from _decoded(ahead)


def _parts(sizes: dict[tuple[int, int], list[str]], batch_size: int | None) -> Iterator[list[str]]:
    for (width, height), names in sizes.items():
        count = batch_size or max(1, MAX_BATCH_PIXELS // (width * height))
        yield from (names[start : start + count] for start in range(0, len(names), count))


def _decoded(part: list[tuple[str, Future]]) -> Iterator[tuple[list[str], Tensor | None, list[str]]]:
    images, faults = {}, []
    for name, future in part:
        try:
            images[name] = future.result()
        except UserError as error:
            faults.append(str(error))
    if part:
        yield list(images), torch.stack(list(images.values())) if images else None, faults


def _write(out: Path, name: str, image: Tensor, probability: Tensor, palette: np.ndarray, kinds: list[str]) -> None:
    """The pictures of one image. Raises UserError where they cannot be written."""
    label = probability.argmax(0)
    suffixes = {"probability": ".npy"}
    try:
        for kind in kinds:
            path = out / kind / f"{name}{suffixes.get(kind, '.png')}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "mask":
                save_label(label, palette, path)
            elif kind == "overlay":
                overlay(image, label, palette).save(path)
            else:
                np.save(path, probability.half().numpy())
    except OSError as error:
        raise UserError(f"pictures cannot be written to {out}: {error.strerror or error}") from None


class _Told:
    """Progress as a bar in a terminal, as plain lines elsewhere; the main process tells."""

    def __init__(self, total: int, accelerator: Accelerator) -> None:
        self._total, self._done, self._tells = total, 0, accelerator.is_main_process
        self._progress = Progress(disable=not (self._tells and sys.stdout.isatty()), transient=True)
        self._last = time.monotonic()

    def __enter__(self) -> "_Told":
        self._progress.start()
        self._task = self._progress.add_task("predicting", total=self._total)
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        """A line above the bar; of every process."""
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def advance(self, count: int) -> None:
        self._done += count
        self._progress.update(self._task, advance=count)
        if self._tells and self._progress.disable and time.monotonic() - self._last > PROGRESS_SECONDS:
            self._last = time.monotonic()
            print(f"predicting: {100 * self._done // self._total} % done", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m common.predict", description="Apply a trained network to images, or export it.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("run", type=Path, help="run folder, or a checkpoint of one")
    parser.add_argument("images", nargs="?", type=Path, help="folder of images, or one image")
    parser.add_argument("--out", type=Path, help="folder for the pictures")
    parser.add_argument(
        "--save", nargs="+", choices=KINDS, default=["overlay", "mask"],
        help="overlay: image under the classes' colors; mask: PNG of class ids; probability: float16 [C,H,W] as .npy",
    )  # fmt: skip
    parser.add_argument("-e", dest="which", help="best, last or a number, as for eval.py; by default best, else last")
    parser.add_argument("-d", "--devices", help="cpu, 0, 0,1, 0-3 or * (all GPUs); by default one GPU, else the CPU")
    parser.add_argument(
        "--batch-size", type=_count, metavar="N",
        help="images of one size that go through the network together; by default a megapixel",
    )  # fmt: skip
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0], help="scales whose predictions are averaged")
    parser.add_argument("--flip", action="store_true", help="average with the prediction of the mirrored image")
    area = parser.add_mutually_exclusive_group()
    area.add_argument("--sliding", type=int, metavar="CROP", help="slide a window of this side")
    area.add_argument("--whole", action="store_true", help="whole images, where the paper slides a window")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the network to FILE.pt2 (torch.export)")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be above 0")
    return number


if __name__ == "__main__":
    main()
