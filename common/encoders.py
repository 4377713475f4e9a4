"""List timm networks that serve as encoders: taps, heads that fit, parameters, license.

    python -m common.encoders                     # a selection
    python -m common.encoders 'vit_*_dinov2*'     # every name that matches

Each name is a value of `model.backbone`. Strides are input pixels per feature; a plain ViT has one in all blocks.
"""

import argparse
import fnmatch
from collections.abc import Iterable

import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from common.errors import UserError, report_errors
from common.models.encoders import EncoderInfo, describe_encoder

SELECTION = [
    "resnet18",
    "resnet50",
    "resnet101",
    "tf_efficientnet_lite0",
    "efficientnet_b0",
    "mobilenetv3_large_100",
    "regnety_016",
    "convnext_atto",
    "convnext_tiny",
    "swin_tiny_patch4_window7_224",
    "pvt_v2_b2",
    "hrnet_w18",
    "vit_small_patch14_dinov2",
    "vit_base_patch14_dinov2",
    "vit_large_patch14_dinov2",
    "vit_giant_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_dinov3",
    "convnext_tiny.dinov3_lvd1689m",
    "deit3_small_patch16_224",
    "vit_base_patch16_clip_224",
    "samvit_base_patch16",
]


def matching(pattern: str | None) -> list[str]:
    """Names of timm that match a shell pattern; the selection for None.

    Raises:
        UserError: none matches.
    """
    if pattern is None:
        return SELECTION
    names = fnmatch.filter(timm.list_models(), pattern)
    if not names:
        raise UserError(f"no timm network matches {pattern!r}; patterns are those of a shell, e.g. 'convnext*'")
    return names


def row(name: str) -> tuple[str, ...]:
    """One line of the table; for networks that do not serve, the reason."""
    try:
        info = describe_encoder(name)
    except UserError as error:
        return name, "-", "-", "-", "-", str(error).removeprefix(f"model.backbone {name} ")
    millions = _parameters(name) / 1e6
    return (
        name,
        _taps(info),
        " ".join(info.heads) or "none",
        f"{millions:.1f} M, {4 * millions:.0f} MB",
        str(info.multiple),
        info.license,
    )


@report_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", help="shell pattern of timm names, e.g. 'vit_*_dinov2'")
    show(matching(parser.parse_args(argv).pattern))


def show(names: Iterable[str]) -> None:
    """Print the table."""
    console = Console()
    table = Table("model.backbone", "stride: channels", "model.head", "parameters, weights", "side multiple", "license")
    for name in track(list(names), description="reading", console=console, transient=True):
        table.add_row(*row(name))
    console.print(table)


def _taps(info: EncoderInfo) -> str:
    taps = " ".join(f"{stride}: {channels}" for stride, channels in zip(info.strides, info.channels))
    return f"{taps} in {info.depth} blocks" if info.is_plain else taps


def _parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name, num_classes=0).parameters())


if __name__ == "__main__":
    main()
