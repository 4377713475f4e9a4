"""Translate the labels of GTA5 from colors to class ids.

    python memory_bank/translate_labels.py data/gta5

Writes a gray PNG with values 0 to 18 and 255 (ignored) to ROOT/label_ids for every file in ROOT/labels and its
subfolders. The reader then uses these instead of the colors: both give the same labels, and ids are read faster. The
colors are not changed, and files that are already translated are skipped. Colors that GTA5 does not define become 255,
with a warning.
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

MAX_SHOWN = 5  # errors


@dataclass
class Outcome:
    """Result of translating one file or several.

    Attributes:
        written: Number of files written.
        skipped: Number of files that were already translated.
        unmapped: Number of pixels of each color that GTA5 does not define.
        examples: One file with each of these colors.
        errors: One line per file that could not be read or written.
    """

    written: int = 0
    skipped: int = 0
    unmapped: Counter[Color] = field(default_factory=Counter)
    examples: dict[Color, Path] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


def translate(path: Path, out: Path) -> Outcome:
    """Write the class ids of the label `path` to `out`, unless `out` exists and is not older.

    The file is written under a temporary name and renamed, so it is never incomplete. Errors are part of the result.
    """
    try:
        if out.exists() and out.stat().st_mtime >= path.stat().st_mtime:
            return Outcome(skipped=1)
        label, unmapped = class_ids(open_label(path), path)
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".{out.name}.new")
        Image.fromarray(label).save(temporary, "PNG")
        temporary.replace(out)
    except UserError as error:
        return Outcome(errors=[str(error)])
    except OSError as error:
        return Outcome(errors=[f"{out} cannot be written: {error.strerror or error}"])
    return Outcome(1, 0, unmapped, dict.fromkeys(unmapped, path))


def merge(outcomes: Iterable[Outcome]) -> Outcome:
    """Sum up the results of several files."""
    merged = Outcome()
    for one in outcomes:
        merged.written += one.written
        merged.skipped += one.skipped
        merged.unmapped += one.unmapped
        merged.examples = one.examples | merged.examples
        merged.errors += one.errors
    return merged


def report(merged: Outcome, out: Path, console: Console) -> None:
    """Print what was translated.

    Raises:
        UserError: a file could not be translated.
    """
    for color, pixels in merged.unmapped.most_common():
        console.print(
            f"warning: {pixels} pixels of the color {color}, which GTA5 does not define, are ignored; "
            f"e.g. in {merged.examples[color]}"
        )
    console.print(f"{merged.written} labels translated to {out}, {merged.skipped} already there")
    if merged.errors:
        for error in merged.errors[:MAX_SHOWN]:
            console.print(f"problem: {error}")
        raise UserError(
            f"{len(merged.errors)} labels were not translated; replace these files, then repeat the command"
        )


@report_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of GTA5, with labels/*.png or labels/{train,val}/*.png")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="number of files translated at the same time"
    )
    options = parser.parse_args(argv)
    labels, out = options.root / "labels", options.root / "label_ids"
    paths = sorted(labels.rglob("*.png"))
    if not paths:
        raise UserError(f"no labels in {labels}: give the folder of GTA5 that contains images and labels")
    if out.resolve() == labels.resolve():
        raise UserError(f"{out} is a link to {labels}, and labels are never overwritten; remove the link")
    if options.workers < 1:
        raise UserError(f"--workers is {options.workers}; give at least 1")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    with ThreadPoolExecutor(options.workers) as pool:
        outcomes = pool.map(lambda path: translate(path, out / path.relative_to(labels)), paths)
        watched = track(outcomes, "translating", len(paths), console=console, disable=not console.is_terminal)
        merged = merge(watched)
    report(merged, out, console)


if __name__ == "__main__":
    main()
