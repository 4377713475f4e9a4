"""`check_data FOLDER` and `common.start`: layouts, classes, choices, and mistakes."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.config import load_config
from common.config.sections import BaseConfig
from common.datasets import open_reader
from common.own_data.classes import propose_classes
from common.own_data.discover import discover
from common.own_data.plan import GIGABYTE, Machine, choose_config, choose_method
from common.splits.split import Split, read_split
from tests.helpers.commands import run_python
from tests.helpers.fields import COLORS, draw_field, write_field
from tests.test_own_files import write_tiff


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".json":
        corners = [[10, 0], [20, 0], [20, 63], [10, 63]]
        content = {"imageWidth": 96, "imageHeight": 64, "shapes": [{"label": "crop", "points": corners}]}
        path.write_text(json.dumps(content))
    else:
        Image.fromarray(values).save(path)


def pairs(root: Path, image: str, mask: str, count: int = 6, masks: int = 4, paint: Callable = lambda ids: ids) -> None:
    """Photos and, for the first ones, masks; `{}` in the paths is a number of three digits."""
    for number in range(1, count + 1):
        pixels, ids = draw_field(number)
        save(root / image.format(f"{number:03d}"), pixels)
        if number <= masks:
            save(root / mask.format(f"{number:03d}"), paint(ids))


# ---- patterns ----

LAYOUTS = {
    # photos, masks -> patterns
    ("images/{}_image.png", "annotations/{}_annotation.png"): None,
    ("images/{}_image.png", "images/{}_annotation.png"): None,
    ("{}.jpg", "{}.png"): None,
    ("{}.png", "{}_mask.png"): None,
    ("IMG_{}.JPG", "masks/IMG_{}.png"): ("{name}.JPG", "masks/{name}.png"),
    ("img{}.png", "mask{}.png"): None,
    ("images/img_{}.png", "images/mask_{}.png"): None,
    ("photos/IMG_{}.jpg", "masks/IMG_{}.tif"): ("photos/{name}.jpg", "masks/{name}.tif"),
    ("a/{}.png", "b/{}.png"): None,
    ("JPEGImages/2007_{}.jpg", "SegmentationClass/2007_{}.png"): (
        "JPEGImages/{name}.jpg",
        "SegmentationClass/{name}.png",
    ),
    ("north/images/{}.jpg", "north/masks/{}.npy"): None,
    ("photos/{}.jpg", "photos/{}.json"): None,
    ("x/{}.bmp", "y/mask_{}.bmp"): None,
    ("leftImg8bit/ulm/ulm_{}_leftImg8bit.png", "gtFine/ulm/ulm_{}_gtFine_labelIds.png"): (
        "leftImg8bit/ulm/{name}_leftImg8bit.png",
        "gtFine/ulm/{name}_gtFine_labelIds.png",
    ),
}


@pytest.mark.parametrize(("image", "mask"), LAYOUTS)
def test_patterns_are_found(image, mask, tmp_path):
    pairs(tmp_path, image, mask)
    found = discover(tmp_path)
    expected = LAYOUTS[image, mask] or (image.replace("{}", "{name}"), mask.replace("{}", "{name}"))
    assert (found.images, found.labels, found.pairs) == (*expected, 4)


def test_names_with_folders_are_found(tmp_path):
    for field in ("north", "south"):
        pairs(tmp_path, f"images/{field}/{{}}_image.png", f"annotations/{field}/{{}}_annotation.png")
    found = discover(tmp_path)
    assert (found.images, found.labels) == ("images/{name}_image.png", "annotations/{name}_annotation.png")
    assert found.pairs == 8


@pytest.mark.parametrize("order", ["{subset}/{kind}/", "{kind}/{subset}/"])
def test_subsets_are_found(order, tmp_path):
    for subset, digit in (("train", "1"), ("val", "2")):
        folders = [order.format(subset=subset, kind=kind) for kind in ("images", "masks")]
        pairs(tmp_path, f"{folders[0]}{digit}{{}}.jpg", f"{folders[1]}{digit}{{}}.png")
    found = discover(tmp_path)
    assert found.images == order.replace("{kind}", "images") + "{name}.jpg"
    assert found.labels == order.replace("{kind}", "masks") + "{name}.png"


def test_mixed_endings_and_further_pictures(tmp_path):
    pairs(tmp_path, "images/{}.jpg", "masks/{}.png", 4)
    save(tmp_path / "images" / "900.png", draw_field(9)[0])
    save(tmp_path / "readme_picture.jpg", draw_field(9)[0])
    assert discover(tmp_path).images == "images/{name}.*"


def coco(root: Path, count: int = 4) -> None:
    pairs(root, "photos/{}.jpg", "unused/{}.png", masks=0)
    corners = [10, 0, 20, 0, 20, 63, 10, 63]
    content = {
        "categories": [{"id": 5, "name": "weed"}, {"id": 2, "name": "crop"}],
        "images": [{"id": n, "file_name": f"{n:03d}.jpg", "width": 96, "height": 64} for n in range(1, count + 1)],
        "annotations": [
            {"id": n, "image_id": n, "category_id": (2, 5)[n % 2], "segmentation": [corners]}
            for n in range(1, count + 1)
        ],
    }
    (root / "labels.json").write_text(json.dumps(content))


def test_a_coco_file_is_found(tmp_path):
    coco(tmp_path)
    found = discover(tmp_path)
    assert (found.images, found.labels, found.pairs) == ("photos/{name}.jpg", "labels.json", 4)
    assert propose_classes(tmp_path, found.images, "labels.json") == ["background", "crop", "weed"]


# ---- classes ----


def black_and_white(ids: np.ndarray) -> np.ndarray:
    return np.where(ids == 1, 255, 0).astype(np.uint8)


CLASSES = {
    "ids": ("png", lambda ids: ids, ["class_0", "class_1", "class_2"]),
    "ids and 255": ("png", lambda ids: np.where(ids == 2, 255, ids).astype(np.uint8), ["class_0", "class_1"]),
    "array": ("npy", lambda ids: ids.astype(np.int64), ["class_0", "class_1", "class_2"]),
    "colors": ("bmp", lambda ids: COLORS[ids], ["background 0 0 0", "class_1 0 128 0", "class_2 200 40 40"]),
    "black and white": ("png", black_and_white, ["background 0 0 0", "foreground 255 255 255"]),
    "bits": ("png", lambda ids: ids == 1, ["background 0 0 0", "foreground 255 255 255"]),
    "grays": ("tif", lambda ids: ids * 80, ["background 0 0 0", "class_1 80 80 80", "class_2 160 160 160"]),
    "polygons": ("json", lambda ids: ids, ["background", "crop"]),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_classes_are_proposed_and_fit(kind, tmp_path):
    suffix, paint, expected = CLASSES[kind]
    root = tmp_path / "mine"
    pairs(root, "images/{}.jpg", f"masks/{{}}.{suffix}", paint=paint)
    ended = run_python(["-m", "common.check_data", str(root)], tmp_path)
    assert ended.status == 0, ended.out + ended.err
    out = tmp_path / "mine-training"
    assert (out / "classes.txt").read_text().splitlines() == expected
    assert "result: the data can be used" in ended.out and (out / "contact_sheet.png").is_file()
    data = load_config(BaseConfig, out / "mine.json").data
    reader = open_reader(data)
    label = reader.read_label("001").numpy()
    ids = draw_field(1)[1]
    if suffix != "json":
        classes = [index for index in np.unique(label) if index != 255]
        assert all((label[ids == index] == index).all() for index in classes) and len(classes) > 1
    split = read_split(data.split)
    assert (len(split.labeled), len(split.unlabeled), len(split.valid)) == (3, 2, 1)


# ---- reports and choices ----


def start(folder: Path, *more: str) -> str:
    """Output of `common.start mine` in `folder`."""
    ended = run_python(["-m", "common.start", "mine", *more], folder)
    assert ended.status == 0, ended.err
    return ended.out


def test_the_contact_sheet_shows_images_under_their_masks(tmp_path):
    write_field(tmp_path / "mine", 6, 4)
    start(tmp_path)
    sheet = np.array(Image.open(tmp_path / "mine-training" / "contact_sheet.png")).astype(int)
    image = np.array(Image.open(tmp_path / "mine" / "images" / "001_image.png").resize((300, 200), 1)).astype(int)
    left, right = sheet[40:240, 20:320], sheet[40:240, 328:628]
    ids = np.array(Image.fromarray(draw_field(1)[1]).resize((300, 200), 0))
    assert abs(left - image).mean() < 3
    crop = ids == 1
    crop[:, 1:] &= crop[:, :-1]
    # The mask's color covers a little more than half of the image: its green has no red and no blue.
    assert (right[crop].mean(0) < 0.6 * left[crop].mean(0))[[0, 2]].all()
    assert abs(right[ids == 0] - left[ids == 0]).mean() < 12


def test_rare_classes_and_16_bits_are_named(tmp_path):
    pairs(tmp_path / "mine", "images/{}.tif", "masks/{}.png")
    for path in (tmp_path / "mine" / "images").iterdir():
        write_tiff(path, np.array(Image.open(path).convert("L")).astype(np.uint16) * 257)
    text = start(tmp_path)
    assert re.search(r"rare in the labeled pixels: class_2 \(0\.\d\d %\); data\.class_balanced true", text)
    assert "images have more than 8 bits: 0 to 65535 become 0 to 255 (data.image_range)" in text
    text = start(tmp_path, "--image-range", "0", "4095", "--out", "other")
    assert "0 to 4095 become 0 to 255" in text
    assert load_config(BaseConfig, tmp_path / "other" / "mine.json").data.image_range == (0, 4095)


def test_names_of_classes_can_be_changed(tmp_path):
    write_field(tmp_path / "mine", 6, 4)
    assert "rename them in mine-training" in start(tmp_path)
    path = tmp_path / "mine-training" / "classes.txt"
    path.write_text(path.read_text().replace("class_1", "maize").replace("class_2", "weed"))
    text = start(tmp_path)
    assert "3: background, maize, weed\n" in text and "rename" not in text


def test_files_that_belong_to_no_image_do_not_matter(tmp_path):
    pairs(tmp_path / "mine", "photos/{}.jpg", "photos/{}.json")
    (tmp_path / "mine" / "photos" / "notes.json").write_text("{}")
    text = start(tmp_path)
    assert "2: background, crop\n" in text and "1 masks belong to no image, e.g. notes.json" in text


def test_a_class_list_of_the_folder_is_used(tmp_path):
    write_field(tmp_path / "mine", 6, 4)
    names = "soil 0 0 0\nmaize 0 128 0\nignore 200 40 40\n"
    (tmp_path / "mine" / "classes.txt").write_text(names)
    assert "2: soil, maize\n" in start(tmp_path)
    assert not (tmp_path / "mine-training" / "classes.txt").exists()


def test_validation_images_of_the_folder_are_used(tmp_path):
    write_field(tmp_path / "mine", 6, 4)
    (tmp_path / "mine" / "val.txt").write_text("002\n003\n")
    assert "2 labeled, 2 unlabeled, 2 for validation" in start(tmp_path)


def test_a_folder_may_be_a_link_and_its_path_absolute(tmp_path):
    write_field(tmp_path / "disk" / "original", 6, 4)
    (tmp_path / "mine").symlink_to(tmp_path / "disk" / "original")
    start(tmp_path)
    start(tmp_path, "--out", str(tmp_path / "other"))
    for config in ("mine-training/mine.json", "other/mine.json", "other/original.json"):
        if (path := tmp_path / config).exists():
            data = load_config(BaseConfig, path).data
            data.root = str(tmp_path / data.root)
            assert len(open_reader(data).names("train")) == 6
    assert (tmp_path / "mine-training" / "classes.txt").is_file()


def test_everything_labeled_is_trained_supervised(tmp_path):
    write_field(tmp_path / "mine", 5, 5)
    text = start(tmp_path)
    assert "supervised: 4 images have a mask to learn from, 0 have none" in text
    assert "accelerate launch supervised/train.py --config mine-training/mine.json" in text


def names(count: int) -> list[str]:
    return [f"{number}" for number in range(count)]


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "method"), [(5, 5, "unimatch"), (5, 4, "supervised"), (9, 0, "supervised")]
)
def test_the_method_depends_on_the_number_of_masks(labeled, unlabeled, method):
    assert choose_method(Split(names(labeled), names(unlabeled), ["v"]))[0] == method


@pytest.mark.parametrize(
    ("machine", "side", "expected"),
    [
        (Machine(False, 16 * GIGABYTE), 400, ("resnet18", 256, 8, 200)),
        (Machine(False, GIGABYTE), 400, ("resnet18", 256, 2, 300)),
        (Machine(True, 6 * GIGABYTE), 400, ("resnet18", 320, 4, 1000)),
        (Machine(True, 24 * GIGABYTE), 400, ("vit_small_patch14_dinov2", 392, 8, 1000)),
        (Machine(True, 24 * GIGABYTE), 4000, ("vit_small_patch14_dinov2", 518, 4, 1000)),
        (Machine(True, 80 * GIGABYTE), 20, ("vit_small_patch14_dinov2", 28, 16, 1000)),
    ],
)
def test_the_network_fits_the_memory(machine, side, expected):
    config = choose_config({}, Split(names(8), names(10), ["v"]), 3, [side] * 9, machine)
    found = (config["model"]["backbone"], config["data"]["crop_size"][0], config["optim"]["batch_size"])
    assert (*found, config["run"]["steps"]) == expected


# ---- mistakes ----


def antialiased(ids: np.ndarray) -> np.ndarray:
    return np.array(Image.fromarray(COLORS[ids]).resize((48, 32), Image.Resampling.BICUBIC).resize(ids.shape[::-1], 2))


def two_mask_folders(root: Path) -> None:
    pairs(root, "images/{}.jpg", "masks/{}.png")
    pairs(root, "images/{}.jpg", "labels/{}.png")


def two_image_folders(root: Path) -> None:
    pairs(root, "images/{}.jpg", "masks/{}.png")
    pairs(root, "photos/{}.jpg", "masks/{}.png")


def wrong_size(root: Path) -> None:
    write_field(root, 6, 4)
    save(root / "annotations" / "002_annotation.png", COLORS[draw_field(2, (40, 40))[1]])


def unknown_color(root: Path) -> None:
    write_field(root, 6, 4)
    (root / "classes.txt").write_text("soil 0 0 0\nmaize 0 128 0\n")


def unknown_id(root: Path) -> None:
    pairs(root, "images/{}.jpg", "masks/{}.png")
    (root / "classes.txt").write_text("soil\nmaize\n")


def one_mask(root: Path) -> None:
    write_field(root, 6, 1)


MISTAKES = {
    "empty folder": (lambda root: root.mkdir(), r"no images in mine: file endings are \.jpg"),
    "no folder": (lambda root: None, r"mine is not a folder: give the folder that contains images and masks"),
    "no masks": (
        lambda root: pairs(root, "images/{}.jpg", "x", masks=0),
        r"no masks in mine: masks are PNG, TIFF or BMP",
    ),
    "no photos": (lambda root: pairs(root, "m/{}_mask.png", "masks/{}.png"), "no images in mine"),
    "no pair": (
        lambda root: pairs(root, "images/a{}a.jpg", "masks/{}9.png"),
        "no image in mine has a mask: e.g. images/",
    ),
    "one mask": (one_mask, "1 images in mine have a mask: at least 2 are needed"),
    "ambiguous masks": (two_mask_folders, r"two patterns fit the masks in mine equally well: .*--labels '"),
    "ambiguous images": (two_image_folders, r"two patterns fit the images in mine equally well: .*--images '"),
    "wrong size": (wrong_size, r"002_image\.png is 96x64 but its label .*002_annotation\.png is 40x40"),
    "unknown color": (unknown_color, r"00\d_annotation\.png contains the color \(200, 40, 40\), which .*classes\.txt"),
    "unknown id": (unknown_id, r"masks/00\d\.png holds 2, which this dataset does not define"),
    "soft edges": (
        lambda root: pairs(root, "images/{}.jpg", "masks/{}.png", paint=antialiased),
        r"mask mine/masks/00\d\.png and others have \d+ colors, more than 64: a mask has one flat color per class",
    ),
    "one class": (
        lambda root: pairs(root, "images/{}.jpg", "masks/{}.png", paint=np.zeros_like),
        r"the masks mine/masks.* show one class \(background 0 0 0\)",
    ),
    "large ids": (
        lambda root: pairs(root, "images/{}.jpg", "masks/{}.npy", paint=lambda ids: ids.astype(int) + 300),
        r"masks/001\.npy hold numbers from 300 to 302: ids are 0 to 253",
    ),
    "damaged mask": (
        lambda root: (write_field(root, 6, 4) / "annotations" / "003_annotation.png").write_bytes(b"x"),
        r"003_annotation\.png cannot be decoded",
    ),
    "damaged image": (
        lambda root: (write_field(root, 6, 4) / "images" / "005_image.png").write_bytes(b"x"),
        r"005_image\.png cannot be decoded",
    ),
    "several coco files": (
        lambda root: [coco(root), (root / "b.json").write_text((root / "labels.json").read_text())],
        r"two patterns fit the masks in mine equally well: b\.json and labels\.json",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_two_lines(mistake, tmp_path):
    spoil, message = MISTAKES[mistake]
    spoil(tmp_path / "mine")
    ended = run_python(["-m", "common.start", "mine"], tmp_path)
    assert ended.status == 2 and len(ended.err.splitlines()) <= 2 and not ended.out
    assert re.search(message, ended.err), ended.err
    assert not (tmp_path / "mine-training" / "mine.json").exists()
    checked = run_python(["-m", "common.check_data", "mine"], tmp_path)
    assert checked.status == 2 and re.search(message, checked.out), checked.out
    assert checked.out.endswith("result: problems found, see above\n")


def test_one_of_several_patterns_can_be_chosen(tmp_path):
    two_mask_folders(tmp_path / "mine")
    assert "masks    labels/{name}.png" in start(tmp_path, "--labels", "labels/{name}.png")
    two_image_folders(tmp_path / "mine")
    text = start(tmp_path, "--images", "photos/{name}.jpg", "--labels", "masks/{name}.png", "--out", "other")
    assert "images   photos/{name}.jpg" in text


def test_small_crops_have_small_rates():
    split, machine = Split(names(8), names(10), ["v"]), Machine(False, 16 * GIGABYTE)
    small, large = (choose_config({}, split, 3, [side] * 9, machine)["model"] for side in (64, 112))
    assert small["rates"] == [1, 2, 3] and "rates" not in large


def test_a_pattern_that_fits_nothing_is_named(tmp_path):
    write_field(tmp_path / "mine", 6, 4)
    patterns = ["--images", "images/{name}_image.png", "--labels", "annotations/{name}_mask.png"]
    ended = run_python(["-m", "common.start", "mine", *patterns], tmp_path)
    assert "no masks of the images fit the pattern mine/annotations/{name}_mask.png" in ended.err
    ended = run_python(["-m", "common.start", "mine", *patterns[2:]], tmp_path)
    assert "no masks annotations/{name}_mask.png in mine" in ended.err and ended.status == 2


def test_a_config_that_was_changed_is_not_overwritten(tmp_path):
    write_field(tmp_path / "mine", 6, 4)
    start(tmp_path)
    path = tmp_path / "mine-training" / "mine.json"
    path.write_text(path.read_text().replace("resnet18", "resnet50"))
    ended = run_python(["-m", "common.start", "mine"], tmp_path)
    assert ended.status == 2 and "mine.json exists with other values: remove it" in ended.err
    assert "resnet50" in path.read_text()
