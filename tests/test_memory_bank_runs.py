"""What memory bank's runs do beside learning: alternate, start again, take statistics anew; labels translated once."""

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
from memory_bank import train, train_domain_adaptation, translate_labels
from memory_bank import training as parts
from memory_bank.train_domain_adaptation import takes_target, target_steps
from tests.helpers.kill_runs import assert_same_run, metrics

SCRIPT, ADAPTATION = "memory_bank/train.py", "memory_bank/train_domain_adaptation.py"


@pytest.fixture
def falling(monkeypatch):
    """Let each evaluation of a run be worse than the one before, but that of statistics taken anew the best."""

    def evaluate(network, source, split, run, protocol):
        is_training = any(network is module for module in run.checkpointer.contents.modules())
        return Scores((0.5,) * 7, 1 / (1 + run.step) if is_training else 0.9, 7, 0.5)

    monkeypatch.setattr(parts, "evaluate_run", evaluate)
    monkeypatch.setattr(parts, "save_panel", lambda *arguments, **named: None)


def test_a_run_that_gets_worse_starts_again_and_continues_to_the_same_bits(falling, tiny, tmp_path, monkeypatch):
    held = []

    def start_again(own, config, run):
        began(own, config, run)
        networks = (own.network, own.teacher)
        held.append([{k: v.clone() for k, v in network.segmenter.state_dict().items()} for network in networks])

    began = parts.start_again
    monkeypatch.setattr(parts, "start_again", start_again)
    length = ["--run.eval_every", "1", "--run.save_every", "1", "--run.keep", "9", "--method.patience", "0.3"]
    arguments = tiny(SCRIPT, *length)
    train.main(arguments)
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "run", whole, symlinks=True)
    best = load_file(whole / "checkpoints" / "step_00000001" / "model.safetensors")
    assert len(held) == 2  # after steps 3 and 5, each two without a better one
    for state in held[0]:
        assert all(state[name].equal(value) for name, value in best.items())

    # Killed after step 3 was saved, with what is to follow still to be done.
    for name in ("step_00000004", "step_00000005", "step_00000006", "refreshed_00000001"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / name)
    train.main(arguments)
    assert len(held) == 4
    assert_same_run(tmp_path / "run", whole)


def test_statistics_are_taken_anew_from_the_best_and_nothing_else_changes(falling, tiny, tmp_path, capsys):
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
    """Genuine trees: Cityscapes, with a split, and GTA5 beside it."""
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


def test_a_source_that_cannot_serve_is_told(domains, tiny, tmp_path, capsys):
    root = str(tmp_path / "cityscapes")
    for change, words in {
        ("cityscapes", root): "is data.root itself",
        ("gta5", str(tmp_path / "split")): "gta5/images; set source_root to",
        ("gta5", str(tmp_path / "nowhere")): "nowhere, is not a folder: set source_root to",
        ("shapes", str(tmp_path / "drawn")): "has other classes",
    }.items():
        source = ["--method.adaptation.source_dataset", change[0], "--method.adaptation.source_root", change[1]]
        if change[0] == "shapes":
            make_shapes(tmp_path / "drawn", "voc", train=1, val=1, size=(32, 32))
        with pytest.raises(SystemExit) as stop:
            train_domain_adaptation.main(tiny(ADAPTATION, *domains, *source))
        assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_labels_are_translated_once_and_originals_stay(tmp_path, capsys):
    root = tmp_path / "gta5"
    make_shapes(root, "gta5", train=4, val=0, size=(32, 40))
    files = sorted((root / "labels").iterdir())
    Image.fromarray(np.full((32, 40, 3), (1, 2, 3), np.uint8)).save(files[1])  # a color that is none
    files[2].write_bytes(files[2].read_bytes()[:60])
    before = {path: path.read_bytes() for path in files}
    source = GTA5(root)
    colors = source.read_label(files[0].stem)

    with pytest.raises(SystemExit) as stop:
        translate_labels.main([str(root), "--workers", "2"])
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.err.startswith("error: 1 labels were not translated")
    assert "1280 pixels of the color (1, 2, 3)" in output.out and f"wrong: label {files[2]} cannot" in output.out
    assert "3 labels translated" in output.out
    assert source.label_path(files[0].stem).parent.name == "label_ids"
    assert torch.equal(source.read_label(files[0].stem), colors)
    assert (source.read_label(files[1].stem) == 255).all()
    assert source.label_path(files[2].stem) == files[2]
    assert before == {path: path.read_bytes() for path in files}

    written = {path: path.stat().st_mtime_ns for path in (root / "label_ids").iterdir()}
    shutil.copy(files[0], files[2])
    translate_labels.main([str(root)])
    assert "1 labels translated" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    with pytest.raises(SystemExit):
        translate_labels.main([str(tmp_path)])
    assert "no labels in" in capsys.readouterr().err
