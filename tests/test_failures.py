"""Failures in the middle of a run: they cost little, are reported, and never enter the weights."""

import json
import pickle
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.engine import checkpoint_files
from common.engine.finite import non_finite_tensors
from common.errors import UserError
from tests.conftest import FEW, SCRIPTS
from tests.helpers.hooks import both, scale_gradients, spoil_files, spoil_gradient, stop_in_evaluation
from tests.helpers.kill_runs import assert_same_run, metrics, same
from tests.helpers.subprocess_runs import start, start_two

every_script = pytest.mark.parametrize("script", SCRIPTS)
LENGTH = ["--run.steps", "3", "--run.save_every", "1", "--run.keep", "9", "--run.eval_every", "3"]
FOUR = ["--optim.batch_size", "4"]


def held(run: Path, step: int) -> dict:
    """All tensors of a checkpoint, the optimizer's too."""
    folder = checkpoint_files.step_folder(run / "checkpoints", step)
    state = torch.load(folder / "state.pt", weights_only=True)
    return {name: load_file(folder / f"{name}.safetensors") for name in ("model", "extra")} | {
        "optimizer": state["optimizer"]["state"]
    }


@every_script
def test_a_step_that_is_not_finite_is_named_counted_and_undone(script, tiny, tmp_path):
    output = start(script, tiny(script, *LENGTH), tmp_path / "log", partial(spoil_gradient, 1)).finish()
    run = tmp_path / "run"
    assert "warning: step 2 skipped: non-finite gradient (lr 0.000" in output and "; images 2007_" in output
    assert "1 consecutive bad step; the run stops at 10." in output
    assert same(held(run, 1), held(run, 2))
    assert not same(held(run, 2), held(run, 3))
    assert not non_finite_tensors(load_file(run / "checkpoints" / "last" / "model.safetensors"))
    lines = metrics(run)
    assert [line["step"] for line in lines if "loss" in line] == [1, 3]
    assert [line for line in lines if "skipped_steps" in line] == [{"step": 2, "skipped_steps": 1, "skipped_files": 0}]


def test_a_step_that_is_not_finite_on_one_process_is_skipped_by_both(some_script, tiny, tmp_path):
    arguments = tiny(some_script, *LENGTH, *FOUR)
    first, second = start_two(some_script, arguments, tmp_path / "log", (None, partial(spoil_gradient, 1)))
    assert "step 2 skipped: non-finite gradient" in first.finish()
    second.finish()
    assert same(held(tmp_path / "run", 1), held(tmp_path / "run", 2))


def test_an_overflow_of_scaled_gradients_halves_the_scale_and_is_undone(tiny, tmp_path):
    script, run = "css/train.py", tmp_path / "run"
    start(
        script, tiny(script, *LENGTH), tmp_path / "log", partial(both, scale_gradients, partial(spoil_gradient, 1))
    ).finish()
    assert same(held(run, 1), held(run, 2))
    assert not same(held(run, 2), held(run, 3))
    scales = [
        torch.load(path, weights_only=True)["scaler"]["scale"]
        for path in sorted(run.glob("checkpoints/step_*/state.pt"))
    ]
    assert scales == [2.0**16, 2.0**15, 2.0**15]
    assert not [line for line in metrics(run) if "skipped_steps" in line]  # fp16 finds its scale that way


def test_scaled_gradients_train_as_unscaled_ones_do(tiny, tmp_path):
    script = "supervised/train.py"
    for name, before in (("plain", None), ("scaled", scale_gradients)):
        start(script, tiny(script, *LENGTH, "--run.dir", str(tmp_path / name)), tmp_path / "log", before).finish()
    plain, scaled = (held(tmp_path / name, 3)["model"] for name in ("plain", "scaled"))
    for name, values in plain.items():
        torch.testing.assert_close(values, scaled[name], rtol=1e-3, atol=1e-4)


STOPPABLE = ["--run.steps", "3", "--run.eval_every", "2", "--run.save_every", "3"]


def test_a_stop_in_an_evaluation_waits_for_neither_its_end_nor_loses_it(some_script, tiny, tmp_path):
    stopped, whole = (tiny(some_script, *STOPPABLE, "--run.dir", str(tmp_path / name)) for name in ("stopped", "whole"))
    child = start(some_script, stopped, tmp_path / "log", stop_in_evaluation)
    assert child.status() == 128 + signal.SIGTERM
    assert "stopped after step 2 of 3" in child.log.read_text()
    assert not [line for line in metrics(tmp_path / "stopped") if "valid/miou" in line]
    for arguments in (stopped, whole):
        start(some_script, arguments, tmp_path / "log").finish()
    assert [line["step"] for line in metrics(tmp_path / "stopped") if "valid/miou" in line] == [2, 3]
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_a_stop_of_one_process_in_an_evaluation_stops_both(tiny, tmp_path):
    script = "supervised/train.py"
    children = start_two(script, tiny(script, *STOPPABLE, *FOUR), tmp_path / "log", (None, stop_in_evaluation))
    assert [child.status() for child in children] == 2 * [128 + signal.SIGTERM]
    output = start(script, tiny(script, *STOPPABLE, *FOUR), tmp_path / "log").finish()
    assert "continuing" in output and "after step 2 of 3" in output


def test_weights_that_are_not_finite_are_never_saved(tiny, tmp_path, capsys):
    from supervised.train import main

    arguments = tiny("supervised/train.py", *LENGTH, "--optim.name", "sgd", "--optim.lr", "1e38")
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--optim.weight_decay", "1e30"])
    assert stop.value.code == 2
    assert "is not finite, so nothing is saved" in capsys.readouterr().err
    assert not checkpoint_files.list_steps(tmp_path / "run" / "checkpoints")


@pytest.fixture
def data(shapes_root, tmp_path):
    """A copy of the data that may be harmed, and the arguments that name it."""
    root = tmp_path / "data"
    shutil.copytree(shapes_root, root)
    split = root / "splits" / "6" / "0"
    names = (split / "labeled_filename.txt").read_text().split()
    files = [root / "JPEGImages" / f"{name}.jpg" for name in names]
    return files, ["--data.root", str(root), "--data.split", str(split)]


@pytest.mark.parametrize(("script", "processes"), [("supervised/train.py", 1), *((script, 2) for script in FEW)])
def test_a_file_that_goes_bad_stops_the_run_after_a_checkpoint(script, processes, data, tiny, tmp_path):
    files, places = data
    rare = ["--run.steps", "4", "--run.save_every", "4", "--run.eval_every", "4", *FOUR, *places]
    arguments, log = tiny(script, *rare), tmp_path / "log"
    spoil = partial(spoil_files, 2, files)
    originals = [path.read_bytes() for path in files]
    if processes == 1:
        children = [start(script, arguments, log, spoil)]
    else:
        children = start_two(script, arguments, log, (spoil, None))
    assert [child.status() for child in children] == [2] * processes
    output = children[0].log.read_text()
    assert "Traceback" not in output and "cannot be decoded" in output and str(files[0].parent) in output
    saved = checkpoint_files.list_steps(tmp_path / "run" / "checkpoints")
    assert saved and saved[-1] >= 2
    if processes == 1:
        for path, content in zip(files, originals):
            path.write_bytes(content)
        assert f"after step {saved[-1]}" in start(script, arguments, log).finish()
        start(script, [*arguments, "--run.dir", str(tmp_path / "whole")], log).finish()
        shutil.rmtree(checkpoint_files.step_folder(tmp_path / "run" / "checkpoints", saved[-1]))
        assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_bad_files_are_skipped_and_counted_where_that_is_asked_for(data, tiny, tmp_path):
    files, places = data
    files[0].write_bytes(b"no picture")
    files[1].unlink()
    script, length = "supervised/train.py", ["--run.steps", "3", "--optim.batch_size", "6"]
    arguments = tiny(script, *length, *places, "--data.skip_bad_files", "true")
    output = start(script, arguments, tmp_path / "log").finish()
    assert f"warning: skipped: image {files[0]}" in output and f"no image of {files[1].stem}" in output
    counts = [line["skipped_files"] for line in metrics(tmp_path / "run") if "skipped_files" in line]
    assert counts == [2, 4, 6]  # six images a step are the whole list


@pytest.mark.parametrize("name", ["model.safetensors", "extra.safetensors", "state.pt", "meta.json"])
@pytest.mark.parametrize("harm", ["truncated", "vanished"])
def test_the_checkpoint_before_a_harmed_one_is_found_with_a_warning(name, harm, tmp_path):
    root = tmp_path / "checkpoints"
    for step in (1, 2):
        tensors = {"weight": torch.full((3,), float(step))}
        checkpoint_files.write(root, {"step": step}, tensors, {"student": tensors}, {"best": None})
    path = root / "step_00000002" / name
    if harm == "vanished":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:40])
    found = list(checkpoint_files.newest(root))
    assert "step_00000002" in found[0] and found[1].meta["step"] == 1


class Harmful:
    def __reduce__(self):
        return eval, ("1 / 0",)


def test_a_checkpoint_that_was_about_to_be_replaced_gets_its_name_back(tiny, tmp_path):
    script, folder = "supervised/train.py", tmp_path / "run" / "checkpoints"
    start(script, tiny(script, *LENGTH), tmp_path / "log").finish()
    # Killed between the two moves of writing the step again.
    (folder / "step_00000003").rename(folder / ".replaced_step_00000003")
    assert "after step 3 of 3" in start(script, tiny(script, *LENGTH), tmp_path / "log").finish()
    assert (folder / "last" / "state.pt").exists()
    assert not list(folder.glob(".replaced_*"))


def test_a_checkpoint_with_code_is_refused_by_name_and_not_executed(tmp_path):
    folder = checkpoint_files.write(tmp_path, {"step": 1}, {}, {}, {"best": None})
    torch.save({"best": Harmful()}, folder / "state.pt", pickle_module=pickle)
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"]["state.pt"] = checkpoint_files._fingerprint(folder / "state.pt")
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"step_00000001 is refused: .* would execute .*eval"):
        checkpoint_files.read(folder)


def test_deterministic_mode_gives_the_same_bits_twice(some_script, tiny, tmp_path):
    for name in ("one", "other"):
        arguments = tiny(some_script, *LENGTH, "--run.deterministic", "true", "--run.dir", str(tmp_path / name))
        start(some_script, arguments, tmp_path / "log").finish()
    assert_same_run(tmp_path / "one", tmp_path / "other")
