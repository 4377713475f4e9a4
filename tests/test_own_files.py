"""Images and masks as people have them: names by patterns, kinds of masks, and images of more than 8 bits."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.config.sections import DataConfig
from common.datasets import open_reader
from common.datasets.reader import Reader, voc_palette
from common.errors import UserError
from common.evaluation.inference import Protocol
from common.evaluation.report import Report
from common.evaluation.selection import CheckpointRef
from common.splits.split import Split, read_split, write_split
from common.visual import Sample

IDS = np.array([[0, 1, 1, 2]] * 3 + [[0, 2, 255, 2]] * 3, np.uint8)  # 6 rows of 4
COLORS = {0: (0, 0, 0), 1: (128, 64, 128), 2: (0, 128, 0), 255: (9, 9, 9)}
NAMES = "soil\nwheat\nweed\n"
COLORED = "soil 0 0 0\nwheat 128 64 128\nweed 0 128 0\nignore 9 9 9\n"


def save(path: Path, values: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return path


def photo(path: Path, size: tuple[int, int] = (6, 4)) -> Path:
    return save(path, np.random.RandomState(len(path.name)).randint(0, 255, (*size, 3)).astype(np.uint8))


def reader_of(root: Path, images: str, labels: str, classes: str = NAMES, **more) -> Reader:
    (root / "classes.txt").write_text(classes)
    return open_reader(DataConfig("folder", str(root), image_dir=images, label_dir=labels, **more))


# ---- names ----


def test_patterns_with_subfolders(tmp_path):
    for name in ("north/001", "north/002", "south/001"):
        photo(tmp_path / "images" / f"{name}_image.png")
    save(tmp_path / "annotations" / "north" / "001_annotation.png", IDS)
    photo(tmp_path / "images" / "preview.png")
    reader = reader_of(tmp_path, "images/{name}_image.png", "annotations/{name}_annotation.png")
    assert reader.names("train") == ["north/001", "north/002", "south/001"]
    assert (reader.read_pair("north/001")[1].numpy() == IDS).all()
    assert reader.has_label("north/001") and not reader.has_label("south/001")
    with pytest.raises(UserError, match=r"no label of south/001: .*annotations.south.001_annotation\.png"):
        reader.label_path("south/001")
    assert pickle.loads(pickle.dumps(reader)).names("train") == reader.names("train")


def test_ids_with_folders_are_read_from_lists(tmp_path):
    for name in ("north/001", "south/002"):
        photo(tmp_path / "images" / f"{name}.jpg")
    reader = reader_of(tmp_path, "images/{name}.*", "masks/{name}.png")
    write_split(tmp_path / "split", Split(["north/001"], [], ["south/002"]))
    assert read_split(tmp_path / "split", reader=reader) == Split(["north/001"], [], ["south/002"])
    with pytest.raises(UserError, match="one id per line"):
        read_split(tmp_path / "split")
    assert reader.id_of("/elsewhere/002.jpg") == "south/002"


def test_predictions_of_names_with_folders_are_written(tmp_path):
    sample = Sample("north/001", torch.zeros(3, 6, 4, dtype=torch.uint8), torch.from_numpy(IDS), torch.from_numpy(IDS))
    report = Report(("a", "b", "c"), Protocol(), Protocol(), None, "config.json", tmp_path)
    report.write_pictures(CheckpointRef("best", tmp_path, 1, None), [sample], voc_palette())
    assert (tmp_path / "pictures" / "best" / "ids" / "north" / "001.png").is_file()


def test_images_and_masks_in_one_folder(tmp_path):
    photo(tmp_path / "001.png")
    photo(tmp_path / "002.png")
    save(tmp_path / "001_mask.png", IDS)
    reader = reader_of(tmp_path, "{name}.png", "{name}_mask.png")
    assert reader.names("train") == ["001", "002"] and reader.stray_labels() == []


def test_subsets_in_patterns(tmp_path):
    for subset in ("train", "val"):
        photo(tmp_path / subset / "images" / f"{subset}1.jpg")
        save(tmp_path / subset / "masks" / f"{subset}1.png", IDS)
    reader = reader_of(tmp_path, "{subset}/images/{name}.*", "{subset}/masks/{name}.png")
    assert reader.names("train") == ["train1"] and reader.names("val") == ["val1"]
    assert reader.has_label("val1")


# ---- kinds of masks ----


def write_array(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values)


def write_tiff(path: Path, values: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("tifffile").imwrite(path, values, **options)
    return path


def colored(ids: np.ndarray) -> np.ndarray:
    return np.array([COLORS[index] for index in ids.ravel()], np.uint8).reshape(*ids.shape, 3)


MASKS = {
    "gray PNG": lambda folder: save(folder / "a.png", IDS),
    "16-bit PNG": lambda folder: save(folder / "a.png", IDS.astype(np.uint16)),
    "gray TIFF": lambda folder: save(folder / "a.tif", IDS, compression="tiff_deflate"),
    "TIFF of 32 bits": lambda folder: save(folder / "a.tiff", IDS.astype(np.int32)),
    "TIFF of 64 bits, tifffile": lambda folder: write_tiff(folder / "a.tif", IDS.astype(np.int64)),
    "gray BMP": lambda folder: save(folder / "a.bmp", IDS),
    "array": lambda folder: write_array(folder / "a.npy", IDS),
    "array of 64 bits with one channel": lambda folder: write_array(folder / "a.npy", IDS[None].astype(np.int64)),
}
COLOR_MASKS = {
    "PNG": lambda folder: save(folder / "a.png", colored(IDS)),
    "BMP": lambda folder: save(folder / "a.bmp", colored(IDS)),
    "TIFF": lambda folder: save(folder / "a.tif", colored(IDS)),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_numbers(kind, tmp_path):
    photo(tmp_path / "images" / "a.jpg")
    MASKS[kind](tmp_path / "masks")
    reader = reader_of(tmp_path, "images", "masks")
    assert (reader.read_pair("a")[1].numpy() == IDS).all()
    assert reader.read_label("a").dtype == torch.uint8
    reader.check_size("a", with_label=True)


@pytest.mark.parametrize("kind", COLOR_MASKS)
def test_masks_of_colors(kind, tmp_path):
    photo(tmp_path / "images" / "a.jpg")
    COLOR_MASKS[kind](tmp_path / "masks")
    reader = reader_of(tmp_path, "images", "masks", COLORED)
    assert (reader.read_pair("a")[1].numpy() == IDS).all()


def test_an_array_of_true_and_false(tmp_path):
    photo(tmp_path / "images" / "a.jpg")
    write_array(tmp_path / "masks" / "a.npy", IDS == 1)
    reader = reader_of(tmp_path, "images", "masks", "soil\nwheat\n")
    assert (reader.read_label("a").numpy() == (IDS == 1)).all()


# ---- polygons ----


def square(left: int, top: int, right: int, bottom: int) -> list[list[int]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def labelme(path: Path, *shapes: dict, size: tuple[int, int] = (6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"imageHeight": size[0], "imageWidth": size[1], "shapes": list(shapes)}))


def shape(label: str, points: list, kind: str = "polygon") -> dict:
    return {"label": label, "points": points, "shape_type": kind}


def test_labelme_files_beside_the_images(tmp_path):
    photo(tmp_path / "photos" / "a.jpg")
    photo(tmp_path / "photos" / "b.jpg")
    path = tmp_path / "photos" / "a.json"
    labelme(path, shape("wheat", square(0, 0, 3, 2)), shape("weed", [[0, 0], [0, 0]], "rectangle"))
    reader = reader_of(tmp_path, "photos", "photos", "background\nwheat\nweed\n")
    assert reader.names("train") == ["a", "b"] and not reader.has_label("b")
    first = np.array([[2, 1, 1, 1]] + [[1] * 4] * 2 + [[0] * 4] * 3)
    assert reader.read_pair("a")[1].tolist() == first.tolist()
    path.write_text("")  # the drawn mask is not used for another file
    with pytest.raises(UserError, match=r"a\.json cannot be read as JSON"):
        reader.read_label("a")
    labelme(path, shape("__ignore__", square(0, 0, 3, 0)))
    assert reader.read_label("a").tolist() == [[255] * 4] + [[0] * 4] * 5


def test_polygons_are_drawn_once(tmp_path, monkeypatch):
    photo(tmp_path / "photos" / "a.jpg")
    labelme(tmp_path / "photos" / "a.json", shape("wheat", square(0, 0, 3, 2)))
    label = reader_of(tmp_path, "photos", "photos", "background\nwheat\n").read_label("a")
    monkeypatch.setattr("common.datasets.polygons.draw", None)
    again = reader_of(tmp_path, "photos", "photos", "background\nwheat\n")
    again.check_size("a", with_label=True)
    assert torch.equal(again.read_label("a"), label) and len(list((tmp_path / ".drawn_masks").iterdir())) == 1


def test_masks_are_drawn_elsewhere_if_the_folder_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    photo(tmp_path / "photos" / "a.jpg")
    labelme(tmp_path / "photos" / "a.json", shape("wheat", square(0, 0, 3, 5)))
    (tmp_path / ".drawn_masks").write_text("a file, so that no folder can be made")
    assert (reader_of(tmp_path, "photos", "photos", "background\nwheat\n").read_label("a") == 1).all()
    assert len(list((tmp_path / "temporary" / "drawn_masks").iterdir())) == 1
    (tmp_path / "temporary" / "drawn_masks").rename(tmp_path / "old")
    (tmp_path / "temporary" / "drawn_masks").write_text("a file")
    with pytest.raises(UserError, match=r"the mask drawn from .*a\.json cannot be written to .*: free space"):
        reader_of(tmp_path, "photos", "photos", "background\nwheat\n").read_label("a")


def test_circles_and_pixels_outside_polygons(tmp_path):
    photo(tmp_path / "photos" / "a.jpg", (21, 21))
    labelme(tmp_path / "json" / "a.json", shape("wheat", [[10, 10], [10, 15]], "circle"), size=(21, 21))
    label = reader_of(tmp_path, "photos", "json", "wheat\nweed\n").read_label("a").numpy()
    assert abs((label == 0).sum() - np.pi * 25) < 12 and (label[[0, -1]] == 255).all()


COCO = {
    "categories": [{"id": 7, "name": "weed"}, {"id": 3, "name": "wheat"}],
    "images": [
        {"id": 1, "file_name": "a.jpg", "width": 4, "height": 6},
        {"id": 2, "file_name": "north/b.jpg", "width": 4, "height": 6},
        {"id": 3, "file_name": "c.jpg", "width": 4, "height": 6},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "segmentation": [[0, 0, 3, 0, 3, 2, 0, 2]]},
        {"id": 2, "image_id": 2, "category_id": 7, "segmentation": [[0, 0, 1, 0, 1, 5, 0, 5], [3, 0, 3, 5, 3, 5]]},
    ],
}


def coco_reader(root: Path, content: dict = COCO) -> Reader:
    for name in ("a", "north/b", "c"):
        photo(root / "images" / f"{name}.jpg")
    (root / "coco.json").write_text(json.dumps(content))
    return reader_of(root, "images/{name}.jpg", "coco.json", "background\nwheat\nweed\n")


def test_a_coco_file(tmp_path):
    reader = coco_reader(tmp_path)
    assert [reader.has_label(name) for name in ("a", "north/b", "c")] == [True, True, False]
    assert reader.read_pair("a")[1].tolist() == [[1] * 4] * 3 + [[0] * 4] * 3
    assert reader.read_label("north/b").tolist() == [[2, 2, 0, 2]] * 6
    reader.check_size("north/b", with_label=True)
    with pytest.raises(UserError, match=r"no label of c: .*coco\.json has no polygons of .*c\.jpg"):
        reader.read_label("c")


# ---- images ----


def read(root: Path, **more) -> np.ndarray:
    image = reader_of(root, "images", "masks", **more).read_image("a")
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


DEEP = np.array([[0, 256, 257, 32768], [65535, 1000, 128, 129]], np.uint16)
BY_257 = [[0, 1, 1, 128], [255, 4, 0, 1]]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_images_are_divided_by_257(suffix, tmp_path):
    save(tmp_path / "images" / f"a.{suffix}", DEEP)
    pixels = read(tmp_path)
    assert pixels[..., 0].tolist() == BY_257 and (pixels == pixels[..., :1]).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_stated_range_replaces_257(suffix, tmp_path):
    save(tmp_path / "images" / f"a.{suffix}", DEEP)
    assert read(tmp_path, image_range=(0.0, 1000.0))[..., 0].tolist() == [[0, 65, 66, 255], [255, 255, 33, 33]]
    assert read(tmp_path, image_range=(128, 1000))[..., 0].tolist() == [[0, 37, 38, 255], [255, 255, 0, 0]]


def test_color_tiffs_of_16_bits(tmp_path):
    write_tiff(tmp_path / "images" / "a.tif", np.repeat(DEEP[..., None], 3, 2), photometric="rgb")
    assert abs(read(tmp_path)[..., 2].astype(int) - BY_257).max() <= 1  # Pillow keeps the high byte
    assert read(tmp_path, image_range=(0, 1000))[..., 1].tolist() == [[0, 65, 66, 255], [255, 255, 33, 33]]


def test_tiffs_that_pillow_cannot_read(tmp_path):
    values = np.repeat(DEEP[..., None], 3, 2).transpose(2, 0, 1)  # one plane per color
    path = write_tiff(
        tmp_path / "images" / "a.tif", values.astype(np.float64), planarconfig="separate", photometric="rgb"
    )
    with pytest.raises(OSError):
        Image.open(path)
    reader = reader_of(tmp_path, "images", "masks", image_range=(0, 65535))
    reader.check_size("a", with_label=False)
    assert reader.read_image("a")[0].tolist() == [[0, 1, 1, 128], [255, 4, 0, 1]]


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK"])
def test_images_of_8_bits_become_rgb(mode, tmp_path):
    picture = Image.fromarray(np.full((2, 4), 255, np.uint8)).convert("RGB").convert(mode)
    (tmp_path / "images").mkdir()
    picture.save(tmp_path / "images" / "a.tif")
    assert (read(tmp_path) == 255).all()
    assert (read(tmp_path, image_range=(0, 1)) == 255).all()  # 8 bits stay as they are


def test_gray_bmp_and_png_images(tmp_path):
    save(tmp_path / "images" / "a.bmp", np.full((2, 4), 7, np.uint8))
    assert (read(tmp_path) == 7).all()


# ---- mistakes ----


def damaged_tiff(path: Path) -> None:
    write_tiff(path, IDS)
    path.write_bytes(b"II*\0" + b"x" * 99)


def bands(path: Path, count: int) -> None:
    write_tiff(path, np.zeros((6, 4, count), np.uint8), photometric="rgb", extrasamples=["unspecified"] * (count - 3))


def spoil_mask(values: np.ndarray, suffix: str = "png"):
    def write(root: Path) -> None:
        (root / "masks" / "a.png").unlink()
        (write_array if suffix == "npy" else save)(root / "masks" / f"a.{suffix}", values)

    return write


MISTAKES = {
    "wrong size": (spoil_mask(IDS[:4]), r"a\.jpg is 4x6 but its label .*a\.png is 4x4"),
    "turned": (
        spoil_mask(IDS.T.copy()),
        r"a\.jpg is 4x6 but its label .*a\.png is 6x4.*rotation tag \(EXIF\) is not applied",
    ),
    "wrong size of an array": (spoil_mask(IDS[:4], "npy"), r"a\.jpg is 4x6 but its label .*a\.npy is 4x4"),
    "unknown id": (spoil_mask(IDS + 3), r"a\.png holds .*3.* which this dataset does not define: mend it"),
    "unknown id of 16 bits": (spoil_mask(IDS.astype(np.uint16) + 300), r"a\.png holds 300, 301.*ids are 0 to 253"),
    "negative ids": (spoil_mask(IDS.astype(np.int32) - 9, "npy"), r"a\.npy holds -9, -8.*ids are 0 to 253"),
    "fractions": (spoil_mask(IDS / 2, "npy"), r"a\.npy holds float64 numbers: save class ids as whole numbers"),
    "scores per class": (
        spoil_mask(np.zeros((6, 4, 3)), "npy"),
        r"a\.npy has the shape \(6, 4, 3\): save one class id",
    ),
    "objects": (spoil_mask(np.array([{}]), "npy"), r"a\.npy cannot be read as a NumPy array"),
    "colors without a list": (spoil_mask(colored(IDS)), r"a\.png is a picture of colors: add the colors"),
    "damaged array": (
        lambda root: (root / "masks" / "a.png").rename(root / "masks" / "a.npy").write_bytes(b"x"),
        r"a\.npy cannot be read as a NumPy array",
    ),
    "two masks": (
        lambda root: save(root / "masks" / "a.tif", IDS),
        r"a\.png and .*a\.tif have the same id a: .*{name}\.",
    ),
    "no mask": (lambda root: (root / "masks" / "a.png").unlink(), r"no label of a: .*masks.a\.\* does not exist"),
    "not LabelMe": (
        lambda root: (root / "masks" / "a.png").rename(root / "masks" / "a.json").write_text('{"x": 1}'),
        r"a\.json is not a LabelMe file: it needs imageWidth",
    ),
    "five channels": (lambda root: bands(root / "images" / "a.tif", 5), r"a\.tif has 5 channels: networks here take 3"),
    "near infrared": (lambda root: bands(root / "images" / "a.tif", 4), r"a\.tif has 4 channels: networks here take 3"),
    "fractions as image": (
        lambda root: save(root / "images" / "a.tif", np.zeros((6, 4), np.float32)),
        r"a\.tif holds float32 numbers: .*data\.image_range \[0, 1\]",
    ),
    "damaged TIFF": (
        lambda root: damaged_tiff(root / "images" / "a.tif"),
        r"a\.tif cannot be decoded",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_files_are_named(mistake, tmp_path):
    spoil, message = MISTAKES[mistake]
    photo(tmp_path / "images" / "a.jpg")
    save(tmp_path / "masks" / "a.png", IDS)
    spoil(tmp_path)
    if (tmp_path / "images" / "a.tif").exists():
        (tmp_path / "images" / "a.jpg").unlink()
    with pytest.raises(UserError) as error:
        reader = reader_of(tmp_path, "images", "masks")
        reader.check_size("a", with_label=True)
        reader.read_pair("a")
    assert re.search(message, str(error.value)) and len(str(error.value).splitlines()) <= 2


def test_an_unknown_color_is_named(tmp_path):
    photo(tmp_path / "images" / "a.jpg")
    save(tmp_path / "masks" / "a.png", np.full((6, 4, 3), 77, np.uint8))
    with pytest.raises(UserError, match=r"a\.png contains the color \(77, 77, 77\), which .*classes\.txt"):
        reader_of(tmp_path, "images", "masks", COLORED).read_label("a")


@pytest.mark.parametrize(
    ("kind", "points", "message"),
    [
        ("polygon", square(0, 0, 1, 1), "names the class 'maize', which .*classes.txt does not list"),
        ("line", [[0, 0], [1, 1]], "has a line of 2 points, which is no area"),
        ("polygon", [[0, 0], [1, 1]], "has a polygon of 2 points, which is no area"),
    ],
)
def test_wrong_shapes_are_named(kind, points, message, tmp_path):
    photo(tmp_path / "photos" / "a.jpg")
    labelme(tmp_path / "photos" / "a.json", shape("maize", points, kind))
    with pytest.raises(UserError, match=r"a\.json " + message):
        reader_of(tmp_path, "photos", "photos").read_label("a")


def test_polygons_of_another_size_name_their_file(tmp_path):
    photo(tmp_path / "photos" / "a.jpg")
    labelme(tmp_path / "photos" / "a.json", size=(9, 9))
    with pytest.raises(UserError, match=r"a\.jpg is 4x6 but its label .*a\.json is 9x9"):
        reader_of(tmp_path, "photos", "photos").check_size("a", with_label=True)


def test_wrong_coco_files_are_named(tmp_path):
    (tmp_path / "coco.json").write_text("{}")
    with pytest.raises(UserError, match=r"coco\.json are not in COCO's format"):
        coco_reader(tmp_path, {"images": []})
    runs = {"counts": [24], "size": [6, 4]}
    wrong = COCO | {"annotations": [{"id": 5, "image_id": 1, "category_id": 3, "segmentation": runs}]}
    with pytest.raises(UserError, match=r"annotation 5 is a run-length mask: export polygons"):
        coco_reader(tmp_path, wrong)


def test_a_pattern_of_files_that_cannot_be_read(tmp_path):
    photo(tmp_path / "images" / "a.jpg")
    with pytest.raises(UserError, match=r"data\.label_dir masks/\{name\}\.gif must end in \.png"):
        reader_of(tmp_path, "images", "masks/{name}.gif")
    with pytest.raises(UserError, match=r"no images in .*pictures.*: set data\.image_dir .*images/\{name\}_image\.png"):
        reader_of(tmp_path, "pictures", "masks")
    with pytest.raises(UserError, match=r"data\.image_range is \[3, 3\]"):
        reader_of(tmp_path, "images", "masks", image_range=(3, 3))


def test_tifffile_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    save(tmp_path / "images" / "a.tif", np.zeros((2, 2, 3), np.uint8))
    (tmp_path / "images" / "a.tif").write_bytes(b"II*\0nothing")
    with pytest.raises(UserError, match=r"a\.tif is a TIFF that Pillow cannot read: pip install tifffile"):
        reader_of(tmp_path, "images", "masks").read_image("a")
