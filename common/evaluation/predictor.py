"""A trained network as a Python function from pictures to labels."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from common.config import load_config
from common.config.sections import BaseConfig
from common.errors import UserError
from common.evaluation.batches import same_size_batches
from common.evaluation.inference import Protocol, predict
from common.evaluation.metainfo import MetaInfo, default_metainfo, read_metainfo
from common.evaluation.selection import CheckpointRef, find_checkpoints
from common.models import build_network
from common.models.weights import load_state, read_state

Picture = Image.Image | np.ndarray
Prediction = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class TrainedNetwork:
    """One checkpoint of a run, loaded on the CPU.

    Attributes:
        run: Run folder.
        config: The shared sections of the run's config.
        file: Weight file.
        network: In evaluation mode.
        metainfo: Class names, palette and protocol.
        is_evaluated: False where the run has no metadata yet; `metainfo` is then the default.
    """

    run: Path
    config: BaseConfig
    file: Path
    network: nn.Module
    metainfo: MetaInfo
    is_evaluated: bool


class Predictor:
    """Predict labels of pictures with a trained network; `load_predictor` makes one.

    Args:
        trained: The network; it is moved to the device.
        device: Device to predict on.
        protocol: Window, scales and flip; None for the protocol that the run was evaluated with.

    Attributes:
        classes: Names, by class id.
        palette: uint8 [256,3], RGB colors by class id.
        protocol: Protocol in use.
        device: Device in use.
    """

    def __init__(self, trained: TrainedNetwork, device: torch.device, protocol: Protocol | None = None) -> None:
        self._network, self._precision = trained.network.to(device), trained.config.run.precision
        self.device, self.protocol = device, protocol or trained.metainfo.protocol
        self.classes, self.palette = trained.metainfo.classes, trained.metainfo.palette

    def __call__(self, images: Picture | Sequence[Picture]) -> Prediction | list[Prediction]:
        """Predict one picture, or a list of pictures of any sizes; those of one size are predicted together.

        Args:
            images: PIL image of any 8-bit mode, or array uint8 [H,W,3] (RGB) or [H,W] (gray); or a list of these.

        Returns:
            label uint8 [H,W] (class ids) and confidence float32 [H,W] (largest probability); a list of such pairs in
            the order of a list.

        Raises:
            UserError: a picture of another kind.
        """
        if isinstance(images, Image.Image | np.ndarray):
            return self([images])[0]
        pixels = [_pixels(image, index) for index, image in enumerate(images)]
        sizes = ((index, (array.shape[1], array.shape[0])) for index, array in enumerate(pixels))
        results: dict[int, Prediction] = {}
        for batch in same_size_batches(sizes):
            stack = torch.stack([torch.from_numpy(pixels[index]).permute(2, 0, 1) for index in batch])
            confidence, label = self.probabilities(stack).max(1)
            results |= zip(batch, zip(label.byte().cpu().numpy(), confidence.cpu().numpy()))
        return [results[index] for index in range(len(pixels))]

    def probabilities(self, images: Tensor) -> Tensor:
        """Predict a batch of images uint8 [B,3,H,W], RGB, as probability float32 [B,C,H,W] on the device."""
        with _autocast(self.device, self._precision):
            return predict(self._network, images.to(self.device), tuple(images.shape[-2:]), self.protocol)


def load_predictor(
    run: str | Path,
    which: str | None = None,
    device: str | torch.device | None = None,
    protocol: Protocol | None = None,
) -> Predictor:
    """Load a trained network as a function: `label, confidence = load_predictor("runs/prcl/demo")(image)`.

    Args:
        run: Run folder, or a checkpoint in one.
        which: With a run folder the checkpoint: `best`, `last` or a number; by default best, else last.
        device: `cpu`, `cuda`, `cuda:1`, ...; by default a GPU if there is one.
        protocol: Window, scales and flip; by default those that the run was evaluated with.

    Raises:
        UserError: no such run, checkpoint or device.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device} does not exist: there are {torch.cuda.device_count()} GPUs")
    return Predictor(load_trained(Path(run), which), device, protocol)


def load_trained(given: Path, which: str | None) -> TrainedNetwork:
    """Load the checkpoint that `select_checkpoint` resolves. Raises UserError where it cannot be read."""
    run, checkpoint = select_checkpoint(given, which)
    config = load_config(BaseConfig, run / "config.json")
    metainfo = read_metainfo(run, config.model.num_classes)
    network = build_network(replace(config.model, pretrained=False)).eval()
    load_state(network, read_state(checkpoint.file), str(checkpoint.file), f"the network of {run / 'config.json'}")
    known = metainfo or default_metainfo(config.model.num_classes)
    return TrainedNetwork(run, config, checkpoint.file, network, known, metainfo is not None)


def select_checkpoint(given: Path, which: str | None) -> tuple[Path, CheckpointRef]:
    """Resolve the run folder and the one checkpoint selected on the command line.

    Args:
        given: A run folder, a checkpoint in it, or its weight file.
        which: With a run folder the checkpoint, as `-e` of eval.py; None for the best, else the last.

    Raises:
        UserError: no run folder, no such checkpoint, or several.
    """
    if not given.exists():
        raise UserError(f"{given} does not exist; give a run folder or a checkpoint in one")
    run = next((path for path in (given, *given.absolute().parents) if (path / "config.json").is_file()), None)
    if run is None:
        raise UserError(f"{given} is not a run folder and is not inside one: there is no config.json")
    if run != given and which is not None:
        raise UserError(f"-e {which} needs a run folder, but {given} is already a checkpoint: leave -e away")
    by_epoch = load_config(BaseConfig, run / "config.json").run.epochs is not None
    checkpoints, _ = find_checkpoints(run, which if run == given else str(given), by_epoch)
    if len(checkpoints) > 1:
        raise UserError(f"-e {which} selects {len(checkpoints)} checkpoints; give one")
    return run, checkpoints[0]


def _pixels(image: Picture, index: int) -> np.ndarray:
    """Pixels of a picture as uint8 [H,W,3]. Raises UserError for another kind."""
    if isinstance(image, Image.Image) and not image.mode.startswith(("I", "F")):
        return np.array(image.convert("RGB"))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and min(image.shape, default=0) > 0:
        if image.ndim == 2:
            return np.repeat(image[..., None], 3, axis=2)
        if image.ndim == 3 and image.shape[2] == 3:
            return np.array(image)  # a copy: torch takes no read-only arrays
    if isinstance(image, np.ndarray):
        found = f"an array {image.dtype} {list(image.shape)}"
    else:
        found = f"a picture of mode {image.mode}" if isinstance(image, Image.Image) else type(image).__name__
    raise UserError(f"image {index} is {found}; give 8-bit PIL images, or arrays uint8 [H,W,3] (RGB) or [H,W] (gray)")


def _autocast(device: torch.device, precision: str | None) -> AbstractContextManager:
    """Context of the run's precision, so that predictions equal those of its evaluation; a CPU uses fp32 for fp16."""
    if precision in (None, "fp32") or (device.type == "cpu" and precision == "fp16"):
        return nullcontext()
    return torch.autocast(device.type, {"fp16": torch.float16, "bf16": torch.bfloat16}[precision])
