"""Runs killed anywhere and continued: a share of the table that `make stress` draws in full, with every script."""

import os
import signal
import time
from pathlib import Path

import pytest

from common.evaluation import evaluate as evaluation
from tests.helpers.kill_runs import LENGTH, draw_points, kill_and_continue, run_whole
from tests.helpers.subprocess_runs import Child, start, start_two

SCRIPT = "supervised/train.py"
# A bank, and networks that restart from the best.
WITH_STATE = ("cac_cps/train.py", "memory_bank/train.py")


@pytest.mark.parametrize("script", WITH_STATE)
def test_killed_and_continued_ends_with_the_same_bits(script, tiny, tmp_path):
    whole = run_whole(script, tiny, tmp_path)
    for point in draw_points(whole, saving=1, writing=0, step=1, seed=1):
        kill_and_continue(script, tiny, whole, point, tmp_path)


@pytest.mark.parametrize("script", WITH_STATE[:1])
def test_a_process_that_dies_ends_the_other_and_both_continue(script, tiny, tmp_path):
    whole = run_whole(script, tiny, tmp_path, processes=2)
    (point,) = draw_points(whole, saving=0, writing=0, step=1, seed=1)
    kill_and_continue(script, tiny, whole, point, tmp_path, victim=1)


WAITING = "a slow evaluation has begun"


def slow_evaluation() -> None:
    """Let an evaluation take a minute: time to be impatient in."""

    def wait_a_minute(*_) -> None:
        print(WAITING, flush=True)
        time.sleep(60)

    evaluation.sum_logits = wait_a_minute


def test_a_second_interrupt_stops_at_once(tiny, tmp_path):
    child = start(SCRIPT, tiny(SCRIPT, *LENGTH), tmp_path / "log", slow_evaluation)
    wait_for(child.log, WAITING, child)
    os.kill(child.process.pid, signal.SIGINT)
    time.sleep(2.2)
    assert child.process.is_alive()  # it waits for the batch at hand
    asked = time.monotonic()
    os.kill(child.process.pid, signal.SIGINT)
    assert child.status() == 128 + signal.SIGINT
    assert time.monotonic() - asked < 5


def test_a_process_that_does_not_answer_ends_the_other(tiny, tmp_path):
    arguments = tiny(SCRIPT, *LENGTH, "--optim.batch_size", "4", "--run.timeout", "5")
    stuck, other = start_two(SCRIPT, arguments, tmp_path / "log", (slow_evaluation, None))
    try:
        wait_for(stuck.log, WAITING, stuck)
        assert other.status() == 1
        assert "another process of this run ended or does not answer" in other.log.read_text()
    finally:
        stuck.process.kill()


def wait_for(path: Path, text: str, child: Child) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and text in path.read_text()):
        assert child.process.is_alive() and time.monotonic() < deadline, child.log.read_text()
        time.sleep(0.01)
