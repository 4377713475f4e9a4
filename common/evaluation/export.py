"""Export of a trained network with its pre- and post-processing to one file that needs only PyTorch."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.evaluation.inference import Protocol, predict
from common.evaluation.metainfo import MetaInfo

EXTRA_FILE = "metainfo.json"  # inside the exported file
MIN_SIDE = 80  # of an image that the exported network takes, in pixels
TRACED_SIZE, CHECKED_SIZE = (2, 3, 99, 125), (1, 3, 120, 80)
MAX_DIFFERENCE = 1e-4  # between probabilities of the exported and the trained network


class Deployed(nn.Module):
    """A network from decoded image to probability: normalization, forward, up-sampling, softmax.

    Args:
        network: A network that `build_network` made.
        protocol: Protocol without a window and with one scale; flip, padding and reduction are possible.
    """

    def __init__(self, network: nn.Module, protocol: Protocol) -> None:
        super().__init__()
        self.network, self.protocol = network, protocol

    def forward(self, image: Tensor) -> Tensor:
        """Predict images uint8 [B,3,H,W], RGB, as probability [B,C,H,W]."""
        return predict(self.network, image, image.shape[-2:], self.protocol)


def export_network(network: nn.Module, metainfo: MetaInfo, path: Path) -> None:
    """Write a network as a `torch.export` program for any batch and image size, with its metadata.

    Before it is written, the program is compared with the network on a random batch of another size than the traced
    one. Classes, colors and the description of the protocol go into the extra file `metainfo.json`.

    Args:
        network: On the CPU, in evaluation mode.
        metainfo: Metadata of the network; its protocol is the exported one.
        path: `*.pt2`.

    Raises:
        UserError: another suffix, a protocol with a window or scales, a program that differs from the network, a file
            that cannot be written.
    """
    if path.suffix != ".pt2":
        raise UserError(f"--export {path}: the file must end in .pt2")
    if metainfo.protocol.crop is not None:
        raise UserError("a sliding window is a loop around the network and cannot be exported: add --whole")
    if metainfo.protocol.scales != (1.0,):
        raise UserError("the exported network works at one scale: leave --scales away")
    program = _traced(Deployed(network, metainfo.protocol))
    content = metainfo.to_dict() | {"protocol": metainfo.protocol.describe()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.export.save(program, path, extra_files={EXTRA_FILE: json.dumps(content)})
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be written: {error}") from None


@torch.no_grad()
def _traced(network: Deployed) -> torch.export.ExportedProgram:
    """Trace the network and compare the program with it. Raises UserError where they differ."""
    sides = {2 + index: torch.export.Dim(name, min=MIN_SIDE) for index, name in enumerate("hw")}
    image = _random_image(CHECKED_SIZE)
    expected = network(image)  # before tracing: tensors that the network caches must not come from the tracing
    # Conditions that tracing cannot prove for all sizes (e.g. logits smaller than the image) are checked at run time.
    program = torch.export.export(
        network,
        (_random_image(TRACED_SIZE),),
        dynamic_shapes=({0: torch.export.Dim("batch"), **sides},),
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    difference = (program.module()(image) - expected).abs().max().item()
    if not difference < MAX_DIFFERENCE:
        raise UserError(
            f"the exported network is not the trained one: probabilities differ by up to {difference:.2g}, more than "
            f"{MAX_DIFFERENCE:g}; nothing was written. Use another PyTorch version"
        )
    return program


def _random_image(size: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
