"""Write the tables of docs/results.md and draw its pictures, from the stored results.

    python benchmarks/results.py
    python benchmarks/results.py --out elsewhere    # writes the page and its pictures there

In the page a block between `<!-- table: NAME -->` and `<!-- end -->` is replaced by the table and the pictures of
benchmarks/tables/NAME.json; text outside blocks stays. Pictures are written to `pictures/` beside the page.
"""

import argparse
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.accuracy import RESULTS, Results, gains, read_results, read_table, standard_error, summary
from common.errors import UserError, report_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = Path("docs/results.md")
TABLES = Path(__file__).parent / "tables"
BLOCK = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
CLEAR = 2.0  # standard errors from which a gain is drawn in color
GAIN, LOSS, UNCLEAR, SEED = "#2a78b5", "#c5543a", "#9aa0a6", "#202124"
LEAST_SEEDS = 2  # for a standard error


def figure(width: float, height: float) -> "Figure":
    """A figure of `width` x `height` inches.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is missing: pip install -e '.[plots]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def rows_with_gains(table: dict[str, Any], results: Results) -> dict[str, list[float]]:
    """Gains over labels only by row and seed, in percentage points, the smallest mean first."""
    found = {row: gains(table, results, row, "scores") for row in table["rows"]}
    return dict(sorted(((row, values) for row, values in found.items() if values), key=lambda item: _mean(item[1])))


def draw_gains(table: dict[str, Any], results: Results) -> "Figure":
    """Draw the gain of each method over labels only: a bar for the mean with its standard error, a dot per seed."""
    found = rows_with_gains(table, results)
    page = figure(8, 0.4 * len(found) + 1)
    axes = page.subplots()
    for height, values in enumerate(found.values()):
        mean = _mean(values)
        error = standard_error(values) if len(values) >= LEAST_SEEDS else 0.0
        is_clear = len(values) >= LEAST_SEEDS and abs(mean) > CLEAR * error
        color = (GAIN if mean > 0 else LOSS) if is_clear else UNCLEAR
        axes.barh(height, mean, 0.62, color=color, xerr=error or None, ecolor=SEED, capsize=3)
        axes.plot(values, [height] * len(values), "o", color=SEED, markersize=3.5)
    axes.axvline(0, color=SEED, linewidth=0.8)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_xlabel(f"gain in mIoU over labels only, points; gray: within {CLEAR:g} standard errors, or one seed")
    axes.spines[["top", "right"]].set_visible(False)
    return page


def draw_classes(table: dict[str, Any], results: Results) -> "Figure":
    """Draw the gain in IoU by method and class, mean over seeds, as colored cells."""
    rows = list(rows_with_gains(table, results))[::-1]
    classes = list(next(iter(results.values()))["scores"]["per_class_iou"])
    cells = np.array([[_class_gain(table, results, row, name) for name in classes] for row in rows])
    page = figure(0.75 * len(classes) + 3, 0.4 * len(rows) + 1.6)
    axes = page.subplots()
    limit = max(1.0, float(np.nanpercentile(np.abs(cells), 95)))
    axes.imshow(cells, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(classes)), classes, rotation=35, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    for (row, column), value in np.ndenumerate(cells):
        if not np.isnan(value):
            color = "white" if abs(value) > 0.6 * limit else SEED
            axes.text(column, row, f"{value:+.0f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_title("gain in IoU over labels only, points", fontsize=10)
    return page


def draw_cost(table: dict[str, Any], results: Results) -> "Figure":
    """Draw gain against training time, both relative to the row's own run on labels only."""
    page = figure(8, 4.5)
    axes = page.subplots()
    for row, values in rows_with_gains(table, results).items():
        times = _times(table, results, row)
        if times:
            axes.plot(_mean(times), _mean(values), "o", color=GAIN)
            axes.annotate(row, (_mean(times), _mean(values)), xytext=(6, 4), textcoords="offset points", fontsize=8)
    if axes.lines:
        axes.axhline(0, color=UNCLEAR, linewidth=0.8)
    axes.margins(x=0.2)
    axes.set(xlabel="training time, times that of labels only", ylabel="gain in mIoU, points")
    axes.spines[["top", "right"]].set_visible(False)
    return page


def draw_curves(table: dict[str, Any], results: Results) -> "Figure":
    """Draw the mIoU of each row during training by its paper's own protocol, mean over seeds; labels only dashed."""
    page = figure(8, 5)
    axes = page.subplots()
    for row, setting in table["rows"].items():
        curves = [results[row, seed]["curve"] for seed in table["seeds"] if "curve" in results.get((row, seed), {})]
        if curves:
            steps = [step for step, _ in curves[0]]
            means = [_mean([curve[index][1] for curve in curves]) for index in range(len(steps))]
            style = "-" if setting["baseline"] else "--"
            axes.plot(steps, means, style, marker="o", markersize=3, linewidth=1.2, label=row)
    axes.set(xlabel="step", ylabel="mIoU (%)")
    if axes.lines:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return page


Draw = Callable[[dict[str, Any], Results], "Figure"]
PICTURES: dict[str, tuple[str, Draw]] = {
    "gain": ("Gain over labels only, by method", draw_gains),
    "classes": ("Gain by class", draw_classes),
    "cost": ("Gain against training time", draw_cost),
    "curves": ("mIoU during training", draw_curves),
}


def block(name: str, pictures: Path) -> str:
    """The block of a table: its picture files are drawn into the folder `pictures`.

    Raises:
        UserError: there is no such table, or matplotlib is missing.
    """
    table, results = read_table(TABLES / f"{name}.json"), read_results(RESULTS / f"{name}.jsonl")
    (columns, *lines), notes = summary(table, results)
    measured = [line for line in lines if line[1] != "0"]
    missing = [line[0] for line in lines if int(line[1]) < len(table["seeds"])]
    text = [f"<!-- table: {name} -->"]
    if measured:
        text += ["", *(_markdown(cells) for cells in (columns, ["---"] * len(columns), *measured)), ""]
        text += [*notes, *_drawn(name, table, results, pictures)]
    if missing:
        text += ["", f"Seeds are missing of: {'; '.join(missing)}."]
    text += ["", f"    python benchmarks/accuracy.py benchmarks/tables/{name}.json", "", "<!-- end -->"]
    return "\n".join(text)


def write_page(page: Path, out: Path) -> list[str]:
    """Write `page` with its blocks made anew, and their pictures, to the folder `out`.

    Returns:
        Names of the tables.

    Raises:
        UserError: the page cannot be read, or names a table that does not exist.
    """
    try:
        text = page.read_text()
    except OSError as error:
        raise UserError(f"page {page} cannot be read: {error}") from None
    pictures = out / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    (out / page.name).write_text(BLOCK.sub(lambda match: block(match[1], pictures), text))
    return BLOCK.findall(text)


@report_errors
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PAGE.parent, help="folder for the page and its pictures")
    options = parser.parse_args(argv)
    for name in write_page(PAGE, options.out):
        print(f"{options.out / PAGE.name}: table {name}")


def _drawn(name: str, table: dict[str, Any], results: Results, folder: Path) -> list[str]:
    """Draw the pictures that the results suffice for; returns the lines that show them."""
    shown = []
    results = {key: result for key, result in results.items() if "scores" in result and "before" not in result}
    if not rows_with_gains(table, results):
        return shown
    for kind, (title, draw) in PICTURES.items():
        drawn = draw(table, results)
        if not any(axes.has_data() for axes in drawn.axes):
            continue
        file = f"results_{name}_{kind}.png"
        # Without the version of matplotlib in the file, the same results give the same bytes.
        drawn.savefig(folder / file, dpi=100, metadata={"Software": None})
        shown += ["", f"![{title}]({folder.name}/{file})"]
    return shown


def _class_gain(table: dict[str, Any], results: Results, row: str, name: str) -> float:
    """Mean gain in IoU of a class over the seeds of both rows, in points; NaN where it is not defined."""
    pairs = [[results.get((key, seed)) for key in (row, table["rows"][row]["baseline"])] for seed in table["seeds"]]
    ious = [[result["scores"]["per_class_iou"][name] for result in pair] for pair in pairs if all(pair)]
    differences = [first - second for first, second in ious if first is not None and second is not None]
    return _mean(differences) if differences else float("nan")


def _times(table: dict[str, Any], results: Results, row: str) -> list[float]:
    """Training times of a row, as multiples of those of its baseline on the same seed."""
    baseline = table["rows"][row]["baseline"]
    pairs = [[results.get((key, seed), {}).get("seconds") for key in (row, baseline)] for seed in table["seeds"]]
    return [first / second for first, second in pairs if first and second]


def _markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mean(values: Sequence[float]) -> float:
    return statistics.mean(values)


if __name__ == "__main__":
    main()
