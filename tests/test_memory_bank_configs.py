"""Memory bank's settings: translating released config files, and evaluating by the config in a checkpoint."""

import json
import pickle
import runpy
import shutil
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.config import config_of, parse, to_dict
from common.config.files import flatten
from common.errors import UserError
from common.models import build_network
from common.released.weights import MEMORY_BANK
from memory_bank import train
from memory_bank.config import Config, protocol_of
from memory_bank.released import config_in, translate
from tests.conftest import SCRIPTS, flags, method_flags

CONFIGS = Path(__file__).parent.parent / "memory_bank" / "configs"
FAMILIES = {"COCO": ("2", "COCO"), "imagenet": ("2", "imagenet"), "v3": ("3", "imagenet")}
# Of a dataset: labels by share, batches of DeepLabV2 and V3+, rates of both, crop, seed, ignored value.
CITY = ({"1_30": 100, "1_8": 372, "1_4": 744}, (5, 7), (2e-4, 4e-4), "512,512", 5555, 250)
PASCAL = ({"1_50": 212, "1_20": 530, "1_8": 1323}, (14, 20), (2e-4, 2e-4), "321,321", 7, 255)
NEEDED = {"data": {"dataset": "voc", "root": "r", "crop_size": [321, 321]}, "model": {"num_classes": 21}}
REDUCED = "configSSL_pascal_1_50_split2_COCO_reduced"

# As the release describes its files, comments included.
DESCRIBED = """
{
  "model": "DeepLab", # Network architecture. Options: Deeplab
  "version": "2", # Version of the network architecture. Options: {2, 3} for deeplabv2 and deeplabv3+
  "dataset": "cityscapes", # Dataset to use. Options: {"cityscapes", "pascal"}

  "training": {
    "batch_size": 5, # Batch size to use. Options: any integer
    "num_workers": 3, // loader processes
    "optimizer": "SGD", # Optimizer to use. Options: {"SGD"}
    "momentum": 0.8,
    "num_iterations": 100000,
    "learning_rate": 2e-4,
    "lr_schedule": "Poly",
    "lr_schedule_power": 0.7,
    "pretraining": "COCO", # Options: {"COCO", "imagenet"}
    "weight_decay": 1e-3,
    "use_teacher_train": false, # Options: boolean.
    "save_teacher_test": true,

    "data": {
      "split_id_list": 4, # Options: {0, 1, 2} for pre-computed splits. N >2 for random splits
      "labeled_samples": 744,
      "input_size": "512,256",
    }

  },
  "seed": 5555,
  "ignore_label": 250,

  "utils": {
    "save_checkpoint_every": 10000,
    "checkpoint_dir": "../saved/Deep#Lab",
    "val_per_iter": 500, # The model will be evaluated every this number of iterations.
    "save_best_model": true
  }
}
"""


def released(dataset: str, share: str, split: int, family: str) -> dict:
    """A file of the release."""
    labels, batches, rates, crop, seed, ignored = CITY if dataset == "city" else PASCAL
    version, pretraining = FAMILIES[family]
    training = {
        "batch_size": batches[version == "3"],
        "num_workers": 3,
        "optimizer": "SGD",
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "num_iterations": 150000,
        "learning_rate": rates[version == "3"],
        "lr_schedule": "Poly",
        "lr_schedule_power": 0.9,
        "pretraining": pretraining,
        "data": {"split_id_list": split, "labeled_samples": labels[share], "input_size": crop},
    }
    if dataset == "city" and version == "3":
        del training["lr_schedule"]
    return {
        "model": "DeepLab",
        "version": version,
        "dataset": "cityscapes" if dataset == "city" else "pascal_voc",
        "training": training,
        "seed": seed,
        "ignore_label": ignored,
        "utils": {
            "save_checkpoint_every": 200000,
            "checkpoint_dir": "../saved/DeepLab",
            "val_per_iter": 1000,
            "save_best_model": True,
        },
    }


def every_setting() -> dict[str, dict]:
    """The 55 files of the release by name."""
    found = {}
    for dataset, (labels, *_) in (("city", CITY), ("pascal", PASCAL)):
        for share, split, family in product(labels, range(3), FAMILIES):
            found[f"configSSL_{dataset}_{share}_split{split}_{family}"] = released(dataset, share, split, family)
    found[REDUCED] = released("pascal", "1_50", 2, "COCO")
    found[REDUCED]["training"]["batch_size"] = 8
    found[REDUCED]["training"]["data"]["input_size"] = "256,256"
    return found


def test_each_released_setting_has_its_file_which_says_the_same():
    settings = every_setting()
    assert {path.stem for path in CONFIGS.glob("configSSL_*.json")} == set(settings) and len(settings) == 55
    usual = flatten(to_dict(config_of(Config, NEEDED, "what has no default")))
    for name, original in settings.items():
        own = flatten(json.loads((CONFIGS / f"{name}.json").read_text()))
        assert usual | own == usual | flatten(translate(json.dumps(original)).values), name
        assert set(own) <= set(usual), name
        unneeded = [key for key in own if own[key] == usual[key] and key not in flatten(NEEDED)]
        assert not unneeded, name


def test_a_released_file_runs_unchanged_and_what_became_of_it_is_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    (tmp_path / "original.json").write_text(DESCRIBED)
    arguments = ["--config", str(tmp_path / "original.json"), "--optim.batch_size", "6"]
    config = parse(Config, "memory_bank/train.py", arguments, translate)
    data, model, optim, method, run = config.data, config.model, config.optim, config.method, config.run
    assert (data.dataset, data.split_id, data.split_seed, data.labeled_samples) == ("cityscapes", 4, 5555, 744)
    assert (data.crop_size, data.scale_range, data.workers) == ((512, 256), (1.0, 1.0), 3)
    assert (model.backbone, model.head, model.output_stride, model.num_classes) == ("resnet101", "v2_coco", 8, 19)
    assert model.bgr and model.pretrained.endswith("resnet101COCO-41f33a49.pth") and model.input_mean[0] < 100
    assert (optim.name, optim.lr, optim.momentum, optim.nesterov) == ("sgd", 2e-4, 0.8, False)
    assert (optim.poly_power, optim.weight_decay, optim.batch_size) == (0.7, 1e-3, 6)
    assert (method.use_teacher_train, method.save_teacher_test) == (False, True)
    assert method.class_balance and protocol_of(config).reduce == 2
    assert (run.steps, run.save_every, run.eval_every, run.seed) == (100000, 10000, 500, 5555)
    assert run.dir == "../saved/Deep#Lab/original"
    other = parse(Config, "memory_bank/train_less_memory.py", arguments, translate)
    assert other.run.dir == "../saved/Deep#Lab/train_less_memory/original"
    table = " ".join(capsys.readouterr().out.split())
    assert "training.batch_size │ 5 │ optim.batch_size 5" in table
    assert "ignore_label │ 250 │ ignored" in table


def changed(key: str, value) -> dict:
    """A released setting with another value, or without the key where `value` is None."""
    values = released("pascal", "1_50", 0, "v3")
    *parents, name = key.split(".")
    place = values
    for parent in parents:
        place = place[parent]
    place[name] = value
    if value is None:
        del place[name]
    return values


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "training.bach_size",
            4,
            r"original\.json: unknown key training\.bach_size; did you mean training\.batch_size\?",
        ),
        ("training.data.labeled_samples", None, r"training\.data\.labeled_samples missing"),
        ("version", 4, "version is '4'; the release supports 2"),
        ("dataset", "ade20k", "dataset is 'ade20k'"),
        ("training.pretraining", "MSCOCO", "the release supports COCO and imagenet"),
        ("training.pretraining", "COCO", "COCO with version 3"),
        ("training.optimizer", "Adam", r"training\.optimizer is 'Adam'; the release supports only sgd"),
        ("training.data.input_size", "512x512", "give height and width"),
        ("training.data.split_id_list", -1, r"data\.split_id"),
        ("training.learning_rate", "fast", r"optim\.lr"),
    ],
)
def test_what_the_release_does_not_know_is_reported(tmp_path, key, value, message):
    (tmp_path / "original.json").write_text(json.dumps(changed(key, value)))
    with pytest.raises(UserError, match=message) as error:
        parse(Config, "memory_bank/train.py", ["--config", str(tmp_path / "original.json")], translate)
    assert len(str(error.value).splitlines()) <= 2


@pytest.mark.parametrize(("key", "value"), [("method.bank_rows_factor", 1e9), ("method.unlabeled_batch_size", 100000)])
def test_what_no_machine_can_hold_is_reported(key, value):
    with pytest.raises(UserError, match=rf"^{key} is .*; it must be a .*number between"):
        parse(Config, "memory_bank/train.py", ["--config", str(CONFIGS / "demo.json"), f"--{key}", str(value)])


def test_files_of_other_kinds_are_left_alone():
    assert translate("no JSON") is None and translate("[]") is None
    assert translate((CONFIGS / "demo.json").read_text()) is None


# ---- training and evaluation

SMALL = {
    "data.crop_size": "[32, 32]",
    "data.workers": 0,
    "data.labeled_samples": 6,
    "model.backbone": "resnet18",
    "model.channels": 8,
    "model.pretrained": "false",
    "optim.batch_size": 2,
    "run.steps": 2,
    "run.threads": 1,
}


@pytest.fixture(scope="module")
def project(shapes_root, tmp_path_factory) -> Path:
    """A folder with VOC and an order of its images, and the run of a released file on them."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "data" / "VOCdevkit").mkdir(parents=True)
    (folder / "data" / "VOCdevkit" / "VOC2012").symlink_to(shapes_root)
    (folder / "splits" / "voc").mkdir(parents=True)
    order = np.random.RandomState(0).permutation(24)
    (folder / "splits" / "voc" / "split_0.pkl").write_bytes(pickle.dumps(order, protocol=3))
    original = changed("utils.checkpoint_dir", "saved")
    (folder / "original.json").write_text(f"# as released\n{json.dumps(original)}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        script = "memory_bank/train.py"
        train.main(["--config", "original.json", *flags(SMALL), *method_flags(SCRIPTS[script].method)])
    return folder


def evaluate(project: Path, monkeypatch, *arguments: str) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", ["memory_bank/eval.py", "-d", "cpu", *arguments])
    runpy.run_path(str(CONFIGS.parent / "eval.py"), run_name="__main__")


def test_student_and_teacher_of_a_run_are_evaluated(project, monkeypatch, capsys):
    run, one = project / "saved" / "original", "saved/original/checkpoints/step_00000002"
    extra = load_file(project / one / "extra.safetensors")
    extra["teacher/classifier.1.bias"][3] = 1e9  # a teacher that sees one class everywhere
    save_file(extra, project / one / "extra.safetensors")
    shares = {}
    for role in ("", "student", "teacher"):
        evaluate(project, monkeypatch, "--model-path", one, *(["--network", role] if role else []))
        name = f"step_00000002_{role}".rstrip("_")
        shares[role] = json.loads((run / "eval" / f"{name}.json").read_text())["per_class_iou"]
    assert shares[""] == shares["student"] != shares["teacher"]
    assert shares["teacher"]["aeroplane"] == 0 < shares["teacher"]["bird"]
    shutil.copy(project / one / "model.safetensors", project / "alone.safetensors")
    with pytest.raises(SystemExit) as stop:
        evaluate(project, monkeypatch, "saved/original", "-e", "alone.safetensors", "--network", "teacher")
    assert stop.value.code == 2
    assert "alone.safetensors does not hold student and teacher" in capsys.readouterr().err


def test_a_released_checkpoint_is_evaluated_by_its_own_config(project, monkeypatch, capsys):
    model = config_of(Config, translate(json.dumps(changed("seed", 1))).values, "released").model
    model.pretrained = False
    own = build_network(model).state_dict()
    original = {prefix: official for official, prefix in MEMORY_BANK.items()}
    named = {
        original[prefix] + key.removeprefix(prefix): value
        for key, value in own.items()
        for prefix in original
        if key.startswith(prefix) and not key.startswith("classifier.branches.")
    }
    stored = {"iteration": 1, "optimizer": {}, "config": changed("dataset", "pascal"), "model": named}
    torch.save(stored, project / "best_model.pth")
    evaluate(project, monkeypatch, "--model-path", "best_model.pth")
    assert (project / "runs" / "memory_bank" / "best_model" / "eval" / "best_model.json").is_file()
    assert "best_model.pth, translated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "backbone"), [("layer3.5.conv1.weight", "resnet50"), ("layer3.22.bn1.bias", "resnet101")]
)
def test_the_backbone_of_a_released_checkpoint_is_that_of_its_weights(tmp_path, key, backbone):
    file = tmp_path / "best_model.pth"
    torch.save({"config": changed("seed", 1), "model": {key: torch.zeros(1)}}, file)
    assert config_in(file).values["model"]["backbone"] == backbone
    torch.save({"model": {key: torch.zeros(1)}}, file)
    assert config_in(file) is None
