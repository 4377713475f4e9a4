"""Create the Accelerator of a run or an evaluation, and divide batches and share batch norm over its processes."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from datetime import timedelta
from importlib.util import find_spec
from shutil import which
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import nn

from common.errors import UserError
from common.models.segmenter import Segmenter


def make_accelerator(config: Any) -> Accelerator:
    """Create the Accelerator for a config's `run` and `optim` sections, on the available devices.

    Raises:
        UserError: fp16 without a GPU, a tracker that is not installed, `run.compile` without a compiler.
    """
    on_cpu = config.run.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    precision = {"fp32": "no", None: None}.get(config.run.precision, config.run.precision)
    if on_cpu and (precision or os.environ.get("ACCELERATE_MIXED_PRECISION")) == "fp16":
        raise UserError("run.precision fp16 needs a GPU; use fp32 or bf16 on the CPU")
    if config.run.compile:
        check_compiler()
    for tracker in config.run.trackers:
        if find_spec(tracker) is None:
            raise UserError(f"run.trackers names {tracker}, which is not installed: pip install {tracker}")
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by CUDA's matrix products
        torch.use_deterministic_algorithms(True)
    if on_cpu:
        # Launchers set OMP_NUM_THREADS to 1, which would leave all cores but one idle.
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(config.run.threads or max(1, (os.cpu_count() or 1) // local))
    return Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,
        log_with=config.run.trackers or None,
        project_dir=config.run.dir,
        # The streams never end, so the end of a loader must not force a synchronization.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.optim.accumulation, sync_with_dataloader=False
        ),
        # The other processes wait while one writes a checkpoint or evaluates a larger share of the images.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.run.timeout))],
    )


def check_compiler() -> None:
    """Make sure that `torch.compile` has a compiler.

    Raises:
        UserError: there is neither a GPU nor a C++ compiler.
    """
    compilers = (os.environ.get("CXX"), "g++", "clang++")
    if not torch.cuda.is_available() and not any(name and which(name) for name in compilers):
        raise UserError("torch.compile needs a C++ compiler: install g++, or set run.compile to false")


def share_batch(total: int, setting: str, accelerator: Accelerator, accumulation: int, needs_two: bool = True) -> int:
    """Divide the images of an optimizer step: images per process and backward pass.

    Args:
        total: Images per optimizer step.
        setting: The config key that sets `total`, for the messages.
        accelerator: Gives the number of processes.
        accumulation: Backward passes per optimizer step.
        needs_two: The batch norm of the network fails on a single image (DeepLabV3+ pools an image to one pixel),
            unless it covers several processes.

    Raises:
        UserError: the batch cannot be divided evenly, or leaves a single image where two are needed.
    """
    processes = accelerator.num_processes
    share, rest = divmod(total, processes * accumulation)
    if rest:
        raise UserError(
            f"{setting} {total} cannot be divided over {processes} processes x {accumulation} accumulation passes; "
            f"change {setting}, optim.accumulation or the number of processes"
        )
    if share == 1 and needs_two and not has_sync_batch_norm(accelerator):
        raise UserError(
            f"{setting} {total} leaves one image per process and pass, too few for batch norm: raise {setting}, "
            "or lower optim.accumulation or the number of processes"
        )
    return share


def has_sync_batch_norm(accelerator: Accelerator) -> bool:
    """True if batch norm covers all processes, as SyncBatchNorm, which exists on GPUs only."""
    return accelerator.num_processes > 1 and accelerator.device.type == "cuda"


def prepare_layout(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Convert to SyncBatchNorm where it exists, and to channels-last memory, the fastest layout for convolutions."""
    if has_sync_batch_norm(accelerator):
        network = timm.layers.convert_sync_batchnorm(network)
    for module in network.modules():
        if isinstance(module, Segmenter):
            module.hold_statistics()
    return network.to(memory_format=torch.channels_last)


def average_buffers(networks: Sequence[nn.Module], accelerator: Accelerator) -> None:
    """Average the floating-point buffers of networks over processes, in place and in one collective."""
    buffers = [buffer for network in networks for buffer in network.buffers() if buffer.is_floating_point()]
    flat = accelerator.reduce(torch.cat([buffer.flatten() for buffer in buffers]), "mean")
    for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers])):
        buffer.copy_(mean.view_as(buffer))


def next_process_tensors(tensors: Sequence[torch.Tensor], accelerator: Accelerator) -> tuple[torch.Tensor, ...]:
    """Exchange tensors: return those of the next process (the first process follows the last)."""
    if accelerator.num_processes == 1:
        return tuple(tensors)
    following = (accelerator.process_index + 1) % accelerator.num_processes
    return tuple(accelerator.gather(tensor.unsqueeze(0))[following] for tensor in tensors)


def parse_devices(text: str, count: int) -> list[int]:
    """Parse the value of `-d`: GPU numbers in ascending order, none for `cpu`.

    Args:
        text: `cpu`, `*`, or numbers and ranges such as `0`, `0,1` or `0-3`.
        count: Number of available GPUs.

    Raises:
        UserError: a GPU that does not exist, or a text of another form.
    """
    if text == "cpu":
        return []
    if not re.fullmatch(r"\*|\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise UserError(f"-d {text} is not understood; use cpu, 0, 0,1, 0-3 or *")
    if count == 0:
        raise UserError(f"-d {text}: there is no GPU here; use -d cpu")
    parts = [f"0-{count - 1}"] if text == "*" else text.split(",")
    spans = [range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1) for part in parts]
    if not all(span and span[-1] < count for span in spans):
        raise UserError(f"-d {text} names a GPU that does not exist; there are {count}, numbered from 0")
    return sorted(set().union(*spans))


def accelerator_on(devices: str | None, precision: str | None, argv: list[str]) -> Accelerator:
    """Create the Accelerator for evaluation; several GPUs replace this process by `accelerate launch`.

    Args:
        devices: Value of `-d`; None for what the launcher or Accelerate chose.
        precision: Precision of the run, kept so that scores equal those seen in training; a CPU uses fp32 for fp16.
        argv: Arguments of this command, for the launch.

    Raises:
        UserError: a GPU that does not exist, or `-d` together with a launcher.
    """
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if devices is not None:
        gpus = parse_devices(devices, torch.cuda.device_count())
        if gpus and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("-d does not go with a launcher, which has already started the processes: leave -d out")
        if len(gpus) > 1:
            command = launch_command(gpus, argv)
            os.execv(command[0], command)
        if gpus:
            torch.cuda.set_device(gpus[0])
        on_cpu = not gpus
    mixed = "no" if precision in (None, "fp32") or (on_cpu and precision == "fp16") else precision
    # Processes that finish early wait for the slowest one, which may take longer than the default of 10 minutes.
    timeout = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    return Accelerator(cpu=on_cpu, mixed_precision=mixed, kwargs_handlers=[timeout])


def launch_command(gpus: list[int], argv: list[str]) -> list[str]:
    """Build the command that runs this one again, without `-d`, with one process on each of `gpus`."""
    devices = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    devices.add_argument("-d", "--devices")
    _, rest = devices.parse_known_args(argv)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # --gpu_ids replaces CUDA_VISIBLE_DEVICES: where that is set, `gpus` index into it.
    ids = [visible.split(",")[gpu] if visible else str(gpu) for gpu in gpus]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    # Port 0 picks a free port: the default may be in use by a training run.
    launch += ["--num_processes", str(len(gpus)), "--gpu_ids", ",".join(ids), "--main_process_port", "0"]
    launch += ["--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no"]
    spec = sys.modules["__main__"].__spec__
    return launch + (["--module", spec.name] if spec else [sys.argv[0]]) + rest
