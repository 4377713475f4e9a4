"""Labels of GTA5 from colors to class ids, once and for all.

    python memory_bank/translate_labels.py data/gta5

Writes ROOT/label_ids, gray PNGs of 0 to 18 and 255 (ignored), of all files in ROOT/labels and the folders below it. The
reader takes them in place of the colors, which stay as they are: both give the same labels, ids are read faster. What
has been translated already is left alone. Colors that GTA5 does not define become 255, and are told.
"""

import argparse
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import track

from common.datasets.gta5 import Color, class_ids
from common.datasets.reader import open_label
from common.errors import UserError, report_errors

SHOWN = 5


@dataclass
class Outcome:
    """Of one file, or of all.

    Attributes:
        done: Files that were written.
        there: Files that had been before.
        unmapped: Pixels of each color that GTA5 does not define.
        examples: A file with each of them.
        faults: Lines on files that could not be read or written.
    """

    done: int = 0
    there: int = 0
    unmapped: Counter[Color] = field(default_factory=Counter)
    examples: dict[Color, Path] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def translate(path: Path, out: Path) -> Outcome:
    """Write the class ids of the label `path` to `out`, unless a file not older than it is there.

    The file appears whole or not at all. What goes wrong is told in the outcome.
    """
    try:
        if out.exists() and out.stat().st_mtime >= path.stat().st_mtime:
            return Outcome(there=1)
        label, unmapped = class_ids(open_label(path), path)
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".{out.name}.new")
        Image.fromarray(label).save(temporary, "PNG")
        temporary.replace(out)
    except UserError as error:
        return Outcome(faults=[str(error)])
    except OSError as error:
        return Outcome(faults=[f"{out} cannot be written: {error.strerror or error}"])
    return Outcome(1, 0, unmapped, dict.fromkeys(unmapped, path))


def total(outcomes: Iterable[Outcome]) -> Outcome:
    """All of them as one."""
    whole = Outcome()
    for one in outcomes:
        whole.done += one.done
        whole.there += one.there
        whole.unmapped += one.unmapped
        whole.examples = one.examples | whole.examples
        whole.faults += one.faults
    return whole


def report(whole: Outcome, out: Path, console: Console) -> None:
    """Say what was done, and what was not.

    Raises:
        UserError: a file could not be translated.
    """
    for color, pixels in whole.unmapped.most_common():
        console.print(
            f"warning: {pixels} pixels of the color {color}, which GTA5 does not define, are ignored; "
            f"{whole.examples[color]} for one"
        )
    console.print(f"{whole.done} labels translated to {out}, {whole.there} were there")
    if whole.faults:
        for fault in whole.faults[:SHOWN]:
            console.print(f"wrong: {fault}")
        raise UserError(
            f"{len(whole.faults)} labels were not translated; mend them, and the same command does the rest"
        )


@report_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of GTA5, with labels/*.png or labels/{train,val}/*.png")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="files at a time")
    options = parser.parse_args(argv)
    labels, out = options.root / "labels", options.root / "label_ids"
    paths = sorted(labels.rglob("*.png"))
    if not paths:
        raise UserError(f"no labels in {labels}: give the folder of GTA5, which has images and labels below it")
    if out.resolve() == labels.resolve():
        raise UserError(f"{out} is {labels}: nothing is written over, remove the link")
    if options.workers < 1:
        raise UserError(f"--workers is {options.workers}; give a number from 1")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    with ThreadPoolExecutor(options.workers) as pool:
        outcomes = pool.map(lambda path: translate(path, out / path.relative_to(labels)), paths)
        watched = track(outcomes, "translating", len(paths), console=console, disable=not console.is_terminal)
        whole = total(watched)
    report(whole, out, console)


if __name__ == "__main__":
    main()
