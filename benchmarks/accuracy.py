"""Train the rows of a table over several seeds and print mean and spread.

    python benchmarks/accuracy.py benchmarks/tables/shapes.json
    python benchmarks/accuracy.py benchmarks/tables/shapes.json --seeds 0 --set run.threads=1
    python benchmarks/accuracy.py benchmarks/tables/shapes.json --show

A table lists scripts, configs and overrides; `{seed}` in a value is replaced by the seed. Every run is stored as one
line of benchmarks/results/<table>.jsonl with its command and hardware; a stored run is read, not repeated.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common.errors import UserError, report_errors

RESULTS = Path(__file__).parent / "results"


def command(row: dict[str, Any], shared: dict[str, Any], given: dict[str, str], seed: int, folder: Path) -> list[str]:
    """Build the command line of one run, without the interpreter."""
    values = shared | row.get("set", {}) | given | {"run.seed": seed, "run.dir": str(folder)}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    flat = [text for key, value in texts.items() for text in (f"--{key}", value.replace("{seed}", str(seed)))]
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


def run_once(name: str, seed: int, arguments: list[str], folder: Path) -> dict[str, Any]:
    """Train, and read the scores from `metrics.jsonl` of the run.

    Raises:
        UserError: the run failed.
    """
    started = time.perf_counter()
    if subprocess.run([sys.executable, "-m", "accelerate.commands.launch", *arguments]).returncode:
        raise UserError(f"row {name!r}, seed {seed} failed: {' '.join(arguments)}")
    seconds = time.perf_counter() - started
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = [line["valid/miou"] for line in lines if "valid/miou" in line]
    training = [line for line in lines if "loss" in line]
    return {
        "row": name,
        "seed": seed,
        "miou_last": round(100 * scores[-1], 2),
        "miou_best": round(100 * max(scores), 2),
        "training": {key: round(value, 4) for key, value in training[-1].items()},
        "seconds": round(seconds, 1),
        "command": "accelerate launch " + " ".join(arguments),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {_gpu()}",
        "torch": torch.__version__,
    }


def read_results(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Read the stored runs, by row and seed."""
    lines = path.read_text().splitlines() if path.exists() else []
    results = [json.loads(line) for line in lines]
    return {(result["row"], result["seed"]): result for result in results}


def summary(rows: list[str], seeds: list[int], results: dict[tuple[str, int], dict[str, Any]]) -> Table:
    """Mean and standard deviation over seeds of the last and the best evaluation."""
    table = Table("row", "seeds", "mIoU, last step", "mIoU, best step", "seconds per run")
    for row in rows:
        found = [results[row, seed] for seed in seeds if (row, seed) in results]
        columns = [[result[key] for result in found] for key in ("miou_last", "miou_best", "seconds")]
        table.add_row(row, str(len(found)), *(_spread(column) for column in columns))
    return table


@report_errors
def main() -> None:
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
    options = parser.parse_args()
    try:
        table = json.loads(options.table.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"table {options.table} cannot be read: {error}") from None
    if not all("=" in text for text in options.set):
        raise UserError(f"--set takes KEY=VALUE, not {' '.join(options.set)}")
    given = dict(text.split("=", 1) for text in options.set)
    path = RESULTS / f"{options.table.stem}.jsonl"
    for name, row in table["rows"].items():
        for seed in options.seeds or table["seeds"]:
            folder = Path("runs", "benchmarks", options.table.stem, name.replace(" ", "_"), str(seed))
            stored = read_results(path).get((name, seed))
            if stored:
                check_same(stored, command(row, table.get("set", {}), {}, seed, folder))
            if stored or options.show:
                continue
            result = run_once(name, seed, command(row, table.get("set", {}), given, seed, folder), folder)
            with path.open("a") as file:
                file.write(json.dumps(result) + "\n")
    Console().print(summary(list(table["rows"]), table["seeds"], read_results(path)))


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


if __name__ == "__main__":
    main()
