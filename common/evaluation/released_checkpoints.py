"""Checkpoints of the papers' own repositories: recognize the network, convert its keys, write it as a run folder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from common.config import load_config
from common.config.files import Translate, Translation
from common.datasets import named_classes
from common.engine import checkpoint_files
from common.engine.run_folder import open_folder
from common.errors import UserError
from common.evaluation.inference import Protocol
from common.evaluation.metainfo import MetaInfo, write_metainfo
from common.models import build_network
from common.models.infer_architecture import infer_architecture
from common.models.weights import STATE_ENTRIES, load_state, read_file, state_in

State = dict[str, Tensor]
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Release:
    """Checkpoint format of a paper's repository.

    Args:
        convert_keys: Function of a state dict and a network's number (1 or 2) to the state dict of the evaluated
            network with this project's keys; raises UserError for keys of another network.
        configs: Config file for each released (`model.head`, number of classes).
        entries: Entries of the file that may hold the weights, in order of preference.
        heads: Key prefixes of weights that the evaluated network does not have.
        config_in: Function that reads the config stored in a checkpoint, for repositories that store it.
        translate: Translation of the repository's config files.
        role_entries: Entry of a role, for repositories whose files hold `student` and `teacher`.
    """

    convert_keys: Callable[[State, int], State]
    configs: Mapping[tuple[str, int], str]
    entries: tuple[str, ...] = STATE_ENTRIES
    heads: tuple[str, ...] = ()
    config_in: Callable[[Path], Translation | None] | None = None
    translate: Translate | None = None
    role_entries: Mapping[str, str] = field(default_factory=dict)

    def read(self, file: Path, number: int = 1) -> State:
        """Read the weights of network 1 or 2, with this project's keys.

        Raises:
            UserError: the file cannot be read, or has keys of another network.
        """
        return self.convert(state_in(read_file(file), file, self.entries), file, number)

    def convert(self, state: State, file: Path, number: int = 1) -> State:
        """Convert the keys of weights read from `file`. Raises UserError, with the file's name, for unknown keys."""
        try:
            return self.convert_keys(state, number)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None

    def unused(self, file: Path) -> str:
        """List the entries and heads of a file that the evaluation of network 1 does not use."""
        content = read_file(file)
        state = state_in(content, file, self.entries)
        names: list[str] = []
        is_bare = len(state) == len(content) and all(key in state for key in content)  # without entries
        if not is_bare:
            used = next((name for name in self.entries if name in content), None)
            names += [str(name) for name in content if name != used]
        for head in self.heads:
            count = sum(key.removeprefix("module.").startswith(head) for key in state)
            names += [f"{head}* ({count} weights)"] if count else []
        return ", ".join(names) or "nothing"

    def infer_config(self, config_class: type, file: Path) -> tuple[Any, str]:
        """Choose the paper's config for a checkpoint, and set its network to the architecture of the weights.

        Returns:
            The config, and the config file that it comes from.

        Raises:
            UserError: weights of another network, or of one that the paper has no config for.
        """
        found = infer_architecture(self.read(file), str(file))
        candidates = ((head, found.num_classes) for head in found.heads)
        path = next((self.configs[key] for key in candidates if key in self.configs), None)
        if path is None:
            raise UserError(
                f"{file} has a network of {found.num_classes} classes (model.head {' or '.join(found.heads)}), for "
                "which there is no released config here: give one with --config"
            )
        config = load_config(config_class, ROOT / path)
        channels = found.channels or config.model.channels
        config.model = replace(config.model, backbone=found.backbone, stem=found.stem, channels=channels)
        return config, path


def has_project_keys(state: Mapping[str, Tensor]) -> bool:
    """True for weights with the keys of this project's networks."""
    return any(key.startswith(("encoder.conv1.", "encoder.body.", "low.")) for key in state)


def convert_checkpoint(
    release: Release, file: Path, paper: str, config: Any, protocol: Protocol, second: str | None, out: Path
) -> list[str]:
    """Convert a released checkpoint to a run folder for eval.py and common.predict.

    Args:
        release: Checkpoint format of the paper's repository.
        file: The checkpoint.
        paper: Folder of the paper.
        config: Config that describes the checkpoint's network.
        protocol: Protocol of the paper.
        second: Name of the second network in this project's checkpoints, for a paper with two.
        out: Run folder to write; new, or empty.

    Returns:
        Lines to print.

    Raises:
        UserError: the weights do not fit the config, or the folder is not empty or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--convert {out} is not empty: give a new folder")
    lines = [f"unused in {file}: {release.unused(file)}"]
    states = {1: release.read(file)}
    if second:
        try:
            states[2] = release.read(file, 2)
        except UserError as error:
            lines.append(f"no second network: {error}")
    network = build_network(replace(config.model, pretrained=False))
    for number, state in states.items():
        load_state(network, state, f"network {number} of {file}", "the config's network")
    config.run.dir = str(out)
    # The folder belongs to eval.py, so that no training script continues in it.
    open_folder(out, f"{paper}/eval.py", config)
    metainfo = MetaInfo(*named_classes(config.data, config.model.num_classes), protocol)
    try:
        _write_checkpoint(out / "checkpoints", file, states[1], {second: states[2]} if 2 in states else {})
        write_metainfo(out, metainfo)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    return [*lines, f"written to {out}: {len(states)} network(s), {config.model.backbone}, {config.model.head}"]


def _write_checkpoint(root: Path, file: Path, state: State, extra: Mapping[str, State]) -> None:
    versions = {name: version(name) for name in ("torch", "timm")}
    meta = {"step": 0, "epoch": None, "scores": {}, "converted_from": file.name, "versions": versions}
    checkpoint_files.write(root, meta, state, extra)
    checkpoint_files.point(root, "last", 0)
