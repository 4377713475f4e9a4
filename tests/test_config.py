"""Reading configs, and the error messages for mistakes in them."""

import importlib
import json
from pathlib import Path

import pytest

from benchmarks.accuracy import command, read_table
from common.config import BaseConfig, load_config, parse, to_dict
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
    with pytest.raises(UserError, match=r"mine\.json is not UTF-8 text; save it as UTF-8"):
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


def test_pascal_is_another_name_of_voc(write):
    path = write(changed("data", "dataset", "pascal_voc"))
    assert parse(Config, "prcl/train.py", ["--config", path]).data.dataset == "voc"
    assert parse(Config, "prcl/train.py", ["--config", path, "--data.dataset", "pascal"]).data.dataset == "voc"


def test_later_files_replace_values_of_earlier_ones_and_arguments_those_of_all(write, tmp_path):
    (tmp_path / "base.json").write_text(json.dumps(VALID))
    later = write({"optim": {"lr": 0.2}, "method": {"temp": 2.0}})
    arguments = ["--method.temp", "3", f"--config={tmp_path / 'base.json'}", "--config", later]
    config = parse(Config, "prcl/train.py", arguments)
    assert (config.optim.lr, config.method.temp, config.run.epochs) == (0.2, 3.0, 3)
    assert config.run.dir == "runs/prcl/mine"


def test_required_values_may_stand_on_the_command_line(write):
    path = write(VALID | {"model": {}})
    assert parse(Config, "prcl/train.py", ["--config", path, "--model.num_classes", "7"]).model.num_classes == 7
    with pytest.raises(UserError, match=r"^model\.num_classes missing: give a --config FILE"):
        parse(Config, "prcl/train.py", ["--config", path])


def test_the_shared_sections_of_any_config_are_read(write):
    config = load_config(BaseConfig, write(VALID | {"method": {"another paper's": 1}}))
    assert config.optim.lr == 1e-3 and not hasattr(config, "method")


def test_a_config_written_and_read_again_is_the_same(write, tmp_path):
    config = parse(Config, "prcl/train.py", ["--config", write(VALID)])
    assert load_config(Config, write(to_dict(config))) == config


TABLES = sorted((Path(__file__).parents[1] / "benchmarks" / "tables").glob("*.json"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_settings_of_every_row_of_the_accuracy_tables_are_accepted(path):
    table = read_table(path)
    for row in table["rows"].values():
        script, *arguments = command(row, table.get("set", {}), {}, 0, Path("somewhere"))
        parse(importlib.import_module(script.removesuffix(".py").replace("/", ".")).Config, script, arguments)


def test_flatten_gives_dotted_keys():
    assert flatten({"a": {"b": {"c": 1}}, "d": [2]}) == {"a.b.c": 1, "d": [2]}


def changed(section: str, key: str, value) -> dict:
    return VALID | {section: VALID[section] | {key: value}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed("optim", "bach_size", 4), r"unknown key optim.bach_size .*did you mean optim.batch_size\?"),
        (VALID | {"optimizer": {}}, r"unknown key optimizer .*did you mean optim\?"),
        (VALID | {"optim": 3}, r"optim in .* must be a section"),
        (changed("optim", "lr", {}), r"optim\.lr in .* must be a value"),
        (changed("optim", "lr", None), r"^optim\.lr is null; leave it out"),
        (changed("optim", "lr", [1]), r"^optim\.lr must be a finite number above 0$"),
        (changed("optim", "lr", "fast"), r"^optim\.lr is 'fast'; it must be a finite number above 0$"),
        (changed("optim", "lr", float("nan")), r"^optim\.lr is nan; it must be a finite number above 0$"),
        (changed("optim", "lr", float("inf")), r"^optim\.lr is inf; it must be a finite number above 0$"),
        (changed("optim", "batch_size", 0), r"^optim\.batch_size is 0; it must be a whole number between 1 and 65536$"),
        (changed("run", "steps_per_epoch", 10**30), r"is 10*; it must be a whole number between 1 and 2147483647$"),
        (changed("run", "steps_per_epoch", 0.5), r"is 0\.5; it must be a whole number between 1 and 2147483647$"),
        (changed("method", "num_queries", 2**15), r"^method\.num_queries is 32768; .* between 1 and 16384$"),
        (changed("data", "crop_size", [64]), r"^data\.crop_size is \[64\]; it must be a list of 2 values$"),
        (changed("data", "crop_size", [2, 2]), r"^data\.crop_size is 2; it must be .* between 16 and 16384$"),
        (changed("data", "scale_range", [1.0, 1e300]), r"is 1e\+300; it must be .* between 0\.000976562 and 64$"),
        (changed("data", "dataset", "kitti"), r"^data\.dataset is kitti; it must be one of voc, pascal, .*, shapes$"),
        (changed("data", "scale_range", [2.0, 1.0]), r"^data\.scale_range is \[2\.0, 1\.0\]; give the smaller one"),
        (changed("model", "pretrained", 3), r"^model\.pretrained is 3; it must be true or false or a string$"),
        (changed("run", "trackers", "tensorboard"), r"^run\.trackers is tensorboard; it must be a list$"),
        (changed("run", "steps", 5), r"both run\.steps and run\.epochs"),
        (VALID | {"run": {}}, r"set run\.steps or run\.epochs"),
        ("{not json", "is not JSON"),
        ("[]", "must be a JSON object"),
    ],
)
def test_mistakes_are_reported_in_two_lines_at_most(values, message, write):
    with pytest.raises(UserError, match=message) as error:
        parse(Config, "prcl/train.py", ["--config", write(values)])
    assert len(str(error.value).splitlines()) <= 2


def test_a_missing_file_is_reported():
    with pytest.raises(UserError, match=r"nowhere\.json cannot be read"):
        parse(Config, "prcl/train.py", ["--config", "nowhere.json"])


@pytest.mark.parametrize(
    ("script", "folder"),
    [("prcl/train.py", "runs/prcl/mine"), ("cac_cps/train_semiseg.py", "runs/cac_cps/train_semiseg/mine")],
)
def test_runs_go_to_a_folder_of_the_paper_script_and_config(script, folder, write):
    assert parse(Config, script, ["--config", write(VALID)]).run.dir == folder


def test_numbers_are_built_in_types(write):
    config = parse(Config, "prcl/train.py", ["--config", write(VALID)])
    assert type(config.optim.lr) is float
    assert [type(side) for side in config.data.crop_size] == [int, int]
