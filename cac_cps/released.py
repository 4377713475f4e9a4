"""Weights as the releases of CAC and CPS have them."""

from collections.abc import Mapping

from torch import Tensor

from common.models.weights import CAC_HEADS, deeplab_from_cac, deeplab_from_cps
from common.release import Release


def segmenter_of(state: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The segmenter of a published checkpoint with our keys.

    Args:
        state: Of CAC, of CPS in CAC's code base, or of original CPS.
        number: Network 1 or 2 of CPS; CAC has one.

    Raises:
        UserError: keys of another network, or a second network that is not there.
    """
    is_cac = any(key.removeprefix("module.").startswith("encoder.backbone.") for key in state)
    return deeplab_from_cac(state) if is_cac and number == 1 else deeplab_from_cps(state, number)


RELEASE = Release(
    segmenter_of,
    configs={
        ("deeplab", 21): "cac_cps/configs/voc_cac_deeplabv3+_resnet50_1over8_datalist0.json",
        ("deeplab", 19): "cac_cps/configs/city_cac_deeplabv3+_resnet50_1over8_datalist0.json",
        ("cps", 21): "cac_cps/configs/voc_cps_resnet50_1over8.json",
        ("cps", 19): "cac_cps/configs/city_cps_resnet50_1over8.json",
    },
    heads=CAC_HEADS,
)
