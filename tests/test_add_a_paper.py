"""The commands of docs/add_a_paper.md make a paper that trains and is evaluated."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from common.datasets.shapes import make_shapes
from tests.conftest import ROOT
from tests.helpers.commands import SMALL_MODEL

SMALL = ["--data.crop_size", "[32,32]", "--data.workers", "0", "--optim.batch_size", "2", "--run.steps", "2"]
SMALL += ["--run.eval_every", "2", "--run.save_every", "2", "--run.threads", "1", "--method.conf_thresh", "0"]


def shell(command: str, folder: Path) -> str:
    """Output of a command that ends well, run in `folder`, whose packages are those that Python finds."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_commands_of_the_page_make_a_paper(tmp_path):
    for name in ("common", "unimatch"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").symlink_to(ROOT / "tests")  # the narrow backbone of small runs
    make_shapes(tmp_path / "data" / "shapes", "voc", train=24, val=2, size=(48, 64))
    (block,) = re.findall(r"^```\n(.*?)^```", (ROOT / "docs" / "add_a_paper.md").read_text(), re.MULTILINE | re.DOTALL)
    *making, train, evaluate = block.splitlines()
    for command in making:
        shell(command, tmp_path)

    # What a paper changes: here, its loss.
    losses = tmp_path / "toy" / "losses.py"
    released, own = "return (supervised + strong) / 2", "return supervised + 100 * strong"
    assert released in losses.read_text()
    losses.write_text(losses.read_text().replace(released, own))
    assert "unimatch." not in (tmp_path / "toy" / "train.py").read_text()
    shutil.rmtree(tmp_path / "unimatch")  # papers never import each other

    def python(command: str, *more: str) -> str:
        script, *arguments = command.split()[1:]
        code = f"import runpy, sys, tests.helpers.narrow; sys.argv[0] = {script!r}; "
        code += f"runpy.run_path({script!r}, run_name='__main__')"
        return shell(shlex.join([sys.executable, "-c", code, *arguments, *more]), tmp_path)

    python(train, *SMALL, *SMALL_MODEL)
    run = tmp_path / "runs" / "toy" / "demo"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = next(line for line in lines if "loss_strong" in line)
    assert abs(losses["loss"] - losses["loss_supervised"] - 100 * losses["loss_strong"]) < 1e-2
    assert "mIoU" in python(evaluate, "-d", "cpu")
