"""Bad data files: the training script reports them in one or two lines before it writes anything."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.datasets.voc import CLASSES
from tests.helpers.commands import refused, train
from tests.helpers.kill_runs import metrics

SCRIPT = "supervised/train.py"


@pytest.fixture
def tree(shapes_root, tiny, tmp_path) -> tuple[Path, list[str], list[str]]:
    """A VOC tree of the user's own, ids of its labeled list, and the arguments that train on it."""
    root = tmp_path / "data"
    split = root / "splits" / "6" / "0"
    shutil.copytree(shapes_root, root)
    own = ["--data.dataset", "voc", "--data.root", str(root), "--data.split", str(split)]
    arguments = tiny(SCRIPT, *own, "--model.num_classes", str(len(CLASSES)))
    return root, (split / "labeled_filename.txt").read_text().split(), arguments


def image_of(root: Path, name: str) -> Path:
    return root / "JPEGImages" / f"{name}.jpg"


def label_of(root: Path, name: str) -> Path:
    return root / "SegmentationClassAug" / f"{name}.png"


def listed(root: Path, kind: str) -> Path:
    return root / "splits" / "6" / "0" / f"{kind}_filename.txt"


def lose_image(root: Path, name: str) -> str:
    image_of(root, name).unlink()
    return name


def lose_label(root: Path, name: str) -> str:
    label_of(root, name).unlink()
    return name


def write_text_as_image(root: Path, name: str) -> str:
    image_of(root, name).write_text("not a picture")
    return f"{name}.jpg"


def shrink_label(root: Path, name: str) -> str:
    Image.open(label_of(root, name)).resize((20, 10), Image.NEAREST).save(label_of(root, name))
    return "20x10"


def empty_list(root: Path, name: str) -> str:
    listed(root, "labeled").write_text("\n \n")
    return "labeled_filename.txt"


def list_in_both(root: Path, name: str) -> str:
    with listed(root, "unlabeled").open("a") as file:
        file.write(f"{name}\n")
    return "data.allow_overlap"


def list_twice(root: Path, name: str) -> str:
    with listed(root, "labeled").open("a") as file:
        file.write(f"{name}\n")
    return name


def list_unknown(root: Path, name: str) -> str:
    with listed(root, "labeled").open("a") as file:
        file.write("no_such_image\n")
    return "no_such_image"


def list_validation(root: Path, name: str) -> str:
    with listed(root, "valid").open("a") as file:
        file.write(f"{name}\n")
    return "also trained on"


@pytest.mark.parametrize(
    "spoil",
    [
        lose_image,
        lose_label,
        write_text_as_image,
        shrink_label,
        empty_list,
        list_in_both,
        list_twice,
        list_unknown,
        list_validation,
    ],
)
def test_bad_data_are_reported_before_training(spoil: Callable[[Path, str], str], tree, tmp_path, capsys):
    root, names, arguments = tree
    words = spoil(root, names[0])
    assert words in refused(SCRIPT, arguments, capsys)
    assert not (tmp_path / "run").exists()


def test_an_unknown_label_value_is_reported_with_its_file(tree, capsys):
    root, names, arguments = tree
    for name in names:
        label = np.array(Image.open(label_of(root, name)))
        label[:] = 77
        Image.fromarray(label).save(label_of(root, name))
    message = refused(SCRIPT, arguments, capsys)
    assert "holds 77" in message and ".png" in message


def test_windows_line_ends_and_blank_lines_are_accepted(tree, tmp_path):
    root, _, arguments = tree
    for kind in ("labeled", "unlabeled", "valid"):
        names = listed(root, kind).read_text().split()
        listed(root, kind).write_bytes("\r\n\r\n".join(names).encode())
    train(SCRIPT, arguments)
    assert metrics(tmp_path / "run")[-1]["step"] == 6


def test_a_list_in_another_encoding_is_refused(tree, capsys):
    root, _, arguments = tree
    names = listed(root, "labeled").read_text()
    listed(root, "labeled").write_text(names, encoding="utf-16")
    assert "labeled_filename.txt is not UTF-8 text" in refused(SCRIPT, arguments, capsys)


def test_the_run_folder_of_another_network_is_refused(tiny, tmp_path, capsys):
    train(SCRIPT, tiny(SCRIPT, "--run.steps", "2"))
    config = tmp_path / "run" / "config.json"
    # As if the config had been edited to fit: the checkpoint is still of another network.
    config.write_text(config.read_text().replace('"channels": 8', '"channels": 16'))
    message = refused(SCRIPT, tiny(SCRIPT, "--run.steps", "2", "--model.channels", "16"), capsys)
    assert "is of another network" in message


def test_an_unknown_device_is_refused(tiny, capsys):
    assert "run.device" in refused(SCRIPT, tiny(SCRIPT, "--run.device", "tpu"), capsys)
