"""Build the network of a config's `model` section, with pretrained weights for its encoder."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import timm
from torch import nn

from common.config.sections import ModelConfig
from common.errors import UserError
from common.images import IMAGENET_MEAN, IMAGENET_STD
from common.models import resnet
from common.models.deeplab import (
    V3PLUS_CAC,
    V3PLUS_CPS,
    V3PLUS_MEMORY_BANK,
    V3PLUS_UNIMATCH,
    DeepLabV2,
    DeepLabV3Plus,
)
from common.models.dpt import DPT
from common.models.encoder_weights import load_encoder
from common.models.encoders import PERMISSIVE, Encoder, build_encoder
from common.models.infer_architecture import infer_backbone
from common.models.segmenter import InputNormalization, Segmenter
from common.models.weights import load_state, read_backbone


@dataclass(frozen=True)
class Head:
    """A value of `model.head`.

    Attributes:
        taps: Family of the head, see `EncoderInfo.taps_for`.
        build: Function from encoder and `model` section to the network.
        dilation: Dilation of a ResNet; None for that of `build_resnet` by stem and stride.
        resnet_only: The head belongs to weights that exist for ResNets only.
    """

    taps: str
    build: Callable[[nn.Module, ModelConfig], Segmenter]
    dilation: resnet.Dilation | None = None
    resnet_only: bool = False


HEADS = {
    "v3plus": Head("v3plus", DeepLabV3Plus),
    "v3plus_cac": Head("v3plus", partial(DeepLabV3Plus, variant=V3PLUS_CAC), resnet.MULTI_GRID),
    "v3plus_cps": Head("v3plus", partial(DeepLabV3Plus, variant=V3PLUS_CPS), resnet.MULTI_GRID),
    "v3plus_memory_bank": Head("v3plus", partial(DeepLabV3Plus, variant=V3PLUS_MEMORY_BANK), resnet.UNIFORM_16),
    "v3plus_unimatch": Head("v3plus", partial(DeepLabV3Plus, variant=V3PLUS_UNIMATCH), resnet.TORCHVISION_16),
    "v2": Head("v2", DeepLabV2, resnet.UNIFORM_8),
    "v2_coco": Head("v2", DeepLabV2, resnet.CAFFE_8, resnet_only=True),
    "dpt": Head("dpt", DPT),
}


def build_network(model: ModelConfig) -> Segmenter:
    """Build the network of a config's `model` section. Its random initial weights follow from torch's seed.

    Raises:
        UserError: a value that the encoder or the head does not support; weights that cannot be downloaded or read, or
            that do not fit.
    """
    head = HEADS[model.head]
    is_timm_name = isinstance(model.pretrained, str) and timm.is_model_pretrained(model.pretrained)
    download = model.pretrained if is_timm_name else model.pretrained is True
    is_resnet = model.backbone in resnet.DEPTHS and head.taps != "dpt"
    encoder = (_resnet if is_resnet else _timm_encoder)(model, head, download)
    network = head.build(encoder, model)
    if model.input_mean is not None:
        network.input = InputNormalization(model.input_mean, model.bgr)
    elif isinstance(encoder, Encoder) and (encoder.info.mean, encoder.info.std) != (IMAGENET_MEAN, IMAGENET_STD):
        mean, std = ([255 * value for value in values] for values in (encoder.info.mean, encoder.info.std))
        network.input = InputNormalization(mean, std=std)
    if isinstance(model.pretrained, str) and not is_timm_name:
        _load_pretrained(network, model)
    if model.grad_checkpointing:
        network.checkpoint_encoder()
    if model.freeze_encoder:
        network.freeze_encoder()
    return network


def _resnet(model: ModelConfig, head: Head, download: bool | str) -> nn.Module:
    if model.dinov2_positions:
        raise UserError(f"model.dinov2_positions needs a ViT with a position table, not {model.backbone}")
    stem, stride, dilation = model.stem, model.output_stride, head.dilation
    return resnet.build_resnet(model.backbone, stem, stride, download, dilation, model.drop_path)


def _timm_encoder(model: ModelConfig, head: Head, download: bool | str) -> Encoder:
    if head.resnet_only:
        names = ", ".join(resnet.DEPTHS)
        raise UserError(f"model.head {model.head} is for weights of ResNets ({names}), not {model.backbone}")
    if model.stem != "plain":
        raise UserError(f"model.stem {model.stem} is for DeepLabs on {', '.join(resnet.DEPTHS)}; leave it out")
    # DPT takes a map of each stride, so nothing is dilated for it.
    stride = 32 if head.taps == "dpt" else model.output_stride
    if download is True and model.backbone in resnet.DEPTHS:
        download = resnet.default_weights(model.backbone)
    encoder = build_encoder(model.backbone, head.taps, stride, download, model.drop_path, model.dinov2_positions)
    if model.pretrained is not False and encoder.info.license not in PERMISSIVE:
        _print_once(f"note: the license of the weights of {model.backbone} is {encoder.info.license}")
    return encoder


def _load_pretrained(network: Segmenter, model: ModelConfig) -> None:
    """Load a local file into the encoder, and into DeepLabV2's classifiers if the number of classes is the same."""
    source = f"model.pretrained {model.pretrained}"
    if isinstance(network.encoder, Encoder):
        left_out = load_encoder(network.encoder, model.pretrained)
    else:
        left_out = _load_resnet(network, model, source)
    if left_out:
        _print_once(f"note: unused weights in {source}: {', '.join(left_out)}")


def _load_resnet(network: Segmenter, model: ModelConfig, source: str) -> list[str]:
    target = f"{model.backbone} with the {model.stem} stem"
    backbone, classifier, left_out = read_backbone(model.pretrained)
    found = infer_backbone(backbone)
    if found and found != (model.backbone, model.stem):
        raise UserError(f"{source} does not fit {target}: the file holds a {found[0]} with the {found[1]} stem")
    load_state(network.encoder, backbone, source, target)
    own = network.classifier.state_dict()
    if own.keys() == classifier.keys() and all(own[key].shape == value.shape for key, value in classifier.items()):
        network.classifier.load_state_dict(classifier)
    elif classifier:
        left_out.append(f"the classifiers of {next(iter(classifier.values())).shape[0]} classes")
    return left_out


def _print_once(text: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(text)
