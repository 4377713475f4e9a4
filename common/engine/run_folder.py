"""Create a run folder, and refuse to resume it with another script or config."""

import json
import os
from pathlib import Path
from typing import Any

from common.config import config_of, to_dict
from common.config.files import flatten
from common.engine import checkpoint_files
from common.engine.log import replace_file
from common.errors import UserError

RUN_FILE = "run.json"
# Keys that may differ when a run is resumed: they change weights and scores by rounding errors at most.
FREE_KEYS = (
    "run.dir",
    "run.keep",
    "run.trackers",
    "run.threads",
    "run.deterministic",
    "run.timeout",
    "data.workers",
    # A run that stopped because of these is resumed with other values.
    "run.max_bad_steps",
    "data.skip_bad_files",
)


def check_folder(folder: Path, script: str, config: Any) -> None:
    """Check, before anything is written, that a run of this script and config may use the folder.

    Raises:
        UserError: the folder cannot be written, is damaged, or belongs to a run of another script or config; the
            message names the keys that differ, with both values.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise UserError(f"run folder {folder} cannot be written: {existing} is not a writable folder; set run.dir")
    if not (folder / "config.json").exists():
        if checkpoint_files.list_steps(folder / "checkpoints"):
            raise UserError(f"{folder} contains checkpoints but no config.json; set another run.dir")
        return
    try:
        owner = json.loads((folder / RUN_FILE).read_text())["script"]
        stored = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"{folder} is not a complete run folder: run.json or config.json is missing or damaged; "
            "move it away or set another run.dir"
        ) from None
    if owner != script:
        raise UserError(f"{folder} is a run of {owner}; set another run.dir")
    # Read as any config, so that former words and keys that came later compare as what they stand for.
    old = flatten(to_dict(config_of(type(config), stored, folder / "config.json")))
    new = flatten(to_dict(config))
    differ = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    changes = [f"{key} ({old.get(key)} there, {new.get(key)} now)" for key in differ if key not in FREE_KEYS]
    if changes:
        raise UserError(
            f"{folder} was started with another config: {', '.join(changes)}.\n"
            "Set another run.dir, or use the old values to continue that run."
        )


def open_folder(folder: Path, script: str, config: Any) -> None:
    """Create the folder, with the script's name in `run.json` and the config in `config.json`.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        for name in ("checkpoints", "pictures", "eval"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        update_run_file(folder, {"script": script})
        replace_file(folder / "config.json", json.dumps(to_dict(config), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"run folder {folder} cannot be written: {error.strerror}; set run.dir") from None


def update_run_file(folder: Path, fields: dict[str, Any]) -> None:
    """Set fields of `run.json` (script, class names, colors, protocol) and keep its other fields.

    Raises:
        OSError: the file cannot be written.
    """
    path = folder / RUN_FILE
    try:
        present = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        present = {}
    text = json.dumps(present | fields)
    if text != json.dumps(present):
        replace_file(path, text + "\n")


def stored_before(folder: Path, key: str) -> bool:
    """True if the folder's config was written before the project had the config key `key`, e.g. `model.drop_path`."""
    path = folder / "config.json"
    return path.exists() and key not in flatten(json.loads(path.read_text()))
