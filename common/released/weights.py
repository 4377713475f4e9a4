"""Convert the state-dict keys of published networks to those of this project."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from common.errors import UserError
from common.models.weights import UNREACHED, few, without_wrapper

# Prefixes of the keys of PRCL's and CSS's published networks (the same in both), and this project's. The first match
# counts.
PRCL_CSS = {
    "resnet_": "encoder.",
    "ASPP.convs.4.": "aspp.pooled.",
    "ASPP.convs.": "aspp.branches.",
    "ASPP.project.": "aspp.project.",
    "project.": "low.",
    "classifier.": "classifier.",
}
# The representation head is not part of the segmenter; the papers' own folders read it.
PRCL_CSS_HEADS = ("representation.",)
# Entries of PRCL's and CSS's checkpoints: the teacher, which the papers evaluate, before the student.
PRCL_CSS_ENTRIES = ("ema", "ema_model", "model")

# The same for CAC, whose decoder also has its input channels in another order (`_low_level_first`).
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
# The same for CPS in CAC's code base, which names the encoder `backbone`, and for original CPS and CPCL.
CPS_IN_CAC = {re.sub("^encoder", "backbone", official): key for official, key in CAC.items()}
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
# The same for both networks of memory bank; memory_bank/released.py converts its heads and selectors.
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
# The same for UniMatch, and for UniMatch V2's DINOv2 and DPT.
UNIMATCH = (
    {"backbone.": "encoder."}
    | {f"head.b{i}.": f"aspp.branches.{i}." for i in range(4)}
    | {
        "head.b4.gap.": "aspp.pooled.",
        "head.project.": "aspp.project.",
        "reduce.": "low.",
        "fuse.": "decoder.",
        "classifier.": "classifier.",
    }
)
UNIMATCH_V2 = (
    {"backbone.": "encoder.body.", "head.projects.": "decoder.projects.", "head.resize_layers.": "decoder.resizes."}
    | {f"head.scratch.layer{i + 1}_rn.": f"decoder.layers.{i}." for i in range(4)}
    | {
        f"head.scratch.refinenet{i + 1}.{official}.": f"decoder.fusions.{i}.{name}."
        for i in range(4)
        for official, name in (("resConfUnit1", "skip_unit"), ("resConfUnit2", "unit"), ("out_conv", "out"))
    }
    | {"head.scratch.output_conv.": "classifier."}
)
# Weights that no forward of the released network reaches.
UNIMATCH_V2_UNUSED = ("backbone.mask_token", "head.scratch.refinenet4.resConfUnit1.")


def segmenter_from_unimatch(state: Mapping[str, Tensor], network: int = 1) -> dict[str, Tensor]:
    """Convert a published network of UniMatch (to `v3plus_unimatch`) or UniMatch V2 (to `dpt` on DINOv2).

    Args:
        state: Keys `backbone.conv1.0.weight`, ..., or `backbone.cls_token`, ..., with or without `module.` before them.
        network: Unused: an entry of a file holds one network.

    Raises:
        UserError: keys of another network.
    """
    state = without_wrapper(state)
    if "backbone.cls_token" not in state:
        return _rename(state, UNIMATCH)
    own = {key: value for key, value in state.items() if not key.startswith(UNIMATCH_V2_UNUSED)}
    # The giant's gated MLP, whose layers timm names as those of the others.
    own = {key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): own[key] for key in own}
    return _rename(own, UNIMATCH_V2)


def deeplab_from_prcl_css(state: Mapping[str, Tensor], network: int = 1) -> dict[str, Tensor]:
    """Convert the segmenter of PRCL's or CSS's published network to the keys of the head `v3plus`.

    Args:
        state: Keys as published (`resnet_layer1.0.conv1.weight`, `ASPP.convs.0.0.weight`, ...). Keys that start with
            one of `PRCL_CSS_HEADS` are left out of the result.
        network: Unused: there is one network.

    Raises:
        UserError: keys of another network.
    """
    return _rename({key: value for key, value in state.items() if not key.startswith(PRCL_CSS_HEADS)}, PRCL_CSS)


def deeplab_from_cac(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the segmenter of CAC's published network to the keys of `v3plus_cac`; its projector is left out.

    Args:
        state: Keys `encoder.backbone.conv1.weight`, ..., with or without `module.` before them.

    Raises:
        UserError: keys of another network.
    """
    state = without_wrapper(state)
    renamed = _rename({key: value for key, value in state.items() if not key.startswith(CAC_HEADS)}, CAC)
    return _low_level_first(renamed)


def deeplab_from_memory_bank(state: Mapping[str, Tensor], network: int = 1) -> dict[str, Tensor]:
    """Convert the segmenter of memory bank's published network to `v2`, `v2_coco` or `v3plus_memory_bank`.

    Args:
        state: Keys `conv1.weight`, ..., `layer5.conv2d_list.0.weight` or `aspp.conv1.weight`, ...; heads, selectors
            and classifiers that are never used are left out.
        network: Unused: there is one network.

    Raises:
        UserError: keys of another network.
    """
    own = {key: value for key, value in state.items() if not key.startswith((*MEMORY_BANK_HEADS, *UNREACHED))}
    return _low_level_first(_rename(own, MEMORY_BANK))


def deeplab_from_cps(state: Mapping[str, Tensor], network: int = 1) -> dict[str, Tensor]:
    """Convert one of the two networks of a published CPS or CPCL.

    Args:
        state: Keys of original CPS and CPCL (converted to those of `v3plus_cps`) or of CPS in CAC's code base
            (converted to those of `v3plus_cac`), both below `branch1.` and `branch2.`, or the keys of the latter's
            first network alone.
        network: 1 or 2.

    Raises:
        UserError: keys of another network, or a second network that the file does not have.
    """
    state = without_wrapper(state)
    branch = f"branch{network}."
    own = {key.removeprefix(branch): value for key, value in state.items() if key.startswith(branch)}
    if not own and (network != 1 or any(key.startswith("branch") for key in state)):
        raise UserError(f"the file has no network {network}; evaluate network 1")
    own = own or dict(state)
    in_cac_code = any(key.startswith("backbone.backbone.") for key in own)
    return _low_level_first(_rename(own, CPS_IN_CAC if in_cac_code else CPS))


def _low_level_first(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move the 48 low-level channels before the ASPP's, as in this project; CAC and CPS have them after."""
    key, low = "decoder.0.weight", "low.0.weight"
    if key in state and low in state:
        aspp_channels = state[key].shape[1] - state[low].shape[0]
        context, low_level = state[key].split([aspp_channels, state[low].shape[0]], dim=1)
        state[key] = torch.cat([low_level, context], dim=1)
    return state


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
            f"not a published network of this kind; its keys start with {', '.join(prefixes)}, not {few(unknown)}"
        )
    return renamed
