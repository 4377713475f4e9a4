"""Memory that each published setting needs on a GPU, computed without one.

    python benchmarks/hardware.py prcl
    python benchmarks/hardware.py unimatch/configs/cityscapes_unimatch_resnet101 --optim.accumulation 2
    python benchmarks/hardware.py --write    # what benchmarks/results/hardware.json lacks; updates docs/hardware.md

Runs two optimizer steps of the training script on a fake GPU (`benchmarks/fake_cuda.py`) with made-up images, and
counts the bytes of all tensors that are alive at once: networks, gradients, optimizer, activations, losses. What CUDA
and its libraries need in addition is not included, e.g. the context and workspaces of the convolutions.
"""

import argparse
import contextlib
import importlib
import io
import json
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from accelerate.state import AcceleratorState
from rich.console import Console
from rich.table import Table

from benchmarks.fake_cuda import FakeCuda
from benchmarks.settings import ROOT, SETTINGS, Setting, made_up_data, settings_named
from common.engine.run import Run
from common.errors import report_errors

STEPS = 2  # the optimizer's state exists from the first step on
GIB = 2**30
CARDS = (8, 12, 16, 24, 32, 48, 80, 96, 141)  # GB
SPARE = 0.8  # share of a card that a setting may fill: the rest is for CUDA, workspaces and fragments
PAGE, RESULTS = ROOT / "docs" / "hardware.md", ROOT / "benchmarks" / "results" / "hardware.json"
# Settings for which the page lists what changes save, and the changes.
EXAMPLES = ("unimatch/configs/cityscapes_unimatch_v2_dinov2_small.json", "css/configs/cityscapes.json")
PUBLISHED = {"as published, `--run.precision fp32`": "fp32", "as published, `--run.precision bf16`": "bf16"}
CHANGES = {
    "`--optim.accumulation 2`": ("--optim.accumulation", "2"),
    "`--optim.accumulation 4`": ("--optim.accumulation", "4"),
    "`--model.grad_checkpointing true`": ("--model.grad_checkpointing", "true"),
    "`--model.freeze_encoder true`": ("--model.freeze_encoder", "true"),
    "`--data.crop_size [518,518]`": ("--data.crop_size", "[518,518]"),
    "two GPUs, each with half of the batch": ("--optim.batch_size", "half"),
}


def peak_bytes(setting: Setting, precision: str, more: Sequence[str] = ()) -> int:
    """Most bytes that are alive at once in the first optimizer steps of a setting.

    Args:
        setting: The published setting.
        precision: fp32 or bf16.
        more: Arguments that change the setting.
    """
    main = importlib.import_module(setting.script.removesuffix(".py").replace("/", ".")).main
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        # No evaluation and no pictures: as after a signal, which ends them at once.
        stack.enter_context(patch.object(Run, "stop_requested", lambda run: True))
        stack.enter_context(made_up_data())
        fake = stack.enter_context(FakeCuda())
        main([*setting.arguments(folder / "run", STEPS), "--run.precision", precision, *more])
    AcceleratorState._reset_state(reset_partial_state=True)
    return max(fake.memory.peaks.values())


def card(size: int) -> str:
    """The smallest usual card for so many bytes, in GB."""
    fits = [card for card in CARDS if size <= SPARE * card * GIB]
    return f"{fits[0]} GB" if fits else "several"


def describe(setting: Setting, more: Sequence[str] = ()) -> dict[str, Any]:
    """The row of a setting: its names, and its peak in GiB in both precisions."""
    config = json.loads((ROOT / setting.config).read_text())
    row = {"paper": setting.paper, "dataset": setting.dataset, "config": setting.config}
    row |= {"encoder": config["model"].get("backbone", "resnet101"), "batch": config["optim"]["batch_size"]}
    row["crop"] = "x".join(map(str, config["data"]["crop_size"]))
    for precision in ("fp32", "bf16"):
        size = peak_bytes(setting, precision, more)
        row |= {precision: round(size / GIB, 1), f"card_{precision}": card(size)}
    return row


COLUMNS = ("paper", "dataset", "encoder", "crop", "batch", "fp32", "card_fp32", "bf16", "card_bf16")
TITLES = ("paper", "dataset", "encoder", "crop", "labeled batch", "fp32, GB", "card", "bf16, GB", "card")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of all settings."""
    lines = ["| " + " | ".join(TITLES) + " |", "|---" * len(TITLES) + "|"]
    lines += ["| " + " | ".join(str(row[column]) for column in COLUMNS) + " |" for row in rows]
    return "\n".join(lines)


def effects_markdown(results: dict[str, dict[str, float]]) -> str:
    """The table of changes, one column per example."""
    lines = ["| change, in bf16 | " + " | ".join(f"`{config}`" for config in results) + " |"]
    lines.append("|---" * (1 + len(results)) + "|")
    for name in (*PUBLISHED, *CHANGES):
        cells = (f"{result[name]} GB" if name in result else "" for result in results.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def update_page(console: Console) -> None:
    """Compute what the results file lacks, and update file and page after each entry."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"settings": [], "changes": {}}
    found = {row["config"]: row for row in results["settings"]}

    def find(setting: Setting) -> None:
        if setting.config not in found:
            found[setting.config] = describe(setting)
            console.print(found[setting.config], highlight=False, soft_wrap=True)
        results["settings"] = [found[one.config] for one in SETTINGS if one.config in found]
        _write(results)

    for setting in sorted(
        (one for one in SETTINGS if one.config in EXAMPLES), key=lambda one: EXAMPLES.index(one.config)
    ):
        find(setting)
        published = {name: found[setting.config][precision] for name, precision in PUBLISHED.items()}
        saved = results["changes"].setdefault(setting.config, published)
        for name, more in CHANGES.items():
            if name not in saved:
                half = str(found[setting.config]["batch"] // 2)
                more = [half if word == "half" else word for word in more]
                saved[name] = round(peak_bytes(setting, "bf16", more) / GIB, 1)
                console.print(setting.config, name, saved[name], highlight=False, soft_wrap=True)
                _write(results)
    for setting in SETTINGS:
        find(setting)


def _write(results: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    text = PAGE.read_text()
    for name, table in (("settings", markdown(results["settings"])), ("changes", effects_markdown(results["changes"]))):
        between = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
        text = re.sub(between, lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL)
    PAGE.write_text(text)


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "settings", nargs="*", help="words in a paper's name, script or config; by default all settings"
    )
    parser.add_argument("--write", action="store_true", help="compute all that the results file lacks; update the page")
    options, more = parser.parse_known_args()
    console = Console()
    if options.write:
        update_page(console)
        return
    table = Table(*TITLES, title="computed, not measured")
    for setting in settings_named(options.settings):
        entry = describe(setting, more)
        table.add_row(*(str(entry[column]) for column in COLUMNS))
    console.print(table)


if __name__ == "__main__":
    main()
