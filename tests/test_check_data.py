"""check_data: sound data pass, and each possible problem is named with exit status 2."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.check_data import main
from common.splits.split import Split, write_split
from tests.test_memory_bank_configs import DESCRIBED
from tests.test_released_configs import CAC, CPCL, PRCL


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A VOC tree of the classes 0 and 1, a split and a config that names them; the unlabeled image has no label."""
    for folder in ("JPEGImages", "SegmentationClassAug"):
        (tmp_path / "voc" / folder).mkdir(parents=True)
    for name in ("l1", "l2", "u1", "v1"):
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "voc" / "JPEGImages" / f"{name}.jpg")
    label = np.array([[0] * 6, [1] * 6, [1] * 6, [255] * 6], np.uint8)
    for name in ("l1", "l2", "v1"):
        Image.fromarray(label).save(tmp_path / "voc" / "SegmentationClassAug" / f"{name}.png")
    write_split(tmp_path / "split", Split(["l1", "l2"], ["u1"], ["v1"]))
    data = {"dataset": "voc", "root": str(tmp_path / "voc"), "split": str(tmp_path / "split")}
    (tmp_path / "config.json").write_text(
        json.dumps({"data": data, "model": {"num_classes": 21}, "method": {"a paper's": 1}})
    )
    return tmp_path


def check(tree: Path, capsys, *overrides: str) -> tuple[int, str]:
    """Exit status and what was printed, with the line breaks of the terminal width taken out."""
    try:
        main(["--config", str(tree / "config.json"), *overrides])
        status = 0
    except SystemExit as stopped:
        status = stopped.code
    return status, " ".join(capsys.readouterr().out.split())


def test_sound_data_pass(tree, capsys):
    status, text = check(tree, capsys)
    assert status == 0
    assert text.endswith("result: the data can be used")
    assert "dataset: voc" in text and "SegmentationClassAug" in text
    assert "labeled │ 2 │ 0 │ 0 │ 6x4" in text and "unlabeled │ 1 │ 0 │ 0 │ 6x4" in text
    assert "aeroplane │ 50.00 │ 50.00" in text and "(ignore) │ 25.00 │ 25.00" in text


def test_a_random_order_takes_the_place_of_the_lists(tree, capsys):
    (tree / "voc" / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tree / "voc" / "ImageSets" / "Segmentation" / "val.txt").write_text("v1\n")
    status, text = check(tree, capsys, "--data.split_id", "3", "--data.labeled_samples=1")
    assert status == 0
    assert "split: split id 3 with 1 labels" in text and "unlabeled │ 1 │ 0 │ 0 │ 6x4" in text


def test_missing_and_broken_files_are_counted_and_named(tree, capsys):
    (tree / "voc" / "JPEGImages" / "u1.jpg").unlink()
    (tree / "voc" / "SegmentationClassAug" / "l1.png").unlink()
    (tree / "voc" / "JPEGImages" / "l2.jpg").write_bytes(b"no picture")
    status, text = check(tree, capsys)
    assert status == 2
    assert "labeled │ 2 │ 1 │ 1 │ -" in text and "unlabeled │ 1 │ 1 │ 0 │ -" in text
    assert "problem: labeled: no label of l1:" in text and "problem: unlabeled: no image of u1:" in text
    assert "l2.jpg cannot be decoded" in text
    assert text.endswith("result: problems found, see above")


def test_label_values_and_sizes_are_checked(tree, capsys):
    Image.fromarray(np.full((4, 6), 77, np.uint8)).save(tree / "voc" / "SegmentationClassAug" / "l1.png")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tree / "voc" / "SegmentationClassAug" / "v1.png")
    status, text = check(tree, capsys)
    assert status == 2
    assert "l1.png holds 77" in text
    assert "v1.jpg is 6x4 but its label" in text and "is 9x9" in text


def test_overlap_of_lists(tree, capsys):
    write_split(tree / "overlap", Split(["l1", "l2"], ["l1", "v1"], ["v1"]))
    status, text = check(tree, capsys, "--data.split", str(tree / "overlap"))
    assert status == 2
    assert "problem: 1 images are both labeled and unlabeled, and data.allow_overlap is not set, e.g. l1" in text
    assert "problem: 1 images are both unlabeled and valid, e.g. v1" in text
    write_split(tree / "allowed", Split(["l1", "l2"], ["l1", "u1"], ["v1"]))
    status, text = check(tree, capsys, "--data.split", str(tree / "allowed"), "--data.allow_overlap", "true")
    assert status == 0 and "note: 1 images are both labeled and unlabeled" in text


def test_classes_of_the_network_and_of_the_labeled_list(tree, capsys):
    Image.fromarray(np.full((4, 6), 2, np.uint8)).save(tree / "voc" / "SegmentationClassAug" / "v1.png")
    status, text = check(tree, capsys, "--model.num_classes", "19")
    assert status == 2
    assert "problem: model.num_classes is 19, but the data has 21 classes" in text
    assert "note: no labeled image contains bicycle" in text


def test_labels_that_say_nothing(tree, capsys):
    for name in ("l1", "l2"):
        Image.fromarray(np.full((4, 6), 255, np.uint8)).save(tree / "voc" / "SegmentationClassAug" / f"{name}.png")
    status, text = check(tree, capsys)
    assert status == 2 and "problem: labeled: no pixel of any class" in text


@pytest.mark.parametrize("text", [json.dumps(CAC), DESCRIBED, PRCL, CPCL])
def test_released_configs_have_to_be_translated_first(tree, capsys, text):
    (tree / "config.json").write_text(text)
    status, output = check(tree, capsys)
    assert status == 2 and "not " in output
    assert f"translate it first: python <paper>/released.py {tree / 'config.json'}" in output


def test_a_misspelled_section_of_a_config_is_named(tree, capsys):
    values = json.loads((tree / "config.json").read_text())
    (tree / "config.json").write_text(json.dumps(values | {"modle": {}}))
    status, output = check(tree, capsys)
    assert status == 2 and re.search(r"unknown key modle in .*config\.json; did you mean model\?", output)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--data.root", "nowhere"], "data root nowhere is not a folder"),
        (["--data.split", "splits/voc/8/0"], "python splits/make.py"),
        (["--data.rot", "x"], "unknown argument --data.rot; did you mean --data.root?"),
        (["--config", "nowhere.json"], "config nowhere.json cannot be read"),
    ],
)
def test_data_that_cannot_be_opened_are_reported(tree, capsys, overrides, message):
    status, text = check(tree, capsys, *overrides)
    assert status == 2
    assert message in text and text.endswith("result: problems found, see above")
