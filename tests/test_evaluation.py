"""Evaluation: scores against a loop over images, on one and two processes; checkpoint and device selection."""

import json
import math
import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from common.config import load_config
from common.config.sections import DataConfig, ModelConfig, RunConfig
from common.datasets import open_reader
from common.engine import checkpoint_files
from common.engine.devices import launch_command, parse_devices
from common.errors import UserError
from common.evaluation.cli import main_eval
from common.evaluation.evaluate import evaluate, sample_predictions
from common.evaluation.inference import Protocol, predict
from common.evaluation.selection import find_checkpoints, find_run
from common.models import build_network
from common.models.weights import read_state
from tests.helpers.subprocess_runs import call_in_two

SIZES = {"a": (20, 30), "b": (24, 18), "c": (20, 30), "d": (20, 30), "e": (24, 18)}
MODEL = {"backbone": "resnet18", "num_classes": 3, "pretrained": True}
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Config:
    """Sections of a paper's config that an evaluation reads."""

    data: DataConfig
    model: ModelConfig
    run: RunConfig


class Toy(nn.Module):
    align_corners = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Dropout(0.5))

    def forward(self, image):
        return self.layers(image)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    """Five images of two sizes; class 2 occurs nowhere, and some pixels are ignored."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for folder in ("images", "labels", "split"):
        (root / folder).mkdir()
    for name, size in SIZES.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(root / "images" / f"{name}.png")
        Image.fromarray(rng.choice([0, 1, 255], size).astype(np.uint8)).save(root / "labels" / f"{name}.png")
    (root / "classes.txt").write_text("road\nsky\ncar\n")
    for kind, names in (("labeled", "a"), ("unlabeled", "b"), ("valid", "a\nb\nc\nd\ne")):
        (root / "split" / f"{kind}_filename.txt").write_text(names + "\n")
    return DataConfig(dataset="folder", root=str(root), split=str(root / "split"), workers=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory, data) -> Path:
    """A run of epochs of 10 steps with checkpoints after epochs 1 and 3."""
    folder = tmp_path_factory.mktemp("toy")
    write_config(folder / "config.json", data)
    torch.manual_seed(0)
    network = build_network(ModelConfig(**MODEL | {"pretrained": False}))
    for step in (20, 40):
        nn.init.normal_(network.classifier[-1].weight)
        checkpoint_files.write(folder / "checkpoints", {"step": step, "epoch": step / 10}, network.state_dict())
    checkpoint_files.point(folder / "checkpoints", "last", 40)
    checkpoint_files.point(folder / "checkpoints", "best", 20)
    return folder


def write_config(path: Path, data: DataConfig, **model) -> None:
    run = {"epochs": 4, "steps_per_epoch": 10}
    path.write_text(json.dumps({"data": vars(data), "model": MODEL | model, "run": run}, default=list))


def fake_run(folder: Path, steps: list[int], per_epoch: int | None = 10) -> Path:
    for step in steps:
        meta = {"step": step, "epoch": step / per_epoch if per_epoch else None, "files": {}}
        path = checkpoint_files.step_folder(folder / "checkpoints", step)
        path.mkdir(parents=True)
        (path / "meta.json").write_text(json.dumps(meta))
    return folder


def expected_matrix(network, reader, names, protocol=Protocol()) -> np.ndarray:
    matrix = np.zeros((3, 3), np.int64)
    for name in names:
        image, label = reader.read_pair(name)
        prediction = predict(network, image[None], label.shape, protocol)[0].argmax(0)
        for g, p in zip(label.flatten().tolist(), prediction.flatten().tolist()):
            if g < 3:
                matrix[g, p] += 1
    return matrix


# The evaluator


@pytest.mark.parametrize("protocol", [Protocol(), Protocol((16, 16), (0.5, 1.0), True)])
def test_scores_are_those_of_a_loop(data, protocol):
    network, reader = Toy(), open_reader(data)
    matrix = expected_matrix(network, reader, SIZES, protocol)
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    for batch_size, workers in ((None, 0), (2, 1)):
        scores = evaluate(network, reader, list(SIZES), 3, Accelerator(cpu=True), protocol, batch_size, workers)
        np.testing.assert_allclose(scores.per_class_iou, matrix.diagonal() / union)
        assert scores.miou == pytest.approx((matrix.diagonal() / union).mean())
        assert scores.pixel_accuracy == pytest.approx(matrix.trace() / matrix.sum())


def test_evaluation_leaves_network_and_random_numbers_alone(data):
    network, reader = Toy().train(), open_reader(data)
    before = torch.get_rng_state(), network.layers[1].running_mean.clone()
    evaluate(network, reader, ["a", "b"], 3, Accelerator(cpu=True), workers=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(network.layers[1].running_mean, before[1]) and network.layers[2].training


def test_a_damaged_file_read_by_a_worker_is_a_user_error(data, tmp_path):
    (tmp_path / "images").mkdir(), (tmp_path / "labels").mkdir()
    (tmp_path / "classes.txt").write_text("road\nsky\ncar\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    (tmp_path / "labels" / "a.png").write_bytes(b"no picture")
    reader = open_reader(DataConfig(dataset="folder", root=str(tmp_path), split=""))
    with pytest.raises(UserError) as caught:
        evaluate(Toy(), reader, ["a"], 3, Accelerator(cpu=True), workers=1)
    assert "a.png" in str(caught.value) and "Traceback" not in str(caught.value)
    with pytest.raises(UserError, match="empty"):
        evaluate(Toy(), reader, [], 3, Accelerator(cpu=True))


def test_samples_for_pictures_open_labels_only_when_asked(data, monkeypatch):
    network, reader = Toy(), open_reader(data)
    (sample,) = sample_predictions(network, reader, ["b"], Protocol(), torch.device("cpu"))
    assert sample.prediction.shape == sample.label.shape == sample.confidence.shape == (24, 18)
    assert sample.confidence.min() >= 1 / 3 and sample.confidence.max() <= 1
    monkeypatch.setattr(reader, "read_label", lambda name: pytest.fail("a label was opened"))
    (sample,) = sample_predictions(network, reader, ["b"], Protocol(), torch.device("cpu"), with_label=False)
    assert sample.label is None


# Which checkpoint


@pytest.mark.parametrize(
    ("which", "epochs"),
    [("6", [6]), ("6-10", [6, 8, 10]), ("8-8", [8]), ("30-", [32, 33]), ("0-100", [6, 8, 10, 32, 33]), ("7-9", [8])],
)
def test_numbers_are_zero_based_epochs(tmp_path, which, epochs):
    run = fake_run(tmp_path, [70, 90, 110, 330, 340])
    (run / "checkpoints" / "notes.txt").touch()
    (run / "checkpoints" / "best_model-3.bak").mkdir()
    found, _ = find_checkpoints(run, which, by_epoch=True)
    assert [checkpoint.epoch for checkpoint in found] == epochs
    assert [checkpoint.step for checkpoint in found] == [10 * (epoch + 1) for epoch in epochs]


@pytest.mark.parametrize(("which", "steps"), [("step:70", [70]), ("step:80-", [90, 110]), ("step:0-95", [70, 90])])
def test_step_forces_steps(tmp_path, which, steps):
    found, _ = find_checkpoints(fake_run(tmp_path, [70, 90, 110]), which, by_epoch=True)
    assert [checkpoint.step for checkpoint in found] == steps


def test_numbers_are_steps_where_epochs_do_not_count(tmp_path):
    found, notes = find_checkpoints(fake_run(tmp_path, [70, 90], per_epoch=None), "60-90", by_epoch=False)
    assert [checkpoint.name for checkpoint in found] == ["step_00000070", "step_00000090"]
    assert notes == ["there is no checkpoint of step 60"]


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("7", "no checkpoint of epoch 7; it has epochs 6, 8"),
        ("40-", "no checkpoint of epoch 40-"),
        ("10-6", "empty range"),
        ("a-b", "not understood"),
        ("-8", "not understood"),
        ("6-10-33", "not understood"),
        ("none.pth", "no such file"),
        ("best", "has no best checkpoint"),
    ],
)
def test_a_selection_without_checkpoints_is_an_error(tmp_path, which, words):
    with pytest.raises(UserError, match=words):
        find_checkpoints(fake_run(tmp_path, [70, 90]), which, by_epoch=True)


def test_a_damaged_checkpoint_in_a_range_is_skipped_with_a_note(tmp_path):
    run = fake_run(tmp_path, [70, 90])
    (run / "checkpoints" / "step_00000070" / "meta.json").write_text("{")
    found, notes = find_checkpoints(run, "0-", by_epoch=True)
    assert [checkpoint.step for checkpoint in found] == [90]
    assert "step_00000070" in notes[0]


def test_default_is_best_else_last(run, tmp_path):
    assert find_checkpoints(run, None, by_epoch=True)[0][0].step == 20
    other = fake_run(tmp_path, [10])
    checkpoint_files.point(other / "checkpoints", "last", 10)
    assert find_checkpoints(other, None, by_epoch=True)[0][0].name == "last"


def test_newest_run_is_found_below_the_paper(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run"):
        find_run("toy", None, None)
    for name, time in (("old", 100), ("deep/new", 200)):
        folder = fake_run(tmp_path / "runs" / "toy" / name, [10])
        (folder / "config.json").touch()
        os.utime(folder / "checkpoints" / "step_00000010", (time, time))
    (tmp_path / "runs" / "toy" / "not_a_run").mkdir()
    assert find_run("toy", None, "best") == Path("runs/toy/deep/new")
    file = tmp_path / "runs/toy/old/checkpoints/step_00000010/model.safetensors"
    file.touch()
    assert find_run("toy", None, str(file)) == tmp_path / "runs/toy/old"
    with pytest.raises(UserError, match="not a run folder"):
        find_run("toy", tmp_path, None)


# Devices


@pytest.mark.parametrize(
    ("text", "devices"),
    [("cpu", []), ("0", [0]), ("0,1", [0, 1]), ("0-3", [0, 1, 2, 3]), ("*", [0, 1, 2, 3]), ("3,0-1", [0, 1, 3])],
)
def test_devices(text, devices):
    assert parse_devices(text, 4) == devices


@pytest.mark.parametrize(("text", "count"), [("4", 4), ("0-4", 4), ("2-1", 4), ("gpu", 4), ("", 4), ("0", 0), ("*", 0)])
def test_missing_devices_are_refused(text, count):
    with pytest.raises(UserError):
        parse_devices(text, count)


def test_several_gpus_relaunch_the_same_command(run, monkeypatch):
    launched = []

    def execv(program, command):
        launched.append(command)
        raise SystemExit

    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("os.execv", execv)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    with pytest.raises(SystemExit):
        main_eval("toy", Config, [str(run), "-e", "0-", "--devices=1,3", "--flip"])
    (command,) = launched
    assert command[command.index("--num_processes") + 1] == "2"
    assert command[command.index("--gpu_ids") + 1] == "5,7"
    assert command[-4:] == [str(run), "-e", "0-", "--flip"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    command = launch_command([0, 2], ["-d", "0,2", "-s"])
    assert command[command.index("--gpu_ids") + 1] == "0,2" and command[-1] == "-s"
    assert "-d" not in command


# The command line


def test_command_line_prints_and_writes_scores_and_pictures(run, data, capsys):
    main_eval("toy", Config, [str(run), "-e", "0-9", "-s", "-d", "cpu"])
    output = capsys.readouterr().out
    network, reader = build_network(ModelConfig(**MODEL | {"pretrained": False})), open_reader(data)
    for step, epoch in ((20, 1), (40, 3)):
        written = json.loads((run / "eval" / f"step_{step:08d}.json").read_text())
        network.load_state_dict(weights(run, step))
        matrix = expected_matrix(network, reader, SIZES)
        assert (written["step"], written["epoch"]) == (step, epoch)
        assert written["pixel_accuracy"] == pytest.approx(matrix.trace() / matrix.sum())
        assert list(written["per_class_iou"]) == ["road", "sky", "car"]
        assert f"{100 * written['miou']:.2f}" in output
    assert "whole image, scale 1, no flip" in output
    assert f"mIoU ({written['classes_counted']} of 3 classes)" in output
    assert "there is no checkpoint of epoch 0" in output
    pictures = run / "eval" / "pictures" / "step_00000040"
    assert sorted(path.stem for path in (pictures / "prediction").iterdir()) == sorted(SIZES)
    assert Image.open(pictures / "side_by_side" / "b.png").size == (3 * 18 + 30, 24)


def test_a_checkpoint_that_is_pruned_meanwhile_is_skipped(run, curves, tmp_path, monkeypatch, capsys):
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    checkpoint_files.write(tmp_path / "run" / "checkpoints", {"step": 30, "epoch": 3.0}, weights(run, 20))

    def evaluate_and_prune(*arguments, **named):
        shutil.rmtree(checkpoint_files.step_folder(tmp_path / "run" / "checkpoints", 30), ignore_errors=True)
        return evaluate(*arguments, **named)

    monkeypatch.setattr("common.evaluation.cli.evaluate", evaluate_and_prune)
    main_eval("toy", Config, [str(tmp_path / "run"), "-e", "0-9", "-d", "cpu"])
    assert "note: skipped a checkpoint" in capsys.readouterr().out
    content = json.loads((tmp_path / "run" / "eval" / "0-9.json").read_text())
    assert [line["step"] for line in content["checkpoints"]] == [20, 40]
    assert content["best_step"] in (20, 40)
    assert (tmp_path / "run" / "eval" / "0-9.png").exists()


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(checkpoint_files.step_folder(run / "checkpoints", step) / "model.safetensors")


def test_a_weight_file_by_another_protocol(run, tmp_path, capsys):
    torch.save(weights(run, 20), tmp_path / "mine.pth")
    arguments = ["--flip", "--scales", "0.5", "1", "--sliding", "16", "-d", "cpu"]
    main_eval("toy", Config, [str(run), "-e", str(tmp_path / "mine.pth"), *arguments])
    written = run / "eval" / "mine_sliding16_scales0.5-1_flip.json"
    assert json.loads(written.read_text())["protocol"]["crop"] == [16, 16]
    assert "sliding window 16x16 stride 11x11, scales 0.5 1, flip" in capsys.readouterr().out


def test_another_config_gives_other_data(run, data, tmp_path, capsys):
    (tmp_path / "split").mkdir()
    for kind, names in (("labeled", "a"), ("unlabeled", "b"), ("valid", "c")):
        (tmp_path / "split" / f"{kind}_filename.txt").write_text(names + "\n")
    other = DataConfig(**vars(data) | {"split": str(tmp_path / "split")})
    write_config(tmp_path / "other.json", other)
    main_eval("toy", Config, [str(run), "-e", "last", "-d", "cpu", "--config", str(tmp_path / "other.json")])
    assert "1 images" in capsys.readouterr().out
    assert json.loads((run / "eval" / "last.json").read_text())["data_config"] == str(tmp_path / "other.json")


def error_of(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main_eval("toy", Config, [*arguments, "-d", "cpu"])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_files_that_do_not_fit_are_refused_by_name(run, tmp_path, capsys):
    whole = (run / "checkpoints" / "last" / "model.safetensors").read_bytes()
    (tmp_path / "torn.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save({"module": nn.Linear(2, 2)}, tmp_path / "pickled.pth")
    torch.save(Toy().state_dict(), tmp_path / "other.pt")
    (tmp_path / "weights.txt").touch()
    for name in ("torn.safetensors", "pickled.pth", "other.pt", "weights.txt"):
        error = error_of(capsys, str(run), "-e", str(tmp_path / name))
        assert name in error and len(error.splitlines()) <= 2, error


def test_another_number_of_classes_is_refused(run, data, tmp_path, capsys):
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    write_config(tmp_path / "config.json", data, num_classes=7)
    assert "7 classes" in error_of(capsys, str(tmp_path))


def count_images(run: Path, out: Path) -> None:
    """Evaluate as one of several processes, and write which images this one opened and the scores."""
    config = load_config(Config, run / "config.json")
    config.model.pretrained = False
    accelerator = Accelerator(cpu=True)
    network = build_network(config.model)
    network.load_state_dict(read_state(run / "checkpoints" / "last" / "model.safetensors"))
    wrapped = accelerator.prepare(network)
    reader = open_reader(config.data)
    opened, read_pair = [], reader.read_pair
    reader.read_pair = lambda name: opened.append(name) or read_pair(name)
    settings = {"accelerator": accelerator, "batch_size": 1, "workers": 0}
    iou = [evaluate(wrapped, reader, names, 3, **settings).per_class_iou for names in ("abcde", "a")]
    (out / f"{accelerator.process_index}.json").write_text(json.dumps([accelerator.num_processes, opened, iou]))
    main_eval("toy", Config, [str(run), "-e", "last", "-d", "cpu"])


def test_two_processes_count_every_image_once(run, data, tmp_path):
    for child in call_in_two(2 * [partial(count_images, run, tmp_path)], tmp_path / "log"):
        child.finish()
    network, reader = build_network(ModelConfig(**MODEL | {"pretrained": False})), open_reader(data)
    network.load_state_dict(weights(run, 40))
    expected = [
        evaluate(network, reader, names, 3, Accelerator(cpu=True), batch_size=1, workers=0) for names in ("abcde", "a")
    ]
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert sorted(name for _, opened, _ in results for name in opened) == sorted("abcde" + "a")
    for processes, opened, iou in results:
        assert processes == 2 and len(opened) < 5
        for got, scores in zip(iou, expected):
            assert np.array_equal(got, scores.per_class_iou, equal_nan=True)
    written = json.loads((run / "eval" / "last.json").read_text())
    assert written["miou"] == pytest.approx(expected[0].miou, abs=0) and not math.isnan(expected[0].miou)
