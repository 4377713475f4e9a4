"""The folder of a run: whose it is, and what lies in it."""

import json
import os
from pathlib import Path
from typing import Any

from common.config import to_dict
from common.config.files import flatten
from common.config.sections import FORMER_HEADS
from common.engine import checkpoints
from common.engine.log import replace_file
from common.errors import UserError

# What may differ when a run is continued: it changes weights and scores by no more than the order of sums.
FREE_KEYS = (
    "run.dir",
    "run.keep",
    "run.trackers",
    "run.threads",
    "run.deterministic",
    "run.timeout",
    "data.workers",
    # What a run that stopped because of them is continued with.
    "run.max_bad_steps",
    "data.skip_bad_files",
)


def check_folder(folder: Path, script: str, config: Any) -> None:
    """Make sure, before anything is written, that `folder` can be written and is of this script and config, or of none.

    Raises:
        UserError: it is not; where configs differ, the keys and both values are named.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise UserError(f"run folder {folder} cannot be written: {existing} is not a writable folder; set run.dir")
    if not (folder / "config.json").exists():
        if checkpoints.list_steps(folder / "checkpoints"):
            raise UserError(f"{folder} holds checkpoints of a run without its config.json; give another run.dir")
        return
    try:
        owner = json.loads((folder / "run.json").read_text())["script"]
        old = flatten(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder} is not a whole run folder; move it away or give another run.dir") from None
    if owner != script:
        raise UserError(f"{folder} is a run of {owner}; give another run.dir")
    old["model.head"] = FORMER_HEADS.get(old.get("model.head"), old.get("model.head"))
    new = flatten(to_dict(config))
    differ = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    changes = [f"{key} ({old.get(key)} there, {new.get(key)} now)" for key in differ if key not in FREE_KEYS]
    if changes:
        raise UserError(
            f"{folder} was started with another config: {', '.join(changes)}.\n"
            "Give another run.dir, or the old values to continue it."
        )


def open_folder(folder: Path, script: str, config: Any) -> None:
    """Make the folder and write whose it is.

    Raises:
        UserError: it cannot be written.
    """
    try:
        for name in ("checkpoints", "pictures", "eval"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        replace_file(folder / "run.json", json.dumps({"script": script}) + "\n")
        replace_file(folder / "config.json", json.dumps(to_dict(config), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"run folder {folder} cannot be written: {error.strerror}; set run.dir") from None
