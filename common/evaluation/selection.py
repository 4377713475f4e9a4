"""Which run and which of its checkpoints a command line means."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common.engine.checkpoints import list_steps, read_meta, step_folder
from common.errors import UserError

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt")
NUMBERS = re.compile(r"(step:)?(\d+)(?:(-)(\d*))?")


@dataclass(frozen=True)
class CheckpointRef:
    """One network: `epoch` is 0-based, with a fraction between ends of epochs, and None where epochs do not count."""

    which: str
    file: Path
    step: int | None = None
    epoch: float | None = None


def find_run(paper: str, given: Path | None, which: str | None) -> Path:
    """The run folder that is meant: the given one, that of the weight file `which`, or the newest below runs/<paper>.

    Raises:
        UserError: the given folder is no run, or there is no run with a checkpoint.
    """
    if given is None:
        return run_around(which) or _newest_run(Path("runs", paper))
    if not (given / "config.json").is_file():
        raise UserError(f"{given} is not a run folder: it has no config.json")
    return given


def run_around(which: str | None) -> Path | None:
    """The run folder that the weight file or checkpoint `which` lies in; None where it is none, or lies in no run."""
    parents = Path(which).parents if which and Path(which).exists() else ()
    return next((parent for parent in parents if (parent / "config.json").is_file()), None)


def find_targets(run: Path, which: str | None, by_epoch: bool) -> tuple[list[CheckpointRef], list[str]]:
    """What `-e` stands for.

    Args:
        run: Run folder.
        which: `best`, `last`, a number, `A-B`, `A-`, any of these after `step:`, or a weight file; None for the best
            checkpoint, or else the last.
        by_epoch: Whether plain numbers are 0-based epochs (epoch e is the checkpoint written after it) or steps.

    Returns:
        At least one target, ascending, and remarks for the user.

    Raises:
        UserError: nothing matches, or `which` is none of the above.
    """
    root = run / "checkpoints"
    if which is None:
        which = next((name for name in ("best", "last") if (root / name).exists()), "best")
    if which in ("best", "last"):
        if not (root / which).exists():
            raise UserError(f"{run} has no {which} checkpoint; it has steps {_listed(list_steps(root))}")
        return [_target(which, root / (root / which).resolve().name)], []
    numbers = NUMBERS.fullmatch(which)
    if numbers is None:
        return [_file_target(which)], []
    unit = "step" if numbers[1] or not by_epoch else "epoch"
    there, notes = _numbered(root, unit)
    low = high = int(numbers[2])
    if numbers[3]:
        high = int(numbers[4]) if numbers[4] else math.inf
    if low > high:
        raise UserError(f"-e {which} is an empty range: the smaller {unit} comes first")
    chosen = [there[number] for number in sorted(there) if low <= number <= high]
    if not chosen:
        asked = which.removeprefix("step:")
        missing = f"{run} has no checkpoint of {unit} {asked}; it has {unit}s {_listed(there)}"
        raise UserError("\n".join([missing, *notes]))
    notes += [f"there is no checkpoint of {unit} {end}" for end in (low, high) if end < math.inf and end not in there]
    return chosen, notes


def _newest_run(root: Path) -> Path:
    times: dict[Path, float] = {}
    for path in root.rglob("config.json"):
        folders = [step_folder(path.parent / "checkpoints", step) for step in list_steps(path.parent / "checkpoints")]
        if folders:
            times[path.parent] = max(folder.stat().st_mtime for folder in folders)
    if not times:
        raise UserError(f"there is no run with a checkpoint below {root}; give the run folder, or train first")
    return max(times, key=times.__getitem__)


def _target(which: str, folder: Path) -> CheckpointRef:
    meta = read_meta(folder)
    epoch = None if meta.get("epoch") is None else round(meta["epoch"] - 1, 6)
    return CheckpointRef(which, folder / "model.safetensors", meta["step"], epoch)


def _file_target(which: str) -> CheckpointRef:
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
    # Every checkpoint's file is called model.safetensors; its folder tells it apart.
    return CheckpointRef(path.parent.name if path.stem == "model" and path.parent.name else path.stem, path)


def _numbered(root: Path, unit: str) -> tuple[dict[float, CheckpointRef], list[str]]:
    """Targets by step or by epoch; a damaged checkpoint becomes a remark."""
    there, notes = {}, []
    for step in list_steps(root):
        folder = step_folder(root, step)
        try:
            target = _target(folder.name, folder)
        except UserError as error:
            notes.append(str(error))
            continue
        number = target.step if unit == "step" else target.epoch
        if number is not None:
            there[number] = target
    return there, notes


def _listed(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:g}" if isinstance(number, float) else str(number) for number in numbers) or "none"
