"""Any timm network as an encoder: taps by stride, input sizes, normalization, weights and license.

`describe_encoder` reads the rules of a timm name without allocating its weights; `build_encoder` builds it. Encoders
are `hierarchical` (taps of several strides: ResNet, ConvNeXt, Swin, ...) or `plain` (one stride: ViTs such as DINOv2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg
from torch import Tensor, nn
from torch.nn import functional as F

from common.config.files import did_you_mean
from common.errors import UserError
from common.models.positions import use_dinov2_positions

# Options under which a timm network takes images of any size, in the order in which they are tried.
SIZE_OPTIONS = ({}, {"dynamic_img_size": True}, {"strict_img_size": False})
MULTIPLES = (1, 2, 4, 8, 14, 16, 32)
SMALLEST_TRIAL = 65  # pixels; at stride 32 a smaller side leaves batch norms and pools without room
DPT_TAPS = 4
PERMISSIVE = ("apache-2.0", "mit", "bsd-3-clause")


@dataclass(frozen=True)
class EncoderInfo:
    """Rules of a timm network that serves as an encoder.

    Attributes:
        name: timm name.
        strides: Input pixels per feature, for each tap that exists; a plain ViT has one stride in all blocks.
        channels: Channels of the same taps.
        multiple: Sides of the input must be multiples of this; `Encoder` resizes other images to the nearest one.
        mean, std: Normalization that the pretrained weights expect, per channel, for images in [0, 1].
        license: License of the pretrained weights.
        options: Keyword arguments with which timm builds it for images of any size.
        depth: Number of blocks of a plain ViT; 0 for hierarchical encoders.
    """

    name: str
    strides: tuple[int, ...]
    channels: tuple[int, ...]
    multiple: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    license: str
    options: tuple[tuple[str, bool], ...]
    depth: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether all taps have the same stride."""
        return self.depth > 0

    @property
    def heads(self) -> tuple[str, ...]:
        """Families of `model.head` that fit: `v3plus` needs taps at stride 4 and above, `dpt` four taps."""
        deeplab = not self.is_plain and 4 in self.strides and self.strides[-1] > 4
        dpt = self.is_plain or len(self._pyramid) == DPT_TAPS
        return (("v3plus",) if deeplab else ()) + (("dpt",) if dpt else ())

    @property
    def _pyramid(self) -> tuple[int, ...]:
        return tuple(index for index, stride in enumerate(self.strides) if stride >= 4)[-DPT_TAPS:]

    def taps_for(self, head: str) -> tuple[int, ...]:
        """Indices of the taps a head needs: `v3plus` (stride 4, last), `v2` (last) or `dpt` (four).

        The blocks of a plain ViT of depth n are those at k * n / 4 - 1, k = 1..4 (DPT; DINOv2's evaluation): 2, 5, 8,
        11 of 12; of 24 blocks UniMatch V2 takes 4, 11, 17, 23.

        Raises:
            UserError: the encoder does not have them.
        """
        if head == "dpt" and self.is_plain:
            return (4, 11, 17, 23) if self.depth == 24 else tuple(k * self.depth // 4 - 1 for k in (1, 2, 3, 4))
        if head == "dpt" and len(self._pyramid) == DPT_TAPS:
            return self._pyramid
        if head == "v3plus" and "v3plus" in self.heads:
            return self.strides.index(4), len(self.strides) - 1
        if head == "v2" and not self.is_plain:
            return (len(self.strides) - 1,)
        needs = {"v3plus": "taps at stride 4 and above", "dpt": "four taps of stride 4 and above"}
        fits = f"; model.head {' or '.join(self.heads)} fits" if self.heads else "; no model.head fits it"
        raise UserError(
            f"model.backbone {self.name} has taps at stride {', '.join(map(str, sorted(set(self.strides))))}, but this "
            f"model.head needs {needs.get(head, 'features of several strides')}{fits}"
        )


@lru_cache(maxsize=256)
def describe_encoder(name: str, output_stride: int = 32) -> EncoderInfo:
    """Read the rules of a timm network from a copy without weights (meta device).

    Args:
        name: timm name, with or without the tag of its weights (`vit_small_patch14_dinov2.lvd142m`).
        output_stride: Stride of the last tap; values below 32 need a family that dilates.

    Raises:
        UserError: unknown name, no features, no rule for images of other sizes, or a family without `output_stride`.
    """
    if name.split(".")[0] not in timm.list_models():
        raise UserError(f"model.backbone {name} is not a timm network{did_you_mean(name, timm.list_models())}")
    with torch.device("meta"):
        try:
            body = timm.create_model(name, features_only=True)
        except (TypeError, RuntimeError, AssertionError, ValueError) as error:
            raise UserError(f"model.backbone {name} has no features in timm ({_first_line(error)})") from None
    strides, channels = tuple(body.feature_info.reduction()), tuple(body.feature_info.channels())
    is_plain = len(strides) > 1 and len(set(strides)) == 1
    if output_stride < 32 and not is_plain and strides[-1] > output_stride:
        strides = _dilated_strides(name, output_stride)
    cfg = timm.get_pretrained_cfg(name) or PretrainedCfg()
    options, multiple = _size_rule(name, is_plain)
    depth = 0
    if is_plain:
        strides = strides[:1]
        depth, channels = _plain_shape(name, options, multiple)
    return EncoderInfo(
        name,
        strides,
        channels,
        multiple,
        tuple(cfg.mean or IMAGENET_DEFAULT_MEAN),
        tuple(cfg.std or IMAGENET_DEFAULT_STD),
        cfg.license or "not stated",
        tuple(options.items()),
        depth,
    )


class Encoder(nn.Module):
    """A timm network that returns the taps of a head, as [B,C,h,w] from the largest map to the smallest.

    Images whose sides are not multiples of `info.multiple` are resized to the nearest multiple first (bilinear,
    align_corners=True, as UniMatch V2 does); maps are never multiplied up, so a caller resizes logits to the image.

    Args:
        body: What timm built.
        info: Rules of the network.
        taps: Indices of the taps, see `EncoderInfo.taps_for`.
        dinov2_positions: Resample position embeddings as facebookresearch's DINOv2 does, see `dinov2_positions`.
    """

    def __init__(self, body: nn.Module, info: EncoderInfo, taps: Sequence[int], dinov2_positions: bool = False) -> None:
        super().__init__()
        self.body, self.info, self.taps = body, info, tuple(taps)
        self.channels = (info.channels * len(self.taps)) if info.is_plain else tuple(info.channels[i] for i in taps)
        self.channels_last = str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC")
        if dinov2_positions:
            use_dinov2_positions(body, info.name)

    def forward(self, image: Tensor) -> list[Tensor]:
        """[B,3,H,W], normalized for this encoder -> maps [B,C,h,w], one per tap."""
        image = resize_to_multiple(image, self.info.multiple)
        if self.info.is_plain:
            # DINOv2's own evaluation, and UniMatch V2, apply the final norm to every tap.
            return self.body.forward_intermediates(
                image, indices=list(self.taps), norm=True, output_fmt="NCHW", intermediates_only=True
            )
        maps = self.body(image)
        # All maps come back and taps are picked here: `out_indices` counts otherwise in some families (DLA, TResNet).
        picked = [maps[index] for index in self.taps]
        return [one.permute(0, 3, 1, 2) for one in picked] if self.channels_last else picked


def resize_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Resize [B,C,H,W] so that each side is the nearest multiple, at least one; other images pass unchanged."""
    height, width = image.shape[-2:]
    size = [max(1, (2 * side + multiple) // (2 * multiple)) * multiple for side in (height, width)]
    # An exported program takes images of any size, and this resizing leaves those that fit as they are.
    if multiple == 1 or (not torch.compiler.is_exporting() and size == [height, width]):
        return image
    return F.interpolate(image, size=size, mode="bilinear", align_corners=True)


def build_encoder(
    name: str,
    head: str,
    output_stride: int = 32,
    download: bool | str = False,
    drop_path: float = 0.0,
    dinov2_positions: bool = False,
) -> Encoder:
    """Build an encoder, randomly initialized by timm or with timm's pretrained weights.

    Args:
        name: timm name.
        head: Family of the head, `v3plus`, `v2` or `dpt`: chooses the taps.
        output_stride: Stride of the last tap of a hierarchical encoder, 8, 16 or 32.
        download: Fetch timm's pretrained weights: True, or a timm name with the tag of its weights.
        drop_path: Probability of dropping a residual branch (stochastic depth).
        dinov2_positions: See `Encoder`.

    Raises:
        UserError: see `describe_encoder` and `EncoderInfo.taps_for`; an encoder without stochastic depth; weights that
            cannot be downloaded.
    """
    info = describe_encoder(name, output_stride)
    taps = info.taps_for(head)
    options = dict(info.options)
    if drop_path:
        options["drop_path_rate"] = drop_path
    if info.is_plain:
        options["num_classes"] = 0
    else:
        options["features_only"] = True
        if output_stride < 32 and info.strides[-1] == output_stride:
            options["output_stride"] = output_stride
    weights = (download if isinstance(download, str) else name) if download else None
    _check_tag(name, weights)
    body = _create(name, weights, options)
    if weights is None:
        _start_at_one(body)
    return Encoder(body, info, taps, dinov2_positions)


def _check_tag(name: str, weights: str | None) -> None:
    """Make sure that weights are of this network, and expect images as the network normalizes them."""
    if weights is None or weights == name:
        return
    if weights.split(".")[0] != name.split(".")[0]:
        raise UserError(f"model.pretrained {weights} holds weights of another network than model.backbone {name}")
    own, other = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(weights)
    if (own.mean, own.std, own.license) != (other.mean, other.std, other.license):
        raise UserError(
            f"model.pretrained {weights} has another normalization or license than model.backbone {name}; set "
            f"model.backbone to {weights} and model.pretrained to true"
        )


def _create(name: str, weights: str | None, options: dict) -> nn.Module:
    if weights and not timm.is_model_pretrained(weights):
        raise UserError(
            f"timm has no pretrained weights for {weights}; set model.pretrained to a local file or to false"
        )
    try:
        return timm.create_model(weights or name, pretrained=weights is not None, **options)
    except TypeError as error:
        if "drop_path_rate" in options:
            raise UserError(f"model.backbone {name} has no stochastic depth; set model.drop_path to 0") from None
        raise UserError(f"model.backbone {name} cannot be built ({_first_line(error)})") from None
    except Exception as error:  # timm, the hub's client and the network below them have no base class in common
        if weights is None:
            raise
        raise UserError(
            f"the pretrained weights {weights} could not be downloaded ({_first_line(error)}); "
            "set model.pretrained to the path of a local file, or to false"
        ) from error


def _start_at_one(body: nn.Module) -> None:
    """Set norms that timm starts at 0 to 1, as in the papers' code: where norms are frozen, a block would stay dead."""
    for module in body.modules():
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm)
        weight = module.weight if is_norm else None
        if weight is not None and not weight.is_meta and not weight.any():
            nn.init.ones_(weight)


def _dilated_strides(name: str, output_stride: int) -> tuple[int, ...]:
    with torch.device("meta"):
        try:
            body = timm.create_model(name, features_only=True, output_stride=output_stride)
        except (TypeError, AssertionError, NotImplementedError):
            raise UserError(
                f"model.backbone {name} cannot be dilated to model.output_stride {output_stride}; "
                "set model.output_stride to 32"
            ) from None
    return tuple(body.feature_info.reduction())


def _size_rule(name: str, is_plain: bool) -> tuple[dict[str, bool], int]:
    """Options and the smallest multiple with which images of other sizes than the native one pass.

    timm does not publish either, so both are tried on the meta device, with two sides that differ.
    """
    kind = {"num_classes": 0} if is_plain else {"features_only": True}
    for options in SIZE_OPTIONS:
        with torch.device("meta"):
            try:
                body = timm.create_model(name, **kind, **options).eval()
            except TypeError:
                continue
            for multiple in MULTIPLES:
                if _accepts(body, multiple, is_plain):
                    return options, multiple
    raise UserError(
        f"model.backbone {name} takes images of its native size alone, which no crop and evaluation here has; "
        "choose another one: python -m common.encoders"
    )


def _plain_shape(name: str, options: dict[str, bool], multiple: int) -> tuple[int, tuple[int]]:
    """Number of blocks, and channels of a tap after the final norm (SAM's neck has fewer than its blocks)."""
    with torch.device("meta"):
        body = timm.create_model(name, num_classes=0, **options).eval()
        image = torch.empty(1, 3, 4 * multiple, 4 * multiple)
        tap = body.forward_intermediates(image, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)[0]
    return len(body.blocks), (tap.shape[1],)


def _accepts(body: nn.Module, multiple: int, is_plain: bool) -> bool:
    least = -(-SMALLEST_TRIAL // multiple)
    height, width = ((least | 1) * multiple, ((least | 1) + 2) * multiple)
    image = torch.empty(2, 3, height, width, device="meta")
    try:
        body.forward_intermediates(image, indices=1, intermediates_only=True) if is_plain else body(image)
    except (RuntimeError, AssertionError, ValueError):
        return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
