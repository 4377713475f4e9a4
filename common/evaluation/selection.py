"""Resolve the run and checkpoints selected on the command line."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common.engine.checkpoint_files import list_steps, read_meta, step_folder
from common.errors import UserError

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt")
NUMBERS = re.compile(r"(?P<steps>step:)?(?P<low>\d+)(?:(?P<dash>-)(?P<high>\d*))?")


@dataclass(frozen=True)
class CheckpointRef:
    """A network to evaluate.

    Args:
        name: `best`, `last`, the name of the checkpoint folder, or that of the weight file without suffix.
        file: Weight file.
        step: Optimizer step it was written after; None for a file that is selected by its path.
        epoch: 0-based epoch it was written after, with a fraction between ends of epochs; None where the run counts
            steps only.
    """

    name: str
    file: Path
    step: int | None = None
    epoch: float | None = None


def find_run(paper: str, given: Path | None, which: str | None) -> Path:
    """Find the run folder: the given one, the one that contains the file `which`, or the newest below runs/<paper>.

    Raises:
        UserError: the given folder is not a run folder, or no run has a checkpoint.
    """
    if given is None:
        return run_containing(which) or _newest_run(Path("runs", paper))
    if not (given / "config.json").is_file():
        raise UserError(f"{given} is not a run folder: it has no config.json")
    return given


def run_containing(which: str | None) -> Path | None:
    """Find the run folder that contains the weight file or checkpoint `which`; None where there is no such folder."""
    parents = Path(which).parents if which and Path(which).exists() else ()
    return next((parent for parent in parents if (parent / "config.json").is_file()), None)


def find_checkpoints(run: Path, which: str | None, by_epoch: bool) -> tuple[list[CheckpointRef], list[str]]:
    """Find the checkpoints that the option `-e` selects.

    Args:
        run: Run folder.
        which: `best`, `last`, a number, `A-B`, `A-`, numbers after `step:`, or a weight file; None for the best
            checkpoint, or else the last.
        by_epoch: Numbers without `step:` are 0-based epochs (epoch e is the checkpoint written after it), else steps.

    Returns:
        At least one checkpoint, ascending, and notes for the user.

    Raises:
        UserError: nothing matches, or `which` has another form.
    """
    root = run / "checkpoints"
    if which is None:
        which = next((name for name in ("best", "last") if (root / name).exists()), "best")
    if which in ("best", "last"):
        if not (root / which).exists():
            raise UserError(f"{run} has no {which} checkpoint; it has steps {_listed(list_steps(root))}")
        return [_checkpoint_in(root / (root / which).resolve().name, which)], []
    numbers = NUMBERS.fullmatch(which)
    if numbers is None:
        return [_weight_file(which)], []
    return _checkpoints_in_range(run, numbers, "step" if numbers["steps"] or not by_epoch else "epoch")


def _checkpoints_in_range(run: Path, numbers: re.Match[str], unit: str) -> tuple[list[CheckpointRef], list[str]]:
    """Find the checkpoints of a number or range; `unit` is `step` or `epoch`. Otherwise as `find_checkpoints`."""
    low = high = int(numbers["low"])
    if numbers["dash"]:
        high = int(numbers["high"]) if numbers["high"] else math.inf
    if low > high:
        raise UserError(f"-e {numbers[0]} is an empty range: give the smaller {unit} first")
    available, notes = _available(run / "checkpoints", unit)
    selected = [available[number] for number in sorted(available) if low <= number <= high]
    if not selected:
        wanted = numbers[0].removeprefix("step:")
        missing = f"{run} has no checkpoint of {unit} {wanted}; it has {unit}s {_listed(available)}"
        raise UserError("\n".join([missing, *notes]))
    ends = (end for end in (low, high) if end < math.inf and end not in available)
    return selected, [*notes, *(f"there is no checkpoint of {unit} {end}" for end in ends)]


def _available(root: Path, unit: str) -> tuple[dict[float, CheckpointRef], list[str]]:
    """List the checkpoints by step or epoch, and one note per damaged checkpoint."""
    available, notes = {}, []
    for step in list_steps(root):
        folder = step_folder(root, step)
        try:
            checkpoint = _checkpoint_in(folder, folder.name)
        except UserError as error:
            notes.append(str(error))
            continue
        number = checkpoint.step if unit == "step" else checkpoint.epoch
        if number is not None:
            available[number] = checkpoint
    return available, notes


def _checkpoint_in(folder: Path, name: str) -> CheckpointRef:
    """Describe the checkpoint in a folder. Raises UserError where its `meta.json` is damaged."""
    meta = read_meta(folder)
    epoch = None if meta.get("epoch") is None else round(meta["epoch"] - 1, 6)
    return CheckpointRef(name, folder / "model.safetensors", meta["step"], epoch)


def _weight_file(which: str) -> CheckpointRef:
    path = Path(which)
    if (path / "model.safetensors").is_file():
        path = path / "model.safetensors"
    if path.suffix not in WEIGHT_SUFFIXES:
        raise UserError(
            f"-e {which} is not understood; give best, last, a number, A-B, A-, step:N, "
            f"a checkpoint folder, or a weight file ({', '.join(WEIGHT_SUFFIXES)})"
        )
    if not path.is_file():
        raise UserError(f"-e {which}: there is no such file")
    # Every checkpoint's file is called model.safetensors, so it is named after its folder.
    return CheckpointRef(path.parent.name if path.stem == "model" and path.parent.name else path.stem, path)


def _newest_run(root: Path) -> Path:
    times: dict[Path, float] = {}
    for path in root.rglob("config.json"):
        checkpoints = path.parent / "checkpoints"
        folders = [step_folder(checkpoints, step) for step in list_steps(checkpoints)]
        if folders:
            times[path.parent] = max(folder.stat().st_mtime for folder in folders)
    if not times:
        raise UserError(f"there is no run with a checkpoint below {root}; give the run folder, or train first")
    return max(times, key=times.__getitem__)


def _listed(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:g}" if isinstance(number, float) else str(number) for number in numbers) or "none"
