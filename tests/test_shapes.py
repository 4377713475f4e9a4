"""The built-in data: what is drawn, and the trees it is written as."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.datasets import shapes
from common.datasets.shapes import CLASSES, draw_scene, is_drawn, make_shapes
from common.errors import UserError

SIZE = (48, 64)


def make(root: Path, layout: str = "voc", **changes) -> Path:
    make_shapes(root, layout, **{"train": 6, "val": 3, "size": SIZE} | changes)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_the_same_seed_makes_the_same_bytes(tmp_path):
    assert contents(make(tmp_path / "one")) == contents(make(tmp_path / "two"))
    other = contents(make(tmp_path / "three", seed=1))
    assert other["JPEGImages/2007_000001.jpg"] != contents(tmp_path / "one")["JPEGImages/2007_000001.jpg"]


def test_a_scene_does_not_depend_on_how_many_there_are(tmp_path):
    few, many = contents(make(tmp_path / "few", train=2)), contents(make(tmp_path / "many", train=6))
    assert few["JPEGImages/2007_000002.jpg"] == many["JPEGImages/2007_000002.jpg"]
    assert few["JPEGImages/2007_000003.jpg"] == many["JPEGImages/2007_000007.jpg"], "the first of val"


def test_all_classes_appear_and_no_other_values(tmp_path):
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng, SIZE) for _ in range(40)]
    assert all(scene.image.shape == (*SIZE, 3) and scene.label.shape == SIZE for scene in scenes)
    assert set(np.unique([scene.label for scene in scenes])) == {*range(len(CLASSES)), 255}


def test_the_domains_differ_in_light_and_not_in_classes():
    day, dusk = ([draw_scene(np.random.default_rng(i), SIZE, domain) for i in range(40)] for domain in ("a", "b"))
    assert np.mean([scene.image for scene in day]) > np.mean([scene.image for scene in dusk]) + 15
    assert set(np.unique([scene.label for scene in day])) == set(np.unique([scene.label for scene in dusk]))


def test_voc_layout(tmp_path):
    root = make(tmp_path / "voc")
    lists = {name: (root / f"ImageSets/Segmentation/{name}.txt").read_text().split() for name in ("train", "val")}
    assert lists == {
        "train": [f"2007_{number:06d}" for number in range(1, 7)],
        "val": [f"2007_{number:06d}" for number in range(7, 10)],
    }
    for name in lists["train"] + lists["val"]:
        assert pixels(root / f"JPEGImages/{name}.jpg").shape == (*SIZE, 3)
        label = Image.open(root / f"SegmentationClassAug/{name}.png")
        assert label.mode == "P"
        assert label.getpalette()[:15] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128]
        assert set(np.unique(label)) <= {*range(len(CLASSES)), 255}


def test_cityscapes_layout(tmp_path):
    root = make(tmp_path / "cityscapes", "cityscapes")
    for subset, count in (("train", 6), ("val", 3)):
        images = sorted((root / "leftImg8bit" / subset).glob("*/*_leftImg8bit.png"))
        assert len(images) == count
        for path in images:
            stem = path.name.removesuffix("_leftImg8bit.png")
            assert stem.startswith(path.parent.name + "_") and stem.endswith("_000019")
            label = pixels(root / "gtFine" / subset / path.parent.name / f"{stem}_gtFine_labelIds.png")
            assert label.shape == SIZE and set(np.unique(label)) <= {0, 7, 8, 11, 12, 13, 17, 19}


def test_gta5_layout(tmp_path):
    root = make(tmp_path / "gta5", "gta5")
    names = [f"{number:05d}.png" for number in range(1, 10)]
    assert sorted(path.name for path in (root / "images").iterdir()) == names
    assert sorted(path.name for path in (root / "labels").iterdir()) == names
    label = Image.open(root / "labels/00001.png")
    assert label.mode == "P"
    colors = {0: (0, 0, 0), 7: (128, 64, 128), 8: (244, 35, 232), 11: (70, 70, 70), 12: (102, 102, 156)}
    colors |= {13: (190, 153, 153), 17: (153, 153, 153), 19: (250, 170, 30)}
    rgb, ids = np.asarray(label.convert("RGB")), np.asarray(label)
    for index in np.unique(ids):
        assert {tuple(color) for color in rgb[ids == index].tolist()} == {colors[index]}


def test_layouts_show_the_same_scenes(tmp_path):
    cityscapes = make(tmp_path / "cityscapes", "cityscapes", train=1)
    gta5 = make(tmp_path / "gta5", "gta5", train=1)
    image = "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"
    label = "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"
    assert (pixels(cityscapes / image) == pixels(gta5 / "images/00001.png")).all()
    assert (pixels(cityscapes / label) == pixels(gta5 / "labels/00001.png")).all()


def test_a_second_call_does_nothing(tmp_path, monkeypatch):
    root = make(tmp_path / "voc")
    monkeypatch.setattr(shapes, "draw_scene", None)
    (root / "JPEGImages/2007_000001.jpg").write_bytes(b"touched")
    make(root)
    assert (root / "JPEGImages/2007_000001.jpg").read_bytes() == b"touched"


def test_other_parameters_and_foreign_folders_are_refused(tmp_path):
    root = make(tmp_path / "voc")
    before = contents(root)
    with pytest.raises(UserError, match=r"seed 0, not 5.*remove it or give another folder"):
        make(root, seed=5)
    assert contents(root) == before

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("dear")
    with pytest.raises(UserError, match="is not built-in data"):
        make(foreign)
    assert contents(foreign) == {"thesis.tex": b"dear"}

    with pytest.raises(UserError, match='layout "coco"'):
        make(tmp_path / "coco", "coco")


def test_an_empty_folder_is_filled(tmp_path):
    make(tmp_path)
    assert json.loads((tmp_path / "shapes.json").read_text())["layout"] == "voc"


def test_a_broken_making_leaves_nothing(tmp_path, monkeypatch):
    def out_of_ink(*args):
        raise RuntimeError("out of ink")

    monkeypatch.setattr(shapes, "draw_scene", out_of_ink)
    with pytest.raises(RuntimeError, match="out of ink"):
        make(tmp_path / "voc")
    assert not any(tmp_path.iterdir())


def test_data_of_another_drawing_are_not_trained_on(tmp_path):
    root = tmp_path / "shapes"
    assert not is_drawn(root)
    make_shapes(root, "voc", train=2, val=1, size=(32, 32))
    assert is_drawn(root)
    stamp = json.loads((root / "shapes.json").read_text())
    (root / "shapes.json").write_text(json.dumps(stamp | {"drawing": 0}))
    with pytest.raises(UserError, match="another version"):
        is_drawn(root)
