"""Published lists: all formats are read and adopted, the recorded ones are recognized, differing ones are refused."""

import json
import pickle
import shlex
import subprocess
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from common.config.sections import DataConfig
from common.datasets import open_reader
from common.datasets.ade20k import FOLDERS
from common.errors import UserError
from common.splits.lists import find_lists, published_id
from common.splits.published import checksum, commands, record, said_of
from common.splits.split import Split, read_split, split_of
from splits.adopt import main as adopt
from splits.record import RECORD, Splits, as_text, record_of

ROOT = Path(__file__).parent.parent
VOC = [f"2007_{number:06d}" for number in range(12)]
CITY = [f"aachen_{number:06d}_000019_leftImg8bit" for number in range(12)]
CONFIGS = sorted(path for path in ROOT.glob("*/configs/*.json") if not path.stem.startswith("demo"))


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))  # no line end after the last, as in PRCL's and UniMatch's


def city_lines(ids: list[str], form: str) -> list[str]:
    stems = [name.removesuffix("_leftImg8bit") for name in ids]
    if form == "cps":
        return [f"/images/train/{stem}.png\t/segmentation/train/{stem}_gtFine.png" for stem in stems]
    return [f"leftImg8bit/train/aachen/{s}_leftImg8bit.png gtFine/train/aachen/{s}_labelTrainIds.png" for s in stems]


def voc_lines(ids: list[str]) -> list[str]:
    return [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png" for name in ids]


def published(folder: Path, form: str, ids: list[str]) -> Path:
    """Four labeled, six unlabeled and two validation images of `ids` in one of the forms; the path to adopt."""
    lists = {"labeled": ids[3::-1], "unlabeled": ids[4:10], "valid": ids[10:]}
    if form == "prcl":
        for kind, names in lists.items():
            write(folder / "4" / "0" / f"{kind}_filename.txt", names)
        return folder / "4" / "0"
    lines = voc_lines if ids is VOC else lambda names: city_lines(names, form)
    if form == "cac":
        names = {"labeled": "4_train_supervised", "unlabeled": "4_train_unsupervised", "valid": "val"}
        for kind, name in names.items():
            write(folder / f"{name}.txt", lines(lists[kind]))
        return folder / "4"
    if form == "unimatch":
        for kind, name in {"labeled": "1_3/labeled", "unlabeled": "1_3/unlabeled", "valid": "val"}.items():
            write(folder / f"{name}.txt", lines(lists[kind]))
        return folder / "1_3"
    for kind, name in {
        "labeled": "subset/train_aug_labeled_1-3",
        "unlabeled": "subset/train_aug_unlabeled_1-3",
    }.items():
        write(folder / f"{name}.txt", lists[kind] if ids is VOC else lines(lists[kind]))
    write(folder / "val.txt", lists["valid"] if ids is VOC else lines(lists["valid"]))
    return folder / "subset" / "train_aug_labeled_1-3.txt"


@pytest.mark.parametrize("ids", [VOC, CITY], ids=["voc", "cityscapes"])
@pytest.mark.parametrize("form", ["prcl", "cac", "cps", "unimatch"])
def test_every_form_is_read_as_it_is_and_adopted(tmp_path, form, ids, capsys):
    path = published(tmp_path / "lists", form, ids)
    expected = Split(ids[3::-1], ids[4:10], ids[10:])
    assert read_split(path) == expected
    adopt([str(path), "--out", str(tmp_path / "out")])
    assert read_split(tmp_path / "out") == expected
    assert (tmp_path / "out" / "labeled_filename.txt").read_text().splitlines() == ids[3::-1]
    text = capsys.readouterr().out
    assert "4 labeled, 6 unlabeled, 2 for validation" in text and "published split: none\n" in text


def test_cac_lists_are_also_named_by_their_file(tmp_path):
    path = published(tmp_path, "cac", VOC)
    assert read_split(tmp_path / "4_train_supervised.txt") == read_split(path)


def fake_tree(root: Path, dataset: str, train: list[str], val: list[str]) -> None:
    """A tree that has names but no pictures."""
    if dataset == "voc":
        (root / "JPEGImages").mkdir(parents=True)
        for name, ids in (("train_aug", train), ("val", val)):
            write(root / "ImageSets" / "Segmentation" / f"{name}.txt", ids)
        return
    for subset, ids in (("train", train), ("val", val)):
        for name in ids:
            path = {
                "cityscapes": f"leftImg8bit/{subset}/{name.split('_')[0]}/{name}.png",
                "ade20k": f"images/{FOLDERS[subset]}/{name}.jpg",
                "coco": f"{subset}2017/{name}.jpg",
            }[dataset]
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).touch()


@pytest.mark.parametrize(("dataset", "ids"), [("voc", VOC), ("cityscapes", CITY)])
def test_an_order_of_images_counts_through_the_sorted_dataset(tmp_path, dataset, ids, capsys):
    fake_tree(tmp_path / "data", dataset, ids[:10], ids[10:])
    order = np.random.RandomState(0).permutation(10)
    (tmp_path / "split_0.pkl").write_bytes(pickle.dumps(order))
    tree = ["--dataset", dataset, "--data-root", str(tmp_path / "data")]
    adopt([str(tmp_path / "split_0.pkl"), "--labels", "3", *tree, "--out", str(tmp_path / "out")])
    ordered = [ids[index] for index in order]
    assert read_split(tmp_path / "out") == Split(ordered[:3], ordered[3:], ids[10:])
    for arguments, message in (
        (tree, "give --labels, from 1 to 10"),
        (["--labels", "11", *tree], "give --labels, from 1 to 10"),
        (["--labels", "3"], "give the dataset with --dataset and --data-root"),
        (["--labels", "3", *tree[:2]], "--dataset and --data-root go together"),
    ):
        assert message in refused([str(tmp_path / "split_0.pkl"), *arguments], capsys)
    (tmp_path / "split_1.pkl").write_bytes(pickle.dumps(np.arange(4)))
    assert "order of 4 images, but" in refused([str(tmp_path / "split_1.pkl"), "--labels", "3", *tree], capsys)


def test_reading_an_order_never_runs_what_is_in_it(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    (tmp_path / "split_0.pkl").write_bytes(pickle.dumps(Evil()))
    assert "refused" in refused([str(tmp_path / "split_0.pkl"), "--labels", "1"], capsys)
    assert not (tmp_path / "touched").exists()


def refused(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        adopt(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_what_was_published_without_validation_images_takes_the_datasets_own(tmp_path, capsys):
    path = published(tmp_path / "lists", "cps", VOC)
    (tmp_path / "lists" / "val.txt").unlink()
    assert "no list for validation was published" in refused([str(path), "--out", str(tmp_path / "out")], capsys)
    with pytest.raises(UserError, match="no list for validation"):
        read_split(path)
    fake_tree(tmp_path / "voc", "voc", VOC[:10], VOC[10:])
    adopt([str(path), "--out", str(tmp_path / "out"), "--dataset", "voc", "--data-root", str(tmp_path / "voc")])
    assert read_split(tmp_path / "out").valid == VOC[10:]
    data = DataConfig("voc", str(tmp_path / "voc"), split=str(path))
    assert split_of(data, open_reader(data)) == read_split(tmp_path / "out")


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A record of one published split, CAC's form of 12 images, of which one is labeled and unlabeled."""
    path = published(tmp_path / "published" / "CAC" / "lists", "cac", VOC)
    unlabeled = path.with_name("4_train_unsupervised.txt")
    write(unlabeled, voc_lines([*VOC[4:10], VOC[0]]))
    names = find_lists(path).names(published_id)
    entry = {kind: {"count": len(ids), "sha256": checksum(ids)} for kind, ids in names.items()}
    entry |= {"name": "CAC/lists/4", "dataset": "voc", "place": "splits/there/4", "defects": ["one shared id"]}
    found = {"repositories": {"CAC": "https://example.org/cac"}, "lists": [], "splits": [entry]}
    monkeypatch.setattr("common.splits.published.record", lambda: found)
    return path


def test_known_defects_are_reported_by_name_and_others_refused(recorded, tmp_path, capsys):
    adopt([str(recorded), "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert "published split: CAC/lists/4\nknown defect: one shared id" in text
    assert len(read_split(tmp_path / "out", allow_overlap=True).unlabeled) == 7
    other = published(tmp_path / "mine", "cac", VOC)
    write(other.with_name("4_train_unsupervised.txt"), voc_lines(VOC[2:10]))
    assert "2 images are both labeled and unlabeled" in refused([str(other), "--out", str(tmp_path / "o")], capsys)
    assert not (tmp_path / "o").exists()


def test_a_changed_list_at_a_published_path_is_refused(recorded, tmp_path, capsys):
    write(recorded.with_name("4_train_supervised.txt"), voc_lines(VOC[:3]))
    text = refused([str(recorded), "--out", str(tmp_path / "out")], capsys)
    assert "labeled list is not the published one (3 ids, published: 4" in text
    assert not (tmp_path / "out").exists()


def test_lists_are_recognized_whatever_their_order_and_form(recorded):
    labeled, unlabeled = VOC[:4], [VOC[0], *VOC[4:10]]
    assert said_of(labeled[::-1], unlabeled[::-1]) == "published split: CAC/lists/4"
    assert said_of(labeled, VOC) == "published split: none; the labeled images equal those of CAC/lists/4"
    assert said_of(VOC[1:5], unlabeled) == "published split: none"


def test_ids_that_are_twice_and_missing_lists_are_errors(tmp_path, capsys):
    path = published(tmp_path, "unimatch", VOC)
    write(path / "labeled.txt", [*voc_lines(VOC[:2]), *voc_lines(VOC[:1])])
    assert "1 ids occur more than once, e.g. 2007_000000" in refused([str(path)], capsys)
    write(path / "labeled.txt", voc_lines(VOC[:2]))
    (path / "unlabeled.txt").unlink()
    assert "no list" in refused([str(path)], capsys)
    assert "no published lists at" in refused([str(tmp_path / "nowhere")], capsys)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: "/".join(path.parts[-3::2]))
def test_a_config_whose_list_is_missing_prints_the_command_that_gets_it(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = DataConfig(**json.loads(config.read_text())["data"])
    fake_tree(tmp_path / "tree", "voc", [f"2007_{number:06d}" for number in range(2000)], VOC[10:])
    reader = open_reader(DataConfig("voc", str(tmp_path / "tree")))
    with pytest.raises(UserError) as caught:
        split_of(data, reader)
    place = data.split or data.labeled_list or f"{data.order_dir}/split_{data.split_id}.pkl"
    theirs = [entry for entry in record()["splits"] + record()["lists"] if entry.get("place") == place]
    theirs = [entry for entry in theirs if entry.get("labels") == data.labeled_samples]
    if config.parent.parent.name == "css":  # its authors published none
        assert not theirs and "python splits/make.py" in str(caught.value)
        return
    (entry,) = theirs
    assert commands(entry, data.root, place) in str(caught.value)


def test_the_page_names_every_published_split():
    page = (ROOT / "splits" / "README.md").read_text()
    for entry in record()["splits"]:
        valid = entry["valid"]["count"] if entry["valid"] else "the dataset's own"
        labels = f" --labels {entry['labels']}" if "labels" in entry else ""
        counts = f"{entry['labeled']['count']} / {entry['unlabeled']['count']} / {valid}"
        assert f"| `{entry['name']}{labels}` | {counts} | `{entry['place']}` |" in page
        assert all(f"| {defect}" in page for defect in entry["defects"])
    for name, url in record()["repositories"].items():
        assert f"git clone --depth 1 {url} published/{name}" in page


# ---- the record ----


@pytest.fixture
def one_kept(tmp_path, monkeypatch) -> Path:
    """Tables of the record cut to one split, published as a repository has it; the folder of its lists."""
    lists = {"train_aug": VOC[:10], "val": VOC[10:]}
    for name, ids in lists.items():
        write(tmp_path / "CAC" / f"{name}.txt", ids)
    monkeypatch.setattr("splits.record.LISTS", {"voc": {name: (f"CAC/{name}.txt",) for name in lists}})
    kept = Splits("CAC", "dataloaders/voc*/*_train_supervised.txt", "voc", "train_aug", "splits", "dataloaders")
    monkeypatch.setattr("splits.record.SPLITS", (kept,))
    return published(tmp_path / "CAC" / "dataloaders" / "voc_splits0", "cac", VOC).parent


def test_a_record_holds_counts_and_the_place(one_kept, tmp_path):
    (entry,) = record_of(tmp_path)["splits"]
    assert (entry["name"], entry["place"]) == ("CAC/dataloaders/voc_splits0/4", "splits/voc_splits0/4")
    assert [entry[kind]["count"] for kind in ("labeled", "unlabeled", "valid")] == [4, 6, 2]
    assert entry["labeled"]["sha256"] == checksum(VOC[:4]) and entry["defects"] == []


@pytest.mark.parametrize(
    ("name", "ids", "defect"),
    [
        ("4_train_unsupervised", VOC[5:10], "not the 10 images of train_aug"),
        ("4_train_unsupervised", VOC[4:11], "not the 10 images of train_aug"),
        ("4_train_unsupervised", VOC[3:10], "one id is labeled and unlabeled"),
        ("4_train_unsupervised", VOC[2:10], "2 images are labeled and unlabeled"),
        ("val", VOC[9:11], "not the validation images"),
    ],
)
def test_defects_that_are_not_known_end_a_record(one_kept, tmp_path, name, ids, defect):
    write(one_kept / f"{name}.txt", voc_lines(ids))
    with pytest.raises(UserError, match=defect):
        record_of(tmp_path)


# ---- the real lists ----


@pytest.fixture(scope="module")
def lists_folder(request) -> Path:
    folder = request.config.getoption("--published")
    if folder is None:
        pytest.skip("--published not given")
    return Path(folder).resolve()


def test_record_is_what_the_real_lists_say(lists_folder):
    """Counts, overlap, nothing missing and no unknown defect: `record_of` ends at the first that is not so."""
    assert as_text(record_of(lists_folder)) == RECORD.read_text()


def test_no_real_list_is_left_out(lists_folder):
    """Every file below the folder belongs to a recorded split or list."""
    names = [entry["name"] for entry in record()["splits"] + record()["lists"]]
    for file in [path for path in lists_folder.rglob("*") if path.suffix in (".txt", ".pkl")]:
        repository, *parts = file.relative_to(lists_folder).parts
        path = "/".join(parts).replace("_train_unsupervised", "_train_supervised").replace("unlabeled_", "labeled_")
        path = path.removesuffix("_train_supervised.txt")
        tails = [path, path.rsplit("/", 1)[0]]
        assert any(n.startswith(f"{repository}/") and n.endswith(tuple(f"/{t}" for t in tails)) for n in names), file


@pytest.fixture(scope="module")
def clones(lists_folder, tmp_path_factory) -> Path:
    """A folder with `published/<repository>` as the clones would have it, and trees with the datasets' real names."""
    folder = tmp_path_factory.mktemp("clones")
    for entry in record()["splits"] + record()["lists"]:
        repository, *parts = entry["name"].split("/")
        parent, start = folder / "published" / repository, 0
        while not (lists_folder / repository / parts[start]).exists():
            start += 1
        link = parent.joinpath(*parts[: start + 1])
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(lists_folder / repository / parts[start])
    for dataset, whole in (("voc", "train_aug"), ("cityscapes", "train"), ("ade20k", None), ("coco", None)):
        lists = {
            e["list"]: folder / "published" / e["name"] for e in record()["lists"][::-1] if e["dataset"] == dataset
        }
        train = ids_of(lists[whole]) if whole else TRAIN[dataset](folder / "published")
        fake_tree(folder / "trees" / dataset, dataset, train, ids_of(lists["val"]))
    return folder


def ids_of(path: Path) -> list[str]:
    return [published_id(line.split()[0]) for line in path.read_text().splitlines()]


def coco_train(lists: Path) -> list[str]:
    """The labeled images of all published splits, and others up to the number of training images."""
    labeled = {name for path in lists.glob("UniMatch/splits/coco/*/labeled.txt") for name in ids_of(path)}
    others = (f"{number:012d}" for number in range(10**6, 10**7))
    return sorted(labeled) + list(islice(others, 118_287 - len(labeled)))


# Training images of datasets of which no complete list was published.
TRAIN = {"ade20k": lambda lists: [f"ADE_train_{number:08d}" for number in range(1, 20_211)], "coco": coco_train}


@pytest.mark.parametrize("repository", sorted(record()["repositories"]))
def test_the_printed_commands_adopt_every_real_split(clones, repository, monkeypatch, tmp_path, capsys):
    """What a config with a missing list prints is run, but for the clone itself; and the split is recognized."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "published").symlink_to(clones / "published")
    entries = [entry for entry in record()["splits"] + record()["lists"] if entry["name"].startswith(f"{repository}/")]
    assert entries
    for entry in (entry for entry in entries if "place" in entry):
        _, *lines = commands(entry, str(clones / "trees" / entry["dataset"]), entry["place"]).splitlines()
        for line in lines[:-1]:
            subprocess.run(line, shell=True, check=True)
        adopt(shlex.split(lines[-1])[2:])
        assert entry["name"] in capsys.readouterr().out
        if "list" in entry:
            continue
        reader = open_reader(DataConfig(entry["dataset"], str(clones / "trees" / entry["dataset"])))
        data = DataConfig(entry["dataset"], "", allow_overlap=bool(entry["defects"]))
        if "labels" in entry:
            place = Path(entry["place"])
            data.order_dir, data.split_id = str(place.parent), int(place.stem.removeprefix("split_"))
            data.labeled_samples = entry["labels"]
        else:
            data.split = entry["place"]
        split = split_of(data, reader)
        assert [len(split.labeled), len(split.unlabeled)] == [entry[k]["count"] for k in ("labeled", "unlabeled")]
        assert sorted(split.valid) == reader.names("val")
        assert entry["name"] in said_of(split.labeled, split.unlabeled)
