"""Run training scripts on configs and data files with one thing wrong."""

import copy
import hashlib
import json
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.state import AcceleratorState
from numpy.random import Generator
from PIL import Image

from common.config import parse, to_dict
from common.datasets import open_reader
from common.splits.split import split_of
from tests.conftest import flags, module_of

SECONDS = 20
HUGE = 10**30
WRONG = (
    -1,
    0,
    0.5,
    3,
    "",
    "x",
    "7",
    "../nowhere",
    None,
    True,
    [],
    {},
    [1],
    [0, 0],
    [-3, 5],
    ["a", "b"],
    HUGE,
    1e308,
    -0.0,
)
# Without these, a mutated config would be a long experiment, not an invalid one.
SHORT = ["--run.steps", "1", "--run.threads", "1", "--data.workers", "0", "--run.device", "cpu"]


class Hang(Exception):
    """A run took longer than `SECONDS`."""


def outcome(script: str, arguments: list[str], capsys) -> str:
    """Run `script`: `success`, or `error` for a message of one or two lines and status 2. Anything else fails."""
    signal.signal(signal.SIGALRM, _hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    began = time.monotonic()
    capsys.readouterr()
    try:
        import_module(module_of(script)).main(arguments)
        status = 0
    except SystemExit as stop:
        status = stop.code
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        AcceleratorState._reset_state(reset_partial_state=True)
    assert time.monotonic() - began < SECONDS
    captured = capsys.readouterr()
    if status == 0:
        return "success"
    assert status == 2, f"status {status}: {captured.err}"
    assert captured.err.startswith("error: ") and len(captured.err.splitlines()) <= 2, captured.err
    return "error"


def _hang(number: int, frame: Any) -> None:
    raise Hang


def digest(*folders: Path) -> str:
    """Hash the names and contents of all files."""
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(path).encode() + path.read_bytes() for path in files)).hexdigest()


def fuzz_configs(script: str, arguments: list[str], folder: Path, count: int, seed: int, capsys) -> Counter:
    """Run `script` with `count` mutated copies of the config that `arguments` give."""
    rng, outcomes = np.random.default_rng(seed), Counter()
    parsed = _parsed(script, arguments)
    split_of(parsed.data, open_reader(parsed.data))  # draws the split of the built-in data
    config, data = to_dict(parsed), Path(parsed.data.root)
    for number in range(count):
        text, change = mutate_config(config, rng)
        path = folder / "config.json"
        path.write_bytes(text)
        before = digest(data), path.read_bytes()
        try:
            outcomes[outcome(script, ["--config", str(path), *SHORT, "--run.dir", str(folder / "run")], capsys)] += 1
        except BaseException as error:
            raise AssertionError(f"config {number}: {change}") from error
        assert before == (digest(data), path.read_bytes()), f"config {number}: {change} changed a file"
        shutil.rmtree(folder / "run", ignore_errors=True)
    return outcomes


def mutate_config(config: dict, rng: Generator) -> tuple[bytes, str]:
    """Make a config file with one thing wrong, and describe it."""
    values = copy.deepcopy(config)
    section = str(rng.choice(sorted(values)))
    key = str(rng.choice(sorted(values[section])))
    kind = str(rng.choice(["drop", "rename", "value", "value", "value", "value", "section", "text"]))
    if kind == "drop":
        del values[section][key]
    elif kind == "rename":
        letters = list(key)
        letters[rng.integers(len(letters))] = str(rng.choice(list("aeiouxyz_")))
        values[section]["".join(letters)] = values[section].pop(key)
    elif kind == "value":
        values[section][key] = value = WRONG[rng.integers(len(WRONG))]
        kind = f"value {value!r}"
    elif kind == "section":
        values[section] = WRONG[rng.integers(len(WRONG))]
    text = json.dumps(values).encode()
    if kind == "text":
        text = damage(text, rng)
    return text, f"{kind} of {section}.{key}"


def damage(content: bytes, rng: Generator) -> bytes:
    """Truncate `content`, or change, add or remove some bytes."""
    where = int(rng.integers(len(content)))
    kind = rng.integers(4)
    if kind == 0:
        return content[:where]
    if kind == 1:
        return content[:where] + rng.bytes(int(rng.integers(1, 40))) + content[where:]
    if kind == 2:
        return content[:where] + content[where + int(rng.integers(1, 40)) :]
    damaged = bytearray(content)
    for place in rng.integers(len(content), size=int(rng.integers(1, 20))):
        damaged[place] = rng.integers(256)
    return bytes(damaged)


def fuzz_data(script: str, arguments: list[str], folder: Path, count: int, seed: int, capsys) -> Counter:
    """Run `script` `count` times on a copy of its data with one file mutated."""
    rng, outcomes = np.random.default_rng(seed), Counter()
    data = _parsed(script, arguments).data
    split_of(data, open_reader(data))  # draws the split of the built-in data
    root, split, run = (folder / name for name in ("data", "split", "run"))
    shutil.copytree(data.root, root)
    shutil.copytree(data.split, split)
    places = {"data.root": root, "data.split": split, "run.dir": run, "optim.batch_size": 6}
    arguments = [*arguments, *flags(places), *SHORT]
    for number in range(count):
        path, mutate = _draw_file(root, split, rng)
        original = path.read_bytes()
        mutate(path, rng)
        before = digest(root, split)
        try:
            outcomes[outcome(script, arguments, capsys)] += 1
        except BaseException as error:
            raise AssertionError(f"file {number}: {mutate.__name__} of {path.name}") from error
        assert before == digest(root, split), f"file {number}: {mutate.__name__} of {path.name}: files changed"
        path.write_bytes(original)
        shutil.rmtree(run, ignore_errors=True)
    return outcomes


def _parsed(script: str, arguments: list[str]) -> Any:
    return parse(import_module(module_of(script)).Config, "fuzz", arguments)


def _draw_file(root: Path, split: Path, rng: Generator) -> tuple[Path, Callable[[Path, Generator], None]]:
    lists = sorted(split.glob("*_filename.txt"))
    kind = rng.integers(3)
    if kind == 0:
        return lists[rng.integers(len(lists))], LIST_CHANGES[rng.integers(len(LIST_CHANGES))]
    # Files that a short run reads: those of the labeled and of the validation list.
    names = [name for path in lists if "unlabeled" not in path.name for name in path.read_text().split()]
    name = names[rng.integers(len(names))]
    if kind == 1:
        return root / "JPEGImages" / f"{name}.jpg", IMAGE_CHANGES[rng.integers(len(IMAGE_CHANGES))]
    return root / "SegmentationClassAug" / f"{name}.png", LABEL_CHANGES[rng.integers(len(LABEL_CHANGES))]


def damaged(path: Path, rng: Generator) -> None:
    path.write_bytes(damage(path.read_bytes(), rng))


def emptied(path: Path, rng: Generator) -> None:
    path.write_bytes(b"")


def deleted(path: Path, rng: Generator) -> None:
    path.unlink()


def noise(path: Path, rng: Generator) -> None:
    path.write_bytes(rng.bytes(int(rng.integers(1, 4000))))


def resized(path: Path, rng: Generator) -> None:
    with Image.open(path) as picture:
        picture.resize(tuple(rng.integers(1, 90, 2).tolist())).save(path)


def other_mode(path: Path, rng: Generator) -> None:
    modes = ["1", "L", "RGB", "RGBA", "CMYK", "I;16", "LA", "P"]
    with Image.open(path) as picture:
        changed = picture.convert(modes[rng.integers(len(modes))].replace("I;16", "I"))
    changed.save(path, format="TIFF" if changed.mode in ("CMYK", "I") else "PNG")


def animated(path: Path, rng: Generator) -> None:
    with Image.open(path) as picture:
        frames = [picture.convert("L"), picture.convert("L").rotate(90)]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:])


def strange_value(path: Path, rng: Generator) -> None:
    with Image.open(path) as picture:
        label = np.array(picture)
    label[rng.integers(label.shape[0]), rng.integers(label.shape[1])] = rng.integers(256)
    Image.fromarray(label).save(path)


def all_ignored(path: Path, rng: Generator) -> None:
    with Image.open(path) as picture:
        Image.fromarray(np.full_like(np.array(picture), 255)).save(path)


def twice(path: Path, rng: Generator) -> None:
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")


def windows(path: Path, rng: Generator) -> None:
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n\r\n"))


def unknown_name(path: Path, rng: Generator) -> None:
    path.write_text(
        path.read_text() + str(rng.choice(["nobody", "a b", "../x", "x.jpg", "\u00e9", "\x00", "."])) + "\n"
    )


def of_another_list(path: Path, rng: Generator) -> None:
    others = [other for other in path.parent.glob("*.txt") if other != path]
    path.write_text(path.read_text() + others[rng.integers(len(others))].read_text())


LIST_CHANGES = (damaged, emptied, deleted, noise, twice, windows, unknown_name, of_another_list)
IMAGE_CHANGES = (damaged, damaged, emptied, deleted, noise, resized, other_mode, animated)
LABEL_CHANGES = (*IMAGE_CHANGES, strange_value, all_ignored)
