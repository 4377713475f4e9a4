"""A page that compares runs: HTML in one file, with its styles and pictures inside."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from common.evaluation.line_chart import line_chart, line_style
from common.evaluation.run_records import Evaluation, ImageScore, RunRecord, differing_settings

Cells = Sequence[tuple[str, str]]  # HTML and class of each cell of a row
WORST = 4  # images per run
PICTURE_WIDTH = 900  # of a panel in pixels; wider ones are reduced
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1e1e23; background: #f6f6f8; margin: 0 auto; padding: 24px;
  max-width: 1100px; }
h1 { font-size: 24px; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 36px 0 8px; }
h3 { font-size: 15px; margin: 20px 0 6px; }
p { margin: 6px 0; }
.faint { color: #686872; }
.scroll, figure, .charts svg { background: #fff; border: 1px solid #e3e3e8; border-radius: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 5px 12px; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 600; border-bottom: 1px solid #d5d5dc; }
tr + tr td { border-top: 1px solid #efeff3; }
tr.total td { border-top: 2px solid #d5d5dc; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.best { font-weight: 700; }
.charts, .panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 16px; }
.charts svg { width: 100%; height: auto; }
.dot { opacity: 0; }
.dot:hover { opacity: 1; }
.keys span { margin-right: 18px; white-space: nowrap; }
.keys svg { width: 26px; vertical-align: middle; }
.swatch { display: inline-block; width: 11px; height: 11px; margin-right: 6px; border: 1px solid #999; }
figure { margin: 0; padding: 10px; }
figure img { width: 100%; display: block; }
figcaption { margin-top: 6px; font-size: 13px; overflow-wrap: anywhere; }
"""


def compare_page(records: Sequence[RunRecord], which: str | None) -> str:
    """Compare runs on one page: settings, curves, IoU per class, worst images. Returns HTML without outside resources.

    Args:
        records: At least one run.
        which: Name of the compared evaluation, for the commands that write what is missing.
    """
    body = [
        "<h1>Comparison of runs</h1>",
        _keys(records),
        "<h2>Scores</h2>",
        *_scores(records, which),
        "<h2>Settings that differ</h2>",
        _settings(records),
        "<h2>Curves</h2>",
        *_curves(records),
        "<h2>IoU per class (%)</h2>",
        _per_class(records),
        "<h2>Worst validation images</h2>",
        *_worst(records, which),
    ]
    head = f'<meta charset="utf-8"><title>Comparison of runs</title><style>{STYLE}</style>'
    return "\n".join(["<!DOCTYPE html>", f'<html lang="en"><head>{head}</head><body>', *body, "</body></html>"]) + "\n"


def missing_parts(records: Sequence[RunRecord], which: str | None) -> list[str]:
    """One line per run without the evaluation or the pictures of images, with the command that writes them."""
    lines = []
    for record in records:
        lack = "scores per class" if record.evaluation is None else "pictures of its images"
        if record.evaluation is None or not record.evaluation.images:
            lines.append(f"{record.name} has no {lack}: {record.how_to_evaluate(_selected(record, which))}")
    return lines


def protocol_note(records: Sequence[RunRecord]) -> str | None:
    """Line that names differing protocols or checkpoints, whose scores cannot be compared; None if all are equal."""
    evaluations = [(record.name, record.evaluation) for record in records if record.evaluation]
    if len({(one.protocol, one.name) for _, one in evaluations}) < 2:
        return None
    return "scores were measured differently: " + "; ".join(
        f"{name}: {one.name}, {one.protocol}" for name, one in evaluations
    )


def percent(share: float | None) -> str:
    """A share as percent with two digits; a dash for None."""
    return "-" if share is None else f"{100 * share:.2f}"


def class_names(records: Sequence[RunRecord]) -> list[str]:
    """Names of all classes that a run was evaluated on, in their order."""
    return list(dict.fromkeys(name for record in records if record.evaluation for name in record.evaluation.per_class))


def best_of(values: Sequence[float | None]) -> int | None:
    """Index of the largest value; None where fewer than two are known."""
    known = [index for index, value in enumerate(values) if value is not None]
    return max(known, key=lambda index: values[index]) if len(known) > 1 else None


def _selected(record: RunRecord, which: str | None) -> str | None:
    return record.evaluation.name if record.evaluation else which


def _keys(records: Sequence[RunRecord]) -> str:
    keys = [
        f'<span><svg viewBox="0 0 26 10"><path d="M0 5H26" stroke-width="3" {line_style(index)}/></svg> '
        f"{escape(record.name)}</span>"
        for index, record in enumerate(records)
    ]
    return f'<p class="keys">{"".join(keys)}</p>'


def _scores(records: Sequence[RunRecord], which: str | None) -> list[str]:
    rows = []
    miou = [record.evaluation.miou if record.evaluation else None for record in records]
    for index, record in enumerate(records):
        one = record.evaluation
        checkpoint = f"{one.name}, step {one.step}" if one else "not evaluated"
        best = max(record.miou, key=lambda point: point[1], default=None)
        training = f"{percent(best[1])} at step {best[0]}" if best else "-"
        last = f"{percent(record.miou[-1][1])} at step {record.miou[-1][0]}" if record.miou else "-"
        cells = [
            (escape(record.name), ""),
            (escape(checkpoint), ""),
            (percent(miou[index]), "number best" if index == best_of(miou) else "number"),
            (percent(one.pixel_accuracy if one else None), "number"),
            (training, "number"),
            (last, "number"),
        ]
        rows.append(cells)
    columns = [("run", ""), ("evaluation", "")]
    columns += [(name, "number") for name in ("mIoU %", "pixel accuracy %", "training: best mIoU %", "training: last")]
    protocols = {record.evaluation.protocol for record in records if record.evaluation}
    lines = [f"protocol: {protocols.pop()}"] if len(protocols) == 1 else []
    lines += [line for line in (protocol_note(records),) if line]
    lines += [line for line in missing_parts(records, which) if "scores per class" in line]
    return [_table(columns, rows), *(f'<p class="faint">{escape(line)}</p>' for line in lines)]


def _settings(records: Sequence[RunRecord]) -> str:
    found = differing_settings(records)
    if not found:
        return "<p>None: all runs have the same script and config.</p>"
    rows = [[(escape(key), ""), *((escape(value), "") for value in values)] for key, values in found.items()]
    return _table([("setting", ""), *((escape(record.name), "") for record in records)], rows)


def _curves(records: Sequence[RunRecord]) -> list[str]:
    miou = {record.name: [(step, 100 * value) for step, value in record.miou] for record in records}
    losses = {record.name: record.losses for record in records}
    charts = [line_chart(miou, "mIoU of the validation images (%)"), line_chart(losses, "loss")]
    if not any(charts):
        return ["<p>No run has a line in metrics.jsonl yet.</p>"]
    note = "<p class='faint'>Losses of different methods have different terms and cannot be compared by their size.</p>"
    return [f'<div class="charts">{"".join(f"<div>{chart}</div>" for chart in charts if chart)}</div>', note]


def _per_class(records: Sequence[RunRecord]) -> str:
    evaluated = [record for record in records if record.evaluation]
    if not evaluated:
        return "<p>No run has been evaluated.</p>"
    colors = {name: color for record in evaluated for name, color in record.colors.items()}
    rows = [
        [
            (_swatch(colors.get(name)) + escape(name), ""),
            *_numbers([record.evaluation.per_class.get(name) for record in evaluated]),
        ]
        for name in class_names(evaluated)
    ]
    total = [("mean", ""), *_numbers([record.evaluation.miou for record in evaluated])]
    return _table([("class", ""), *((escape(record.name), "number") for record in evaluated)], rows, total)


def _worst(records: Sequence[RunRecord], which: str | None) -> list[str]:
    lines = [f"<p>{escape(line)}</p>" for line in missing_parts(records, which)]
    shown = [record for record in records if record.evaluation and record.evaluation.images]
    if not shown:
        return lines
    lines.append("<p>Each picture shows image, prediction and label; ignored pixels are white.</p>")
    for record in shown:
        figures = "".join(_figure(image, record, shown) for image in record.evaluation.images[:WORST])
        lines += [f"<h3>{escape(record.name)}</h3>", f'<div class="panels">{figures}</div>']
    return lines


def _figure(image: ImageScore, record: RunRecord, shown: Sequence[RunRecord]) -> str:
    others = [(other.name, _score_in(other.evaluation, image.name)) for other in shown if other is not record]
    also = "".join(f"; {escape(name)} {percent(score)}" for name, score in others if score is not None)
    caption = f"{escape(image.name)}: mIoU {percent(image.miou)}<span class='faint'>{also}</span>"
    source = _inline(image.picture)
    return f'<figure><img src="{source}" alt="{escape(image.name)}"><figcaption>{caption}</figcaption></figure>'


def _score_in(evaluation: Evaluation, name: str) -> float | None:
    return next((image.miou for image in evaluation.images if image.name == name), None)


def _inline(path: Path) -> str:
    """A picture as a data: address, reduced to `PICTURE_WIDTH`."""
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
    if picture.width > PICTURE_WIDTH:
        picture = picture.resize((PICTURE_WIDTH, round(picture.height * PICTURE_WIDTH / picture.width)))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=90, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _numbers(shares: Sequence[float | None]) -> Cells:
    """Cells of a row of shares in percent; the best is marked."""
    best = best_of(shares)
    return [(percent(share), "number best" if index == best else "number") for index, share in enumerate(shares)]


def _swatch(color: tuple[int, int, int] | None) -> str:
    return "" if color is None else f'<span class="swatch" style="background: rgb{tuple(color)}"></span>'


def _table(columns: Cells, rows: Sequence[Cells], total: Cells | None = None) -> str:
    head = "".join(f'<th class="{kind}">{text}</th>' for text, kind in columns)
    lines = [f"<tr>{_cells(row)}</tr>" for row in rows]
    lines += [f'<tr class="total">{_cells(total)}</tr>'] if total else []
    return f'<div class="scroll"><table><tr>{head}</tr>\n' + "\n".join(lines) + "\n</table></div>"


def _cells(row: Cells) -> str:
    return "".join(f'<td class="{kind}">{text}</td>' for text, kind in row)
