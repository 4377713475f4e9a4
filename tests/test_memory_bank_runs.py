"""Memory bank's runs beside learning: alternation, restart, refreshed batch norm, and translation of labels."""

import itertools
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common.datasets.gta5 import GTA5
from common.datasets.shapes import make_shapes
from common.metrics import Scores
from memory_bank import train, train_domain_adaptation, training, translate_labels
from memory_bank.train_domain_adaptation import takes_target, target_steps
from tests.helpers.kill_runs import assert_same_run, metrics

SCRIPT, ADAPTATION = "memory_bank/train.py", "memory_bank/train_domain_adaptation.py"


@pytest.fixture
def falling(monkeypatch):
    """Make each evaluation of a run worse than the one before, and that of refreshed statistics the best."""

    def evaluate(network, reader, split, run, protocol):
        is_training = any(network is module for module in run.checkpointer.contents.modules())
        return Scores((0.5,) * 7, 1 / (1 + run.step) if is_training else 0.9, 7, 0.5)

    for module in (train, training):
        monkeypatch.setattr(module, "evaluate_run", evaluate)
    monkeypatch.setattr(train, "save_panel", lambda *arguments, **named: None)


def test_a_run_that_gets_worse_restarts_and_resumes_to_the_same_bits(falling, tiny, tmp_path, monkeypatch):
    held = []

    def restart(state, config, run):
        restart_from_best(state, config, run)
        networks = (state.network, state.teacher)
        held.append([{k: v.clone() for k, v in network.segmenter.state_dict().items()} for network in networks])

    restart_from_best = train.restart_from_best
    monkeypatch.setattr(train, "restart_from_best", restart)
    length = ["--run.eval_every", "1", "--run.save_every", "1", "--run.keep", "9", "--method.patience", "0.3"]
    arguments = tiny(SCRIPT, *length)
    train.main(arguments)
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "run", whole, symlinks=True)
    best = load_file(whole / "checkpoints" / "step_00000001" / "model.safetensors")
    assert len(held) == 2  # after steps 3 and 5, each two without a better one
    for state in held[0]:
        assert all(state[name].equal(value) for name, value in best.items())

    # Killed after saving step 3 and before its restart.
    for name in ("step_00000004", "step_00000005", "step_00000006", "refreshed_00000001"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / name)
    train.main(arguments)
    assert len(held) == 4
    assert_same_run(tmp_path / "run", whole)


def test_batch_norm_of_the_best_network_is_refreshed_and_nothing_else_changes(falling, tiny, tmp_path, capsys):
    for _ in range(2):  # the same command on the finished run
        train.main(tiny(SCRIPT, "--run.steps", "2", "--run.eval_every", "1"))
        root = tmp_path / "run" / "checkpoints"
        assert os.readlink(root / "best") == "refreshed_00000001"
        assert "best mIoU 90.00 after step 1, refreshed (chosen on the valid list)" in capsys.readouterr().out
        before, after = (load_file(root / f"{kind}_00000001" / "model.safetensors") for kind in ("step", "refreshed"))
        changed = {name.rsplit(".", 1)[1] for name in before if not before[name].equal(after[name])}
        assert changed == {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize(("total", "last"), [(9, 0), (9, 4), (10, 4), (3, 100)])
def test_labels_alternate_and_end_with_the_target(total, last):
    taken = [takes_target(step, total, last) for step in range(total)]
    assert [target_steps(step, total, last) for step in range(total + 1)] == [0, *itertools.accumulate(taken)]
    assert all(taken[-last:] if last else taken[::2])
    assert not any(taken[: max(0, total - last)][1::2])


@pytest.fixture
def domains(tmp_path):
    """Folders laid out as Cityscapes, with a split, and GTA5 beside it; returns the arguments that select them."""
    make_shapes(tmp_path / "cityscapes", "cityscapes", train=6, val=2, size=(40, 48))
    make_shapes(tmp_path / "gta5", "gta5", train=5, val=1, size=(40, 48), domain="b")
    names = sorted(path.stem for path in (tmp_path / "cityscapes" / "leftImg8bit").glob("train/*/*.png"))
    valid = sorted(path.stem for path in (tmp_path / "cityscapes" / "leftImg8bit").glob("val/*/*.png"))
    for kind, ids in {"labeled": names[:2], "unlabeled": names[2:], "valid": valid}.items():
        (tmp_path / "split").mkdir(exist_ok=True)
        (tmp_path / "split" / f"{kind}_filename.txt").write_text("\n".join(ids) + "\n")
    own = ["--data.dataset", "cityscapes", "--data.root", str(tmp_path / "cityscapes"), "--model.num_classes", "19"]
    return [*own, "--data.split", str(tmp_path / "split"), "--method.adaptation.source_dataset", "gta5"]


def test_gta5_adapts_to_cityscapes_with_colors_or_ids(domains, tiny, tmp_path, capsys):
    weighted = ["--run.steps", "3", "--method.class_balance", "true", "--method.half_size", "true"]
    logs = []
    for name in ("colors", "ids"):
        folder = ["--run.dir", str(tmp_path / name)]
        train_domain_adaptation.main(tiny(ADAPTATION, *domains, *weighted, *folder))
        logs.append(metrics(tmp_path / name))
        translate_labels.main([str(tmp_path / "gta5")])
    assert logs[0] == logs[1]
    assert ["loss_source" in line for line in logs[0] if "loss" in line] == [False, True, False]
    assert "contrast_labeled" in logs[0][-2] and "6 labels translated" in capsys.readouterr().out


def test_an_unusable_source_domain_is_an_error(domains, tiny, tmp_path, capsys):
    root = str(tmp_path / "cityscapes")
    for (dataset, folder), words in {
        ("cityscapes", root): "is data.root itself",
        ("gta5", str(tmp_path / "split")): "gta5/images; set source_root to",
        ("gta5", str(tmp_path / "nowhere")): "nowhere, is not a folder: set source_root to",
        ("shapes", str(tmp_path / "drawn")): "has other classes",
    }.items():
        source = ["--method.adaptation.source_dataset", dataset, "--method.adaptation.source_root", folder]
        if dataset == "shapes":
            make_shapes(tmp_path / "drawn", "voc", train=1, val=1, size=(32, 32))
        with pytest.raises(SystemExit) as stop:
            train_domain_adaptation.main(tiny(ADAPTATION, *domains, *source))
        assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_labels_are_translated_once_and_originals_stay(tmp_path, capsys):
    root = tmp_path / "gta5"
    make_shapes(root, "gta5", train=4, val=0, size=(32, 40))
    files = sorted((root / "labels").iterdir())
    Image.fromarray(np.full((32, 40, 3), (1, 2, 3), np.uint8)).save(files[1])  # a color that GTA5 does not define
    files[2].write_bytes(files[2].read_bytes()[:60])
    before = {path: path.read_bytes() for path in files}
    reader = GTA5(root)
    colors = reader.read_label(files[0].stem)

    with pytest.raises(SystemExit) as stop:
        translate_labels.main([str(root), "--workers", "2"])
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.err.startswith("error: 1 labels were not translated")
    assert "1280 pixels of the color (1, 2, 3)" in output.out and f"problem: label {files[2]} cannot" in output.out
    assert "3 labels translated" in output.out
    assert reader.label_path(files[0].stem).parent.name == "label_ids"
    assert torch.equal(reader.read_label(files[0].stem), colors)
    assert (reader.read_label(files[1].stem) == 255).all()
    assert reader.label_path(files[2].stem) == files[2]
    assert before == {path: path.read_bytes() for path in files}

    written = {path: path.stat().st_mtime_ns for path in (root / "label_ids").iterdir()}
    shutil.copy(files[0], files[2])
    translate_labels.main([str(root)])
    assert "1 labels translated" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    with pytest.raises(SystemExit):
        translate_labels.main([str(tmp_path)])
    assert "no labels in" in capsys.readouterr().err
