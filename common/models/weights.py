"""Read weight files safely, and load them into networks."""

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
# Entries of a file that may be the state dict.
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
    """Remove the prefix `module.` of DataParallel and DDP from the keys."""
    return {key.removeprefix("module."): value for key, value in state.items()}


def read_backbone(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Read the weights of a ResNet with the keys of torchvision and timm.

    Supported are torchvision's files, files with a deep stem (`resnet50_v1c.pth`, `resnet101-stem.pth`), and the whole
    DeepLabV2 trained on COCO that AdvSemiSeg published.

    Returns:
        The backbone, DeepLabV2's classifiers with this project's keys (empty for other files), and the names of unused
        weights.

    Raises:
        UserError: see `read_state`.
    """
    state = without_wrapper(read_state(path))
    published, own = "layer5.conv2d_list.", "branches."
    left = [key for key in state if key.startswith(("fc.", *UNREACHED))]
    state = {key: value for key, value in state.items() if key not in left}
    classifier = {own + key.removeprefix(published): value for key, value in state.items() if key.startswith(published)}
    return {key: value for key, value in state.items() if not key.startswith(published)}, classifier, left


def read_state(path: str | Path, entries: Sequence[str] = STATE_ENTRIES) -> dict[str, Tensor]:
    """Read a state dict from a safetensors or torch file to the CPU. No code in the file is executed.

    Args:
        path: `*.safetensors`, or a file of `torch.save` with the state dict itself or in one of `entries`.
        entries: Entries that may be the state dict.

    Raises:
        UserError: the file is missing, is damaged, contains code, or is not a state dict.
    """
    return state_in(read_file(path), path, entries)


def read_file(path: str | Path) -> object:
    """Read a safetensors or torch file to the CPU. No code in the file is executed.

    Raises:
        UserError: the file is missing, is damaged, or contains code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights {path}: there is no such file")
    return _read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)


def state_in(content: object, path: str | Path, entries: Sequence[str] = STATE_ENTRIES) -> dict[str, Tensor]:
    """The state dict in the content of a file: the first of `entries` that exists, or the content itself.

    Args:
        content: Result of `read_file`.
        path: The file, for the message.
        entries: Entries that may be the state dict.

    Raises:
        UserError: the content is not a state dict.
    """
    if isinstance(content, Mapping):
        content = next((content[name] for name in entries if isinstance(content.get(name), Mapping)), content)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"weights {path}: the file holds no state dict (names of weights and their tensors)")
    return dict(content)


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: str, target: str) -> None:
    """Load `state` into `module`; keys and shapes must be the same.

    Counters of batch norm (`num_batches_tracked`) may be missing, as in files written before they existed.

    Args:
        module: Module that gets the weights.
        state: The weights.
        source: Origin of the weights, for the message.
        target: Name of the module, for the message.

    Raises:
        UserError: missing keys, unexpected keys, or other shapes; a few of them are named.
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
    """Read a file of `torch.save` to the CPU. No code in the file is executed.

    Raises:
        UserError: the file is damaged or contains code.
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
    """The first `count` keys and the number of others, for a message."""
    keys = list(keys)
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(keys[:count]) + more
