"""Whole runs of every paper's train.py on small built-in data: what they leave behind, continue and refuse."""

import contextlib
import functools
import io
import json
import math
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from tests.conftest import SCRIPTS
from tests.helpers.commands import refused, train
from tests.helpers.kill_runs import assert_same_run, everything, metrics, same
from tests.helpers.subprocess_runs import start

# A stopped run leaves a checkpoint more: after the next ones it is gone.
KEEP = ["--run.keep", "1"]
every_script = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture(scope="module")
def finished(small_run, tmp_path_factory):
    """Run folder and output of a script after six steps: `finished("prcl/train.py")`. One run serves several tests."""

    @functools.cache
    def run(script: str) -> tuple[Path, str]:
        folder, output = tmp_path_factory.mktemp("finished") / "run", io.StringIO()
        with contextlib.redirect_stdout(output):
            train(script, small_run(script, folder, *KEEP))
        AcceleratorState._reset_state(reset_partial_state=True)
        return folder, output.getvalue()

    return run


@every_script
def test_a_run_leaves_what_is_documented(script, finished):
    run, output = finished(script)
    assert json.loads((run / "config.json").read_text())["run"]["steps"] == 6
    lines = metrics(run)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "valid/miou" in line] == [3, 6]
    assert os.readlink(run / "checkpoints" / "last") == "step_00000006"
    assert (run / "checkpoints" / "best" / "model.safetensors").exists()
    assert (run / "pictures" / "step_00000006.png").exists()
    assert (run / "eval").is_dir()
    assert "mIoU" in output


@every_script
def test_bf16_trains_every_term_of_the_loss(script, tiny, tmp_path):
    train(script, tiny(script, "--run.precision", "bf16", "--run.eval_every", "6", "--run.save_every", "6"))
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert len(lines) == 6
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_only_the_newest_checkpoints_and_the_best_are_kept_and_snapshots_stay(some_script, tiny, tmp_path):
    train(some_script, tiny(some_script, "--run.keep", "1", "--run.snapshot_every", "1", "--run.eval_every", "6"))
    checkpoints = tmp_path / "run" / "checkpoints"
    folders = sorted(path.name for path in checkpoints.glob("step_*"))
    assert folders == [f"step_0000000{step}" for step in range(1, 7)]
    resumable = [path.parent.name for path in checkpoints.glob("step_*/state.pt")]
    assert resumable == ["step_00000006"]


def test_the_same_command_on_a_finished_run_changes_nothing(some_script, finished, tiny, tmp_path):
    shutil.copytree(finished(some_script)[0], tmp_path / "run", symlinks=True)
    before = metrics(tmp_path / "run"), everything(tmp_path / "run")
    train(some_script, tiny(some_script, *KEEP))
    after = metrics(tmp_path / "run"), everything(tmp_path / "run")
    assert before[0] == after[0]
    assert same(before[1], after[1])


@pytest.mark.parametrize(("script", "workers"), [*((script, 0) for script in SCRIPTS), ("supervised/train.py", 1)])
def test_a_run_stopped_by_a_signal_continues_to_the_same_bits(script, workers, finished, tiny, tmp_path):
    child = start(script, tiny(script, *KEEP, "--data.workers", str(workers)), tmp_path / "log", os.setsid)
    wait_for(tmp_path / "run" / "metrics.jsonl", '"step": 2')
    os.killpg(child.process.pid, signal.SIGTERM)  # as a terminal or a cluster does: the loader's workers get it too
    status, output = child.status(), child.log.read_text()
    assert status == 128 + signal.SIGTERM, output
    assert "stopped after step" in output
    assert "Traceback" not in output
    assert 2 <= metrics(tmp_path / "run")[-1]["step"] < 6
    train(script, tiny(script, *KEEP))
    assert_same_run(tmp_path / "run", finished(script)[0])


def wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline, f"{path} never held {text}"
        time.sleep(0.01)


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(tiny, tmp_path, capsys):
    train("supervised/train.py", tiny("supervised/train.py"))
    expected = everything(tmp_path / "run"), metrics(tmp_path / "run")
    with open(tmp_path / "run" / "checkpoints" / "step_00000006" / "model.safetensors", "r+b") as file:
        file.truncate(100)
    train("supervised/train.py", tiny("supervised/train.py"))
    assert "is damaged" in capsys.readouterr().out
    assert same(expected[0], everything(tmp_path / "run"))
    assert metrics(tmp_path / "run") == expected[1]


def limit_file_size() -> None:
    """What a full disk looks like: files of more than 100 kB cannot be written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def test_a_full_disk_costs_checkpoints_but_does_not_stop_the_run(tiny, tmp_path):
    child = start("supervised/train.py", tiny("supervised/train.py"), tmp_path / "log", limit_file_size)
    status, output = child.status(), child.log.read_text()
    assert status == 2, output
    assert "warning: no checkpoint of step 2" in output
    assert "error: no checkpoint of the last step, 6, could be written" in output
    assert "Traceback" not in output
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert metrics(tmp_path / "run")[-1]["step"] == 6
    train("supervised/train.py", tiny("supervised/train.py"))
    assert (tmp_path / "run" / "checkpoints" / "best").exists()


@pytest.mark.parametrize("script", ["css/train.py", "prcl/train.py"])
def test_labels_of_unlabeled_images_need_not_exist(script, shapes_root, tiny, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(shapes_root, root)
    # The split is made on first use, so the labels go after a first run.
    arguments = tiny(script, "--data.root", str(root), "--data.split", str(root / "splits" / "6" / "0"))
    train(script, [*arguments, "--run.dir", str(tmp_path / "first")])
    for name in (root / "splits" / "6" / "0" / "unlabeled_filename.txt").read_text().split():
        (root / "SegmentationClassAug" / f"{name}.png").unlink()
    train(script, arguments)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "first")


def test_tensorboard_gets_the_log(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    train("supervised/train.py", tiny("supervised/train.py", "--run.trackers", '["tensorboard"]'))
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_a_loss_that_is_not_finite_ends_the_run(tiny, capsys):
    message = refused(
        "supervised/train.py", tiny("supervised/train.py", "--optim.lr", "1e30", "--run.max_bad_steps", "2"), capsys
    )
    assert "non-finite loss, gradient" in message and "2 consecutive bad steps" in message


def test_a_folder_of_another_config_or_script_is_refused_and_left_alone(tiny, tmp_path, capsys):
    train("supervised/train.py", tiny("supervised/train.py"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    message = refused("supervised/train.py", tiny("supervised/train.py", "--optim.lr", "0.5"), capsys)
    assert "optim.lr (0.001 there, 0.5 now)" in message
    assert "supervised/train.py" in refused("prcl/train.py", tiny("prcl/train.py"), capsys)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--optim.batch_sise", "2"], "did you mean --optim.batch_size"),
        (["--optim.lr", "-1"], "optim.lr"),
        (["--data.crop_size", "[0, 32]"], "data.crop_size"),
        (["--data.dataset", "voc", "--data.root", "nowhere"], "nowhere"),
        (["--data.split", "nowhere"], "nowhere"),
        (["--model.num_classes", "5"], "model.num_classes is 5"),
        (["--model.backbone", "resnet19"], "resnet19"),
        (["--model.pretrained", "nowhere.pth"], "nowhere.pth"),
        (["--model.pretrained", "resnet50.a1_in1k"], "another network than model.backbone resnet"),
        (["--method.fully_labeled", "maybe"], "method.fully_labeled"),
        (["--data.scale_range", "[2, 1]"], "data.scale_range"),
        (["--run.dir", "/proc/nowhere"], "cannot be written"),
        (["--run.precision", "fp16"], "fp16"),
        (["--optim.accumulation", "3"], "optim.batch_size 2 cannot be divided"),
        (["--optim.accumulation", "2"], "too few for batch norm"),
    ],
)
def test_a_mistake_is_reported_before_training(arguments, expected, tiny, tmp_path, capsys):
    message = refused("supervised/train.py", tiny("supervised/train.py", *arguments), capsys)
    assert expected in message
    assert not (tmp_path / "run").exists()


def test_accumulated_passes_count_as_one_step(tiny, tmp_path):
    train("supervised/train.py", tiny("supervised/train.py", "--optim.batch_size", "4", "--optim.accumulation", "2"))
    assert metrics(tmp_path / "run")[-1]["step"] == 6
