"""docs/your_data.md: its commands in their order from a clean folder, and its split by hand; errors of mistakes."""

import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.config import load_config
from common.config.sections import DataConfig
from common.datasets import open_reader
from common.datasets.class_list import read_classes
from common.errors import UserError
from common.splits.split import read_split
from splits.make import main as make
from supervised.train import main as train
from tests.conftest import SCRIPTS, module_of
from tests.helpers.commands import SMALL_MODEL, run_python, without_launcher
from tests.helpers.fields import write_field

PAGE = (Path(__file__).parent.parent / "docs" / "your_data.md").read_text()
FENCED = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
BLOCKS = dict(FENCED)
# Start and train; evaluate and predict; check; make a split by hand.
COMMANDS = [block.strip().splitlines() for language, block in FENCED if not language]
MAKE = shlex.split(COMMANDS[3][0])[2:]
COLORS = np.array([(128, 64, 128), (0, 128, 0), (70, 130, 180), (0, 0, 0)], np.uint8)  # the last is ignored
SHORT = ["--data.crop_size", "[32,32]", "--data.workers", "0", "--optim.batch_size", "2", "--run.threads", "1"]


def write_mask(path: Path, ids: np.ndarray, kind: str) -> None:
    """`ids`, of which 3 is no class, as a mask of colors, of numbers, or of colors in a palette of another order."""
    if kind == "rgb":
        Image.fromarray(COLORS[ids]).save(path)
    elif kind == "gray":
        Image.fromarray(np.where(ids == 3, 255, ids).astype(np.uint8)).save(path)
    else:
        picture = Image.fromarray((3 - ids).astype(np.uint8)).convert("P")
        picture.putpalette(COLORS[::-1].tobytes())
        picture.save(path)


def draw(folder: Path, kind: str = "rgb", masks: int = 12) -> Path:
    """20 photos of three stripes and noise, the first with masks; data/mine in `folder`."""
    mine, rng = folder / "data" / "mine", np.random.RandomState(0)
    for name in ("photos", "masks"):
        (mine / name).mkdir(parents=True)
    for number in range(20):
        ids = np.sort(rng.randint(0, 3, (40, 1)), axis=0).repeat(48, 1)
        ids[:, :2] = 3
        image = np.clip(COLORS[ids] + rng.randint(0, 40, (40, 48, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(mine / "photos" / f"p{number:02d}.jpg")
        if number < masks:
            write_mask(mine / "masks" / f"p{number:02d}_mask.png", ids, kind)
    names = re.sub(r" \d+", "", BLOCKS["text"]).replace("ignore\n", "") if kind == "gray" else BLOCKS["text"]
    (mine / "classes.txt").write_text(names)
    (folder / "mine.json").write_text(BLOCKS["json"])
    return mine


def test_the_commands_of_the_page_end_in_scores(tmp_path):
    write_field(tmp_path / "data" / "mine", images=60, masks=24)
    for paper in ("unimatch", "splits"):
        (tmp_path / paper).symlink_to(Path(__file__).parent.parent / paper)
    first, second, third, _ = COMMANDS
    assert len(first) == 2
    text = ""
    for command in [*first, *second, *third]:
        arguments = without_launcher(command)
        if arguments[0] == "unimatch/train.py":
            arguments += [*SHORT, *SMALL_MODEL, "--run.steps", "3"]
        ended = run_python(arguments, tmp_path)
        assert ended.status == 0, ended.err
        text += ended.out
        if arguments[:2] == ["-m", "common.start"]:
            assert first[1] in text and second[0] in text  # it prints what comes next
    assert "19 labeled, 36 unlabeled, 5 for validation" in text
    assert (tmp_path / "data" / "mine-training" / "splits" / "19" / "0").is_dir()
    assert "mIoU" in text and "class_2" in text and "result: the data can be used" in text
    pictures = tmp_path / "runs" / "unimatch" / "mine" / "eval" / "pictures"
    assert len(list(pictures.rglob("prediction/*.png"))) == 5
    assert len(list((tmp_path / "predictions" / "mask").iterdir())) == 60


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_takes_the_config(script, tmp_path):
    (tmp_path / "mine.json").write_text(BLOCKS["json"])
    config = load_config(importlib.import_module(module_of(script)).Config, tmp_path / "mine.json")
    assert config.data.dataset == "folder"


def make_command(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    make(MAKE)


@pytest.mark.parametrize("kind", ["rgb", "gray", "palette"])
def test_masks_of_every_kind_give_the_same_labels(kind, tmp_path, monkeypatch):
    mine = draw(tmp_path, kind)
    make_command(tmp_path, monkeypatch)
    reader = open_reader(DataConfig(**json.loads(BLOCKS["json"])["data"]))
    split = read_split("data/mine/splits/8/0")
    assert reader.classes == ("road", "grass", "sky")
    rng = np.random.RandomState(0)
    ids = np.sort(rng.randint(0, 3, (40, 1)), axis=0)
    label = reader.read_label("p00").numpy()
    assert (label[:, 2:] == ids).all() and (label[:, :2] == 255).all()
    assert not reader.has_label("p12") and "p12" in split.unlabeled
    assert mine.joinpath("splits").is_dir()
    if kind != "gray":
        assert reader.palette[:3].tolist() == COLORS[:3].tolist()


@pytest.mark.parametrize("mode", ["L", "1", "RGB"])
def test_black_and_white_masks_are_colors(mode, tmp_path):
    mine = draw(tmp_path, masks=1)
    classes(mine, "background 0 0 0", "thing 255 255 255")
    Image.fromarray(np.repeat([[0, 255]], 40, axis=0).astype(np.uint8)).convert(mode).save(mine / "masks/p00_mask.png")
    reader = open_reader(DataConfig(**json.loads(BLOCKS["json"])["data"] | {"root": str(mine)}))
    assert reader.read_label("p00").tolist() == [[0, 1]] * 40


def test_folders_may_be_anywhere(tmp_path):
    mine = draw(tmp_path)
    (tmp_path / "else").mkdir()
    (mine / "classes.txt").rename(tmp_path / "else" / "classes.txt")
    folders = {"image_dir": str(mine / "photos"), "label_dir": str(mine / "masks")}
    reader = open_reader(DataConfig("folder", str(tmp_path / "else"), **folders))
    assert len(reader.names("train")) == 20 and reader.has_label("p00") and not reader.has_label("p12")
    assert reader.read_pair("p00")[0].shape == (3, 40, 48)


def test_validation_images_do_not_depend_on_labels_and_seed(tmp_path, monkeypatch, capsys):
    draw(tmp_path)
    make_command(tmp_path, monkeypatch)
    make([*MAKE, "--labels", "2", "--seed", "7"])
    make([*MAKE, "--labels", "1/1"])
    first, other, every = (read_split(f"data/mine/splits/{name}") for name in ("8/0", "2/7", "9/0"))
    assert first.valid == other.valid == every.valid and len(every.unlabeled) == 8
    assert not set(first.valid) & {*first.labeled, *first.unlabeled}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda mine: write_rgb(mine, (9, 9, 9)),
            r"p03_mask\.png contains the color \(9, 9, 9\), which .*classes\.txt",
        ),
        (lambda mine: write_mask(mine / "masks/p03_mask.png", np.full((4, 4), 1), "rgb"), "is 48x40 but its label"),
        (lambda mine: (mine / "masks/p03_mask.png").write_bytes(b"x"), "cannot be decoded"),
        (
            lambda mine: classes(mine, "a", "b", "c"),
            r"is a picture of colors: add .*classes\.txt, e\.g\. `road 128 64 128`",
        ),
        (lambda mine: classes(mine, "a 1 2 3", "b"), "b has no color, but other classes have one"),
        (lambda mine: classes(mine, "a 1 2 3", "b 1 2 3"), r"\(1, 2, 3\) occurs 2 times"),
        (lambda mine: classes(mine, "a", "a"), "a occurs 2 times"),
        (lambda mine: classes(mine, "a", "b", "ignore 1"), "1 is to be ignored, but is the id of b"),
        (lambda mine: classes(mine, "a", "b", "ignore"), "the line 'ignore' has no value"),
        (lambda mine: classes(mine, "a 1 2 300", "b 1 2 3"), "a value is above 255"),
        (lambda mine: classes(mine, "a"), "has 1 names"),
        (lambda mine: (mine / "val.txt").write_text("p01\n"), "has its own images for validation"),
        (
            lambda mine: [path.rename(path.with_name("x" + path.name)) for path in (mine / "masks").iterdir()],
            "no image has",
        ),
        (
            lambda mine: [path.rename(path.with_suffix(".jpg")) for path in (mine / "masks").iterdir()],
            r"no image has a label: a mask has the name of its image; .*masks/\{name\}_mask\.png",
        ),
        (lambda mine: (mine / "photos").rename(mine / "pictures"), "no images in .*photos"),
    ],
)
def test_mistakes_are_reported_before_anything_is_written(spoil, message, tmp_path, monkeypatch, capsys):
    mine = draw(tmp_path)
    spoil(mine)
    with pytest.raises(SystemExit) as stopped:
        make_command(tmp_path, monkeypatch)
    message_shown = capsys.readouterr().err
    assert stopped.value.code == 2 and len(message_shown.splitlines()) <= 2
    assert re.search(message, message_shown), message_shown
    assert not (mine / "splits").exists()


def write_rgb(mine: Path, color: tuple[int, int, int]) -> None:
    Image.new("RGB", (48, 40), color).save(mine / "masks" / "p03_mask.png")


def classes(mine: Path, *lines: str) -> None:
    (mine / "classes.txt").write_text("\n".join(lines))


def test_wrong_numbers_shares_and_class_counts_are_errors(tmp_path, monkeypatch, capsys):
    draw(tmp_path, "gray")
    monkeypatch.chdir(tmp_path)
    for more, message in (
        (["--valid", "12"], "none is left to learn from"),
        (["--valid", "some"], "--valid some: give a number"),
        (["--labels", "10"], "10 labeled images of 9"),
    ):
        with pytest.raises(SystemExit):
            make([*MAKE, *more])
        assert message in capsys.readouterr().err
    arguments = MAKE
    at = arguments.index("--valid")
    with pytest.raises(SystemExit):
        make(arguments[:at] + arguments[at + 2 :])
    assert "--valid 1/5" in capsys.readouterr().err
    make_command(tmp_path, monkeypatch)
    with pytest.raises(SystemExit):
        train(["--config", "mine.json", *SHORT, *SMALL_MODEL, "--model.num_classes", "4"])
    assert "model.num_classes is 4, but data/mine has 3 classes (road, grass, sky" in capsys.readouterr().err
    (tmp_path / "data/mine/classes.txt").write_text("road\ngrass\n")
    with pytest.raises(SystemExit):
        make(MAKE)
    assert "_mask.png holds 2, which this dataset does not define" in capsys.readouterr().err


def test_class_lists_are_read_as_people_write_them(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufefftraffic light, 250, 170, 30\r\n\r\nsky 70 130 180\r\nignore 0,0,0\r\nignore 9\r\n".encode())
    found = read_classes(path)
    assert found.names == ("traffic light", "sky") and found.colors == ((250, 170, 30), (70, 130, 180))
    assert found.ignored_ids == (9,) and found.ignored_colors == ((0, 0, 0),)
    path.write_text("class 1\nclass 2\n")
    assert read_classes(path).names == ("class 1", "class 2")
    with pytest.raises(UserError, match="no class list"):
        read_classes(tmp_path / "none.txt")
