"""ADE20K, COCO and COCO-Stuff: files in the published formats are read, trained on and evaluated; lists of UniMatch."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from common.check_data import main as check_data
from common.config import load_config
from common.config.sections import DataConfig
from common.datasets import named_classes, open_reader
from common.datasets.ade20k import ADE20K
from common.datasets.coco import COCO, COCOStuff
from common.errors import UserError
from common.splits.lists import find_lists, published_id
from common.splits.published import checksum, commands, equals, record, said_of
from common.splits.split import Split, read_split, split_of
from prcl.train import Config as PRCLConfig
from splits.adopt import main as adopt
from splits.make import main as make
from tests.helpers.commands import refused, run_python, train
from unimatch.config import Config

ROOT = Path(__file__).parent.parent
SIZE = (48, 64)
TRAIN, VALID = range(1, 11), range(1, 4)
# The largest value that a label may store, beside the ignored one.
LARGEST = {"ade20k": 150, "coco": 80, "coco_stuff": 181}


def picture(path: Path, seed: int, gray: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, SIZE if gray else (*SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def label(path: Path, values: np.ndarray) -> Path:
    """An 8-bit gray PNG with columns of `values`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = np.resize(np.repeat(np.asarray(values, np.uint8), 3), SIZE[1])
    Image.fromarray(np.broadcast_to(row, SIZE).copy()).save(path)
    return path


def ade20k(root: Path) -> Path:
    """ADEChallengeData2016 as its archive unpacks; a few of its images are gray JPEGs."""
    for folder, kind, numbers in (("training", "train", TRAIN), ("validation", "val", VALID)):
        for number in numbers:
            name = f"ADE_{kind}_{number:08d}"
            picture(root / "images" / folder / f"{name}.jpg", number, gray=number == 1)
            label(root / "annotations" / folder / f"{name}.png", [0, 1, number, 150])
    (root / "objectInfo150.txt").touch()
    return root


def coco(root: Path, stuff: bool = False) -> Path:
    """COCO 2017 with UniMatch's masks of 0..80, or with COCO-Stuff's maps of 0..181 and 255."""
    for subset, first, numbers in (("train2017", 100, TRAIN), ("val2017", 900, VALID)):
        for number in numbers:
            name = f"{first + number:012d}"
            picture(root / subset / f"{name}.jpg", number, gray=number == 1)
            if stuff:
                label(root / "stuffthingmaps" / subset / f"{name}.png", [255, 0, number, 181])
            else:
                label(root / "masks" / f"{name}.png", [0, 1, number, 80])
    return root


TREES = {"ade20k": ade20k, "coco": coco, "coco_stuff": lambda root: coco(root, stuff=True)}
every_tree = pytest.mark.parametrize("dataset", TREES)


def released_lists(root: Path, folder: Path, dataset: str, with_unlabeled: bool) -> Path:
    """Four labeled images as UniMatch lists them, in paths; the folder of the split."""
    reader = open_reader(DataConfig(dataset, str(root)))

    def lines(names: list[str]) -> str:
        paths = [f"{reader.image_path(name)} {reader.label_path(name)}" for name in names]
        return "\n".join(paths).replace(f"{root}/", "")

    train = reader.names("train")
    texts = {"1_3/labeled": train[3::-1], "1_3/unlabeled": train[4:], "val": reader.names("val")}
    (folder / "1_3").mkdir(parents=True)
    for name, names in texts.items():
        if with_unlabeled or name != "1_3/unlabeled":
            (folder / f"{name}.txt").write_text(lines(names))
    return folder / "1_3"


# ---- readers ----


@pytest.mark.parametrize("place", [".", "ADEChallengeData2016"])
def test_ade20k_is_read_as_published(tmp_path, place):
    ade20k(tmp_path / place)
    reader = ADE20K(tmp_path)
    assert reader.names("train") == [f"ADE_train_{number:08d}" for number in TRAIN]
    assert reader.names("val") == [f"ADE_val_{number:08d}" for number in VALID]
    image, mask = reader.read_pair("ADE_train_00000003")
    assert image.shape == (3, *SIZE) and mask[0, :12:3].tolist() == [255, 0, 2, 149]
    assert reader.read_image("ADE_train_00000001").shape == (3, *SIZE)  # gray
    assert reader.read_label("ADE_val_00000002")[0, :12:3].tolist() == [255, 0, 1, 149]


@pytest.mark.parametrize("place", [".", "coco", "images"])
def test_coco_masks_store_the_class_ids(tmp_path, place):
    coco(tmp_path / place)
    if place == "images":
        (tmp_path / "images" / "masks").rename(tmp_path / "masks")
    reader = COCO(tmp_path)
    assert reader.names("train") == [f"{100 + number:012d}" for number in TRAIN]
    image, mask = reader.read_pair("000000000103")
    assert image.shape == (3, *SIZE) and mask[0, :12:3].tolist() == [0, 1, 3, 80]
    assert reader.read_pair("000000000901")[1][0, :12:3].tolist() == [0, 1, 1, 80]


def test_coco_stuff_maps_skip_the_things_without_masks(tmp_path):
    coco(tmp_path, stuff=True)
    stored = [0, 10, 12, 89, 91, 181, 255]
    label(tmp_path / "stuffthingmaps" / "train2017" / "000000000101.png", stored)
    reader = COCOStuff(tmp_path)
    ids = reader.read_label("000000000101")[0, : 3 * len(stored) : 3].tolist()
    assert ids == [0, 10, 11, 79, 80, 170, 255]
    names = [reader.classes[class_id] for class_id in ids[:-1]]
    assert names == ["person", "fire hydrant", "stop sign", "toothbrush", "banner", "wood"]


def test_coco_stuff_maps_lie_in_other_places_and_as_class_ids_too(tmp_path):
    coco(tmp_path, stuff=True)
    (tmp_path / "stuffthingmaps").rename(tmp_path / "annotations")
    for subset in ("train2017", "val2017"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / subset).rename(tmp_path / "images" / subset)
    folder = tmp_path / "annotations" / "train2017"
    label(folder / "000000000101_labelTrainIds.png", [7])
    assert COCOStuff(tmp_path).read_label("000000000101")[0, 3] == 0  # the map is preferred
    (folder / "000000000101.png").unlink()
    label(folder / "000000000101_labelTrainIds.png", [11, 170, 255])
    assert COCOStuff(tmp_path).read_label("000000000101")[0, :9:3].tolist() == [11, 170, 255]
    label(folder / "000000000101_labelTrainIds.png", [171])
    with pytest.raises(UserError, match=r"000000000101_labelTrainIds\.png holds 171,"):
        COCOStuff(tmp_path).read_label("000000000101")


def test_classes_are_named_in_the_order_of_the_publishers():
    assert [len(reader.classes) for reader in (ADE20K, COCO, COCOStuff)] == [150, 81, 171]
    assert all(len(set(reader.classes)) == len(reader.classes) for reader in (ADE20K, COCO, COCOStuff))
    every_tenth = [ADE20K.classes[number - 1] for number in range(10, 160, 10)]  # of the publisher's objectInfo150.txt
    assert every_tenth[:8] == ["grass", "chair", "field", "cushion", "fireplace", "stairway", "bench", "hovel"]
    assert every_tenth[8:] == ["television", "buffet", "swimming pool", "ball", "dishwasher", "fan", "flag"]
    things = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # by COCO's id
    assert COCO.classes == ("void", *(name for name in things[1:] if name != "N/A"))
    assert COCOStuff.classes[:80] == COCO.classes[1:]
    every_tenth = [COCOStuff.classes[80 + number] for number in range(8, 91, 10)]  # ids 100, 110, ... of labels.txt
    assert every_tenth[:5] == ["cardboard", "desk-stuff", "fog", "light", "pavement"]
    assert every_tenth[5:] == ["rock", "solid-other", "vegetable", "window-blind"]
    for dataset, reader in {"ade20k": ADE20K, "coco": COCO, "coco_stuff": COCOStuff}.items():
        names, palette = named_classes(DataConfig(dataset, "nowhere"), len(reader.classes))
        assert names == reader.classes
        assert len({tuple(color) for color in palette[: len(names)].tolist()}) == len(names)


@pytest.mark.parametrize(
    ("dataset", "value", "message"),
    [
        ("ade20k", 151, "holds 151; ADE20K stores 1 to 150"),
        ("ade20k", 255, r"holds 255, as in masks that were converted to 0\.\.149"),
        ("coco", 81, "holds 81, which this dataset does not define"),
        ("coco", 254, "holds 254, which this dataset does not define"),
        ("coco_stuff", 11, "holds 11, which this dataset does not define"),
        ("coco_stuff", 182, "holds 182, which this dataset does not define"),
    ],
)
def test_unknown_values_are_errors_that_name_file_and_value(tmp_path, dataset, value, message):
    reader = open_reader(DataConfig(dataset, str(TREES[dataset](tmp_path))))
    path = label(reader.label_path(reader.names("train")[1]), [0, value])
    with pytest.raises(UserError, match=rf"{path.name} {message}"):
        reader.read_label(reader.names("train")[1])


@every_tree
def test_damaged_and_colored_masks_are_errors(tmp_path, dataset):
    reader = open_reader(DataConfig(dataset, str(TREES[dataset](tmp_path))))
    name = reader.names("train")[1]
    path = reader.label_path(name)
    picture(path, 0)
    with pytest.raises(UserError, match=rf"{path.name} has mode RGB"):
        reader.read_label(name)
    path.write_bytes(b"no picture")
    with pytest.raises(UserError, match=rf"{path.name} cannot be decoded"):
        reader.read_label(name)
    path.unlink()
    with pytest.raises(UserError, match=rf"no label of {name}"):
        reader.read_label(name)


@every_tree
def test_a_root_without_the_tree_is_an_error(tmp_path, dataset):
    with pytest.raises(UserError, match=rf"tree under {tmp_path}: looked for"):
        open_reader(DataConfig(dataset, str(tmp_path)))


# ---- lists ----


@every_tree
@pytest.mark.parametrize("with_unlabeled", [True, False], ids=["all lists", "no unlabeled list"])
def test_released_lists_are_read_and_adopted(tmp_path, dataset, with_unlabeled, capsys):
    root = TREES[dataset](tmp_path / "data")
    lists = released_lists(root, tmp_path / "lists", dataset, with_unlabeled)
    data = DataConfig(dataset, str(root), split=str(lists))
    reader = open_reader(data)
    train = reader.names("train")
    expected = Split(train[3::-1], train[4:], reader.names("val"))
    assert split_of(data, reader) == expected
    adopt([str(lists), "--out", str(tmp_path / "out"), "--dataset", dataset, "--data-root", str(root)])
    assert read_split(tmp_path / "out") == expected
    assert "4 labeled, 6 unlabeled, 3 for validation" in capsys.readouterr().out


def test_without_an_unlabeled_list_the_dataset_is_needed(tmp_path, capsys):
    lists = released_lists(coco(tmp_path / "coco"), tmp_path / "lists", "coco", with_unlabeled=False)
    message = r"no list .*unlabeled\.txt, so all other training images of the dataset are unlabeled: give .*--dataset"
    with pytest.raises(UserError, match=message):
        read_split(lists)
    with pytest.raises(SystemExit):
        adopt([str(lists), "--out", str(tmp_path / "out")])
    assert "all other training images" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_published_split_without_unlabeled_list_is_recognized_by_their_number(tmp_path, monkeypatch, capsys):
    root = coco(tmp_path / "coco")
    lists = released_lists(root, tmp_path / "published" / "UniMatch" / "splits" / "coco", "coco", with_unlabeled=False)
    labeled = [f"{number:012d}" for number in range(101, 105)]
    entry = {
        "labeled": {"count": 4, "sha256": checksum(labeled)},
        "unlabeled": {"count": 6, "sha256": None},
        "valid": {"count": 3, "sha256": checksum([f"{number:012d}" for number in range(901, 904)])},
        "name": "UniMatch/splits/coco/1_3",
        "dataset": "coco",
        "place": "splits/unimatch/coco/1_3",
        "defects": [],
    }
    made = {"repositories": {"UniMatch": "https://example.org/unimatch"}, "lists": [], "splits": [entry]}
    monkeypatch.setattr("common.splits.published.record", lambda: made)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="those of UniMatch/splits/coco/1_3") as caught:
        split_of(DataConfig("coco", "coco", split=entry["place"]), COCO(root))
    command = commands(entry, "coco", entry["place"]).splitlines()[-1]
    assert command in str(caught.value) and command.endswith("--dataset coco --data-root coco")
    adopt(shlex.split(command)[2:])
    assert f"published split: {entry['name']}" in capsys.readouterr().out
    split = split_of(DataConfig("coco", "coco", split=entry["place"]), COCO(root))
    assert said_of(split.labeled, split.unlabeled) == f"published split: {entry['name']}"
    (root / "train2017" / "000000000110.jpg").unlink()
    with pytest.raises(SystemExit):
        adopt([str(lists), "--dataset", "coco", "--data-root", str(root)])
    assert "5 unlabeled images, published: 6; they are all other training images" in capsys.readouterr().err


@every_tree
def test_splits_are_made(tmp_path, dataset, capsys):
    root = TREES[dataset](tmp_path / "data")
    make(["--dataset", dataset, "--data-root", str(root), "--labels", "1/2", "--out", str(tmp_path / "splits")])
    assert "5 labeled, 5 unlabeled, 3 for validation" in capsys.readouterr().out


ADE20K_SHARES = {"1_64": 316, "1_32": 631, "1_16": 1263, "1_8": 2526, "1_4": 5052, "1_2": 10_105}
COCO_SHARES = {"1_512": 232, "1_256": 463, "1_128": 925, "1_64": 1849, "1_32": 3697}


def test_the_record_has_every_published_share():
    entries = {entry["name"]: entry for entry in record()["splits"] if entry["dataset"] in ("ade20k", "coco")}
    published = [
        ("UniMatch-V2/splits/ade20k", ADE20K_SHARES, 20_210, 2000),
        ("UniMatch/splits/coco", COCO_SHARES, 118_287, 5000),
    ]
    assert len(entries) == len(ADE20K_SHARES) + len(COCO_SHARES)
    for folder, shares, total, valid in published:
        for share, labels in shares.items():
            entry = entries[f"{folder}/{share}"]
            counts = [entry[kind]["count"] for kind in ("labeled", "unlabeled", "valid")]
            assert counts == [labels, total - labels, valid] and entry["defects"] == []
            assert entry["place"] == f"splits/unimatch/{entry['dataset']}/{share}"


def test_the_real_lists_are_recognized(request):
    folder = request.config.getoption("--published")
    if folder is None:
        pytest.skip("--published not given")
    for name, shares in (("UniMatch-V2/{}ade20k", ADE20K_SHARES), ("UniMatch/{}coco", COCO_SHARES)):
        places = [Path(folder, name.format(splits)) for splits in ("", "splits/")]
        place = next(path for path in places if path.is_dir())
        for share, labels in shares.items():
            names = find_lists(place / share).names(published_id)
            others = names.get("unlabeled") or [str(number) for number in range(118_287 - labels)]
            wanted = f"{name.format('splits/')}/{share}"
            (entry,) = (entry for entry in record()["splits"] if entry["name"] == wanted)
            assert said_of(names["labeled"], others) == f"published split: {wanted}"
            assert equals(entry["valid"], names["valid"])
            assert said_of(names["labeled"][1:], others) == "published split: none"


# ---- runs ----


@pytest.mark.parametrize(
    ("dataset", "script"),
    [
        ("ade20k", "unimatch/train.py"),
        ("ade20k", "prcl/train.py"),
        ("coco", "unimatch/train_v2.py"),
        ("coco_stuff", "unimatch/train_fixmatch.py"),
    ],
)
def test_a_run_and_its_evaluation(tiny, tmp_path, dataset, script, capsys):
    root = TREES[dataset](tmp_path / "data")
    lists = released_lists(root, tmp_path / "lists", dataset, with_unlabeled=dataset != "coco")
    data = ["--data.dataset", dataset, "--data.root", str(root), "--data.split", str(lists)]
    classes = open_reader(DataConfig(dataset, str(root))).classes
    short = ["--run.steps", "2", "--run.eval_every", "2", "--model.num_classes", str(len(classes))]
    train(script, tiny(script, *data, *short))
    (warning,) = (line for line in capsys.readouterr().out.splitlines() if "no labeled image shows" in line)
    assert " more classes: the network cannot learn them" in warning and len(warning) < 400
    ended = run_python([str(ROOT / script.split("/")[0] / "eval.py"), str(tmp_path / "run"), "-d", "cpu"], tmp_path)
    assert ended.status == 0, ended.err
    (written,) = (tmp_path / "run" / "eval").glob("*.json")
    scores = json.loads(written.read_text())
    assert tuple(scores["per_class_iou"]) == classes
    shown = {"ade20k": (0, 1, 2, 149), "coco": (0, 1, 2, 3, 80), "coco_stuff": (0, 1, 2, 3, 170)}[dataset]
    assert all(scores["per_class_iou"][classes[class_id]] is not None for class_id in shown)


@every_tree
def test_data_are_checked(tmp_path, dataset, capsys):
    root = TREES[dataset](tmp_path / "data")
    lists = released_lists(root, tmp_path / "lists", dataset, with_unlabeled=False)
    reader = open_reader(DataConfig(dataset, str(root)))
    section = {"dataset": dataset, "root": str(root), "split": str(lists)}
    config = {"data": section, "model": {"num_classes": len(reader.classes)}}
    (tmp_path / "mine.json").write_text(json.dumps(config))
    check_data(["--config", str(tmp_path / "mine.json")])
    text = capsys.readouterr().out
    assert "the data can be used" in text and f"dataset: {dataset}" in text and reader.classes[-1] in text
    label(reader.label_path(reader.names("val")[0]), [LARGEST[dataset] + 1])
    with pytest.raises(SystemExit):
        check_data(["--config", str(tmp_path / "mine.json")])
    assert f"holds {LARGEST[dataset] + 1}" in " ".join(capsys.readouterr().out.split())


def test_a_wrong_number_of_classes_is_reported_before_training(tiny, tmp_path, capsys):
    root = coco(tmp_path / "data")
    lists = released_lists(root, tmp_path / "lists", "coco", with_unlabeled=False)
    data = ["--data.dataset", "coco", "--data.root", str(root), "--data.split", str(lists)]
    message = refused("unimatch/train.py", tiny("unimatch/train.py", *data, "--model.num_classes", "80"), capsys)
    assert "model.num_classes is 80" in message and "81 classes" in message


# ---- configs ----

CONFIGS = [path for dataset in ("ade20k", "coco") for path in sorted(ROOT.glob(f"*/configs/{dataset}*.json"))]


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("*/configs/ade20k*.json")) + sorted(ROOT.glob("*/configs/coco*.json"))
)
def test_configs_fit_their_dataset(path):
    config = load_config(Config if path.parts[-3] == "unimatch" else PRCLConfig, path)
    names, _ = named_classes(config.data, config.model.num_classes)
    assert names[0] in ("wall", "void")  # not numbers, as with another number of classes
    assert config.data.split in {entry["place"] for entry in record()["splits"]}
    if config.model.head == "dpt":
        assert all(side % 14 == 0 for side in config.data.crop_size)
