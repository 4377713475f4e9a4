"""Checkpoints as the papers' repositories wrote them: found out what they are of, evaluated, written as ours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from common.config import load_config
from common.config.files import Translation
from common.datasets import named_classes
from common.engine import checkpoints
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
    """How a paper's repository writes its networks.

    Args:
        segmenter: Turns its weights, of network 1 or 2, into ours.
        configs: Our config file for each (`model.head`, number of classes) that was released.
        entries: Entries of the file that may hold the weights; the first that is there counts.
        heads: Beginnings of the names of weights that the evaluated network does not have.
        config_in: Reads the config that a checkpoint holds.
    """

    segmenter: Callable[[State, int], State]
    configs: Mapping[tuple[str, int], str]
    entries: tuple[str, ...] = STATE_ENTRIES
    heads: tuple[str, ...] = ()
    config_in: Callable[[Path], Translation | None] | None = None

    def read(self, file: Path, number: int = 1) -> State:
        """Weights of network 1 or 2, with our keys. Raises UserError as `read_file`, or for keys of another network."""
        return self.ours(state_in(read_file(file), file, self.entries), file, number)

    def ours(self, state: State, file: Path, number: int = 1) -> State:
        """Weights of network 1 or 2, out of `file`, with our keys. Raises UserError for keys of another network."""
        try:
            return self.segmenter(state, number)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None

    def left_out(self, file: Path) -> str:
        """What of a file is not used to evaluate network 1, in words."""
        content = read_file(file)
        state = state_in(content, file, self.entries)
        told = []
        if len(state) != len(content) or any(key not in state for key in content):
            entry = next((name for name in self.entries if name in content), None)
            told += [str(name) for name in content if name != entry]
        for head in self.heads:
            count = sum(key.removeprefix("module.").startswith(head) for key in state)
            told += [f"{count} weights {head}*"] if count else []
        return ", ".join(told) or "nothing"

    def config_of(self, config_class: type, file: Path) -> tuple[Any, str]:
        """The paper's config for a checkpoint, its network as the weights say, and where it is from.

        Raises:
            UserError: weights of another network, or of one that the paper has no config for.
        """
        found = infer_architecture(self.read(file), str(file))
        known = ((head, found.num_classes) for head in found.heads)
        path = next((self.configs[key] for key in known if key in self.configs), None)
        if path is None:
            raise UserError(
                f"{file} has a network of {found.num_classes} classes (model.head {' or '.join(found.heads)}), for "
                "which there is no released config here: give one with --config"
            )
        config = load_config(config_class, ROOT / path)
        width = found.channels or config.model.channels
        config.model = replace(config.model, backbone=found.backbone, stem=found.stem, channels=width)
        return config, path


def is_ours(state: Mapping[str, Tensor]) -> bool:
    """Whether weights have the keys of our networks."""
    return any(key.startswith(("encoder.conv1.", "low.")) for key in state)


def convert(
    release: Release, file: Path, paper: str, config: Any, protocol: Protocol, second: str | None, out: Path
) -> list[str]:
    """Write a released checkpoint as a run folder that eval.py and common.predict take.

    Args:
        release: Of the paper.
        file: The checkpoint.
        paper: Its folder.
        config: Ours, that describes its network.
        protocol: How the paper evaluates.
        second: What our checkpoints call the second network, where the paper has two.
        out: The run folder; new, or empty.

    Returns:
        What was done, a line each.

    Raises:
        UserError: weights that do not fit, a folder that is not empty or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--convert {out} is not empty: give a new folder")
    states = {1: release.read(file)}
    told = [f"not used of {file}: {release.left_out(file)}"]
    if second:
        try:
            states[2] = release.read(file, 2)
        except UserError as error:
            told.append(f"no second network: {error}")
    network = build_network(replace(config.model, pretrained=False))
    for number, state in states.items():
        load_state(network, state, f"network {number} of {file}", "the config's network")
    config.run.dir = str(out)
    # Not the script that trains: a training must not go on in this folder.
    open_folder(out, f"{paper}/eval.py", config)
    extra = {second: states[2]} if 2 in states else {}
    versions = {name: version(name) for name in ("torch", "timm")}
    meta = {"step": 0, "epoch": None, "scores": {}, "converted_from": file.name, "versions": versions}
    try:
        checkpoints.write(out / "checkpoints", meta, states[1], extra)
        checkpoints.point(out / "checkpoints", "last", 0)
        write_metainfo(out, MetaInfo(*named_classes(config.data, config.model.num_classes), protocol))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    return [*told, f"written to {out}: {len(states)} network(s), {config.model.backbone}, {config.model.head}"]
