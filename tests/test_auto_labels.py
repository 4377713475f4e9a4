"""Masks from a network's confident pixels: their values, the masks of people beside them, and training on both."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.config.sections import DataConfig
from common.datasets import open_reader
from common.predict import load_predictor
from common.predict import main as predict
from common.splits.split import read_split
from common.start import main as start
from splits.make import main as make
from supervised.train import main as train
from tests.helpers.commands import SMALL_MODEL
from tests.helpers.fields import write_field
from tests.test_your_data import BLOCKS, COLORS, SHORT, draw

MAKE = "--dataset folder --data-root data/mine --image-dir photos --label-dir masks --labels 8 --valid 1/5"


@pytest.fixture(params=["gray", "rgb"])
def mine(request, tmp_path, monkeypatch) -> Path:
    """data/mine with 20 images, 12 of them with masks, and a network trained for two steps in runs/first."""
    monkeypatch.chdir(tmp_path)
    mine = draw(tmp_path, request.param)
    make([*MAKE.split(), "--out", "data/mine/splits"])
    train(["--config", "mine.json", *SHORT, *SMALL_MODEL, "--run.steps", "2", "--run.dir", "runs/first"])
    return mine


def label_all(*more: str) -> float:
    """Label the photos into data/mine/auto; returns the threshold, which half of the pixels of p12 reach."""
    _, confidence = load_predictor("runs/first", device="cpu")(Image.open("data/mine/photos/p12.jpg"))
    least = float(np.median(confidence))
    flags = ["--save", "pseudo_label", "--min-confidence", str(least), "--out", "data/mine/auto", "-d", "cpu"]
    predict(["runs/first", "data/mine/photos", *flags, *more])
    return least


def data_of(settings: dict[str, str]) -> DataConfig:
    return DataConfig(**json.loads(BLOCKS["json"])["data"] | settings)


def test_a_run_trains_on_the_masks_of_another(mine, capsys):
    """Train, label, train on the result, with the settings that the command prints."""
    least = label_all("--masks", "data/mine/masks")
    output = capsys.readouterr().out
    assert "12 masks of people kept" in output
    printed = re.search(r"^train with (.*)$", output, re.MULTILINE)[1].split()
    settings = {key.removeprefix("--data."): value for key, value in zip(printed[::2], printed[1::2])}
    assert settings["label_dir"] == "auto/pseudo_label" and settings["split"] == "data/mine/auto/split"
    before, reader = open_reader(data_of({})), open_reader(data_of({"label_dir": settings["label_dir"]}))
    predictor = load_predictor("runs/first", device="cpu")
    empty = 0
    for number in range(20):
        name = f"p{number:02d}"
        label = reader.read_label(name).numpy()
        if number < 12:
            assert np.array_equal(label, before.read_label(name).numpy())
            continue
        ids, confidence = predictor(Image.open(mine / "photos" / f"{name}.jpg"))
        assert np.array_equal(label, np.where(confidence < least, 255, ids))
        empty += (label == 255).all()
    split, first = read_split(settings["split"], allow_overlap=True), read_split("data/mine/splits/8/0")
    assert split.valid == first.valid and set(first.labeled) <= set(split.labeled)
    assert split.unlabeled == [f"p{number:02d}" for number in range(12, 20)]
    assert len(split.labeled) == 12 - len(first.valid) + 8 - empty and empty < 8
    train(["--config", "mine.json", *SHORT, *SMALL_MODEL, *printed, "--run.steps", "2", "--run.dir", "runs/second"])
    assert Path("runs/second/checkpoints/last").exists()


def test_masks_are_shown_in_the_colors_of_the_classes(mine):
    label_all()
    mask = Image.open("data/mine/auto/pseudo_label/p12.png")
    assert mask.mode == "P"
    ids, colors = np.asarray(mask), np.asarray(mask.convert("RGB"))
    is_colored = " " in (mine / "classes.txt").read_text()
    ignored = (0, 0, 0) if is_colored else (255, 255, 255)
    assert set(map(tuple, colors[ids == 255])) == {ignored}
    if is_colored:
        assert np.array_equal(colors[ids < 3], COLORS[ids[ids < 3]])


def test_masks_of_other_datasets_become_a_folder_dataset(small_run, shapes_root, tmp_path, capsys):
    train(small_run("supervised/train.py", tmp_path / "run", "--run.steps", "2", "--run.eval_every", "2"))
    flags = ["--masks", shapes_root / "SegmentationClassAug", "--out", tmp_path / "auto", "-d", "cpu"]
    out = ["--save", "pseudo_label", "--min-confidence", "0"]
    predict([str(text) for text in (tmp_path / "run", shapes_root / "JPEGImages", *flags, *out)])
    printed = re.search(r"^train with (.*)$", capsys.readouterr().out, re.MULTILINE)[1].split()
    train(small_run("supervised/train.py", tmp_path / "second", *printed, "--run.steps", "2"))
    config = json.loads((tmp_path / "second" / "config.json").read_text())["data"]
    config = DataConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in config.items()})
    assert config.dataset == "folder"
    name = read_split(config.split, allow_overlap=True).valid[0]
    original = open_reader(DataConfig("shapes", str(shapes_root)))
    assert np.array_equal(open_reader(config).read_label(name), original.read_label(name))
    assert open_reader(config).classes == original.classes


@pytest.mark.parametrize("mine", ["rgb"], indirect=True)
def test_mistakes_are_errors_before_anything_is_written(mine, tmp_path, capsys):
    def refused(words: str, *flags: str) -> None:
        with pytest.raises(SystemExit) as stopped:
            predict(["runs/first", "data/mine/photos", "--save", "pseudo_label", "--out", "auto", "-d", "cpu", *flags])
        message = capsys.readouterr().err
        assert stopped.value.code == 2 and words in message and len(message.splitlines()) <= 2, message
        assert not Path("auto/pseudo_label").exists()

    refused("--masks data/mine/photos: no mask there belongs", "--masks", "data/mine/photos")
    with pytest.raises(SystemExit):
        predict(["runs/first", "data/mine/photos", "--save", "mask", "--out", "auto", "--min-confidence", "0.5"])
    assert "--min-confidence and --masks go with --save pseudo_label" in capsys.readouterr().err
    Image.new("RGB", (9, 9)).save(mine / "masks" / "p03_mask.png")
    refused("but its label", "--masks", "data/mine/masks")
    classes = (mine / "classes.txt").read_text()
    (mine / "classes.txt").write_text(classes.replace("ignore 0 0 0\n", ""))
    refused("has no color for pixels without a label: add the line `ignore 0 0 0`")
    (mine / "classes.txt").write_text("road 1 2 3\nsky 4 5 6\nignore 0 0 0\n")
    refused("has 2 names, but the network 3")
    (mine / "classes.txt").unlink()
    refused("no class list data/mine/classes.txt")
    (mine / "classes.txt").write_text(classes)
    (mine / "photos" / "sub").mkdir()
    (mine / "photos" / "p01.jpg").rename(mine / "photos" / "sub" / "p01.jpg")
    refused("is in a subfolder")


@pytest.mark.parametrize("mine", ["gray"], indirect=True)
def test_masks_are_not_overwritten_and_none_is_an_error(mine, tmp_path, capsys):
    label_all()
    assert "list images for validation" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        label_all()
    assert "has masks already, perhaps corrected ones" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        label_all("--out", "data/mine/other", "--min-confidence", "1")
    assert "no pixel reaches the confidence 1" in capsys.readouterr().err


def test_images_and_masks_that_patterns_name(tmp_path, monkeypatch, capsys):
    """The loop with `001_image.png` and `001_annotation.png`: ids in the lists are those of the pattern."""
    monkeypatch.chdir(tmp_path)
    write_field(tmp_path / "field", images=12, masks=8)
    start([str(tmp_path / "field")])
    with (tmp_path / "field-training" / "classes.txt").open("a") as classes:
        classes.write("ignore 255 255 255\n")
    config = ["--config", "field-training/field.json", "--model.pretrained", "false", "--data.crop_size", "[32,32]"]
    config += [*SMALL_MODEL, "--optim.batch_size", "2", "--run.threads", "1", "--data.workers", "0"]
    config += ["--run.steps", "2", "--run.eval_every", "2"]
    train([*config, "--run.dir", "runs/first"])
    capsys.readouterr()
    flags = ["--save", "pseudo_label", "--min-confidence", "0", "--masks", "field/annotations", "--out", "auto"]
    predict(["runs/first", "field/images", *flags, "-d", "cpu"])
    printed = re.search(r"^train with (.*)$", capsys.readouterr().out, re.MULTILINE)[1].split()
    split = read_split("auto/split", allow_overlap=True)
    assert split.unlabeled == ["009", "010", "011", "012"] and len(split.labeled) + len(split.valid) == 12
    for name in ("001", "008"):
        drawn = np.asarray(Image.open(f"field/annotations/{name}_annotation.png"))
        assert np.array_equal(np.asarray(Image.open(f"auto/pseudo_label/{name}_image.png").convert("RGB")), drawn)
    train([*config, *printed, "--run.dir", "runs/second"])
    assert Path("runs/second/checkpoints/last").exists()
