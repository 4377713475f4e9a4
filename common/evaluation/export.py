"""A trained network, with what is done to an image before it and after it, as one file that needs no code of ours."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.evaluation.inference import Protocol, predict
from common.evaluation.metainfo import MetaInfo

SMALLEST = 80  # side of an image that the exported network takes
EXAMPLE, OTHER = (2, 3, 99, 125), (1, 3, 120, 80)


class Deployed(nn.Module):
    """From an image as it was decoded to probabilities: normalized, put through the network, enlarged, softmax.

    Args:
        network: One that `build_network` made.
        protocol: Whether to flip, to pad and to work at a fraction of the size; no window and no scales.
    """

    def __init__(self, network: nn.Module, protocol: Protocol) -> None:
        super().__init__()
        self.network, self.protocol = network, protocol

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [B,3,H,W], RGB -> probability [B,C,H,W]."""
        return predict(self.network, image, image.shape[-2:], self.protocol)


def export_network(network: nn.Module, metainfo: MetaInfo, path: Path) -> None:
    """Write `network` as a `torch.export` program for batches and images of any size, with its classes and protocol.

    Before it is written it is compared with the network on a random batch of another size than it was traced with.

    Args:
        network: On the CPU, in evaluation mode.
        metainfo: Protocol, classes and colors; the last two go into the file's `usage.json`.
        path: `*.pt2`.

    Raises:
        UserError: another ending, a protocol with a window or scales, a program that differs from the network, a file
            that cannot be written.
    """
    if path.suffix != ".pt2":
        raise UserError(f"--export {path}: the file must end in .pt2")
    if metainfo.protocol.crop is not None:
        raise UserError("a sliding window is a loop around the network and cannot be exported: add --whole")
    if metainfo.protocol.scales != (1.0,):
        raise UserError("the exported network works at one scale: leave --scales away")
    deployed = Deployed(network, metainfo.protocol)
    sizes = {0: torch.export.Dim("batch"), **{2 + i: torch.export.Dim(n, min=SMALLEST) for i, n in enumerate("hw")}}
    image = _random(OTHER)
    with torch.no_grad():
        want = deployed(image)  # first, since what it keeps for later must not come from the tracing
        # What tracing cannot prove of all sizes (that logits are smaller than the image, say) is asked when it is run.
        program = torch.export.export(
            deployed, (_random(EXAMPLE),), dynamic_shapes=(sizes,), prefer_deferred_runtime_asserts_over_guards=True
        )
        error = (program.module()(image) - want).abs().max().item()
    if not error < 1e-4:
        raise UserError(f"the exported network is not the trained one: probabilities differ by up to {error:.2g}")
    colors = metainfo.palette[: len(metainfo.classes)].tolist()
    told = {"classes": metainfo.classes, "colors": colors, "protocol": metainfo.protocol.describe()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.export.save(program, path, extra_files={"usage.json": json.dumps(told)})
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be written: {error}") from None


def _random(size: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
