"""Whole runs of CAC's and CPS's three scripts on small built-in data: what they leave behind, continue and refuse."""

import importlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cac_cps import train as cac_train
from cac_cps.config import Config
from cac_cps.crops import draw_size
from cac_cps.panels import COMMON, save_pair_panel
from cac_cps.train import CACNetwork, first_contrastive_step
from common.config import load_config, parse
from common.datasets import open_reader
from common.datasets.shapes import make_shapes
from common.engine.run import Run
from common.errors import UserError
from common.evaluation.cli import main_eval
from common.splits.split import Split, read_split
from common.visual import MARGIN, TILE
from tests.helpers.kill_runs import metrics
from tests.helpers.subprocess_runs import call_in_two

SCRIPTS = ("train", "train_semiseg", "train_semiseg_cutmix")
every_script = pytest.mark.parametrize("script", SCRIPTS)
PICTURES = {"train": ("step", "pairs"), "train_semiseg": ("step",), "train_semiseg_cutmix": ("step",)}


def train(script: str, arguments: list[str]) -> None:
    importlib.import_module(f"cac_cps.{script}").main(arguments)


def refused(script: str, arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        train(script, arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and len(message.splitlines()) <= 2
    return message


@every_script
def test_a_run_leaves_what_is_documented(script, tiny, tmp_path):
    train(script, tiny(f"cac_cps/{script}.py"))
    run = tmp_path / "run"
    assert json.loads((run / "run.json").read_text())["script"] == f"cac_cps/{script}.py"
    assert [line["step"] for line in metrics(run) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    for kind in PICTURES[script]:
        assert (run / "pictures" / f"{kind}_00000006.png").exists()
    extra = load_file(run / "checkpoints" / "last" / "extra.safetensors")
    wanted = {"train": {"projector", "bank", "signs"}}.get(script, {"second", "signs"})
    assert {key.split("/")[0] for key in extra} == wanted


def save_bank(folder: Path, arguments: list[str]) -> None:
    """Train, and save the bank that this process holds in the end."""
    made = []

    class Kept(cac_train.Bank):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            made.append(self)

    cac_train.Bank = Kept
    with Run(parse(Config, "cac_cps/train.py", arguments), "cac_cps/train.py") as run:
        cac_train.train(run.config, run)
        torch.save(made[0].state_dict(), folder / f"bank_{run.rank}.pt")


def test_the_bank_is_the_same_on_every_process(tiny, tmp_path):
    arguments = tiny("cac_cps/train.py", "--run.steps", "4", "--optim.batch_size", "4")
    for child in call_in_two(2 * [partial(save_bank, tmp_path, arguments)], tmp_path / "log"):
        child.finish()
    first, second = (torch.load(tmp_path / f"bank_{rank}.pt") for rank in (0, 1))
    assert first["embedding"].norm() > 0
    for name, values in first.items():
        assert values.equal(second[name])


@every_script
def test_accumulated_passes_count_as_one_step(script, tiny, tmp_path):
    train(script, tiny(f"cac_cps/{script}.py", "--optim.batch_size", "4", "--optim.accumulation", "2"))
    assert metrics(tmp_path / "run")[-1]["step"] == 6


@every_script
def test_the_head_of_original_cps_and_its_crops(script, tiny, tmp_path):
    arguments = [
        "--model.head",
        "v3plus_cps",
        "--model.stem",
        "deep",
        "--method.base_size",
        "null",
        "--method.jitter",
        "true",
    ]
    more = ["--method.cps.ohem", "true", "--method.decay_norms", "false", "--run.steps", "3"]
    train(script, tiny(f"cac_cps/{script}.py", *arguments, *more))
    assert metrics(tmp_path / "run")[-1]["step"] == 3


@every_script
def test_cityscapes(script, tiny, tmp_path):
    root = tmp_path / "cityscapes"
    make_shapes(root, "cityscapes", train=12, val=2, size=(48, 64))
    lists = tmp_path / "lists"
    lists.mkdir()
    names = sorted(path.stem for path in (root / "leftImg8bit" / "train").rglob("*.png"))
    valid = sorted(path.stem for path in (root / "leftImg8bit" / "val").rglob("*.png"))
    parts = {"4_train_supervised": names[:4], "4_train_unsupervised": names[4:], "val": valid}
    for name, ids in parts.items():
        (lists / f"{name}.txt").write_text("".join(f"leftImg8bit/{i}.png gtFine/{i}.png\n" for i in ids))
    data = ["--data.dataset", "cityscapes", "--data.root", str(root), "--data.split", str(lists / "4")]
    more = ["--model.num_classes", "19", "--run.steps", "2", "--method.cps.lr", "0.0005"]
    train(script, tiny(f"cac_cps/{script}.py", *data, *more))
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2]
    assert metrics(tmp_path / "run")[0]["lr"] == pytest.approx(0.001 if script == "train" else 0.0005)


def test_labels_alone(tiny, tmp_path):
    train("train", tiny("cac_cps/train.py", "--method.cac.supervised", "true"))
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert all("loss1" not in line and line["loss"] == line["loss_supervised"] for line in lines)


def test_the_first_epochs_are_from_labels_alone(tiny, tmp_path):
    train("train", tiny("cac_cps/train.py", "--run.steps", "8"))
    contrasts = ["loss1" in line for line in metrics(tmp_path / "run") if "loss" in line]
    assert contrasts == [False] * 2 + [True] * 6


def test_no_image_is_resized_to_nothing():
    assert draw_size(np.random.default_rng(0), (10, 20), base=1, scale_range=(0.5, 0.5)) == (1, 1)


def test_a_run_that_ends_before_its_first_contrast_warns():
    config, warnings = load_config(Config, "cac_cps/configs/demo.json"), []
    run = SimpleNamespace(total=30, log=SimpleNamespace(print=warnings.append))
    assert first_contrastive_step(config, run) == 10 and not warnings  # the demo's share of a run
    config.run.steps, config.run.epochs, config.method.cac.epoch_start_unsup = None, 3, 5
    assert first_contrastive_step(config, run) >= 30 and "epoch_start_unsup 5, epochs 3" in warnings[0]
    config.run.epochs = 30
    assert first_contrastive_step(config, run) == 5 and len(warnings) == 1


def test_pictures_of_pairs_leave_out_what_cannot_be_read_and_end_with_the_run(tmp_path):
    """As training does: `data.skip_bad_files`, and a run that is asked to stop."""
    make_shapes(tmp_path, "voc", train=4, val=1, size=(40, 48))
    config = load_config(Config, "cac_cps/configs/demo.json")
    config.data = replace(config.data, root=str(tmp_path), crop_size=(32, 32))
    config.model = replace(config.model, channels=8)
    reader, (bad, *others) = open_reader(config.data), sorted(path.stem for path in (tmp_path / "JPEGImages").iterdir())
    reader.skip_bad_files = True
    reader.image_path(bad).write_bytes(b"no picture")
    split, network = Split([], [bad, *others], others), CACNetwork(config.model, 8)

    def pictures(stops: bool) -> list[Image.Image]:
        run = SimpleNamespace(
            is_main=True,
            stop_requested=lambda: stops,
            picture_path=lambda: tmp_path / "step.png",
            folder=tmp_path,
            step=7,
            device=torch.device("cpu"),
            accelerator=SimpleNamespace(unwrap_model=lambda network, **_: network),
        )
        save_pair_panel(network, reader, split, config, run)
        return [Image.open(path) for path in sorted(tmp_path.glob("*.png"))]

    assert pictures(stops=True) == []
    pairs, _ = pictures(stops=False)
    assert pairs.height // (TILE + MARGIN) == 2  # rows
    first_column = np.asarray(pairs)[:, MARGIN : MARGIN + TILE]
    assert (first_column == COMMON).all(2).sum() > 2 * TILE


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("train", ["--data.crop_size", "[36, 32]"], "multiples of 8"),
        (
            "train",
            ["--data.crop_size", "[2, 2]"],
            "data.crop_size is 2; it must be a whole number between 16 and 16384",
        ),
        ("train", ["--method.cac.step_save", "5000"], "it must be a whole number between 0 and 1024"),
        ("train", ["--method.cac.iou_bound", "[1, 0.1]"], "method.cac.iou_bound is [1.0, 0.1]"),
        ("train_semiseg", ["--method.base_size", "null", "--method.scales", "[]"], "method.scales is empty"),
        ("train", ["--method.cac.selected_num", "33"], "at most 32"),
        ("train", ["--method.cac.temp", "0"], "method.cac.temp"),
        ("train", ["--method.cac.tmp", "1"], "did you mean --method.cac.temp"),
        ("train", ["--method.cac.scale_range", "[2, 1]"], "method.cac.scale_range"),
        ("train_semiseg", ["--method.cps.weight", "-1"], "method.cps.weight"),
        ("train_semiseg", ["--model.head", "psp"], "model.head"),
        ("train_semiseg_cutmix", ["--model.output_stride", "8"], "model.output_stride is 8"),
        ("train_semiseg_cutmix", ["--data.split", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_reported_before_training(script, arguments, expected, tiny, tmp_path, capsys):
    assert expected in refused(script, tiny(f"cac_cps/{script}.py", *arguments), capsys)
    assert not (tmp_path / "run").exists()


def evaluated(run: Path, *arguments: str) -> None:
    module = importlib.import_module("cac_cps.eval")
    main_eval(
        "cac_cps",
        module.Config,
        [str(run), "-d", "cpu", *arguments],
        protocol_of=module.protocol_of,
        second="second",
        release=module.RELEASE,
    )


def test_either_network_or_both_are_evaluated(tiny, tmp_path, capsys):
    train("train_semiseg", tiny("cac_cps/train_semiseg.py"))
    run = tmp_path / "run"
    best = [line["valid/miou"] for line in metrics(run) if "valid/miou" in line]
    scores = {}
    for network, name in (("1", "last"), ("2", "last_network2"), ("both", "last_networkboth")):
        evaluated(run, "-e", "last", "--network", network)
        content = json.loads((run / "eval" / f"{name}.json").read_text())
        scores[network] = content["per_class_iou"]
        assert "padded to multiples of 8" in content["protocol"]["text"]
    assert json.loads((run / "eval" / "last.json").read_text())["miou"] == pytest.approx(best[-1])
    assert scores["1"] != scores["2"]
    evaluated(run, "-e", "last", "--sliding", "32")
    assert "sliding window 32x32 stride 22x22" in capsys.readouterr().out


def test_the_head_of_original_cps_slides_a_window_by_default(tiny, tmp_path, capsys):
    train("train_semiseg", tiny("cac_cps/train_semiseg.py", "--model.head", "v3plus_cps", "--run.steps", "2"))
    evaluated(tmp_path / "run")
    assert "sliding window 32x32" in capsys.readouterr().out
    evaluated(tmp_path / "run", "--whole")
    assert "whole image" in capsys.readouterr().out


def test_cac_has_no_second_network(tiny, tmp_path, capsys):
    train("train", tiny("cac_cps/train.py", "--run.steps", "2"))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        evaluated(tmp_path / "run", "--network", "2")
    assert "no second network" in capsys.readouterr().err


def test_lists_of_cac_are_read_and_checked(tmp_path):
    content = {"2_train_supervised": "ab", "2_train_unsupervised": "cde", "val": "f"}
    for name, ids in content.items():
        lines = [f"/JPEGImages/{i}.jpg /SegmentationClassAug/{i}.png" for i in ids]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
    split = read_split(tmp_path / "2")
    assert (split.labeled, split.unlabeled, split.valid) == (["a", "b"], ["c", "d", "e"], ["f"])
    (tmp_path / "2_train_unsupervised.txt").write_text("/JPEGImages/a.jpg /SegmentationClassAug/a.png\n")
    with pytest.raises(UserError, match="both labeled and unlabeled"):
        read_split(tmp_path / "2")
    assert read_split(tmp_path / "2", allow_overlap=True).unlabeled == ["a"]
    (tmp_path / "val.txt").write_text("f\n")
    with pytest.raises(UserError, match="an image and its label"):
        read_split(tmp_path / "2", allow_overlap=True)
    (tmp_path / "val.txt").unlink()
    with pytest.raises(UserError, match=r"no list .*val\.txt"):
        read_split(tmp_path / "2")
