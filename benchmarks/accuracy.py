"""Train the rows of a table over several seeds, each beside its own run on labels only, and print mean and spread.

    python benchmarks/accuracy.py benchmarks/tables/shapes.json
    python benchmarks/accuracy.py benchmarks/tables/shapes.json --seeds 0 --set run.threads=1
    python benchmarks/accuracy.py benchmarks/tables/shapes.json --show

A table (JSON) has these fields; `{seed}` in a value is replaced by the seed:

- `seeds`: the seeds of every row.
- `set`: settings of all rows, e.g. `"run.steps": 600`.
- `rows`: by name `script`, `config`, `set` and `baseline`. Without `baseline` a row is compared with the row "<name>,
  labels only", which has the same settings and `method.labels_only`, and is added where the table does not list it.
  `"baseline": false` compares with nothing, and a name with that row.
- `protocol`: `crop`, `scales` and `flip`, with which all rows are evaluated; by default whole images, no flip.
- `also`: folder of a second split, on whose validation list all rows are evaluated too.

Every run is stored as a line of benchmarks/results/<table>.jsonl, and a stored run is not repeated. The same command
continues a run that was killed; a run folder that is finished is only evaluated. Lines of earlier versions without
`scores` have the scores of the paper's own protocol alone. Lines with the field `before` were measured before the
change that it names: they are shown with a mark, and replaced once the table is run.
"""

import argparse
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common.config import parse
from common.datasets import open_reader
from common.engine.checkpoint_files import list_steps
from common.engine.devices import accelerator_on
from common.engine.log import replace_file
from common.engine.run_folder import check_folder, stored_before
from common.errors import UserError, report_errors
from common.evaluation.evaluate import evaluate
from common.evaluation.inference import Protocol
from common.evaluation.predictor import load_trained
from common.metrics import Scores
from common.splits.split import valid_of

RESULTS = Path(__file__).parent / "results"
# With all of its values given, the launcher prints no warning; -q leaves the error report to the script.
LAUNCH = ["-m", "accelerate.commands.launch", "-q", "--num_processes", "1", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]
LABELS_ONLY = "method.labels_only"
KEY_SINCE_NORMS = "optim.supervised_loss"  # in every config since convolutional networks start with all norms at 1

Rows = dict[str, dict[str, Any]]
Results = dict[tuple[str, int], dict[str, Any]]


def read_table(path: Path) -> dict[str, Any]:
    """Read a table, with the labels-only rows that it does not list: each follows the row that it belongs to.

    Raises:
        UserError: the file cannot be read, or a row names a baseline that is not in the table.
    """
    try:
        table = json.loads(path.read_text())
        table["rows"] = _with_baselines(table["rows"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"table {path} cannot be read: {error!r}") from None
    for name, row in table["rows"].items():
        if row["baseline"] and row["baseline"] not in table["rows"]:
            raise UserError(f"{path}: row {name!r} names the baseline {row['baseline']!r}, which is not a row")
    return table


def command(row: dict[str, Any], shared: dict[str, Any], given: dict[str, str], seed: int, folder: Path) -> list[str]:
    """Build the command line of one run, without the interpreter."""
    values = shared | row.get("set", {}) | given | {"run.seed": seed, "run.dir": str(folder)}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    flat = [text for key, value in texts.items() for text in (f"--{key}", _with_seed(value, seed))]
    return [row["script"], "--config", row["config"], *flat]


def check_same(stored: dict[str, Any], arguments: list[str]) -> None:
    """Check that a stored result was measured with the current settings of its row.

    Raises:
        UserError: the settings have changed since.
    """
    pairs = [f"{key} {value} " for key, value in zip(arguments[1::2], arguments[2::2])]
    missing = [pair.strip() for pair in pairs if pair not in stored["command"] + " "]
    if missing:
        raise UserError(
            f"row {stored['row']!r}, seed {stored['seed']} was measured without {', '.join(missing)}; "
            "remove its line from the results to measure it again"
        )


def is_finished(arguments: list[str], folder: Path) -> bool:
    """True if the run folder holds the last step of the run with these arguments.

    Raises:
        UserError: the folder belongs to other settings, or to an earlier version of the networks.
    """
    if not (folder / "config.json").exists():
        return False
    if stored_before(folder, KEY_SINCE_NORMS):
        raise UserError(f"{folder} was trained by an earlier version, from other initial weights; move it away")
    script, *flags = arguments
    config = parse(importlib.import_module(script.removesuffix(".py").replace("/", ".")).Config, script, flags)
    config.run.precision = config.run.precision or "fp32"  # as launched
    check_folder(folder, script, config)
    return _last_step(folder) == config.run.steps


def train(arguments: list[str], folder: Path) -> dict[str, float]:
    """Train, or continue a run that was stopped.

    Returns:
        `seconds`, and `peak_memory_mb` of the largest process; empty for a continued run, as they would cover only the
        last part.

    Raises:
        UserError: the run failed.
    """
    is_whole = not _last_step(folder)
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *LAUNCH, *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"run {folder} failed: {' '.join(arguments)}")
    if not is_whole:
        return {}
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return {"seconds": round(time.perf_counter() - started, 1), "peak_memory_mb": round(usage.ru_maxrss / unit)}


def read_run(folder: Path) -> dict[str, Any]:
    """Scores by the paper's own protocol (at each evaluation, last, best), and the last line of losses."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [(line["step"], round(100 * line["valid/miou"], 2)) for line in lines if "valid/miou" in line]
    training = [line for line in lines if "loss" in line]
    return {
        "miou_last": curve[-1][1],
        "miou_best": max(score for _, score in curve),
        "curve": curve,
        "training": {key: round(value, 4) for key, value in training[-1].items()},
    }


def score(folder: Path, protocol: Protocol, also: str | None) -> dict[str, Any]:
    """Evaluate the last checkpoint of a run in fp32, on its validation list and on that of the split `also`.

    A network that was trained on smaller images gets them as small here.
    """
    trained = load_trained(folder, "last")
    config, network, accelerator = trained.config, trained.network, accelerator_on(None, "fp32", [])
    network.to(accelerator.device)
    protocol = replace(protocol, reduce=trained.metainfo.protocol.reduce)
    reader = open_reader(config.data)
    second = replace(config.data, split=also, labeled_list=None, unlabeled_list=None, split_id=None)
    found: dict[str, Any] = {"protocol": protocol.describe()}
    for key, data in {"scores": config.data, **({"also": second} if also else {})}.items():
        names, workers = valid_of(data, reader), data.workers
        scores = evaluate(network, reader, names, len(reader.classes), accelerator, protocol, workers=workers)
        found[key] = _percentages(scores, reader.classes) | {"images": len(names)}
    return found


def measure(
    arguments: list[str], folder: Path, protocol: Protocol, also: str | None, stored: dict[str, Any]
) -> dict[str, Any]:
    """Train a run, unless it is finished, and evaluate it; times of a stored line of an earlier version are kept."""
    costs = {key: stored[key] for key in ("seconds", "hardware", "torch", "command") if key in stored}
    if not is_finished(arguments, folder):
        machine = {"hardware": f"{platform.machine()}, {os.cpu_count()} cores, {_gpu()}", "torch": torch.__version__}
        costs = train(arguments, folder) | machine
    shown = {"command": "accelerate launch " + " ".join(arguments)}
    return read_run(folder) | score(folder, protocol, also) | shown | costs


def read_results(path: Path) -> Results:
    """Read the stored runs, by row and seed."""
    lines = path.read_text().splitlines() if path.exists() else []
    results = [json.loads(line) for line in lines]
    return {(result["row"], result["seed"]): result for result in results}


def store(path: Path, result: dict[str, Any]) -> None:
    """Add a run to the stored ones, in place of an older line of its row and seed."""
    results = read_results(path) | {(result["row"], result["seed"]): result}
    path.parent.mkdir(exist_ok=True)
    replace_file(path, "".join(json.dumps(result) + "\n" for result in results.values()))


def run_folder(table: str, row: str, seed: int) -> Path:
    """Folder of one run of a table."""
    return Path("runs", "benchmarks", table, row.replace(" ", "_"), str(seed))


def run_table(table: dict[str, Any], name: str, given: dict[str, str], seeds: Sequence[int]) -> None:
    """Measure every run of a table that is not stored."""
    path, shared = RESULTS / f"{name}.jsonl", table.get("set", {})
    settings = table.get("protocol", {})
    protocol = Protocol(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()})
    for row_name, row in table["rows"].items():
        for seed in seeds:
            folder = run_folder(name, row_name, seed)
            stored = read_results(path).get((row_name, seed), {})
            if "before" in stored:
                stored = {}
            if stored:
                check_same(stored, command(row, shared, {}, seed, folder))
                if "scores" in stored or not folder.exists():
                    continue
            also = _with_seed(table["also"], seed) if "also" in table else None
            print(f"{row_name}, seed {seed}", flush=True)
            result = measure(command(row, shared, given, seed, folder), folder, protocol, also, stored)
            store(path, {"row": row_name, "seed": seed} | result)


def summary(table: dict[str, Any], results: Results) -> tuple[list[list[str]], list[str]]:
    """Mean and standard deviation over seeds; gains are paired by seed, with the standard error of their mean.

    Returns:
        The cells of each line, the first of which has the names of the columns, and notes on the scores.
    """
    found = [result for (row, seed), result in results.items() if row in table["rows"] and seed in table["seeds"]]
    protocols = sorted({result["protocol"] for result in found if "protocol" in result})
    changes = sorted({result["before"] for result in found if "before" in result})
    notes = ["All in %.", *(f"mIoU, gain and accuracy: last step, {protocol}, fp32." for protocol in protocols)]
    notes += [f"* measured before this change: {change}" for change in changes]
    has_second = any("also" in result for result in found)
    columns = ["row", "seeds", "mIoU", "gain over labels only", "pixel accuracy"]
    columns += [f"mIoU, {table['also']}", "gain there"] if has_second else []
    shown = [[*columns, "paper's protocol, last", "best", "seconds", "MB"]]
    for name in table["rows"]:
        lines = [results[name, seed] for seed in table["seeds"] if (name, seed) in results]
        mark = " *" if any("before" in line for line in lines) else ""
        cells = [name + mark, str(len(lines)), _spread(_miou(lines, "scores"))]
        cells += [gain(table, results, name, "scores"), _spread(_of(lines, "scores", "pixel_accuracy"))]
        if has_second:
            cells += [_spread(_miou(lines, "also")), gain(table, results, name, "also")]
        plain = [[line[key] for line in lines if key in line] for key in ("miou_last", "miou_best")]
        costs = [[line[key] for line in lines if key in line] for key in ("seconds", "peak_memory_mb")]
        shown.append([*cells, *map(_spread, plain), *map(_rounded, costs)])
    return shown, notes


def gains(table: dict[str, Any], results: Results, name: str, key: str) -> list[float]:
    """Differences in mIoU of a row to its baseline, for each seed that both have, in percentage points."""
    baseline = table["rows"][name]["baseline"]
    pairs = [[results.get((row, seed), {}) for row in (name, baseline)] for seed in table["seeds"]]
    both = [pair for pair in pairs if len(_miou(pair, key)) == 2]
    return [first - second for first, second in (_miou(pair, key) for pair in both)]


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of two or more values."""
    return statistics.stdev(values) / math.sqrt(len(values))


def gain(table: dict[str, Any], results: Results, name: str, key: str) -> str:
    """Mean difference of a row to its baseline over the seeds that both have, with its standard error."""
    values = gains(table, results, name, key)
    if not values:
        return "-"
    error = f" ± {standard_error(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.1f}{error}"


@report_errors
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="JSON file with seeds, shared settings and rows")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="settings specific to this machine, e.g. run.threads=1",
    )
    parser.add_argument("--seeds", nargs="*", type=int, help="run these seeds of the table only")
    parser.add_argument("--show", action="store_true", help="print the stored results, run nothing")
    options = parser.parse_args(argv)
    table = read_table(options.table)
    if not all("=" in text for text in options.set):
        raise UserError(f"--set takes KEY=VALUE, not {' '.join(options.set)}")
    given = dict(text.split("=", 1) for text in options.set)
    if not options.show:
        run_table(table, options.table.stem, given, options.seeds or table["seeds"])
    (columns, *lines), notes = summary(table, read_results(RESULTS / f"{options.table.stem}.jsonl"))
    shown = Table(*columns, caption="\n".join(notes), caption_justify="left")
    for line in lines:
        shown.add_row(*line)
    Console().print(shown)


def _with_baselines(rows: Rows) -> Rows:
    """Give every row its `baseline` (a name or None), and add the labels-only rows that are not listed."""
    complete: Rows = {}
    for name, row in rows.items():
        settings, own = row.get("set", {}), f"{name}, labels only"
        baseline = row.get("baseline", not settings.get(LABELS_ONLY, False))
        complete[name] = row | {"baseline": own if baseline is True else baseline or None}
        if baseline is True and own not in rows:
            complete[own] = row | {"set": settings | {LABELS_ONLY: True}, "baseline": None}
    return complete


def _with_seed(text: str, seed: int) -> str:
    return text.replace("{seed}", str(seed))


def _last_step(folder: Path) -> int:
    return max(list_steps(folder / "checkpoints"), default=0)


def _percentages(scores: Scores, classes: Sequence[str]) -> dict[str, Any]:
    """Scores in percent; None for a class that occurs neither in labels nor in predictions."""
    ious = [None if math.isnan(iou) else round(100 * iou, 2) for iou in scores.per_class_iou]
    return {
        "miou": round(100 * scores.miou, 2),
        "pixel_accuracy": round(100 * scores.pixel_accuracy, 2),
        "classes_counted": scores.classes_counted,
        "per_class_iou": dict(zip(classes, ious)),
    }


def _of(lines: Sequence[dict[str, Any]], key: str, score_name: str) -> list[float]:
    return [line[key][score_name] for line in lines if key in line]


def _miou(lines: Sequence[dict[str, Any]], key: str) -> list[float]:
    return _of(lines, key, "miou")


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def _rounded(values: list[float]) -> str:
    return f"{statistics.mean(values):.0f}" if values else "-"


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


if __name__ == "__main__":
    main()
