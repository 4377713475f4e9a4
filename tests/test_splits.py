"""Splits: lists are read as people write them, made reproducibly, and never overwritten."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.config.sections import DataConfig
from common.datasets import open_reader
from common.datasets.cityscapes import Cityscapes
from common.datasets.shapes import CLASSES, make_shapes
from common.datasets.voc import VOC
from common.errors import UserError
from common.splits.split import (
    Split,
    candidates,
    choose_class_covering,
    choose_every,
    choose_random,
    complete,
    read_split,
    split_of,
    valid_of,
    write_split,
)
from splits.make import main

NAMES = [f"2007_{number:06d}" for number in range(40)]


def lists(folder: Path, labeled: str, unlabeled: str = "c\n", valid: str = "v\n") -> Path:
    folder.mkdir(parents=True)
    for kind, text in (("labeled", labeled), ("unlabeled", unlabeled), ("valid", valid)):
        (folder / f"{kind}_filename.txt").write_bytes(text.encode())
    return folder


def voc_tree(root: Path, unlabeled: int = 0) -> Path:
    """40 training images of class 0 and one of the classes 1 to 4, which is rare; 4 for validation."""
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for index, name in enumerate([*NAMES, *(f"2008_{number:06d}" for number in range(4))]):
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
        label = np.zeros((4, 6), np.uint8)
        label[0] = index // 9 if index % 9 == 0 else 255
        Image.fromarray(label).save(root / "SegmentationClassAug" / f"{name}.png")
    (root / "ImageSets/Segmentation/val.txt").write_text("".join(f"2008_{number:06d}\n" for number in range(4)))
    return root


# ---- reading and writing ----


def test_lists_are_read_in_their_order_whatever_the_line_ends(tmp_path):
    folder = lists(tmp_path / "s", "b\r\n\r\na\r\n", "\ufeffd e\n  c \n\n", "v")
    assert read_split(folder) == Split(["b", "a"], ["d e", "c"], ["v"])


def test_what_is_written_is_read_back(tmp_path):
    split = Split(["b", "a"], ["c"], ["v", "w"])
    write_split(tmp_path / "662" / "0", split)
    assert read_split(tmp_path / "662" / "0") == split
    assert [path.name for path in (tmp_path / "662").iterdir()] == ["0"]


def test_a_split_is_not_written_over(tmp_path):
    split = Split(["a"], ["c"], ["v"])
    write_split(tmp_path / "s", split)
    write_split(tmp_path / "s", split)
    with pytest.raises(UserError, match="nothing is overwritten"):
        write_split(tmp_path / "s", Split(["b"], ["c"], ["v"]))
    assert read_split(tmp_path / "s") == split
    (tmp_path / "s" / "valid_filename.txt").unlink()
    with pytest.raises(UserError, match="nothing is overwritten"):
        write_split(tmp_path / "s", split)


def test_repeated_ids_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"unlabeled_filename\.txt: 1 ids occur more than once, e\.g\. c"):
        read_split(lists(tmp_path / "s", "a\n", "c\nd\nc\n"))


def test_overlap_is_refused_unless_allowed(tmp_path):
    folder = lists(tmp_path / "s", "a\nb\n", "b\nc\n")
    with pytest.raises(UserError, match=r"1 images are both labeled and unlabeled, e\.g\. b.*data\.allow_overlap"):
        read_split(folder)
    assert read_split(folder, allow_overlap=True).unlabeled == ["b", "c"]


def test_lists_of_other_repositories_are_distinguished(tmp_path):
    with pytest.raises(UserError, match="one id per line"):
        read_split(lists(tmp_path / "s", "/JPEGImages/a.jpg /SegmentationClassAug/a.png\n"))


def test_missing_and_empty_lists_are_errors(tmp_path):
    folder = tmp_path / "splits" / "662" / "3"
    with pytest.raises(
        UserError, match=rf"published.*\n.*voc --data-root there --labels 662 --seed 3 --out {tmp_path}"
    ):
        read_split(folder, dataset="voc", root="there")
    with pytest.raises(UserError, match="--labels N --seed SEED --out SPLITS"):
        read_split(tmp_path / "any")
    with pytest.raises(UserError, match=r"labeled_filename\.txt is empty"):
        read_split(lists(folder, "\n"))
    assert read_split(lists(tmp_path / "full", "a\n", "")).unlabeled == []
    (folder / "valid_filename.txt").unlink()
    with pytest.raises(UserError, match=r"no list .*valid_filename\.txt"):
        read_split(folder)


# ---- choosing ----


def test_random_choice_depends_on_names_number_and_seed_alone():
    chosen = choose_random(NAMES, 8, 0)
    assert len(set(chosen)) == 8 and set(chosen) <= set(NAMES)
    assert choose_random(NAMES[::-1], 8, 0) == chosen
    assert choose_random(NAMES, 8, 1) != chosen
    assert choose_random(NAMES, 16, 0)[:8] == chosen
    # Pinned: published runs name their split by these three alone.
    assert choose_random(NAMES, 4, 0) == ["2007_000017", "2007_000009", "2007_000007", "2007_000032"]


@pytest.mark.parametrize("count", [0, 41])
def test_impossible_numbers_are_refused(count):
    with pytest.raises(UserError, match=f"{count} labeled images of 40"):
        choose_random(NAMES, count, 0)


def test_every_rth_counts_are_the_published_ones():
    names = [f"{number:05d}" for number in range(10582)]
    assert [len(choose_every(names, step)) for step in (16, 8, 4, 2)] == [662, 1323, 2646, 5291]
    assert choose_every(names[::-1], 16)[:2] == ["00000", "00016"]


def test_class_covering_changes_the_random_choice_as_little_as_needed(tmp_path):
    reader = VOC(voc_tree(tmp_path))
    names = candidates(reader)
    for seed in range(5):
        chosen = choose_class_covering(reader, names, 12, seed)
        shown = {int(value) for name in chosen for value in reader.read_label(name).unique()} - {255}
        assert shown == {0, 1, 2, 3, 4}
        assert len(set(chosen)) == 12
        assert len(set(chosen) & set(choose_random(names, 12, seed))) >= 8
        assert choose_class_covering(reader, names[::-1], 12, seed) == chosen
    assert choose_class_covering(reader, names, 40, 0) == choose_random(names, 40, 0)
    assert len(set(choose_class_covering(reader, names, 4, 0))) == 4
    with pytest.raises(UserError, match="3 images cannot show all 5 classes"):
        choose_class_covering(reader, names, 3, 0)


def test_only_labeled_images_are_chosen_and_the_rest_is_unlabeled(tmp_path):
    reader = VOC(voc_tree(tmp_path))
    (tmp_path / "ImageSets/Segmentation/train_aug.txt").write_text("".join(f"{name}\n" for name in NAMES))
    for name in NAMES[10:]:
        (tmp_path / "SegmentationClassAug" / f"{name}.png").unlink()
    assert candidates(reader) == NAMES[:10]
    split = complete(reader, NAMES[:3])
    assert split == Split(NAMES[:3], NAMES[3:], reader.names("val"))


# ---- the command ----


def make(root: Path, out: Path, *more: str) -> None:
    main(["--dataset", "voc", "--data-root", str(root), "--out", str(out), *more])


@pytest.mark.parametrize("method", ["random", "class-covering", "every-rth"])
def test_make_writes_a_complete_split(tmp_path, method, capsys):
    reader = VOC(voc_tree(tmp_path / "voc"))
    make(tmp_path / "voc", tmp_path / "splits", "--labels", "1/4", "--seed", "3", "--method", method)
    split = read_split(tmp_path / "splits" / "10" / "3")
    assert len(split.labeled) == 10
    assert sorted(split.labeled + split.unlabeled) == NAMES
    assert split.valid == reader.names("val")
    assert "10 labeled, 30 unlabeled, 4 for validation" in capsys.readouterr().out
    make(tmp_path / "voc", tmp_path / "splits", "--labels", "10", "--seed", "3", "--method", method)
    if method == "every-rth":
        assert split.labeled == NAMES[::4]


def test_labeled_images_are_drawn_among_those_of_a_list(tmp_path):
    voc_tree(tmp_path / "voc")
    (tmp_path / "train.txt").write_text("".join(f"{name}\n" for name in NAMES[20:30]))
    make(tmp_path / "voc", tmp_path / "splits", "--labels", "1/2", "--among", str(tmp_path / "train.txt"))
    split = read_split(tmp_path / "splits" / "5" / "0")
    assert set(split.labeled) <= set(NAMES[20:30])
    assert sorted(split.labeled + split.unlabeled) == NAMES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "41"], "41 labeled images of 40"),
        (["--labels", "many"], "give a number of images or a share"),
        (["--labels", "5/4"], "give a number of images or a share"),
        (["--labels", "1.5"], "give a number of images or a share"),
        (["--labels", "12", "--method", "every-rth"], "every 4th gives 10"),
        (["--labels", "3/8", "--method", "every-rth"], "shares such as 1/8"),
        (["--labels", "2", "--among", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--labels", "2", "--among", "LICENSE"], "which is not a training image with a label"),
    ],
)
def test_make_tells_what_cannot_be(tmp_path, arguments, message, capsys):
    voc_tree(tmp_path / "voc")
    with pytest.raises(SystemExit) as stopped:
        make(tmp_path / "voc", tmp_path / "splits", *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "splits").exists()


def test_make_refuses_to_write_over_another_split(tmp_path, capsys):
    voc_tree(tmp_path / "voc")
    make(tmp_path / "voc", tmp_path / "splits", "--labels", "10")
    with pytest.raises(SystemExit):
        make(tmp_path / "voc", tmp_path / "splits", "--labels", "10", "--method", "every-rth")
    assert "nothing is overwritten" in capsys.readouterr().err


# ---- the built-in data ----


def test_built_in_data_bring_their_split(tmp_path):
    make_shapes(tmp_path / "shapes", "voc", train=24, val=3, size=(24, 32))
    data = DataConfig("shapes", str(tmp_path / "shapes"), str(tmp_path / "shapes" / "splits" / "6" / "1"))
    reader = open_reader(data)
    assert len(reader.classes) == 7
    split = split_of(data, reader)
    assert (len(split.labeled), len(split.unlabeled), len(split.valid)) == (6, 18, 3)
    shown = {int(value) for name in split.labeled for value in reader.read_label(name).unique()} - {255}
    assert shown == set(range(7))
    assert split_of(data, open_reader(data)) == read_split(data.split) == split


def test_built_in_data_are_made_on_first_use(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        "common.datasets.make_shapes", lambda root, layout: made.append(make_shapes(root, layout, 2, 1))
    )
    data = DataConfig("shapes", str(tmp_path / "shapes"), str(tmp_path / "elsewhere" / "2" / "0"))
    assert len(open_reader(data).names("train")) == 2
    assert len(open_reader(data).names("val")) == 1
    assert len(made) == 1
    with pytest.raises(UserError, match="no split"):
        read_split(data.split)


def test_built_in_split_folders_name_labels_and_seed(tmp_path):
    make_shapes(tmp_path / "shapes", "voc", train=2, val=1, size=(24, 32))
    data = DataConfig("shapes", str(tmp_path / "shapes"), str(tmp_path / "shapes" / "splits" / "few" / "0"))
    with pytest.raises(UserError, match="both numbers"):
        split_of(data, open_reader(data))


def test_real_splits_partition_the_data(request):
    folder = request.config.getoption("--realdata")
    if folder is None:
        pytest.skip("--realdata not given")
    reader = VOC(Path(folder) / "camvid_voc")
    for labels in (12, 23, 46, 92):
        for seed in (0, 1, 2):
            split = read_split(Path(folder, "camvid_voc", "splits", str(labels), str(seed)))
            assert len(split.labeled) == labels
            assert sorted(split.labeled + split.unlabeled) == reader.names("train")
            assert split.valid == reader.names("val")


# ---- lists that a config names ----


def test_lists_of_ids_and_the_datasets_own_validation_images(tmp_path):
    make_shapes(tmp_path, "voc", train=6, val=3, size=(24, 32))
    reader = VOC(tmp_path, CLASSES)
    names = reader.names("train")
    (tmp_path / "some.txt").write_bytes(f"{names[2]}\r\n{names[0]}\r\n".encode())
    (tmp_path / "all.txt").write_text("\n".join(names))
    data = DataConfig("voc", str(tmp_path), labeled_list=str(tmp_path / "some.txt"))
    split = split_of(data, reader)
    assert (split.labeled, split.valid) == ([names[2], names[0]], reader.names("val"))
    assert split.unlabeled == [names[1], *names[3:]]
    data.unlabeled_list = str(tmp_path / "all.txt")
    with pytest.raises(UserError, match="2 images are both labeled and unlabeled"):
        split_of(data, reader)
    data.allow_overlap = True
    assert split_of(data, reader).unlabeled == names


def test_lists_of_paths_name_the_images_of_any_tree(tmp_path):
    make_shapes(tmp_path, "cityscapes", train=4, val=2, size=(24, 32))
    reader = Cityscapes(tmp_path)
    names = reader.names("train")
    stems = [name.removesuffix("_leftImg8bit") for name in names]
    lines = [f"/images/train/{stem}.png\t/segmentation/train/{stem}_gtFine.png" for stem in stems[:2]]
    (tmp_path / "cps.txt").write_text("\n".join(lines))
    # As a script on Windows writes them.
    (tmp_path / "others.txt").write_text("".join(f"leftImg8bit\\train\\{name}.png\r\n" for name in names[2:]))
    lists = {"labeled_list": str(tmp_path / "cps.txt"), "unlabeled_list": str(tmp_path / "others.txt")}
    split = split_of(DataConfig("cityscapes", str(tmp_path), **lists), reader)
    assert (split.labeled, split.unlabeled) == (names[:2], names[2:])


# ---- stored and random orders ----


def by_order(root: Path, split_id: int, labeled: int, **more) -> DataConfig:
    return DataConfig("voc", str(root), split_id=split_id, labeled_samples=labeled, split_seed=5, **more)


def test_the_first_of_an_order_are_labeled(tmp_path):
    root, order = voc_tree(tmp_path / "voc"), np.random.RandomState(0).permutation(40)
    (tmp_path / "split_2.pkl").write_bytes(pickle.dumps(order, protocol=3))
    reader, released = VOC(root), [NAMES[index] for index in order]
    split = split_of(by_order(root, 2, 15, order_dir=str(tmp_path)), reader)
    assert (split.labeled, split.unlabeled, split.valid) == (released[:15], released[15:], reader.names("val"))
    randoms = [split_of(by_order(root, split_id, 15), reader) for split_id in (3, 4, 3)]
    assert randoms[0] == randoms[2] and randoms[0].labeled != randoms[1].labeled
    assert sorted(randoms[1].labeled + randoms[1].unlabeled) == NAMES
    assert split_of(by_order(root, 3, 9), reader).labeled == randoms[0].labeled[:9]


def test_built_in_data_have_random_orders(shapes_root):
    data = DataConfig("shapes", str(shapes_root), split_id=3, labeled_samples=5, split_seed=0)
    split = split_of(data, open_reader(data))
    assert (len(split.labeled), len(split.unlabeled), len(split.valid)) == (5, 19, 7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"split_id": 0, "order_dir": "{}/none"}, r"no stored order .*split_0\.pkl: copy the released"),
        ({"split_id": 1}, r"set data\.order_dir to the folder of split_1\.pkl"),
        ({"split_id": 2, "order_dir": "{}"}, r"split_2\.pkl orders 3 images, but .* has 40 for training"),
        ({"split_id": 3, "labeled_samples": 41}, r"data\.labeled_samples is 41, but .* has 40"),
        ({"split_id": 3, "labeled_samples": None}, "go together"),
        ({"split_id": None}, "states one of"),
        ({"split_id": 3, "split": "somewhere"}, "states one of"),
        ({"split_id": 3, "unlabeled_list": "somewhere"}, "requires data.labeled_list"),
    ],
)
def test_wrong_split_ids_are_errors(tmp_path, values, message):
    root = voc_tree(tmp_path / "voc")
    (tmp_path / "split_2.pkl").write_bytes(pickle.dumps(np.arange(3)))
    values = {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in values.items()}
    data = DataConfig(**{"dataset": "voc", "root": str(root), "labeled_samples": 4, "split_seed": 0} | values)
    with pytest.raises(UserError, match=message):
        split_of(data, VOC(root))


def test_validation_needs_no_stored_order(tmp_path):
    root = voc_tree(tmp_path / "voc")
    assert valid_of(by_order(root, 0, 4), VOC(root)) == VOC(root).names("val")
