"""The whole table of kill points: `make stress` prints it."""

import pytest

from tests.conftest import SCRIPTS
from tests.helpers.kill_runs import draw_points, kill_and_continue, run_whole

SEED = 20


@pytest.mark.parametrize("script", SCRIPTS)
def test_kill_points_of_one_process(script, tiny, tmp_path, capsys):
    whole = run_whole(script, tiny, tmp_path)
    for point in draw_points(whole, saving=10, writing=4, step=8, seed=SEED):
        outcome = kill_and_continue(script, tiny, whole, point, tmp_path)
        with capsys.disabled():
            print(f"{script:20} 1 process    {point.name:32} {outcome}", flush=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_kill_points_of_two_processes(script, tiny, tmp_path, capsys):
    whole = run_whole(script, tiny, tmp_path, processes=2)
    for number, point in enumerate(draw_points(whole, saving=3, writing=1, step=4, seed=SEED)):
        # Only the first process saves.
        victim = number % 2 if point.name.startswith("step") else 0
        outcome = kill_and_continue(script, tiny, whole, point, tmp_path, victim)
        with capsys.disabled():
            print(f"{script:20} 2, {victim} killed  {point.name:32} {outcome}", flush=True)
