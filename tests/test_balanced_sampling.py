"""Class-balanced sampling: every class equally often, by step alone, for any number of processes."""

import shutil
from collections import Counter

import numpy as np
import pytest
from accelerate.state import AcceleratorState

from common.loaders import StepSampler
from tests.helpers.commands import train
from tests.helpers.kill_runs import assert_same_run

# Class 0 is in all ten images, class 1 in two, class 2 in one.
POOLS = [np.arange(10), np.array([3, 4]), np.array([7])]
SCRIPT = "supervised/train.py"


def drawn(batch: int, processes: int = 1, rank: int = 0, first: int = 0, passes: int = 1, pools=POOLS) -> list:
    batches = iter(StepSampler(10, batch, processes, rank, first, 5, "labeled", pools))
    return [next(batches) for _ in range(passes)]


def test_every_class_is_drawn_equally_often():
    (batch,) = drawn(6000)
    counts = Counter(index for index, _ in batch)
    # A third of the draws each, of which images of the first class share theirs.
    wanted = dict.fromkeys(range(10), 200) | {3: 1200, 4: 1200, 7: 2200}
    for index, count in wanted.items():
        assert counts[index] == pytest.approx(count, abs=5 * count**0.5)


def test_the_draws_depend_on_the_step_alone():
    whole = drawn(4, passes=5)
    assert drawn(4, first=3, passes=2) == whole[3:]
    parts = [drawn(2, 2, rank, passes=5) for rank in (0, 1)]
    assert [one + two for one, two in zip(*parts)] == whole


def test_a_balanced_run_resumes_to_the_same_bits(tiny, tmp_path):
    arguments, run = tiny(SCRIPT, "--data.class_balanced", "true", "--run.save_every", "3"), tmp_path / "run"
    train(SCRIPT, arguments)
    shutil.copytree(run, tmp_path / "whole", symlinks=True)
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    for link in ("last", "best"):
        (run / "checkpoints" / link).unlink()
    AcceleratorState._reset_state(reset_partial_state=True)
    train(SCRIPT, arguments)
    assert_same_run(run, tmp_path / "whole")
