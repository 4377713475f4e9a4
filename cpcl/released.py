"""Checkpoints as CPCL's repository writes them."""

from common.models.weights import deeplab_from_cps
from common.release import Release

RELEASE = Release(
    deeplab_from_cps,
    configs={
        ("cps", 21): "cpcl/configs/voc_resnet50_1over8.json",
        ("cps", 19): "cpcl/configs/city_resnet50_1over8.json",
    },
)
