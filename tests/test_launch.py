"""Launching over machines: two launchers on one machine, and SLURM's script with stand-ins for its commands."""

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPT = "supervised/train.py"
# The narrow backbone is only in processes of these tests.
OWN_PROCESS = ["--model.backbone", "resnet18"]
# Starts the tasks of a job here; the first time it asks them to stop once the log has a step, as a pre-emption does.
SRUN = """
import os, signal, subprocess, sys, time
from pathlib import Path
run, command = Path(os.environ["RUN"]), sys.argv[2:]
tasks = [
    subprocess.Popen(command, env=os.environ | {"SLURM_PROCID": str(i), "SLURM_LOCALID": "0"}) for i in range(2)
]
if not (run / "checkpoints").exists():
    while '"loss"' not in ((run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""):
        assert all(task.poll() is None for task in tasks)
        time.sleep(0.02)
    for task in tasks:
        task.send_signal(signal.SIGTERM)
sys.exit(max(task.wait() for task in tasks))
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def launchers(kind: str, port: int) -> list[list[str]]:
    """The commands of docs/launch.md for two machines of one process each."""
    python = [sys.executable, "-m"]
    if kind == "torchrun":
        start = [*python, "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        address = ["--master_addr", "localhost", "--master_port", str(port)]
        return [[*start, "--node_rank", str(rank), *address] for rank in (0, 1)]
    # On machines with GPUs --multi_gpu follows from their number.
    start = [*python, "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2", "--num_processes", "2"]
    address = ["--main_process_ip", "localhost", "--main_process_port", str(port)]
    return [[*start, "--machine_rank", str(rank), *address] for rank in (0, 1)]


@pytest.mark.parametrize("kind", ["accelerate", "torchrun"])
def test_two_launchers_are_one_run(kind, tiny, tmp_path, request):
    if kind == "torchrun" and not request.config.getoption("--every-script"):
        pytest.skip("eight seconds more: a test of `make stress`")
    arguments = tiny(SCRIPT, *OWN_PROCESS, "--run.steps", "2", "--optim.batch_size", "4", "--run.device", "cpu")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    commands = [[*start, SCRIPT, *arguments] for start in launchers(kind, free_port())]
    logs = [tmp_path / f"{rank}.log" for rank in (0, 1)]
    machines = []
    for command, log in zip(commands, logs):
        with log.open("w") as file:
            machines.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file))
    assert [machine.wait(300) for machine in machines] == [0, 0], "\n".join(log.read_text() for log in logs)
    assert json.loads((tmp_path / "run" / "checkpoints" / "last" / "meta.json").read_text())["step"] == 2
    assert "best mIoU" in logs[0].read_text() and "best mIoU" not in logs[1].read_text()


def stand_in(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_slurm_job_is_queued_again_and_goes_on(tiny, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    stand_in(tools / "srun", f"#!{sys.executable}\n{SRUN}")
    stand_in(tools / "scontrol", '#!/bin/bash\n[ "$1" = show ] && echo localhost || echo "$@" >> "$QUEUED"\n')
    run, queued = tmp_path / "run", tmp_path / "queued"
    slurm = {"SLURM_JOB_ID": str(free_port() - 20000), "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NTASKS": "2"}
    slurm |= {"SLURM_NTASKS_PER_NODE": "1", "RUN": str(run), "QUEUED": str(queued), "OMP_NUM_THREADS": "1"}
    environment = (
        os.environ
        | slurm
        | {"PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    )
    job = ["bash", "docs/slurm.sh", SCRIPT, *tiny(SCRIPT, *OWN_PROCESS, "--run.steps", "12", "--optim.batch_size", "4")]
    job += ["--run.device", "cpu", "--run.eval_every", "12", "--run.save_every", "12"]
    first = subprocess.run(job, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert first.returncode == 143, first.stdout + first.stderr
    assert queued.read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    again = subprocess.run(job, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "continuing" in again.stdout and len(queued.read_text().splitlines()) == 1
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, 13))
