"""Export of a trained network with its pre- and post-processing to one file: for PyTorch (.pt2) or ONNX (.onnx)."""

import copy
import json
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.evaluation.inference import Protocol, predict
from common.evaluation.metainfo import MetaInfo

EXTRA_FILE = "metainfo.json"  # inside a .pt2 file; key of the metadata of an .onnx file
MIN_SIDE = 80  # of an image that the exported network takes, in pixels
TRACED_SIZE, CHECKED_SIZE = (2, 3, 99, 125), (1, 3, 120, 80)
# Between probabilities of the exported network, in single or half precision, and the trained one.
MAX_DIFFERENCE, MAX_HALF_DIFFERENCE = 1e-4, 2e-2
OPSET = 18  # of .onnx files
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_LIMIT = 2**31  # bytes of one .onnx file, by its format


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
        """Predict images uint8 [B,3,H,W], RGB, as probability float32 [B,C,H,W]."""
        return predict(self.network, image, image.shape[-2:], self.protocol)


class HalfNetwork(nn.Module):
    """A copy of a network in half precision, between normalization and up-sampling, which stay in single precision.

    Args:
        network: A network that `build_network` made; it is left as it was.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.align_corners = copy.deepcopy(network).half(), network.align_corners

    def forward(self, image: Tensor) -> Tensor:
        """[B,3,H,W], normalized -> logits float32 [B,C,h,w]."""
        return self.network(image.half()).float()


def export_network(network: nn.Module, metainfo: MetaInfo, path: Path, half: bool = False) -> None:
    """Write a network as a program for any batch and image size, with its metadata.

    Before it is written, the program is compared with the network on a random batch of another size than the traced
    one; an ONNX program is run by onnxruntime. Classes, colors and the description of the protocol are stored as
    `metainfo.json`: an extra file of .pt2, an entry in the metadata of .onnx.

    Args:
        network: On the CPU, in evaluation mode.
        metainfo: Metadata of the network; its protocol is the exported one.
        path: `*.pt2` for a `torch.export` program, `*.onnx` for ONNX with opset `OPSET`.
        half: Store and run the network in half precision (fp16).

    Raises:
        UserError: another suffix, a package that is missing, a protocol with a window or scales, a program that differs
            from the network, a file that cannot be written.
    """
    _check(network, metainfo.protocol, path, half)
    deployed = Deployed(HalfNetwork(network) if half else network, metainfo.protocol).eval()
    image = _random_image(CHECKED_SIZE)
    # Before tracing: tensors that the network caches must not come from the tracing.
    expected = Deployed(network, metainfo.protocol)(image)
    program = _traced(deployed)
    content = json.dumps(metainfo.to_dict() | {"protocol": metainfo.protocol.describe()})
    limit = MAX_HALF_DIFFERENCE if half else MAX_DIFFERENCE
    if path.suffix == ".onnx":
        data = _to_onnx(program, content)
        _check_difference(torch.from_numpy(_run_onnx(data, image)), expected, limit, "onnxruntime or PyTorch")
    else:
        with torch.no_grad():
            _check_difference(program.module()(image), expected, limit, "PyTorch")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".onnx":
            path.write_bytes(data)
        else:
            torch.export.save(program, path, extra_files={EXTRA_FILE: content})
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be written: {error}") from None


def _check(network: nn.Module, protocol: Protocol, path: Path, half: bool) -> None:
    """Refuse what cannot be exported. Raises UserError."""
    if path.suffix not in (".pt2", ".onnx"):
        raise UserError(f"--export {path}: the file must end in .pt2 (for PyTorch) or .onnx")
    if protocol.crop is not None:
        raise UserError("a sliding window is a loop around the network and cannot be exported: add --whole")
    if protocol.scales != (1.0,):
        raise UserError("the exported network works at one scale: leave --scales away")
    if path.suffix == ".pt2":
        return
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"--export {path} needs {', '.join(missing)}: pip install -e '.[onnx]'")
    size = sum(tensor.numel() for tensor in network.state_dict().values()) * (2 if half else 4)
    if size > 0.99 * ONNX_LIMIT:
        raise UserError(f"the network has {size / 2**30:.1f} GB, but an .onnx file at most 2: use --half, or .pt2")


@torch.no_grad()
def _traced(network: Deployed) -> torch.export.ExportedProgram:
    sides = {2 + index: torch.export.Dim(name, min=MIN_SIDE) for index, name in enumerate(("height", "width"))}
    # Conditions that tracing cannot prove for all sizes (e.g. logits smaller than the image) are checked at run time.
    return torch.export.export(
        network,
        (_random_image(TRACED_SIZE),),
        dynamic_shapes=({0: torch.export.Dim("batch"), **sides},),
        prefer_deferred_runtime_asserts_over_guards=True,
    )


def _to_onnx(program: torch.export.ExportedProgram, content: str) -> bytes:
    """Convert a traced network to the bytes of an .onnx file, with `content` as its metadata."""
    onnx = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["probability"],
        dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),  # names; the program has the sizes
        verbose=False,
    )
    onnx.model.metadata_props[EXTRA_FILE] = content
    return onnx.model_proto.SerializeToString()


def _run_onnx(data: bytes, image: Tensor):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; a warning per initializer would follow otherwise
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": image.numpy()})[0]


def _check_difference(found: Tensor, expected: Tensor, limit: float, cause: str) -> None:
    difference = (found - expected).abs().max().item()
    if not difference < limit:
        raise UserError(
            f"the exported network is not the trained one: probabilities differ by up to {difference:.2g}, more than "
            f"{limit:g}; nothing was written. Use another version of {cause}"
        )


def _random_image(size: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
