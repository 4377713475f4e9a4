"""Weights from files: reading them safely, fitting them, and the keys of published networks in ours."""

import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from common.errors import UserError

_ARRAYS = {"_reconstruct": np._core.multiarray._reconstruct, "scalar": np._core.multiarray.scalar}
# Entries of a file that may hold the state dict.
STATE_ENTRIES = ("state_dict", "model")
# Arrays and numbers of NumPy, under its names of before and after 2.0: scores and prototypes in released checkpoints.
NUMPY = [
    *(
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name, function in _ARRAYS.items()
    ),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "uint8", "float16", "float32", "float64")),
]
# DeepLabV2's classifiers that its released forward never reaches.
UNREACHED = ("layer5.conv2d_list.2.", "layer5.conv2d_list.3.")


def without_wrapper(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("module."): value for key, value in state.items()}


def read_backbone(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Weights of a ResNet, named as torchvision and timm do.

    Known are torchvision's files, those with a deep stem (`resnet50_v1c.pth`, `resnet101-stem.pth`), and the whole
    DeepLabV2 trained on COCO that AdvSemiSeg published.

    Returns:
        The backbone, DeepLabV2's classifiers with our keys (nothing for other files), and the names of what is left.

    Raises:
        UserError: see `read_state`.
    """
    state = without_wrapper(read_state(path))
    theirs, ours = "layer5.conv2d_list.", "branches."
    left = [key for key in state if key.startswith(("fc.", *UNREACHED))]
    state = {key: value for key, value in state.items() if key not in left}
    classifier = {ours + key.removeprefix(theirs): value for key, value in state.items() if key.startswith(theirs)}
    return {key: value for key, value in state.items() if not key.startswith(theirs)}, classifier, left


def read_state(path: str | Path, entries: Sequence[str] = STATE_ENTRIES) -> dict[str, Tensor]:
    """A state dict from a safetensors or torch file, on the CPU. No code in the file is ever executed.

    Args:
        path: `*.safetensors`, or what `torch.save` wrote: the state dict itself, or below one of `entries`.

    Raises:
        UserError: no such file, a damaged one, one that holds code, one that is no state dict.
    """
    return state_in(read_file(path), path, entries)


def read_file(path: str | Path) -> object:
    """What a safetensors or torch file holds, on the CPU. Raises UserError as `read_state`."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights {path}: there is no such file")
    return _read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)


def state_in(content: object, path: str | Path, entries: Sequence[str] = STATE_ENTRIES) -> dict[str, Tensor]:
    """The state dict in what a file holds: below the first of `entries` that is there, or itself.

    Raises:
        UserError: it is none.
    """
    if isinstance(content, Mapping):
        content = next((content[name] for name in entries if isinstance(content.get(name), Mapping)), content)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"weights {path}: the file holds no state dict (names of weights and their tensors)")
    return dict(content)


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: str, target: str) -> None:
    """Load `state` into `module`, all of it and nothing else.

    Counters of batch norm (`num_batches_tracked`) may be missing, as in files written before they existed.

    Args:
        source: Where the weights come from, for the message.
        target: What they were meant for, for the message.

    Raises:
        UserError: keys missing, keys too many, or shapes that differ; a few of them are named.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    extra = [key for key in state if key not in own]
    shapes = [
        f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    named = (("missing", missing), ("unexpected", extra), ("wrong shape", shapes))
    wrong = [f"{what}: {few(keys)}" for what, keys in named if keys]
    if wrong:
        raise UserError(f"{source} does not fit {target}; {'; '.join(wrong)}")
    module.load_state_dict(state, strict=False)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights {path}: not a readable safetensors file ({error})") from None


def read_torch(path: Path) -> object:
    """What `torch.save` wrote, on the CPU. No code in the file is ever executed.

    Raises:
        UserError: a damaged file, one that holds code.
    """
    try:
        with torch.serialization.safe_globals(NUMPY):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise UserError(f"weights {path}: damaged, or not a file of torch.save") from None
        raise UserError(
            f"weights {path}: refused, since it holds more than tensors: reading it would execute {code[1]}; "
            "save its state dict alone, or as safetensors"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"weights {path}: damaged, or not a file of torch.save ({type(error).__name__})") from None


def few(keys: Iterable[str], count: int = 3) -> str:
    keys = list(keys)
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(keys[:count]) + more
