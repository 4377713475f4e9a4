"""The Accelerator of a run or an evaluation, and each process's share of the batch."""

import argparse
import os
import re
import sys
from datetime import timedelta
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

from common.errors import UserError


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
        # The streams never end, so the end of a loader must not force a synchronization.
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


def parse_devices(text: str, count: int) -> list[int]:
    """The GPUs that `-d` names, ascending; none for `cpu`.

    Args:
        text: `cpu`, `*`, or numbers and ranges such as `0`, `0,1` or `0-3`.
        count: How many GPUs there are.

    Raises:
        UserError: a GPU that is not there, or anything else.
    """
    if text == "cpu":
        return []
    if not re.fullmatch(r"\*|\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise UserError(f"-d {text} is not understood; give cpu, 0, 0,1, 0-3 or *")
    if count == 0:
        raise UserError(f"-d {text}: there is no GPU here; use -d cpu")
    parts = [f"0-{count - 1}"] if text == "*" else text.split(",")
    spans = [range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1) for part in parts]
    if not all(span and span[-1] < count for span in spans):
        raise UserError(f"-d {text} names no device that is here; there are {count}, numbered from 0")
    return sorted(set().union(*spans))


def accelerator_on(devices: str | None, precision: str | None, argv: list[str]) -> Accelerator:
    """The Accelerator of the asked devices; several GPUs replace this process by `accelerate launch`.

    The run's precision is kept, so that scores are those seen in training; a CPU takes fp32 for fp16.
    """
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if devices is not None:
        gpus = parse_devices(devices, torch.cuda.device_count())
        if gpus and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("-d is for a plain start; this one was launched with its processes: leave -d away")
        if len(gpus) > 1:
            command = launch_command(gpus, argv)
            os.execv(command[0], command)
        if gpus:
            torch.cuda.set_device(gpus[0])
        on_cpu = not gpus
    mixed = "no" if precision in (None, "fp32") or (on_cpu and precision == "fp16") else precision
    # Processes that finish early wait for the slowest one, which may take longer than the 10 minutes of the default.
    timeout = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    return Accelerator(cpu=on_cpu, mixed_precision=mixed, kwargs_handlers=[timeout])


def launch_command(gpus: list[int], argv: list[str]) -> list[str]:
    """This very command, without `-d`, with a process on each of `gpus`."""
    devices = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    devices.add_argument("-d", "--devices")
    _, rest = devices.parse_known_args(argv)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # --gpu_ids replaces CUDA_VISIBLE_DEVICES: where that is set, our numbers count within it.
    ids = [visible.split(",")[gpu] if visible else str(gpu) for gpu in gpus]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    # Port 0 takes a free one: the default may belong to a training that still runs.
    launch += ["--num_processes", str(len(gpus)), "--gpu_ids", ",".join(ids), "--main_process_port", "0"]
    launch += ["--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no"]
    spec = sys.modules["__main__"].__spec__
    return launch + (["--module", spec.name] if spec else [sys.argv[0]]) + rest
