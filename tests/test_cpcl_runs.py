"""Whole runs of CPCL on small built-in data: what they leave behind and refuse; its evaluation as a user calls it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common.config import load_config
from common.datasets.shapes import make_shapes
from common.released.weights import CPS
from cpcl.train import Config, main
from tests.helpers.commands import SMALL_MODEL, run_python
from tests.helpers.kill_runs import metrics

ROOT = Path(__file__).parents[1]
SCRIPT = "cpcl/train.py"
# Six epochs of two steps; snapshots after epochs 2 and 4, counted from 0, and the last.
EPOCHS = ["--run.steps", "null", "--run.epochs", "6", "--run.steps_per_epoch", "2", "--run.save_every", "12"]
EPOCHS += ["--run.eval_every", "12", "--run.snapshot_every", "4", "--run.snapshot_from", "6"]
EPOCHS += ["--run.precision", "bf16"]  # in which predictions differ from those in fp32


def test_a_run_leaves_what_is_documented(curves, tiny, tmp_path):
    main(tiny(SCRIPT))
    run = tmp_path / "run"
    lines = [line for line in metrics(run) if "loss" in line]
    for line in lines:
        both = line["loss_intersection"] + line["loss_union"]
        assert line["loss"] == pytest.approx(line["loss_supervised1"] + line["loss_supervised2"] + both, rel=1e-5)
        assert 0 < line["agreement"] <= 1 and 0 < line["confidence"] <= 1
    assert (run / "pictures" / "step_00000006.png").exists() and (run / "pictures" / "curve.png").exists()
    extra = load_file(run / "checkpoints" / "last" / "extra.safetensors")
    assert {key.split("/")[0] for key in extra} == {"second", "signs"}
    first = load_file(run / "checkpoints" / "last" / "model.safetensors")
    assert not first["classifier.weight"].equal(extra["second/classifier.weight"])


def test_accumulated_passes_count_as_one_step(tiny, tmp_path):
    main(tiny(SCRIPT, "--optim.batch_size", "4", "--optim.accumulation", "2"))
    assert metrics(tmp_path / "run")[-1]["step"] == 6


def test_cityscapes_with_lists_of_paths_and_mined_pixels(tiny, tmp_path):
    root = tmp_path / "city"
    make_shapes(root, "cityscapes", train=12, val=2, size=(48, 64))
    names = sorted(path.stem.removesuffix("_leftImg8bit") for path in (root / "leftImg8bit" / "train").rglob("*.png"))
    for kind, chosen in (("labeled", names[:4]), ("unlabeled", names[4:])):
        lines = [f"/images/train/{name}.png\t/segmentation/train/{name}_gtFine.png\r\n" for name in chosen]
        (root / f"{kind}.txt").write_text("".join(lines))
    data = ["--data.dataset", "cityscapes", "--data.root", str(root), "--data.labeled_list", str(root / "labeled.txt")]
    data += ["--data.split", "null", "--data.unlabeled_list", str(root / "unlabeled.txt"), "--model.num_classes", "19"]
    weights = load_config(Config, ROOT / "cpcl" / "configs" / "city_resnet50_1over8.json").method.ohem_class_weight
    method = ["--method.ohem", "true", "--method.ohem_min_kept", "200", "--method.unsup_weight", "5"]
    main(tiny(SCRIPT, *data, *method, "--method.ohem_class_weight", str(list(weights)), "--run.steps", "2"))
    assert metrics(tmp_path / "run")[-1]["step"] == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--method.train_scale_array", "[]"], "train_scale_array is empty"),
        (["--method.train_scale_array", "[0]"], "train_scale_array"),
        (["--method.cutmix_mask_prop_range", "[0.5, 0.25]"], "the smaller one first"),
        (["--method.cutmix_mask_prop_range", "[0, 0.25]"], "above 0"),
        (["--method.ohem", "true", "--method.ohem_class_weight", "[1, 2]"], "2 values for 7 classes"),
        (["--method.ohem_class_weight", "[1, 1, 1, 1, 1, 1, 1]"], "set method.ohem"),
        (["--method.unsup_wait", "1"], "did you mean --method.unsup_weight"),
        (["--data.unlabeled_list", "nowhere.txt"], "requires data.labeled_list"),
        (["--data.split", "null", "--data.labeled_list", "nowhere.txt"], "no list nowhere.txt"),
        (["--data.split", "null"], "one of data.split, data.labeled_list"),
        (["--model.output_stride", "8"], "model.output_stride is 8"),
        (["--optim.batch_size", "1"], "batch norm"),
    ],
)
def test_a_mistake_is_reported_before_training(arguments, expected, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(tiny(SCRIPT, *arguments))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and expected in message and len(message.splitlines()) <= 2, message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "cpcl" / "configs").glob("[cv]*_resnet*.json")), ids=lambda path: path.stem
)
def test_snapshots_are_after_every_second_epoch_from_a_sixth_on(path):
    run = load_config(Config, path).run
    steps = range(run.snapshot_from, run.epochs * run.steps_per_epoch + 1, run.snapshot_every)
    epochs = [step / run.steps_per_epoch - 1 for step in steps]
    released = [epoch for epoch in range(run.epochs) if epoch > run.epochs // 6 and epoch % 2 == 0]
    assert epochs == released


# ---- evaluation


@pytest.fixture(scope="module")
def trained(shapes_root, tmp_path_factory) -> Path:
    """A run of epochs."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    places = ["--data.root", str(shapes_root), "--data.split", str(shapes_root / "splits" / "6" / "0")]
    small = ["--data.crop_size", "[32,32]", "--data.workers", "0", *SMALL_MODEL, "--optim.batch_size", "2"]
    config = ["--config", str(ROOT / "cpcl" / "configs" / "demo.json"), "--run.threads", "1"]
    main([*config, *places, *small, *EPOCHS, "--run.dir", str(folder)])
    return folder


def evaluated(folder: Path, *arguments: str, status: int = 0) -> str:
    """Output, or with another status the errors, of the evaluation run in `folder`."""
    ended = run_python([str(ROOT / "cpcl" / "eval.py"), *arguments, "-d", "cpu"], folder)
    assert ended.status == status, ended.out + ended.err
    return ended.out if status == 0 else ended.err


def scores(run: Path, name: str) -> dict:
    return json.loads((run / "eval" / f"{name}.json").read_text())


def test_one_epoch(trained, shapes_root, tmp_path):
    output = evaluated(tmp_path, str(trained), "-e", "2", "-s")
    content = scores(trained, "step_00000006")
    assert (content["epoch"], content["step"]) == (2, 6)
    for words in ("mIoU (", "mIoU without background", "pixel accuracy", "sliding window 32x32 stride 22x22"):
        assert words in output
    without = np.nanmean([np.nan if iou is None else iou for iou in list(content["per_class_iou"].values())[1:]])
    assert content["miou_without_background"] == pytest.approx(without)
    pictures = trained / "eval" / "pictures" / "step_00000006"
    right = labeled = 0
    for path in sorted((pictures / "ids").iterdir()):
        label = np.asarray(Image.open(shapes_root / "SegmentationClassAug" / path.name))
        right += (np.asarray(Image.open(path)) == label).sum()
        labeled += (label != 255).sum()
        ids, colored = Image.open(path), Image.open(pictures / "prediction" / path.name)
        assert (ids.mode, colored.mode) == ("L", "P") and np.array_equal(ids, colored)
        beside = np.asarray(Image.open(pictures / "side_by_side" / path.name))
        assert beside.shape == (48, 3 * 64 + 30, 3)
    assert len(list((pictures / "ids").iterdir())) == 7
    assert content["pixel_accuracy"] == pytest.approx(right / labeled, rel=1e-12)  # what is written is what was scored


def test_a_range_in_order_with_missing_ends_and_the_best_marked(curves, trained, tmp_path):
    output = evaluated(tmp_path, str(trained), "-e", "1-5")
    assert "there is no checkpoint of epoch 1" in output
    content = scores(trained, "1-5")
    assert [line["epoch"] for line in content["checkpoints"]] == [2, 4, 5]
    best = max(content["checkpoints"], key=lambda line: line["miou"])
    assert content["best_step"] == best["step"]
    table = output[output.rindex("all\n") :]
    rows = [line for line in table.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == ["2", "4", "5"]
    assert [("best" in row) for row in rows] == [line is best for line in content["checkpoints"]]
    assert (trained / "eval" / "1-5.png").exists()


def test_from_an_epoch_on_and_a_range_of_one(trained, tmp_path):
    evaluated(tmp_path, str(trained), "-e", "4-")
    assert [line["epoch"] for line in scores(trained, "4-")["checkpoints"]] == [4, 5]
    assert "epoch 4" in evaluated(tmp_path, str(trained), "-e", "4-4")


@pytest.mark.parametrize(
    ("which", "expected"), [("3", "it has epochs 2, 4, 5"), ("6-", "no checkpoint of epoch 6-"), ("5-2", "empty range")]
)
def test_a_selection_without_checkpoints_ends_with_status_2(which, expected, trained, tmp_path):
    assert expected in evaluated(tmp_path, str(trained), "-e", which, status=2)


def released_state(run: Path) -> dict[str, torch.Tensor]:
    """Both networks of the last checkpoint under the published keys."""
    first = load_file(run / "checkpoints" / "last" / "model.safetensors")
    second = load_file(run / "checkpoints" / "last" / "extra.safetensors")
    branches = {
        "branch1.": first,
        "branch2.": {key.removeprefix("second/"): value for key, value in second.items() if "signs" not in key},
    }
    state = {}
    for branch, own in branches.items():
        low, context = own["decoder.0.weight"].split([48, own["decoder.0.weight"].shape[1] - 48], dim=1)
        for key, value in (own | {"decoder.0.weight": torch.cat([context, low], dim=1)}).items():
            official, ours = next((official, ours) for official, ours in CPS.items() if key.startswith(ours))
            state[branch + official + key.removeprefix(ours)] = value
    return state


def test_a_released_file_with_a_config_and_no_run(trained, tmp_path):
    torch.save({"model": released_state(trained), "epoch": 5}, tmp_path / "released.pth")
    shutil.copy(trained / "config.json", tmp_path / "mine.json")
    evaluated(tmp_path, str(trained), "-e", "last")
    evaluated(tmp_path, str(trained), "-e", "last", "--network", "2")
    for network, suffix in (("1", ""), ("2", "_network2")):
        output = evaluated(tmp_path, "-e", "released.pth", "--config", "mine.json", "--network", network)
        assert "the newest" not in output
        theirs = scores(tmp_path / "runs" / "cpcl" / "mine", f"released{suffix}")
        assert theirs["per_class_iou"] == scores(trained, f"last{suffix}")["per_class_iou"]


def test_either_network_or_both(trained, tmp_path):
    for network in ("1", "2", "both"):
        evaluated(tmp_path, str(trained), "-e", "last", "--network", network)
    output = evaluated(tmp_path, str(trained), "-e", "2-5", "--network", "both")
    assert output.count("note: skipped a checkpoint") == 2 and "holds no second network" in output
    assert "no second network" in evaluated(tmp_path, str(trained), "-e", "2", "--network", "2", status=2)
