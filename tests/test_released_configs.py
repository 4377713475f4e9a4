"""Translation of the config files that the papers released, each written as its release describes it."""

import copy
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cac_cps.config
import cpcl.train
import css.train
import memory_bank.config
import prcl.released
import prcl.train
import unimatch.config
from common.config import load_config, parse, to_dict
from common.errors import UserError
from common.released.configs import main_translate
from tests.test_memory_bank_configs import DESCRIBED

ROOT = Path(__file__).parent.parent


def read(config_class, script: str, file: Path):
    """Read a released file as the paper's script does."""
    translate = importlib.import_module(f"{script.split('/')[0]}.released").translate
    return parse(config_class, script, ["--config", str(file)], translate)


def parsed(config_class, script: str, file: Path) -> dict:
    """Values that a script reads from a file, without the run folder, which has the name of the file."""
    values = to_dict(read(config_class, script, file))
    values["run"].pop("dir")
    return values


def config_values(config_class, name: str, **changes) -> dict:
    """Values of a config of this project, changed by values under `section__key`."""
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
    (folder / "original.json").write_text(json.dumps(changed(CAC, changes or {}), sort_keys=True))
    return folder / "original.json"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "voc_cac_deeplabv3+_resnet50_1over8_datalist0"),
        ({"model.layers": 101, "model.step_save": 2, "datalist": 1}, "voc_cac_deeplabv3+_resnet101_1over8_datalist1"),
        (CITY, "city_cac_deeplabv3+_resnet50_1over8_datalist2"),
    ],
)
def test_files_of_cac_are_our_configs(tmp_path, capsys, changes, name):
    config_class, script = cac_cps.config.Config, "cac_cps/train.py"
    file = cac_file(tmp_path, changes)
    assert parsed(config_class, script, file) == config_values(config_class, f"cac_cps/configs/{name}.json")
    assert read(config_class, script, file).run.dir == "saved/original"
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
    config = read(cac_cps.config.Config, "cac_cps/train.py", cac_file(tmp_path, changes))
    assert config.data.root == str(tmp_path / "VOCdevkit" / "VOC2012") and config.data.workers == 0
    assert config.data.split == "dataloaders/voc_splits1/1323"
    assert config.method.cac.supervised and config.method.cac.selected_num == 6400
    assert config.run.steps_per_epoch is None  # a pass over the labels
    file = cac_file(tmp_path, {"trainer.val_per_epochs": 2})
    config = read(cac_cps.config.Config, "cac_cps/train_semiseg.py", file)
    assert config.run.eval_every == 2 * 1157 and config.run.dir == "saved/train_semiseg/original"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.tmp": 0.1}, r"original\.json: unknown key model\.tmp; did you mean model\.temp\?"),
        ({"datalist": None}, "datalist missing; a config of CAC's release has them"),
        ({"dataset": "ade20k"}, "dataset is 'ade20k'; the release supports voc, cityscapes"),
        ({"model.layers": 18}, "model.layers is 18; the release supports 50, 101"),
        ({"model.backbone": "psp"}, r"model\.backbone is 'psp'; the release supports only deeplab_v3\+"),
        ({"model.supervised": True}, "one of model.supervised and model.semi must be true"),
        ({"n_gpu": "two"}, "n_gpu is 'two'; it must be a whole number above 0"),
        ({"train_unsupervised.batch_size": 4}, r"train_unsupervised\.batch_size is 4; it must equal"),
        ({"model.temp": "warm"}, r"method\.cac\.temp"),
    ],
)
def test_what_cac_does_not_know_is_reported(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        read(cac_cps.config.Config, "cac_cps/train.py", cac_file(tmp_path, changes))
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
    (folder / "original.yaml").write_text(text)
    return folder / "original.yaml"


@pytest.mark.parametrize(("changes", "name"), [({}, "voc"), (PRCL_CITY, "cityscapes")])
def test_files_of_prcl_are_our_configs(tmp_path, capsys, changes, name):
    file = yaml_file(tmp_path, PRCL, changes)
    config_class = prcl.train.Config
    assert parsed(config_class, "prcl/train.py", file) == config_values(config_class, f"prcl/configs/{name}.json")
    assert "Prcl_Loss.warm_up │ 0 │ ignored" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("changes", "name", "split"), [({}, "voc", "splits/voc/331/3407"), (CSS_CITY, "cityscapes", None)]
)
def test_files_of_css_are_our_configs(tmp_path, changes, name, split):
    file = yaml_file(tmp_path, CSS, changes)
    config_class = css.train.Config
    own = config_values(config_class, f"css/configs/{name}.json", **({"data__split": split} if split else {}))
    assert parsed(config_class, "css/train.py", file) == own


def test_trees_and_lists_of_prcl_are_taken_where_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "VOC" / "JPEGImages").mkdir(parents=True)
    (tmp_path / "VOC_split" / "662" / "3407").mkdir(parents=True)
    data = read(prcl.train.Config, "prcl/train.py", yaml_file(tmp_path, PRCL)).data
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
        ({"Seed: 3407": ""}, "Seed missing; a config of PRCL's release has them"),
        ({"'VOC'": "'COCO'"}, "Dataset.name is 'COCO'; the release supports VOC, CityScapes"),
        ({"batch_size: 2": "batch_size: two"}, "Dataset.batch_size is 'two'"),
        ({"[321, 321]": "321"}, "neither JSON nor YAML: line 19: expected a sequence node"),
    ],
)
def test_unsafe_and_unknown_yaml_is_refused(tmp_path, changes, message):
    file = yaml_file(tmp_path, PRCL, changes)
    with pytest.raises(UserError, match=rf"original\.yaml: .*{message}") as error:
        read(prcl.train.Config, "prcl/train.py", file)
    assert len(str(error.value).splitlines()) == 1


# ---- CPCL

CPCL = """
import os
import os.path as osp
from easydict import EasyDict as edict
import numpy as np

C = edict()
config = C

'''Paths'''
if os.getenv('volna') is not None:
    C.volna = os.environ['volna']
else:
    C.volna = '/data/cpcl/'
C.repo_name = 'CPCL'
C.abs_dir = osp.realpath(".")
C.log_dir = osp.abspath('log')
C.link_val_log_file = C.log_dir + '/val_last.log'
C.dataset_path = osp.join(C.volna, 'DATA/pascal_voc')
C.img_root_folder = C.dataset_path
C.gt_root_folder = C.dataset_path
C.pretrained_model = C.volna + 'DATA/pytorch-weight/resnet50_v1c.pth'
C.device = '0'
C.seed = 12345
C.labeled_ratio = 8
C.nepochs = 34
C.train_source = osp.join(C.dataset_path, "subset_train_aug/train_aug_labeled_1-{}.txt".format(C.labeled_ratio))
C.unsup_source = osp.join(C.dataset_path, "subset_train_aug/train_aug_unlabeled_1-{}.txt".format(C.labeled_ratio))
C.eval_source = osp.join(C.dataset_path, "val.txt")
C.cutmix_mask_prop_range = (0.25, 0.5)
C.cutmix_boxmask_n_boxes = 3
C.cutmix_boxmask_fixed_aspect_ratio = C.cutmix_boxmask_by_size = False
C.cutmix_boxmask_outside_bounds = False
C.cutmix_boxmask_no_invert = False
C.num_classes = 21
C.background = 0
C.image_mean = np.array([0.485, 0.456, 0.406])
C.image_height = 512
C.image_width = 512
C.num_train_imgs = 10582 // C.labeled_ratio
C.num_eval_imgs = 1449
C.num_unsup_imgs = 10582 - C.num_train_imgs
if os.getenv('learning_rate') is not None:
    C.lr = float(os.environ['learning_rate'])
else:
    C.lr = 0.005
C.batch_size = 8
C.lr_power = 0.9
C.momentum = 0.9
C.weight_decay = 1e-4
C.bn_eps = 1e-5
C.bn_momentum = 0.1
C.unsup_weight = 1
C.max_samples = max(C.num_train_imgs, C.num_unsup_imgs)
C.niters_per_epoch = int(np.ceil(C.max_samples // C.batch_size))
C.num_workers = 4
C.train_scale_array = [0.5, 0.75, 1, 1.5, 1.75, 2.0]
C.warm_up_epoch = 0
C.eval_stride_rate = 2 / 3
C.eval_scale_array = [1, ]
C.eval_flip = False
C.eval_crop_size = 512
C.snapshot_iter = 2
C.display_iter = 50

def open_log():
    os.makedirs(C.log_dir)

if __name__ == '__main__':
    print(config.nepochs)
"""
CPCL_CITY = {
    "C.num_classes = 21": "C.num_classes = 19",
    "= 512": "= 800",
    "C.lr = 0.005": "C.lr = 0.01",
    "C.batch_size = 8": "C.batch_size = 16",
    "unsup_weight = 1": "unsup_weight = 5",
}


def config_py(folder: Path, changes: dict | None = None) -> Path:
    return yaml_file(folder, CPCL, changes).rename(folder / "config.py")


@pytest.mark.parametrize(
    ("name", "changes", "ratio", "epochs"),
    [
        ("voc", {}, 8, 34),
        ("voc", {}, 16, 32),
        ("voc", {}, 2, 60),
        ("city", CPCL_CITY, 8, 137),
        ("city", CPCL_CITY, 16, 128),
        ("city", CPCL_CITY, 4, 160),
    ],
)
def test_files_of_cpcl_are_our_configs(tmp_path, capsys, name, changes, ratio, epochs):
    changes = changes | {"ratio = 8": f"ratio = {ratio}", "nepochs = 34": f"nepochs = {epochs}"}
    file, config_class = config_py(tmp_path, changes), cpcl.train.Config
    own = config_values(config_class, f"cpcl/configs/{name}_resnet50_1over{ratio}.json")
    assert parsed(config_class, "cpcl/train.py", file) == own
    table = " ".join(capsys.readouterr().out.split())
    assert "display_iter │ 50 │ ignored" in table and "max_samples │ (line 5" in table


def test_paths_and_counts_that_cpcl_writes_as_values_count(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "voc" / "JPEGImages").mkdir(parents=True)
    (tmp_path / "resnet50.pth").touch()
    changes = {
        "osp.join(C.volna, 'DATA/pascal_voc')": "'voc'",
        "C.volna + 'DATA/pytorch-weight/resnet50_v1c.pth'": "'resnet50.pth'",
        "C.train_source = ": "C.train_source = 'mine.txt' #",
        "C.niters_per_epoch = int": "C.niters_per_epoch = 10\nniters = int",
    }
    config = read(cpcl.train.Config, "cpcl/train.py", config_py(tmp_path, changes))
    data = config.data
    assert (data.root, data.labeled_list) == ("voc", "mine.txt")
    assert data.unlabeled_list == "voc/subset_train_aug/train_aug_unlabeled_1-8.txt"
    assert config.model.pretrained == "resnet50.pth"
    assert (config.run.steps_per_epoch, config.run.snapshot_from) == (10, 70)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"C.seed = 12345": "C.seed = os.system('touch ran')"}, "line 24: C.seed is conditional or not a literal"),
        ({"C.seed = 12345": "C.seed = 1\nC.seed += 1"}, "line 25: C.seed is conditional or not a literal"),
        ({"C.seed = 12345": "C.seed = 1\nif osp: C.seed = 2"}, "line 25: C.seed is conditional or not a literal"),
        ({"C.seed = 12345": "C.seed = {1, 2}"}, "line 24: C.seed is conditional or not a literal"),
        ({"C.seed = 12345": "C['seed'] = 1"}, "line 24: values are only read from C.name = VALUE"),
        ({"C.seed = 12345": "C.update(seed=1)"}, "line 24: values are only read from C.name = VALUE"),
        ({"C.seed = 12345": "C.seed = = 1"}, "line 24: not Python: invalid syntax"),
        ({"C.momentum": "C.momentun"}, r"unknown key momentun; did you mean momentum\?"),
        ({"C.nepochs = 34": ""}, "nepochs missing; a config of CPCL's release has them"),
        ({"C.num_classes = 21": "C.num_classes = 11"}, "num_classes is 11; the release supports 21, 19"),
        ({"C.eval_flip = False": "C.eval_flip = True"}, "eval_flip is True; the release supports only False"),
        ({"C.labeled_ratio = 8": "C.labeled_ratio = 0"}, "labeled_ratio is 0; it must be a whole number above 0"),
        ({"C.lr = 0.005": "C.lr = 'fast'"}, r"optim\.lr"),
    ],
)
def test_a_config_py_is_read_and_never_run(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        read(cpcl.train.Config, "cpcl/train.py", config_py(tmp_path, changes))
    assert len(str(error.value).splitlines()) <= 2
    assert [file.name for file in tmp_path.iterdir()] == ["config.py"]


# ---- Translated to a file


@pytest.mark.parametrize(
    ("paper", "config_class", "text"),
    [
        ("cac_cps", cac_cps.config.Config, json.dumps(CAC)),
        ("prcl", prcl.train.Config, PRCL),
        ("css", css.train.Config, CSS),
        ("cpcl", cpcl.train.Config, CPCL),
        ("memory_bank", memory_bank.config.Config, DESCRIBED),
    ],
)
def test_a_translated_file_is_the_config_that_training_reads(tmp_path, capsys, paper, config_class, text):
    source, out = tmp_path / "original", tmp_path / "mine.json"
    source.write_text(text)
    main_translate(paper, importlib.import_module(f"{paper}.released").translate, [str(source), "--out", str(out)])
    output = capsys.readouterr()
    assert output.out == f"written to {out}\n" and "released key" in output.err
    assert parsed(config_class, f"{paper}/train.py", out) == parsed(config_class, f"{paper}/train.py", source)


def test_a_released_file_is_translated_by_the_command(tmp_path):
    run = [sys.executable, str(ROOT / "prcl" / "released.py"), str(yaml_file(tmp_path, PRCL))]
    done = subprocess.run(run, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert json.loads(done.stdout)["optim"]["batch_size"] == 16
    assert "Prcl_Loss.temp" in done.stderr


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (PRCL.replace("uncer_lr", "uncert_lr"), [], r"original\.yaml: unknown key Optim\.uncert_lr; did you mean"),
        ("{}", [], r"original\.yaml is not a config file of the repository that prcl/ follows"),
        (PRCL, ["--out", "nowhere/mine.json"], r"nowhere/mine\.json cannot be written: No such file"),
    ],
)
def test_files_that_cannot_be_translated_are_reported(tmp_path, monkeypatch, capsys, text, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "original.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main_translate("prcl", prcl.released.translate, ["original.yaml", *arguments])
    error = capsys.readouterr().err.split("error: ")[1]
    assert stop.value.code == 2 and re.match(message, error) and len(error.splitlines()) <= 2


# ---- UniMatch

UNIMATCH = """
dataset: pascal
nclass: 21
crop_size: 321
data_root: Your/Pascal/Path
epochs: 80
batch_size: 2 # per GPU
lr: 0.001
lr_multi: 10.0
criterion: {name: CELoss, kwargs: {ignore_index: 255}}
conf_thresh: 0.95
backbone: resnet101
replace_stride_with_dilation: [False, False, True]
dilations: [6, 12, 18]
"""
# Released with Xception-65, which is not built here.
UNIMATCH_COCO = """
dataset: coco
nclass: 81
crop_size: 513
data_root: Your/COCO/Path
epochs: 30
batch_size: 2
lr: 0.004
lr_multi: 10.0
criterion: {name: CELoss, kwargs: {ignore_index: 255}}
conf_thresh: 0.95
backbone: resnet101
replace_stride_with_dilation: [False, False, True]
dilations: [6, 12, 18]
"""
UNIMATCH_V2_CITY = """
dataset: cityscapes
data_root: Your/Cityscapes/Path
nclass: 19
crop_size: 798
epochs: 180
batch_size: 2
lr: 0.000005
lr_multi: 40.0
criterion: {name: OHEM, kwargs: {ignore_index: 255, thresh: 0.7, min_kept: 200000}}
conf_thresh: 0.95
model: dpt
backbone: dinov2_small
lock_backbone: False
"""
UNIMATCH_V2_ADE20K = """
dataset: ade20k
data_root: Your/ADE20K/Path
nclass: 150
crop_size: 518
epochs: 60
batch_size: 2
lr: 0.000005
lr_multi: 40.0
criterion: {name: CELoss, kwargs: {ignore_index: 255}}
conf_thresh: 0.95
model: dpt
backbone: dinov2_small
lock_backbone: False
"""
UNIMATCH_V2_COCO = """
dataset: coco
data_root: Your/COCO/Path
nclass: 81
crop_size: 518
epochs: 20
batch_size: 4
lr: 0.000005
lr_multi: 40.0
criterion: {name: CELoss, kwargs: {ignore_index: 255}}
conf_thresh: 0.95
model: dpt
backbone: dinov2_base
lock_backbone: False
"""


@pytest.mark.parametrize(
    ("text", "script", "name"),
    [
        (UNIMATCH, "unimatch/train.py", "pascal_unimatch_resnet101"),
        (UNIMATCH_COCO, "unimatch/train.py", "coco_unimatch_resnet101"),
        (UNIMATCH_V2_CITY, "unimatch/train_v2.py", "cityscapes_unimatch_v2_dinov2_small"),
        (UNIMATCH_V2_ADE20K, "unimatch/train_v2.py", "ade20k_unimatch_v2_dinov2_small"),
        (UNIMATCH_V2_COCO, "unimatch/train_v2.py", "coco_unimatch_v2_dinov2_base"),
    ],
)
def test_files_of_unimatch_are_our_configs(tmp_path, text, script, name):
    config_class = unimatch.config.Config
    ours = config_values(config_class, f"unimatch/configs/{name}.json", model__rates=None)
    theirs = parsed(config_class, script, yaml_file(tmp_path, text))
    theirs["model"]["rates"] = None  # stated in the release, and the default of the stride here
    assert theirs == ours


def test_the_released_file_of_ade20k_freezes_the_encoder(tmp_path):
    file = yaml_file(tmp_path, UNIMATCH_V2_ADE20K, {"lock_backbone: False": "lock_backbone: True"})
    assert read(unimatch.config.Config, "unimatch/train_v2.py", file).model.freeze_encoder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resnet101": "xception"}, "backbone is 'xception'; the release supports resnet50"),
        ({"[False, False, True]": "[False, True, True]"}, "output stride 16, is supported"),
        ({"lr: 0.001": "lr: fast"}, "both must be numbers above 0"),
        ({"ignore_index: 255": "ignore_index: 0"}, "support only 255"),
        ({"batch_size: 2": "batch_size: 0"}, "whole number above 0"),
        ({"dataset: pascal": "dataset: mapillary"}, "dataset is 'mapillary'; the release supports pascal, cityscapes"),
    ],
)
def test_files_of_unimatch_that_cannot_be_followed_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read(unimatch.config.Config, "unimatch/train.py", yaml_file(tmp_path, UNIMATCH, change))
