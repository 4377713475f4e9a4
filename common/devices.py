"""The Accelerator of a run, and each process's share of the batch."""

import os
from datetime import timedelta
from importlib.util import find_spec
from shutil import which
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

from common.errors import UserError


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy that does not wait for the device, which only page-locked memory allows."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def make_accelerator(config: Any) -> Accelerator:
    """The Accelerator for a config's `run` and `optim` sections, on the devices there are.

    Raises:
        UserError: fp16 without a GPU, a tracker that is not installed, `run.compile` without a compiler.
    """
    on_cpu = config.run.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    asked = {"fp32": "no", None: None}.get(config.run.precision, config.run.precision)
    if on_cpu and (asked or os.environ.get("ACCELERATE_MIXED_PRECISION")) == "fp16":
        raise UserError("run.precision fp16 needs a GPU; use fp32 or bf16 on the CPU")
    if config.run.compile:
        check_compiler()
    for tracker in config.run.trackers:
        if find_spec(tracker) is None:
            raise UserError(f"run.trackers names {tracker}, which is not installed: pip install {tracker}")
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by CUDA's matrix products
        torch.use_deterministic_algorithms(True)
    if on_cpu:
        # Launchers set OMP_NUM_THREADS to 1, which would leave all cores but one idle.
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(config.run.threads or max(1, (os.cpu_count() or 1) // local))
    return Accelerator(
        cpu=on_cpu,
        mixed_precision=asked,
        log_with=config.run.trackers or None,
        project_dir=config.run.dir,
        # The streams never end, so the end of a loader must not force a synchronisation.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.optim.accumulation, sync_with_dataloader=False
        ),
        # The other processes wait while one writes a checkpoint or has the larger share of an evaluation.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.run.timeout))],
    )


def check_compiler() -> None:
    """Raises UserError where there is nothing for `torch.compile` to compile with."""
    compilers = (os.environ.get("CXX"), "g++", "clang++")
    if not torch.cuda.is_available() and not any(name and which(name) for name in compilers):
        raise UserError("torch.compile needs a C++ compiler: install g++, or do without (run.compile false)")


def share_batch(batch_size: int, processes: int, accumulation: int, shared_batch_norm: bool) -> int:
    """Images of one process in one backward pass.

    Raises:
        UserError: the batch cannot be divided evenly, or to single images without a batch norm over processes.
    """
    share, rest = divmod(batch_size, processes * accumulation)
    if rest:
        raise UserError(
            f"optim.batch_size {batch_size} cannot be divided over {processes} processes x {accumulation} "
            "accumulation passes; change optim.batch_size, optim.accumulation or the number of processes"
        )
    if share == 1 and not shared_batch_norm:
        raise UserError(
            "one image a process and pass is too few for batch norm: raise optim.batch_size, "
            "or lower optim.accumulation or the number of processes"
        )
    return share
