"""The config files that the papers released, each written as its release describes it, in our words."""

import copy
import json
from pathlib import Path

import pytest

import cac_cps.setting
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
