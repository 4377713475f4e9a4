"""Readers: every tree that papers use is found, and what it stores becomes class ids and 255."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.config.sections import DataConfig
from common.datasets import cityscapes, gta5, open_reader
from common.datasets.cityscapes import Cityscapes
from common.datasets.folder import Folder
from common.datasets.gta5 import GTA5
from common.datasets.reader import voc_palette
from common.datasets.shapes import make_shapes
from common.datasets.voc import VOC
from common.errors import UserError

STEM = "aachen_000013_000019"
CITY = f"{STEM}_leftImg8bit"
VALUES = np.array([[0, 1, 20], [7, 255, 3]], np.uint8)


def save(path: Path, pixels: np.ndarray, palette: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    if palette is not None:
        picture.putpalette(palette.astype(np.uint8).tobytes())
    picture.save(path)
    return path


def save_image(path: Path, size: tuple[int, int] = (2, 3), color: tuple[int, int, int] = (10, 20, 30)) -> Path:
    return save(path, np.full((*size, 3), color, np.uint8))


def voc_tree(root: Path, folder: str = "SegmentationClassAug", palette: np.ndarray | None = None) -> Path:
    for name in ("2007_000001", "2007_000002", "2008_000001"):
        save_image(root / "JPEGImages" / f"{name}.jpg")
        save(root / folder / f"{name}.png", VALUES, palette)
    save_image(root / "JPEGImages" / "2009_000009.jpg")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("2008_000001\n")
    return root


# ---- VOC ----


@pytest.mark.parametrize("place", [".", "VOC2012", "VOCdevkit/VOC2012", "VOCtrainval_11-May-2012/VOCdevkit/VOC2012"])
def test_voc_is_found_in_the_usual_places(tmp_path, place):
    voc_tree(tmp_path / place)
    reader = VOC(tmp_path)
    assert reader.names("train") == ["2007_000001", "2007_000002"]
    assert reader.names("val") == ["2008_000001"]
    assert "SegmentationClassAug" in reader.layout
    assert len(reader.classes) == 21


@pytest.mark.parametrize("palette", [None, voc_palette()], ids=["gray", "palette"])
def test_voc_labels_are_the_stored_ids(tmp_path, palette):
    reader = VOC(voc_tree(tmp_path, palette=palette))
    image, label = reader.read_pair("2007_000001")
    assert image.dtype == torch.uint8 and image.shape == (3, 2, 3)
    assert (image.flatten(1).float().mean(1) - torch.tensor([10.0, 20, 30])).abs().max() < 3
    assert label.dtype == torch.uint8
    assert label.tolist() == VALUES.tolist()


def test_voc_prefers_augmented_labels_and_falls_back_on_its_own(tmp_path):
    voc_tree(tmp_path, "SegmentationClass")
    assert "SegmentationClassAug" not in VOC(tmp_path).layout
    save(tmp_path / "SegmentationClassAug" / "2007_000001.png", VALUES)
    reader = VOC(tmp_path)
    assert reader.label_path("2007_000001").parent.name == "SegmentationClassAug"
    assert reader.names("train") == ["2007_000001"]


def test_voc_takes_the_training_list_where_there_is_one(tmp_path):
    voc_tree(tmp_path)
    (tmp_path / "ImageSets" / "Segmentation" / "train_aug.txt").write_text("2007_000002\r\n\r\n")
    assert VOC(tmp_path).names("train") == ["2007_000002"]


def test_voc_as_cps_arranges_it(tmp_path):
    for folder, name in (("train_aug", "2007_000001"), ("val", "2008_000001")):
        save_image(tmp_path / "pascal_voc" / folder / "image" / f"{name}.jpg")
        save(tmp_path / "pascal_voc" / folder / "label" / f"{name}.png", VALUES)
    reader = VOC(tmp_path)
    assert reader.names("train") == ["2007_000001"] and reader.names("val") == ["2008_000001"]
    assert "train_aug" in reader.layout
    for name in ("2007_000001", "2008_000001"):
        assert reader.read_pair(name)[1].tolist() == VALUES.tolist()


def test_unlabeled_images_need_no_labels(tmp_path):
    reader = VOC(voc_tree(tmp_path))
    assert reader.read_image("2009_000009").shape == (3, 2, 3)
    assert not reader.has_label("2009_000009") and reader.has_label("2007_000001")
    with pytest.raises(UserError, match=r"no label of 2009_000009: .*2009_000009\.png"):
        reader.label_path("2009_000009")


# ---- Cityscapes ----


def city_image(root: Path, subset: str = "train", stem: str = STEM) -> None:
    save_image(root / subset / stem.split("_")[0] / f"{stem}_leftImg8bit.png", (1, 4))


LABEL_IDS = np.array([[7, 33, 0, 34]], np.uint8)
TRAIN_IDS = np.array([[0, 18, 255, 255]], np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "suffix"),
    [
        ("leftImg8bit", "gtFine", "_gtFine_labelIds.png"),
        ("leftImg8bit", "gtFine", "_gtFine_labelTrainIds.png"),
        ("leftImg8bit", "gtFine", "_gtFine_trainIds.png"),
        ("leftImg8bit", ".", "_gtFine_labelIds.png"),
        ("cityscapes/leftImg8bit", "cityscapes", "_gtFine_labelIds.png"),
        ("leftImg8bit_trainvaltest/leftImg8bit", "gtFine_trainvaltest/gtFine", "_gtFine_labelIds.png"),
        ("CityScapes/leftImg8bit_trainvaltest/leftImg8bit", "CityScapes/gtFine", "_gtFine_labelIds.png"),
    ],
)
def test_cityscapes_trees_of_the_papers(tmp_path, images, labels, suffix):
    city_image(tmp_path / images)
    city_image(tmp_path / images, "val", "frankfurt_000000_000294")
    stored = LABEL_IDS if suffix.endswith("labelIds.png") else TRAIN_IDS
    save(tmp_path / labels / "train" / "aachen" / f"{STEM}{suffix}", stored)
    reader = Cityscapes(tmp_path)
    assert reader.names("train") == [CITY]
    assert reader.names("val") == ["frankfurt_000000_000294_leftImg8bit"]
    assert reader.read_pair(CITY)[1].tolist() == TRAIN_IDS.tolist()
    assert suffix in reader.layout
    assert ("label ids" in reader.layout) == (stored is LABEL_IDS)


def test_cityscapes_as_cps_arranges_it(tmp_path):
    for subset, stem in (("train", STEM), ("val", "frankfurt_000000_000294")):
        save_image(tmp_path / "city" / "images" / subset / f"{stem}.png", (1, 4))
        save(tmp_path / "city" / "segmentation" / subset / f"{stem}_gtFine.png", TRAIN_IDS)
    reader = Cityscapes(tmp_path)
    assert reader.names("train") == [CITY]
    for name in reader.names("train") + reader.names("val"):
        assert reader.read_pair(name)[1].tolist() == TRAIN_IDS.tolist()
    assert "train ids" in reader.layout


def test_cityscapes_prefers_label_ids(tmp_path):
    city_image(tmp_path / "leftImg8bit")
    for suffix in ("trainIds", "labelTrainIds", "labelIds"):
        path = save(tmp_path / "gtFine" / "train" / "aachen" / f"{STEM}_gtFine_{suffix}.png", LABEL_IDS)
        if suffix != "labelIds":
            path.write_bytes(b"not opened")
    assert Cityscapes(tmp_path).read_label(CITY).tolist() == TRAIN_IDS.tolist()


def test_cityscapes_label_ids_are_mapped_by_the_published_table(tmp_path):
    city_image(tmp_path / "leftImg8bit")
    ids = np.arange(35, dtype=np.uint8)[None]
    save(tmp_path / "gtFine" / "train" / "aachen" / f"{STEM}_gtFine_labelIds.png", ids)
    mapped = Cityscapes(tmp_path).read_label(CITY)[0].tolist()
    kept = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert [mapped[i] for i in kept] == list(range(19))
    assert all(value == 255 for i, value in enumerate(mapped) if i not in kept)


@pytest.mark.parametrize(("suffix", "value"), [("labelIds", 35), ("labelTrainIds", 19), ("labelTrainIds", 254)])
def test_cityscapes_refuses_unknown_values(tmp_path, suffix, value):
    city_image(tmp_path / "leftImg8bit")
    save(tmp_path / "gtFine" / "train" / "aachen" / f"{STEM}_gtFine_{suffix}.png", np.array([[0, value]], np.uint8))
    with pytest.raises(UserError, match=rf"{STEM}_gtFine_{suffix}\.png holds {value},"):
        Cityscapes(tmp_path).read_label(CITY)


def test_cityscapes_without_labels_gives_images(tmp_path):
    city_image(tmp_path / "leftImg8bit")
    reader = Cityscapes(tmp_path)
    assert reader.read_image(CITY).shape == (3, 1, 4)
    assert "no labels" in reader.layout and not reader.has_label(CITY)
    with pytest.raises(UserError, match="no label of"):
        reader.read_label(CITY)


def test_cityscapes_ids_end_as_the_files_do(tmp_path):
    city_image(tmp_path / "leftImg8bit")
    reader = Cityscapes(tmp_path)
    with pytest.raises(UserError, match="_leftImg8bit"):
        reader.image_path(STEM)
    with pytest.raises(UserError, match=r"no image of bonn_1_2_leftImg8bit below .*leftImg8bit: looked for train/bonn"):
        reader.image_path("bonn_1_2_leftImg8bit")


# ---- GTA5 ----

COLORS = np.array([[(128, 64, 128), (119, 11, 32), (0, 0, 0), (111, 74, 0)]], np.uint8)


@pytest.mark.parametrize("subset", [".", "train"])
def test_gta5_colors_become_train_ids(tmp_path, subset):
    save_image(tmp_path / "images" / subset / "00001.png", (1, 4))
    save(tmp_path / "labels" / subset / "00001.png", COLORS)
    reader = GTA5(tmp_path)
    assert reader.names("train") == ["00001"] and reader.names("val") == []
    assert reader.read_pair("00001")[1].tolist() == TRAIN_IDS.tolist()


def test_gta5_palette_labels_go_by_their_colors(tmp_path):
    save_image(tmp_path / "images" / "00001.png", (1, 4))
    palette = np.zeros((256, 3))
    palette[[5, 6, 7, 8]] = COLORS[0]
    save(tmp_path / "labels" / "00001.png", np.array([[5, 6, 7, 8]], np.uint8), palette)
    assert GTA5(tmp_path).read_label("00001").tolist() == TRAIN_IDS.tolist()


def test_gta5_gray_labels_hold_train_ids(tmp_path):
    save_image(tmp_path / "images" / "00001.png", (1, 4))
    save(tmp_path / "labels" / "00001.png", np.array([[0, 18, 250, 255]], np.uint8))
    assert GTA5(tmp_path).read_label("00001").tolist() == TRAIN_IDS.tolist()


def test_gta5_knows_every_color_of_the_classes_and_refuses_others(tmp_path):
    save_image(tmp_path / "images" / "00001.png", (1, 19))
    path = save(tmp_path / "labels" / "00001.png", np.array([cityscapes.COLORS], np.uint8))
    assert GTA5(tmp_path).read_label("00001")[0].tolist() == list(range(19))
    save(path, np.array([gta5.VOID_COLORS], np.uint8))
    assert set(GTA5(tmp_path).read_label("00001")[0].tolist()) == {255}
    save(path, np.array([[(1, 2, 3)]], np.uint8))
    with pytest.raises(UserError, match=r"00001\.png contains the color \(1, 2, 3\)"):
        GTA5(tmp_path).read_label("00001")
    save(path, np.array([[1]], np.uint8), np.array([[0, 0, 0], [9, 9, 9]]))
    with pytest.raises(UserError, match=r"00001\.png contains the color \(9, 9, 9\)"):
        GTA5(tmp_path).read_label("00001")


# ---- any folder ----


def test_folder_with_a_list_for_validation(tmp_path):
    for name in ("a b", "c"):
        save_image(tmp_path / "pictures" / f"{name}.jpg")
    save(tmp_path / "masks" / "c.png", np.array([[0, 1, 255]] * 2, np.uint8))
    (tmp_path / "names.txt").write_text("road\nwall\n")
    (tmp_path / "val.txt").write_text("c\n")
    reader = Folder(tmp_path, "pictures", "masks", "names.txt")
    assert reader.classes == ("road", "wall")
    assert reader.names("train") == ["a b"] and reader.names("val") == ["c"]
    assert reader.read_pair("c")[1].tolist() == [[0, 1, 255]] * 2
    assert reader.read_image("a b").shape == (3, 2, 3) and not reader.has_label("a b")
    save(tmp_path / "masks" / "c.png", np.array([[2]], np.uint8))
    with pytest.raises(UserError, match=r"c\.png holds 2,"):
        reader.read_label("c")


def test_folder_with_subsets_as_camvid_has_them(tmp_path):
    for subset in ("train", "val"):
        save_image(tmp_path / subset / f"{subset}1.png")
        save(tmp_path / f"{subset}annot" / f"{subset}1.png", np.zeros((2, 3), np.uint8))
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    reader = Folder(tmp_path, "{subset}", "{subset}annot", "classes.txt")
    assert reader.names("train") == ["train1"] and reader.names("val") == ["val1"]
    assert reader.read_pair("val1")[1].sum() == 0


def test_folder_whose_labels_have_an_ending(tmp_path):
    for name in ("x", "x_1"):
        save_image(tmp_path / "images" / f"{name}.jpg")
        save(tmp_path / "labels" / f"{name}_L.png", np.full((2, 3), len(name) > 1, np.uint8))
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    reader = Folder(tmp_path, "images", "labels", "classes.txt")
    assert reader.label_path("x").name == "x_L.png"
    assert reader.read_pair("x_1")[1].min() == 1
    assert "_L" in reader.layout


def test_folder_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"no class list .*classes\.txt"):
        Folder(tmp_path, "images", "labels", "classes.txt")
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    with pytest.raises(UserError, match=r"no images in .*images"):
        Folder(tmp_path, "images", "labels", "classes.txt")
    save_image(tmp_path / "images" / "a.jpg")
    reader = Folder(tmp_path, "images", "labels", "classes.txt")
    with pytest.raises(UserError, match=r"val\.txt"):
        reader.names("val")
    with pytest.raises(UserError, match=r"no image of b: .*images.b\.\* does not exist"):
        reader.read_image("b")
    save_image(tmp_path / "images" / "a.png")
    with pytest.raises(UserError, match="same id a"):
        Folder(tmp_path, "images", "labels", "classes.txt")


# ---- what goes wrong in any tree ----


def test_sizes_that_differ_are_both_named(tmp_path):
    reader = VOC(voc_tree(tmp_path))
    save_image(tmp_path / "JPEGImages" / "2007_000001.jpg", (5, 4))
    with pytest.raises(UserError, match=r"2007_000001\.jpg is 4x5 but its label .*2007_000001\.png is 3x2"):
        reader.read_pair("2007_000001")


@pytest.mark.parametrize("harm", ["truncated", "text", "empty"])
def test_broken_files_are_named(tmp_path, harm):
    reader = VOC(voc_tree(tmp_path))
    rng = np.random.default_rng(0)
    save(tmp_path / "JPEGImages" / "2007_000001.jpg", rng.integers(0, 255, (64, 64, 3), np.uint8))
    save(tmp_path / "SegmentationClassAug" / "2007_000001.png", rng.integers(0, 20, (64, 64), np.uint8))
    name = "2007_000001"
    for path, read in ((reader.image_path(name), reader.read_image), (reader.label_path(name), reader.read_label)):
        whole = path.read_bytes()
        path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"no picture " * 9, "empty": b""}[harm])
        with pytest.raises(UserError, match=rf"{path.name} cannot be decoded"):
            read(name)


def test_label_pictures_that_would_be_misread_are_refused(tmp_path):
    reader = VOC(voc_tree(tmp_path))
    path = reader.label_path("2007_000001")
    save(path, np.zeros((2, 3, 3), np.uint8))
    with pytest.raises(UserError, match="mode RGB"):
        reader.read_label("2007_000001")
    save(path, np.zeros((2, 3), np.uint16))
    with pytest.raises(UserError, match="mode I;16"):
        reader.read_label("2007_000001")
    Image.fromarray(np.array([[0, 1, 3]], np.uint8)).save(path, bits=2)
    with pytest.raises(UserError, match="fewer than 8 bits"):
        reader.read_label("2007_000001")
    save(path, np.array([[0, 21, 22]], np.uint8))
    with pytest.raises(UserError, match=r"2007_000001\.png holds 21, 22,"):
        reader.read_label("2007_000001")


@pytest.mark.parametrize("dataset", ["voc", "cityscapes", "gta5"])
def test_a_root_without_the_tree_is_an_error(tmp_path, dataset):
    with pytest.raises(UserError, match=rf"tree under {tmp_path}: looked for"):
        open_reader(DataConfig(dataset, str(tmp_path), ""))
    with pytest.raises(UserError, match=r"nowhere is not a folder: set data\.root"):
        open_reader(DataConfig(dataset, str(tmp_path / "nowhere"), ""))


def test_sources_travel_to_loader_processes(tmp_path):
    reader = pickle.loads(pickle.dumps(VOC(voc_tree(tmp_path))))
    assert reader.read_label("2007_000001").tolist() == VALUES.tolist()


def test_palette_is_that_of_voc(tmp_path):
    palette = VOC(voc_tree(tmp_path)).palette
    assert palette.dtype == np.uint8 and palette.shape == (256, 3)
    assert palette[[0, 1, 2, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192],
    ]  # fmt: skip


# ---- the built-in data, whose files are genuine trees ----


def test_built_in_trees_of_every_layout_show_the_same_scenes(tmp_path):
    sources = {}
    for layout, reader in (("voc", VOC), ("cityscapes", Cityscapes), ("gta5", GTA5)):
        make_shapes(tmp_path / layout, layout, train=2, val=1, size=(24, 32))
        sources[layout] = reader(tmp_path / layout)
    labels = {layout: reader.read_pair(reader.names("train")[0])[1] for layout, reader in sources.items()}
    assert labels["voc"].unique().numel() > 2
    assert torch.equal(labels["voc"], labels["cityscapes"])
    assert torch.equal(labels["voc"], labels["gta5"])


# ---- real data ----


def test_camvid_in_both_trees_holds_the_same_labels(request):
    folder = request.config.getoption("--realdata")
    if folder is None:
        pytest.skip("--realdata not given")
    voc = open_reader(DataConfig("voc", f"{folder}/camvid_voc", ""))
    city = open_reader(DataConfig("cityscapes", f"{folder}/camvid_cityscapes", ""))
    assert [len(reader.names(subset)) for reader in (voc, city) for subset in ("train", "val")] == [367, 101] * 2
    counts = {}
    for reader in (voc, city):
        labels = torch.stack([reader.read_label(name) for name in reader.names("val")])
        counts[reader] = torch.bincount(labels.flatten().int(), minlength=256)
    train_ids = [10, 2, 5, 0, 1, 8, 7, 4, 13, 11, 18]
    assert counts[voc][1:12].tolist() == counts[city][train_ids].tolist()
    assert counts[voc][255] == counts[city][255]
