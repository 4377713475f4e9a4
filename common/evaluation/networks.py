"""Networks in a paper's checkpoints: read the weights that `--network` selects, and load them for an evaluation."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from common.config.sections import ModelConfig
from common.errors import UserError
from common.evaluation.inference import MeanOfNetworks
from common.evaluation.released_checkpoints import Release, has_project_keys
from common.models import build_network
from common.models.weights import STATE_ENTRIES, load_state, read_file, read_state

State = dict[str, Tensor]


@dataclass(frozen=True)
class PaperNetworks:
    """Networks that the checkpoints of a paper hold.

    Args:
        second: Name of the second network in `extra.safetensors`, for a paper that trains two.
        roles: `student` and `teacher` for a paper whose checkpoints hold both; the one that is evaluated in training
            stands in `model.safetensors`, the other one in `extra.safetensors` under its role.
        release: Weight files of the paper's own repository.
    """

    second: str | None = None
    roles: Sequence[str] = ()
    release: Release | None = None

    @property
    def choices(self) -> Sequence[str]:
        """Values of `--network`; empty for a paper with one network."""
        return ("1", "2", "both") if self.second else self.roles

    def read(self, file: Path, name: str | None) -> State:
        """Read the weights of a network, with this project's keys.

        Args:
            file: Weight file.
            name: `1`, `2` or a role; None for the network that is evaluated in training.

        Raises:
            UserError: the file cannot be read, or the checkpoint does not hold this network.
        """
        if name in self.roles:
            return self._read_role(file, name)
        if name == "2" and file.name == "model.safetensors":
            state = _read_extra(file, self.second)
            if not state:
                raise UserError(f"{file.parent} holds no second network; evaluate it with --network 1")
            return state
        if self.release is None:
            return read_state(file, STATE_ENTRIES)
        state = read_state(file, self.release.entries)
        return state if has_project_keys(state) else self.release.convert(state, file, 2 if name == "2" else 1)

    def _read_role(self, file: Path, role: str) -> State:
        state = _read_extra(file, role)
        if state:
            return state
        if any(_read_extra(file, other) for other in self.roles):
            return read_state(file)  # the evaluated network itself, as its counterpart stands beside it
        entry = self.release.role_entries.get(role) if self.release else None
        if entry and file.suffix != ".safetensors" and entry in read_file(file):
            return self.release.convert(read_state(file, (entry,)), file)
        raise UserError(f"{file} does not hold student and teacher; evaluate it without --network")


class EvaluatedNetwork:
    """Network that `--network` selects, to be loaded from one checkpoint after the other.

    Args:
        paper_networks: Networks in the checkpoints.
        name: `1`, `2`, `both` (mean of the logits), a role, or None; as `--network`.
        model: Config of each network. The weights come from checkpoints, so ImageNet's are not downloaded.
        accelerator: Device and processes.

    Attributes:
        module: The network, on the accelerator's device.
    """

    def __init__(
        self, paper_networks: PaperNetworks, name: str | None, model: ModelConfig, accelerator: Accelerator
    ) -> None:
        self._paper_networks, self._accelerator = paper_networks, accelerator
        names = ("1", "2") if name == "both" else (name,)
        self._networks = {name: build_network(replace(model, pretrained=False)) for name in names}
        networks = list(self._networks.values())
        self.module: nn.Module = networks[0] if len(networks) == 1 else MeanOfNetworks(networks)
        self.module.to(accelerator.device)

    def load(self, file: Path, config_file: Path) -> None:
        """Load a checkpoint's weights; every process must call it.

        Args:
            file: Weight file.
            config_file: Config file of the network, for error messages.

        Raises:
            UserError: on every process, where the weights cannot be read or do not fit on any of them.
        """
        with _fail_together(self._accelerator):
            for name, network in self._networks.items():
                load_state(network, self._paper_networks.read(file, name), str(file), f"the network of {config_file}")


@contextmanager
def _fail_together(accelerator: Accelerator) -> Iterator[None]:
    """Raise a `UserError` of one process on all processes, which would otherwise wait for that process."""
    failure: UserError | None = None
    try:
        yield
    except UserError as error:
        failure = error
    if accelerator.reduce(torch.tensor(int(failure is not None), device=accelerator.device), "sum"):
        raise failure or UserError("another process could not read the checkpoint")


def _read_extra(file: Path, name: str) -> State:
    """Read the weights under `name` in the `extra.safetensors` beside a checkpoint's file; empty without them."""
    extra = file.with_name("extra.safetensors")
    state = read_state(extra) if file.name == "model.safetensors" and extra.is_file() else {}
    return {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}
