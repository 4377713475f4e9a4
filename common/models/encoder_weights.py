"""Load a local weight file into a timm encoder, whether its keys are timm's, torchvision's or the makers'."""

import sys
from collections.abc import Mapping

import timm
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.models.encoders import Encoder
from common.models.weights import few, load_state, read_state, without_wrapper


def load_encoder(encoder: Encoder, path: str) -> list[str]:
    """Load a file strictly: each weight of the encoder must be in it, with the same shape.

    Keys of the makers (e.g. DINOv2 of facebookresearch) are recognized and renamed by timm's own conversion.

    Returns:
        Names of the file's weights that the encoder does not use, e.g. of the classifier.

    Raises:
        UserError: the file cannot be read, or does not fit.
    """
    source, target = f"model.pretrained {path}", f"model.backbone {encoder.info.name}"
    with torch.device("meta"):
        whole = timm.create_model(encoder.info.name)
    state = _converted(without_wrapper(read_state(path)), whole, source, target)
    names = _names_in_body(encoder.body, whole)
    fitting = {names[key]: value for key, value in state.items() if key in names}
    load_state(encoder.body, fitting, source, target)
    left = [key for key in state if key not in names]
    unknown = [key for key in left if key not in whole.state_dict() and not _is_classifier(key, whole)]
    if unknown:
        raise UserError(f"{source} does not fit {target}; unexpected: {few(unknown)}")
    return [few(left)] if left else []


def _converted(state: dict[str, Tensor], whole: nn.Module, source: str, target: str) -> Mapping[str, Tensor]:
    """The weights under timm's keys. Each model file of timm converts the makers' keys of its networks."""
    module = sys.modules[type(whole).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None) or getattr(module, "_filter_fn", None)
    if convert is None or state.keys() == whole.state_dict().keys():
        return state
    try:
        takes_model = convert.__code__.co_argcount > 1
        return convert(dict(state), whole) if takes_model else convert(dict(state))
    except (KeyError, RuntimeError, ValueError, AttributeError) as error:
        raise UserError(f"{source} does not fit {target} ({type(error).__name__}: {error})") from None


def _names_in_body(body: nn.Module, whole: nn.Module) -> dict[str, str]:
    """Key of the whole network -> key in its encoder, where timm names the first level `stages_0` for `stages.0`."""
    own = body.state_dict()
    found = {}
    for key in whole.state_dict():
        name = next((name for name in (key, key.replace(".", "_", 1), f"model.{key}") if name in own), None)
        if name is not None:
            found[key] = name
    return found


def _is_classifier(key: str, whole: nn.Module) -> bool:
    """True for weights of a classifier or of pretraining, which files hold beside the network."""
    stated = whole.pretrained_cfg.get("classifier") or ()
    names = (stated,) if isinstance(stated, str) else tuple(stated)
    return key.startswith(tuple(f"{name}." for name in (*names, "head", "fc", "classifier"))) or key == "mask_token"
