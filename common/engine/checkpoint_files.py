"""Checkpoint files: folders `step_XXXXXXXX` that are written atomically and verified when read.

A folder contains `model.safetensors` (the evaluated network) and `meta.json` (step, epoch, scores, size and checksum of
every file). A resumable one also contains `extra.safetensors` (student, heads, banks) and `state.pt` (optimizer and
counters: tensors and plain values, loaded with `weights_only=True`). `last` and `best` are relative links to folders.
"""

import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.engine.log import sync_file
from common.errors import UserError

STEP_FOLDER = re.compile(r"step_(\d{8,})")
RESUME_FILES = ("extra.safetensors", "state.pt")


@dataclass
class Checkpoint:
    """Content of a resumable checkpoint.

    Attributes:
        path: Its folder.
        meta: Content of `meta.json`.
        model: State dict of the evaluated network.
        extra: State dicts of the other modules by name.
        state: Content of `state.pt`.
    """

    path: Path
    meta: dict[str, Any]
    model: dict[str, torch.Tensor]
    extra: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]


def step_folder(root: Path, step: int, prefix: str = "step") -> Path:
    """Path of the checkpoint after `step` optimizer steps; with another prefix, of weights derived from it."""
    return root / f"{prefix}_{step:08d}"


def list_steps(root: Path) -> list[int]:
    """List the steps of all checkpoints under `root`, weights-only ones included, in ascending order."""
    if not root.is_dir():
        return []
    found = (STEP_FOLDER.fullmatch(entry.name) for entry in root.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in found if match)


def write(
    root: Path,
    meta: dict[str, Any],
    model: Mapping[str, torch.Tensor],
    extra: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    state: dict[str, Any] | None = None,
    prefix: str = "step",
) -> Path:
    """Write a checkpoint under a temporary name, sync it and rename it to `<prefix>_<meta["step"]>`.

    Replaces an existing folder of that name.

    Args:
        root: The run's `checkpoints` folder.
        meta: Entries of `meta.json`; `step` is required.
        model: State dict of the evaluated network.
        extra: State dicts of other modules by name.
        state: Content of `state.pt`; without it, the checkpoint is not resumable.
        prefix: First part of the folder's name.

    Returns:
        The folder.

    Raises:
        OSError: the disk is full or the folder cannot be written; no partial files are left.
    """
    final = step_folder(root, meta["step"], prefix)
    temporary, replaced = root / f".writing_{final.name}", root / f".replaced_{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _save_tensors(model, temporary / "model.safetensors")
        if state is not None or extra:
            _save_tensors(_join(extra or {}), temporary / "extra.safetensors")
        if state is not None:
            torch.save(state, temporary / "state.pt")
        files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
        (temporary / "meta.json").write_text(json.dumps(meta | {"files": files}, indent=2) + "\n")
        for path in (*temporary.iterdir(), temporary):
            sync_file(path)
        if final.exists():
            final.rename(replaced)  # a folder cannot be renamed over a full one
        temporary.rename(final)
        sync_file(root)
    except (SafetensorError, RuntimeError) as error:
        # Both writers report a full disk this way.
        raise OSError(str(error).splitlines()[0]) from error
    finally:
        restore(root)
        for leftover in (temporary, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
    return final


def restore(root: Path) -> None:
    """Rename a checkpoint back that a kill, or a full disk, interrupted while it was being replaced."""
    for replaced in root.glob(".replaced_*"):
        final = root / replaced.name.removeprefix(".replaced_")
        if not final.exists():
            replaced.rename(final)


def point(root: Path, name: str, step: int, prefix: str = "step") -> None:
    """Point the link `name` (`last`, `best`) to the checkpoint of `step`, atomically."""
    temporary = root / f".link_{name}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(step_folder(root, step, prefix).name)
    temporary.replace(root / name)
    sync_file(root)


def prune(root: Path, keep: int, is_snapshot: Callable[[int], bool]) -> None:
    """Delete resumable checkpoints, except the `keep` newest and those that `last` and `best` point to.

    A snapshot loses its resume files and keeps its weights. A link to derived weights (another prefix) counts as a
    link to the checkpoint of the same step.

    Args:
        root: The run's `checkpoints` folder.
        keep: Number of resumable checkpoints to keep.
        is_snapshot: Decides by its step whether a checkpoint is a snapshot.
    """
    linked = {f"step_{(root / name).resolve().name.rsplit('_', 1)[-1]}" for name in ("last", "best")}
    resumable = [step for step in list_steps(root) if (step_folder(root, step) / "state.pt").exists()]
    for step in resumable[:-keep]:
        folder = step_folder(root, step)
        if folder.name in linked:
            continue
        if is_snapshot(step):
            # meta.json still lists the deleted files: only `read`, which is for resuming, requires them.
            for name in RESUME_FILES:
                (folder / name).unlink(missing_ok=True)
        else:
            # Renamed first, so that a kill during deletion does not leave a folder that looks like a checkpoint.
            pruned = root / f".pruned_{folder.name}"
            folder.rename(pruned)
            shutil.rmtree(pruned)


def clean(root: Path) -> None:
    """Delete temporary files left by a kill during writing or pruning."""
    for pattern in (".writing_*", ".replaced_*", ".pruned_*", ".link_*"):
        for leftover in root.glob(pattern):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def newest(root: Path) -> Iterator[Checkpoint | str]:
    """Read resumable checkpoints, newest first; yields an error message in place of a damaged one."""
    for step in reversed(list_steps(root)):
        folder = step_folder(root, step)
        if (folder / "meta.json").exists() and not _resume_files_listed(folder):
            continue
        try:
            yield read(folder)
        except UserError as error:
            yield str(error)


def read(folder: Path) -> Checkpoint:
    """Read a resumable checkpoint after verifying the size and checksum of every file.

    Raises:
        UserError: a file is missing, truncated or changed, or would execute code.
    """
    meta = read_meta(folder)
    for name, expected in meta["files"].items():
        path = folder / name
        if not path.exists():
            raise UserError(f"checkpoint {folder} is incomplete: {name} is missing")
        if _fingerprint(path) != expected:
            raise UserError(f"checkpoint {folder} is damaged: {name} has changed since it was written")
    try:
        extra, model = (load_file(folder / f"{name}.safetensors") for name in ("extra", "model"))
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError) as error:
        raise UserError(f"checkpoint {folder} is damaged: {str(error).splitlines()[0]}") from None
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        what = f"reading it would execute {code[1]}" if code else "it was not written by torch.save"
        raise UserError(f"checkpoint {folder} is refused: state.pt contains more than tensors, {what}") from None
    return Checkpoint(folder, meta, model, _split(extra), state)


def read_meta(folder: Path) -> dict[str, Any]:
    """Read the `meta.json` of a checkpoint.

    Raises:
        UserError: it is missing or incomplete.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        meta["step"], meta["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"checkpoint {folder} is incomplete: its meta.json is missing or damaged") from None
    return meta


def _resume_files_listed(folder: Path) -> bool:
    try:
        # Pruning deletes both files of a snapshot; if only one is missing, the checkpoint is damaged.
        return "state.pt" in read_meta(folder)["files"] and any((folder / name).exists() for name in RESUME_FILES)
    except UserError:
        return True  # damaged: `newest` reports it


def _save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _join(parts: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def _split(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        part, key = name.split("/", 1)
        parts.setdefault(part, {})[key] = tensor
    return parts


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
