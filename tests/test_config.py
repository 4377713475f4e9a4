"""How a config is read, and how a mistake in one is told."""

import importlib
import json
from pathlib import Path

import pytest

from benchmarks.accuracy import command
from common.config import load_config, parse, to_dict
from common.config.files import flatten
from common.errors import UserError
from prcl.train import Config

VALID = {
    "data": {"dataset": "voc", "root": "somewhere", "split": "splits/voc/1/0", "crop_size": [64, 96]},
    "model": {"num_classes": 21},
    "optim": {"lr": 1e-3},
    "method": {"temp": 0.5},
    "run": {"epochs": 3},
}


@pytest.fixture
def write(tmp_path):
    def write_config(values) -> str:
        path = tmp_path / "mine.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return str(path)

    return write_config


def test_file_then_overrides(write):
    config = parse(
        Config, "prcl/train.py", ["--config", write(VALID), "--optim.lr", "0.01", "--data.crop_size", "[32, 48]"]
    )
    assert config.optim.lr == 0.01
    assert config.data.crop_size == (32, 48)
    assert config.method.temp == 0.5
    assert config.run.dir == "runs/prcl/mine"


def test_files_as_windows_editors_write_them(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(VALID), encoding="utf-8-sig")
    assert parse(Config, "prcl/train.py", ["--config", str(file)]).method.temp == 0.5
    file.write_text(json.dumps(VALID), encoding="utf-16")
    with pytest.raises(UserError, match=r"mine\.json is no text in UTF-8: save it as UTF-8"):
        parse(Config, "prcl/train.py", ["--config", str(file)])


def test_steps_on_the_command_line_replace_epochs(write):
    config = parse(Config, "prcl/train.py", ["--config", write(VALID), "--run.steps", "7"])
    assert (config.run.steps, config.run.epochs) == (7, None)


def test_a_split_on_the_command_line_replaces_lists_and_lists_a_split(write):
    lists = {"split": None, "labeled_list": "a.txt", "unlabeled_list": "b.txt"}
    path = write(VALID | {"data": VALID["data"] | lists})
    data = parse(Config, "prcl/train.py", ["--config", path, "--data.split", "s"]).data
    assert (data.split, data.labeled_list, data.unlabeled_list, data.lists) == ("s", None, None, "s")
    data = parse(Config, "prcl/train.py", ["--config", write(VALID), "--data.labeled_list", "a.txt"]).data
    assert (data.split, data.labeled_list, data.lists) == (None, "a.txt", "a.txt")
    by_id = ["--data.split_id", "3", "--data.labeled_samples", "9"]
    data = parse(Config, "prcl/train.py", ["--config", path, *by_id, "--run.seed", "8"]).data
    assert (data.labeled_list, data.split_id, data.labeled_samples, data.split_seed) == (None, 3, 9, 8)
    path = write(VALID | {"data": VALID["data"] | {"split": None, "split_id": 3, "labeled_samples": 9}})
    data = parse(Config, "prcl/train.py", ["--config", path, "--data.split", "s"]).data
    assert (data.split, data.split_id, data.labeled_samples) == ("s", None, None)


def test_the_release_calls_voc_pascal(write):
    path = write(changed("data", "dataset", "pascal_voc"))
    assert parse(Config, "prcl/train.py", ["--config", path]).data.dataset == "voc"
    assert parse(Config, "prcl/train.py", ["--config", path, "--data.dataset", "pascal"]).data.dataset == "voc"


def test_a_config_written_and_read_again_is_the_same(write, tmp_path):
    config = parse(Config, "prcl/train.py", ["--config", write(VALID)])
    assert load_config(Config, write(to_dict(config))) == config


TABLES = sorted((Path(__file__).parents[1] / "benchmarks" / "tables").glob("*.json"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_settings_of_every_row_of_the_accuracy_tables_are_accepted(path):
    table = json.loads(path.read_text())
    for row in table["rows"].values():
        script, *arguments = command(row, table.get("set", {}), {}, 0, Path("somewhere"))
        parse(importlib.import_module(script.removesuffix(".py").replace("/", ".")).Config, script, arguments)


def test_flatten_gives_dotted_keys():
    assert flatten({"a": {"b": {"c": 1}}, "d": [2]}) == {"a.b.c": 1, "d": [2]}


def changed(section: str, key: str, value) -> dict:
    return VALID | {section: VALID[section] | {key: value}}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (changed("optim", "bach_size", 4), r"unknown key optim.bach_size .*did you mean optim.batch_size\?"),
        (VALID | {"optimizer": {}}, r"unknown key optimizer .*did you mean optim\?"),
        (VALID | {"optim": 3}, r"optim in .* must be a section"),
        (changed("optim", "lr", "fast"), r"optim\.lr"),
        (changed("optim", "lr", float("nan")), r"optim\.lr"),
        (changed("optim", "batch_size", 0), r"optim\.batch_size"),
        (changed("data", "crop_size", [64]), r"data\.crop_size"),
        (changed("data", "crop_size", [2, 2]), r"data\.crop_size is 2; it goes from 16 to 16384"),
        (
            changed("data", "scale_range", [1.0, 1e300]),
            r"data\.scale_range is 1e\+300; it goes from 0\.000976562 to 64",
        ),
        (changed("data", "dataset", "ade20k"), r"data\.dataset.*ade20k"),
        (changed("data", "scale_range", [2.0, 1.0]), r"data\.scale_range"),
        (changed("run", "trackers", "tensorboard"), r"^run\.trackers: Expected a list"),
        (changed("run", "steps", 5), r"both run\.steps and run\.epochs"),
        (VALID | {"run": {}}, r"set run\.steps or run\.epochs"),
        ("{not json", "is not JSON"),
        ("[]", "must be a JSON object"),
    ],
)
def test_mistakes_are_told_in_a_line_or_two(values, told, write):
    with pytest.raises(UserError, match=told) as error:
        parse(Config, "prcl/train.py", ["--config", write(values)])
    assert len(str(error.value).splitlines()) <= 2


def test_a_missing_file_is_told():
    with pytest.raises(UserError, match=r"nowhere\.json cannot be read"):
        parse(Config, "prcl/train.py", ["--config", "nowhere.json"])


@pytest.mark.parametrize(
    ("script", "folder"),
    [("prcl/train.py", "runs/prcl/mine"), ("cac_cps/train_semiseg.py", "runs/cac_cps/train_semiseg/mine")],
)
def test_runs_go_to_a_folder_of_the_paper_script_and_config(script, folder, write):
    assert parse(Config, script, ["--config", write(VALID)]).run.dir == folder


def test_numbers_are_plain(write):
    config = parse(Config, "prcl/train.py", ["--config", write(VALID)])
    assert type(config.optim.lr) is float
    assert [type(side) for side in config.data.crop_size] == [int, int]
