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

# Prefixes of the networks PRCL and CSS published (the same keys in both), and ours. The first that fits counts.
PRCL_CSS = {
    "resnet_": "encoder.",
    "ASPP.convs.4.": "aspp.pooled.",
    "ASPP.convs.": "aspp.branches.",
    "ASPP.project.": "aspp.project.",
    "project.": "low.",
    "classifier.": "classifier.",
}
# The representation head is no part of the segmenter; the papers' own folders read it.
PRCL_CSS_HEADS = ("representation.",)

# The same for CAC. The decoder's first convolution also sees its input channels in another order (`_low_level_first`).
CAC = (
    {"encoder.backbone.": "encoder."}
    | {f"encoder.aspp.aspp{i + 1}.atrous_conv.": f"aspp.branches.{i}.0." for i in range(4)}
    | {f"encoder.aspp.aspp{i + 1}.bn.": f"aspp.branches.{i}.1." for i in range(4)}
    | {
        "encoder.aspp.global_avg_pool.": "aspp.pooled.",
        "encoder.aspp.conv1.": "aspp.project.0.",
        "encoder.aspp.bn1.": "aspp.project.1.",
        "encoder.decoder.conv1.": "low.0.",
        "encoder.decoder.bn1.": "low.1.",
        "encoder.decoder.last_conv.": "decoder.",
        "classifier.": "classifier.",
    }
)
CAC_HEADS = ("project.",)
# For CPS in CAC's code base, which calls the encoder backbone, and for original CPS and CPCL.
CPS_IN_CAC = {re.sub("^encoder", "backbone", official): ours for official, ours in CAC.items()}
CPS = {
    "backbone.": "encoder.",
    "head.aspp.map_convs.": "aspp.branches.",
    "head.aspp.map_bn.": "aspp.norm.0.",
    "head.aspp.red_conv.": "aspp.reduce.",
    "head.aspp.global_pooling_conv.": "aspp.pooled.1.",
    "head.aspp.global_pooling_bn.": "aspp.pooled.2.",
    "head.aspp.pool_red_conv.": "aspp.pooled.4.",
    "head.aspp.red_bn.": "aspp.project.0.",
    "head.reduce.": "low.",
    "head.last_conv.": "decoder.",
    "classifier.": "classifier.",
}
# For both networks of memory bank; its heads and selectors are read in its folder.
MEMORY_BANK = (
    {f"{name}.": f"encoder.{name}." for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")}
    | {"layer5.conv2d_list.": "classifier.branches."}
    | {f"aspp.aspp{i + 1}.atrous_conv.": f"aspp.branches.{i}.0." for i in range(4)}
    | {f"aspp.aspp{i + 1}.bn.": f"aspp.branches.{i}.1." for i in range(4)}
    | {
        "aspp.global_avg_pool.": "aspp.pooled.",
        "aspp.conv1.": "aspp.project.0.",
        "aspp.bn1.": "aspp.project.1.",
        "decoder.conv1.": "low.0.",
        "decoder.bn1.": "low.1.",
        "decoder.pre_last_conv.": "decoder.",
        "decoder.last_conv.": "classifier.1.",
    }
)
MEMORY_BANK_HEADS = ("projection_head.", "prediction_head.", "contrastive_class_selector_")
# DeepLabV2's classifiers that its released forward never reaches.
UNREACHED = ("layer5.conv2d_list.2.", "layer5.conv2d_list.3.")


def deeplab_from_prcl_css(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The segmenter out of a state dict of PRCL's or CSS's published network, with the keys of our `DeepLabV3Plus`.

    Args:
        state: Keys as published (`resnet_layer1.0.conv1.weight`, `ASPP.convs.0.0.weight`, ...). Those that start with
            one of `PRCL_CSS_HEADS` are left out of the result.

    Raises:
        UserError: keys of another network.
    """
    return _rename({key: value for key, value in state.items() if not key.startswith(PRCL_CSS_HEADS)}, PRCL_CSS)


def deeplab_from_cac(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The segmenter out of CAC's published network, with the keys of our `CACDeepLab`; its projector is left out.

    Args:
        state: Keys `encoder.backbone.conv1.weight`, ..., with or without `module.` before them.

    Raises:
        UserError: keys of another network.
    """
    state = _without_wrapper(state)
    renamed = _rename({key: value for key, value in state.items() if not key.startswith(CAC_HEADS)}, CAC)
    return _low_level_first(renamed)


def deeplab_from_memory_bank(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The segmenter out of memory bank's published network: our `DeepLabV2` or `MemoryBankDeepLab`.

    Args:
        state: Keys `conv1.weight`, ..., `layer5.conv2d_list.0.weight` or `aspp.conv1.weight`, ...; heads, selectors
            and classifiers that are never reached are left out.

    Raises:
        UserError: keys of another network.
    """
    own = {key: value for key, value in state.items() if not key.startswith((*MEMORY_BANK_HEADS, *UNREACHED))}
    return _low_level_first(_rename(own, MEMORY_BANK))


def deeplab_from_cps(state: Mapping[str, Tensor], network: int = 1) -> dict[str, Tensor]:
    """One of the two networks out of a published CPS or CPCL.

    Args:
        state: Keys of original CPS and CPCL (our `CPSDeepLab`) or of CPS in CAC's code base (our `CACDeepLab`), both
            below `branch1.` and `branch2.`, or those of the latter's first network alone.
        network: 1 or 2.

    Raises:
        UserError: keys of another network; a second network that the file does not hold.
    """
    state = _without_wrapper(state)
    branch = f"branch{network}."
    own = {key.removeprefix(branch): value for key, value in state.items() if key.startswith(branch)}
    if not own and (network != 1 or any(key.startswith("branch") for key in state)):
        raise UserError(f"the file holds no network {network}")
    own = own or dict(state)
    in_cac_code = any(key.startswith("backbone.backbone.") for key in own)
    return _low_level_first(_rename(own, CPS_IN_CAC if in_cac_code else CPS))


def _without_wrapper(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("module."): value for key, value in state.items()}


def _low_level_first(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move the 48 low-level channels, which CAC and CPS put after the ASPP's, to where our decoder has them."""
    key, low = "decoder.0.weight", "low.0.weight"
    if key in state and low in state:
        aspp_channels = state[key].shape[1] - state[low].shape[0]
        context, low_level = state[key].split([aspp_channels, state[low].shape[0]], dim=1)
        state[key] = torch.cat([low_level, context], dim=1)
    return state


def read_backbone(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Weights of a ResNet, named as torchvision and timm do.

    Known are torchvision's files, those with a deep stem (`resnet50_v1c.pth`, `resnet101-stem.pth`), and the whole
    DeepLabV2 trained on COCO that AdvSemiSeg published.

    Returns:
        The backbone, DeepLabV2's classifiers with our keys (nothing for other files), and the names of what is left.

    Raises:
        UserError: see `read_state`.
    """
    state = _without_wrapper(read_state(path))
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
    wrong = [f"{what}: {_few(keys)}" for what, keys in named if keys]
    if wrong:
        raise UserError(f"{source} does not fit {target}; {'; '.join(wrong)}")
    module.load_state_dict(state, strict=False)


def _rename(state: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    renamed, unknown = {}, []
    for key, value in state.items():
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        if prefix is None:
            unknown.append(key)
        else:
            renamed[prefixes[prefix] + key.removeprefix(prefix)] = value
    if unknown:
        raise UserError(
            f"not a published network of this kind; its keys start with {', '.join(prefixes)}, not {_few(unknown)}"
        )
    return renamed


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


def _few(keys: Iterable[str], count: int = 3) -> str:
    keys = list(keys)
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(keys[:count]) + more
