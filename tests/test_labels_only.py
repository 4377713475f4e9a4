"""Every method on labels only: no unlabeled image is opened for training, and the run resumes to the same bits."""

import shutil
from importlib import import_module

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from common.datasets.reader import Reader
from common.engine.run import Run
from tests.conftest import SCRIPTS, module_of
from tests.helpers.commands import train
from tests.helpers.kill_runs import assert_same_run, everything, same

METHODS = [script for script in SCRIPTS if script != "supervised/train.py"]
KINDS = ("labeled", "valid")
ONLY = ("--method.labels_only", "true")
LENGTH = ("--run.steps", "3", "--run.save_every", "2", "--run.eval_every", "3", "--run.keep", "9")


@pytest.mark.parametrize("script", METHODS)
def test_training_opens_labeled_images_alone_and_resumes(script, tiny, shapes_root, tmp_path, monkeypatch, capsys):
    """In domain adaptation, too, the labels are the target's: nothing of the source is opened. Panels may show more."""
    opened, names = [], []
    read, registered = Reader.read_pair, Run.register_batch
    module = import_module(module_of(script))
    for panel in ("save_panel", "save_pair_panel", "save_disagreement_panel"):
        monkeypatch.setattr(module, panel, lambda *_, **__: None, raising=False)
    monkeypatch.setattr(Reader, "read_image", lambda reader, name: pytest.fail(f"{name} is opened without its label"))
    monkeypatch.setattr(
        Reader, "read_pair", lambda reader, name: (opened.append(reader.image_path(name)), read(reader, name))[1]
    )
    monkeypatch.setattr(
        Run, "register_batch", lambda run, batch: (names.extend(batch.names), registered(run, batch))[1]
    )
    arguments, run = tiny(script, *LENGTH, *ONLY), tmp_path / "run"
    train(script, arguments)
    labeled, valid = ((shapes_root / f"splits/6/0/{kind}_filename.txt").read_text().split() for kind in KINDS)
    assert len(names) == 6 and set(names) <= set(labeled)
    assert {path.stem for path in opened} <= {*labeled, *valid}
    assert all(path.is_relative_to(shapes_root) for path in opened)  # not of the source domain
    evaluated = load_file(run / "checkpoints" / "last" / "model.safetensors")
    means = {name: mean for name, mean in evaluated.items() if name.endswith("running_mean")}
    assert means and all(mean.any() for mean in means.values())  # a network without statistics predicts one class
    shutil.copytree(run, tmp_path / "whole", symlinks=True)
    shutil.rmtree(run / "checkpoints" / "step_00000003")
    for link in ("last", "best"):
        (run / "checkpoints" / link).unlink()
    AcceleratorState._reset_state(reset_partial_state=True)
    train(script, arguments)
    assert "after step 2 of 3" in capsys.readouterr().out
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.parametrize("script", ["prcl/train.py", "css/train.py"])
def test_the_teacher_is_evaluated_as_in_the_paper(script, tiny, tmp_path):
    train(script, tiny(script, *LENGTH, *ONLY, "--method.alpha_t" if "css" in script else "--method.alpha", "0.9"))
    tensors = everything(tmp_path / "run")
    student = {name.split("segmenter.")[1]: tensors[name] for name in tensors if name.startswith("student/segmenter.")}
    weights = [name for name in student if name.endswith("weight")]
    assert weights and any(not tensors[name].equal(student[name]) for name in weights)


def test_the_name_in_cacs_configs_means_the_same(tiny, tmp_path):
    script = "cac_cps/train.py"
    for name, more in (("one", ONLY), ("two", ("--method.cac.supervised", "true"))):
        train(script, tiny(script, *LENGTH, *more, "--run.dir", str(tmp_path / name)))
        AcceleratorState._reset_state(reset_partial_state=True)
    one, two = everything(tmp_path / "one"), everything(tmp_path / "two")
    assert same(one, two)
