"""Compare runs: settings, curves, IoU per class and worst images, as tables and as one HTML page.

    python -m common.compare runs/prcl/demo runs/css/demo

docs/evaluation.md explains it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.errors import UserError, report_errors
from common.evaluation.compare_page import best_of, class_names, compare_page, missing_parts, percent, protocol_note
from common.evaluation.run_records import RunRecord, differing_settings, read_runs


@report_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if len(args.runs) < 2 or len({run.resolve() for run in args.runs}) < len(args.runs):
        raise UserError("give two or more different run folders")
    records = read_runs(args.runs, args.which)
    console = Console(highlight=False, markup=False)
    console.print(_settings_table(records))
    console.print(_scores_table(records))
    for line in (protocol_note(records), *missing_parts(records, args.which)):
        if line:
            console.print(f"note: {line}", soft_wrap=True)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(compare_page(records, args.which), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{args.out} cannot be written: {error.strerror}; give another --out") from None
    console.print(f"written to {args.out}", soft_wrap=True)


def _settings_table(records: Sequence[RunRecord]) -> Table:
    table = _table("settings that differ", "setting", records)
    for key, values in differing_settings(records).items():
        table.add_row(key, *values)
    return table


def _scores_table(records: Sequence[RunRecord]) -> Table:
    """IoU per class, means and the best score seen in training; the best of a row in bold."""
    evaluations = [record.evaluation for record in records]
    table = _table("IoU %", "class", records, justify="right")
    for name in class_names(records):
        _add_numbers(table, name, [one.per_class.get(name) if one else None for one in evaluations])
    table.add_section()
    _add_numbers(table, "mIoU", [one.miou if one else None for one in evaluations])
    _add_numbers(table, "pixel accuracy", [one.pixel_accuracy if one else None for one in evaluations])
    best = [max((value for _, value in record.miou), default=None) for record in records]
    _add_numbers(table, "best mIoU in training", best)
    table.add_row("evaluation", *(f"{one.name}, step {one.step}" if one else "-" for one in evaluations))
    return table


def _add_numbers(table: Table, name: str, values: Sequence[float | None]) -> None:
    best = best_of(values)
    cells = [Text(percent(value), "bold" if index == best else "") for index, value in enumerate(values)]
    table.add_row(name, *cells)


def _table(title: str, first: str, records: Sequence[RunRecord], justify: str = "left") -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for record in records:
        table.add_column(record.name, justify=justify, overflow="fold")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m common.compare",
        description="Compare runs: settings that differ, curves, IoU per class, worst validation images.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "-e",
        dest="which",
        metavar="NAME",
        help="evaluation to compare: name of a file in RUN/eval, e.g. last or best_flip; by default best, else last",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/compare.html"), help="page to write")
    return parser


if __name__ == "__main__":
    main()
