"""The config files that the papers released, each written as its release describes it, in our words."""

import copy
import json
from pathlib import Path

import pytest

import cac_cps.setting
import css.train
import prcl.train
from common.config import load_config, parse, to_dict
from common.errors import UserError

ROOT = Path(__file__).parent.parent


def parsed(config_class, script: str, file: Path, *overrides: str) -> dict:
    """What a script reads from a file, without the run folder, which has the name of the file."""
    values = to_dict(parse(config_class, script, ["--config", str(file), *overrides]))
    values["run"].pop("dir")
    return values


def ours(config_class, name: str, **changes) -> dict:
    """What a config of ours says, with changed values under `section__key`."""
    values = to_dict(load_config(config_class, ROOT / name))
    values["run"].pop("dir")
    for key, value in changes.items():
        section, key = key.split("__")
        values[section][key] = value
    return values


# ---- CAC

CAC = json.loads("""
{
  "name": "CAC", "experim_name": "voc_cac_deeplabv3+_resnet50_1over8_datalist0",
  "dataset": "voc", "data_dir": "pretrained/VOCtrainval_11-May-2012", "datalist": 0,
  "n_gpu": 2, "n_labeled_examples": 1323, "diff_lrs": true, "ramp_up": 0.1, "unsupervised_w": 30, "ignore_index": 255,
  "lr_scheduler": "Poly", "use_weak_lables": false, "weakly_loss_w": 0.4, "pretrained": true, "random_seed": 42,
  "model": {
    "supervised": false, "semi": true, "supervised_w": 1, "sup_loss": "CE", "layers": 50, "downsample": true,
    "proj_final_dim": 128, "out_dim": 256, "backbone": "deeplab_v3+", "pos_thresh_value": 0.75, "weight_unsup": 0.1,
    "epoch_start_unsup": 5, "selected_num": 6400, "temp": 0.1, "step_save": 1, "stride": 8
  },
  "optimizer": {"type": "SGD", "args": {"lr": 0.01, "weight_decay": 1e-4, "momentum": 0.9}},
  "train_supervised": {
    "batch_size": 8, "crop_size": 320, "shuffle": true, "base_size": 400, "scale": true, "augment": true, "flip": true,
    "rotate": false, "blur": false, "split": "train_supervised", "num_workers": 8
  },
  "train_unsupervised": {
    "batch_size": 8, "crop_size": 320, "shuffle": true, "base_size": 400, "scale": true, "augment": true, "flip": true,
    "rotate": false, "blur": false, "split": "train_unsupervised", "num_workers": 8, "iou_bound": [0.1, 1.0],
    "stride": 8
  },
  "val_loader": {"batch_size": 2, "val": true, "split": "val", "shuffle": false, "num_workers": 4},
  "trainer": {
    "epochs": 80, "save_dir": "saved/", "save_period": 1, "log_dir": "saved/", "monitor": "max Mean_IoU",
    "early_stop": 100, "tensorboardX": true, "log_per_iter": 20, "val": true, "val_per_epochs": 1
  }
}
""")
CITY = {
    "dataset": "cityscapes",
    "datalist": 2,
    "n_gpu": 4,
    "n_labeled_examples": 372,
    "model.selected_num": 16200,
    "model.step_save": 0,
    "optimizer.args.lr": 0.1,
    "train_supervised.crop_size": 720,
    "train_supervised.base_size": 2048,
    "train_supervised.jitter": True,
    "train_supervised.num_workers": 16,
    "train_unsupervised.crop_size": 720,
    "train_unsupervised.base_size": 2048,
}


def changed(values: dict, changes: dict) -> dict:
    """A released file with other values under dotted keys, or without those where the value is None."""
    values = copy.deepcopy(values)
    for dotted, value in changes.items():
        *parents, name = dotted.split(".")
        place = values
        for parent in parents:
            place = place[parent]
        place[name] = value
        if value is None:
            del place[name]
    return values


def cac_file(folder: Path, changes: dict | None = None) -> Path:
    # As the release stores it in a run folder too: sorted.
    (folder / "theirs.json").write_text(json.dumps(changed(CAC, changes or {}), sort_keys=True))
    return folder / "theirs.json"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "voc_cac_deeplabv3+_resnet50_1over8_datalist0"),
        ({"model.layers": 101, "model.step_save": 2, "datalist": 1}, "voc_cac_deeplabv3+_resnet101_1over8_datalist1"),
        (CITY, "city_cac_deeplabv3+_resnet50_1over8_datalist2"),
    ],
)
def test_files_of_cac_are_our_configs(tmp_path, capsys, changes, name):
    config_class, script = cac_cps.setting.Config, "cac_cps/train.py"
    file = cac_file(tmp_path, changes)
    assert parsed(config_class, script, file) == ours(config_class, f"cac_cps/configs/{name}.json")
    assert parse(config_class, script, ["--config", str(file)]).run.dir == "saved/theirs"
    table = " ".join(capsys.readouterr().out.split())
    assert "ramp_up │ 0.1 │ ignored" in table


def test_a_changed_file_of_cac(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "VOCdevkit" / "VOC2012" / "JPEGImages").mkdir(parents=True)
    (tmp_path / "dataloaders" / "voc_splits1").mkdir(parents=True)
    changes = {
        "data_dir": str(tmp_path),
        "datalist": 1,
        "n_gpu": 1,
        "model.supervised": True,
        "model.semi": False,
        "train_supervised.num_workers": 0,
        "val_loader.crop_size": 320,
    }
    config = parse(cac_cps.setting.Config, "cac_cps/train.py", ["--config", str(cac_file(tmp_path, changes))])
    assert config.data.root == str(tmp_path / "VOCdevkit" / "VOC2012") and config.data.workers == 0
    assert config.data.split == "dataloaders/voc_splits1/1323"
    assert config.method.cac.supervised and config.method.cac.selected_num == 6400
    assert config.run.steps_per_epoch is None  # a pass over the labels
    file = cac_file(tmp_path, {"trainer.val_per_epochs": 2})
    config = parse(cac_cps.setting.Config, "cac_cps/train_semiseg.py", ["--config", str(file)])
    assert config.run.eval_every == 2 * 1157 and config.run.dir == "saved/train_semiseg/theirs"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.tmp": 0.1}, r"theirs\.json: unknown key model\.tmp; did you mean model\.temp\?"),
        ({"datalist": None}, "datalist missing: a config of CAC's release has them"),
        ({"dataset": "ade20k"}, "dataset is 'ade20k'; the release knows voc, cityscapes"),
        ({"model.layers": 18}, "model.layers is 18; the release knows 50, 101"),
        ({"model.backbone": "psp"}, r"model\.backbone is 'psp'; the release has deeplab_v3\+ alone"),
        ({"model.supervised": True}, "one of model.supervised and model.semi must be true"),
        ({"n_gpu": "two"}, "n_gpu is 'two'; it must be a whole number above 0"),
        ({"train_unsupervised.batch_size": 4}, r"train_unsupervised\.batch_size is 4; here it is that of labeled"),
        ({"model.temp": "warm"}, r"method\.cac\.temp"),
    ],
)
def test_what_cac_does_not_know_is_told(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        parse(cac_cps.setting.Config, "cac_cps/train.py", ["--config", str(cac_file(tmp_path, changes))])
    assert len(str(error.value).splitlines()) <= 2


# ---- PRCL and CSS

PRCL = """
Network:
  name: 'DeepLabv3Plus'
  num_class: 21
EMA:
  alpha: 0.99
Optim:
  lr: 3.2e-3
  uncer_lr: 5e-5 # very sensitive
  weight_decay: 5.0e-4
Lr_Scheduler: {name: 'PolyLR', step_size: 90, gamma: 0.1}
Dataset:
  name: 'VOC'
  data_dir: './VOC'
  txt_dir: './VOC_split'
  num_labels: 662
  batch_size: 2
  mix_mode: 'classmix'
  crop_size: !!python/tuple [321, 321]
  scale_size: !!python/tuple
  - 0.5
  - 1.5
Training_Setting:
  epoch: 200
  save_dir: './checkpoints/'
Seed: 3407
Ramp_Scheduler: {begin_epoch: 0, max_epoch: 200, max_value: 1.0, min_value: 0, ramp_mult: -5.0}
Prcl_Loss:
  is_available: True
  warm_up: 0
  un_threshold: 0.97
  strong_threshold: 0.8
  weak_threshold: 0.7
  temp: 100
  num_queries: 256
  num_negatives: 512
Distributed:
  world_size: 8
  gpu_id: 0,1,2,3,4,5,6,7
"""
PRCL_CITY = {
    "num_class: 21": "num_class: 19",
    "'VOC'": "'CityScapes'",
    "./VOC": "./cityscapes",
    "662": "150",
    "batch_size: 2": "batch_size: 6",
    "[321, 321]": "[512, 512]",
    "- 1.5": "- 2.0",
    "Distributed:\n  world_size: 8\n  gpu_id: 0,1,2,3,4,5,6,7\n": "",
}
CSS = """
Network: {name: DeepLabv3Plus, num_class: 21}
EMA: {alpha: 0.99}
Optim: {lr: 6.4e-3, weight_decay: 5e-4}
Lr_Scheduler: {name: PolyLR, step_size: 90, gamma: 0.1}
Dataset:
  name: VOC
  data_dir: /
  txt_dir: /
  num_labels: 331
  batch_size: 8
  crop_size: !!python/tuple [512, 512]
  scale_size: !!python/tuple [0.5, 1.5]
  mix_mode: cutmix
Training_Setting: {epoch: 200, save_dir: ./checkpoints}
Seed: 3407
Loss:
  is_available: True
  warm_up: 0
  un_threshold: 0.97
  strong_threshold: 0.97
  weak_threshold: 0.7
  temp: 0.5
  num_queries: 256
  num_negatives: 512
  alpha: 0.99
Ramp_Scheduler: {begin_epoch: 0, max_epoch: 200, max_value: 1.0, min_value: 0, ramp_mult: -5.0}
Distributed: {world_size: 2, gpu_id: "0,1"}
"""
CSS_CITY = {
    "num_class: 21": "num_class: 19",
    "VOC": "CityScapes",
    "331": "372",
    "batch_size: 8": "batch_size: 4",
    "[512, 512]": "[769, 769]",
    "[0.5, 1.5]": "[0.5, 2.0]",
}


def yaml_file(folder: Path, text: str, changes: dict | None = None) -> Path:
    for old, new in (changes or {}).items():
        assert old in text
        text = text.replace(old, new)
    (folder / "theirs.yaml").write_text(text)
    return folder / "theirs.yaml"


@pytest.mark.parametrize(("changes", "name"), [({}, "voc"), (PRCL_CITY, "cityscapes")])
def test_files_of_prcl_are_our_configs(tmp_path, capsys, changes, name):
    file = yaml_file(tmp_path, PRCL, changes)
    config_class = prcl.train.Config
    assert parsed(config_class, "prcl/train.py", file) == ours(config_class, f"prcl/configs/{name}.json")
    assert "Prcl_Loss.warm_up │ 0 │ ignored" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("changes", "name", "split"), [({}, "voc", "splits/voc/331/3407"), (CSS_CITY, "cityscapes", None)]
)
def test_files_of_css_are_our_configs(tmp_path, changes, name, split):
    file = yaml_file(tmp_path, CSS, changes)
    config_class = css.train.Config
    own = ours(config_class, f"css/configs/{name}.json", **({"data__split": split} if split else {}))
    assert parsed(config_class, "css/train.py", file) == own


def test_trees_and_lists_of_prcl_are_taken_where_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "VOC" / "JPEGImages").mkdir(parents=True)
    (tmp_path / "VOC_split" / "662" / "3407").mkdir(parents=True)
    data = parse(prcl.train.Config, "prcl/train.py", ["--config", str(yaml_file(tmp_path, PRCL))]).data
    assert (data.root, data.split) == ("VOC", "VOC_split/662/3407")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tuple [321": "object/apply:os.system [321"},
            r"line 19: the tag !!python/object/apply:os\.system is refused",
        ),
        ({"'./VOC'": "!!python/name:os.system"}, "the tag !!python/name:os.system is refused"),
        ({"Seed: 3407": "Seed: !seed 3407"}, "neither JSON nor YAML: line 2.: could not determine a constructor"),
        ({"num_labels: 662": "num_labels: &n 662", "temp: 100": "temp: *n"}, r"the alias \*n is refused"),
        ({"Seed: 3407": "Seed: [3407"}, "neither JSON nor YAML: line"),
        ({"uncer_lr": "uncert_lr"}, r"unknown key Optim\.uncert_lr; did you mean Optim\.uncer_lr\?"),
        ({"Seed: 3407": ""}, "Seed missing: a config of PRCL's release has them"),
        ({"'VOC'": "'COCO'"}, "Dataset.name is 'COCO'; the release knows VOC, CityScapes"),
        ({"batch_size: 2": "batch_size: two"}, "Dataset.batch_size is 'two'"),
        ({"[321, 321]": "321"}, "neither JSON nor YAML: line 19: expected a sequence node"),
    ],
)
def test_unsafe_and_unknown_yaml_is_refused(tmp_path, changes, message):
    file = yaml_file(tmp_path, PRCL, changes)
    with pytest.raises(UserError, match=rf"theirs\.yaml: .*{message}") as error:
        parse(prcl.train.Config, "prcl/train.py", ["--config", str(file)])
    assert len(str(error.value).splitlines()) == 1
