"""Signs of a run: each is fired by a planted case, and demos and healthy runs give none."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from common.config import parse
from common.config.lengths import decay_of, in_steps
from common.datasets.shapes import make_shapes
from common.engine import checkpoint_files as checkpoints_of
from common.engine import monitor as signs_of
from common.engine.monitor import Monitor, RunFacts, classes_shown, startup_warnings
from common.engine.run import Run
from memory_bank.train import Config as MemoryBank
from memory_bank.training import facts_of
from prcl.train import Config as PRCL
from tests.conftest import ROOT, SCRIPTS, flags
from tests.helpers.commands import refused, train
from tests.helpers.kill_runs import assert_same_run, metrics
from tests.helpers.subprocess_runs import start_two

CLASSES = ("road", "car", "sign")
ONLY = ("--method.labels_only", "true")
ALL_SHOWN = [True, True, True]
LIST = SimpleNamespace(labeled=["x"] * 6, unlabeled=["x"] * 40)


def config_of(paper: str, *more: str):
    """The demo config of PRCL or memory bank, with the arguments `more`."""
    class_ = {"prcl": PRCL, "memory_bank": MemoryBank}[paper]
    return parse(class_, f"{paper}/train.py", ["--config", str(ROOT / paper / "configs" / "demo.json"), *more])


def found(config, total: int = 400, facts: RunFacts = RunFacts(), shown=ALL_SHOWN) -> str:
    return "\n".join(startup_warnings(config, total, facts, CLASSES, shown))


# Signs at the start


@pytest.mark.parametrize("key", ["bank_start", "contrast_start", "ramp_steps", "adaptation.last_steps"])
def test_a_constant_in_steps_beyond_the_run_is_a_sign(key):
    config = config_of("memory_bank", f"--method.{key}", "400")
    sign = found(config)
    assert sign.startswith(f"method.{key} is 400 steps, but the run has 400") and sign.count("\n") == 0
    assert not found(config, total=401)
    # Constants that count updates reach twice as far, and those that a run does not use are not examined.
    assert not found(config, facts=RunFacts(updates_per_step=2))
    assert not found(config, facts=RunFacts(skipped=[f"method.{key}"]))


def test_a_teacher_that_lags_more_than_a_twentieth_of_the_run_is_a_sign():
    config = config_of("prcl", "--method.alpha", "0.99")
    sign = found(config, total=1000)
    assert "method.alpha 0.99" in sign and "lags 100 steps, 10% of the run" in sign
    assert not found(config, total=2000)
    assert "lags 48 steps, 12% of the run" in found(config_of("prcl", "--method.alpha", "12%"))
    assert "lags inf steps" in found(config_of("prcl", "--method.alpha", "1"))


def test_snapshots_beyond_the_run_are_a_sign():
    late = config_of("prcl", "--run.snapshot_every", "20", "--run.snapshot_from", "401")
    assert found(late) == (
        "run.snapshot_from is 401 steps, but the run has 400, so no snapshot is kept; lower it, or set "
        "run.snapshot_every 0"
    )
    assert found(config_of("prcl", "--run.snapshot_every", "401")).startswith("run.snapshot_every is 401 steps")
    assert not found(config_of("prcl", "--run.snapshot_every", "20", "--run.snapshot_from", "400"))
    assert not found(config_of("prcl", "--run.snapshot_from", "500"))  # switched off by snapshot_every 0


def test_a_run_shorter_than_a_pass_over_the_images_has_no_class_balance():
    balanced = config_of("memory_bank", "--method.class_balance", "true", "--optim.batch_size", "2")
    (sign,) = facts_of(balanced, LIST, total=39).signs  # one unlabeled image per step
    assert sign.startswith("method.class_balance counts 40 steps") and "the run has 39" in sign
    assert sign in found(balanced, total=39, facts=facts_of(balanced, LIST, total=39))
    assert not facts_of(balanced, LIST, total=40).signs
    assert not facts_of(config_of("memory_bank"), LIST, total=3).signs


def test_a_high_floor_of_the_learning_rate_is_a_sign():
    config = config_of("prcl", "--optim.lr", "1e-3")
    assert "never falls below 3e-05, 3% of optim.lr" in found(config, facts=RunFacts(lr_floor=3e-5))
    assert not found(config, facts=RunFacts(lr_floor=2e-5))


def test_classes_that_no_label_shows_are_a_sign(tmp_path):
    sign = found(config_of("prcl"), shown=[True, False, False])
    assert sign.startswith("no labeled image shows car, sign: the network cannot learn them")
    assert not found(config_of("prcl"), shown=None)


def test_labels_are_read_for_the_classes_that_they_show(tmp_path):
    for name, ids in (("a", [0, 255]), ("b", [2, 2])):
        Image.fromarray(np.array([ids], np.uint8)).save(tmp_path / f"{name}.png")
    reader = SimpleNamespace(
        classes=CLASSES, read_label=lambda name: torch.from_numpy(np.array(Image.open(tmp_path / f"{name}.png")))
    )
    assert classes_shown([(reader, ["a"])]) == [True, False, False]
    assert classes_shown([(reader, ["a"]), (reader, ["b"])]) == [True, False, True]
    assert classes_shown([(reader, ["a"] * 501)]) is None  # too many to read before training


def test_crops_smaller_than_the_smallest_rate_are_a_sign():
    sign = found(config_of("prcl", "--data.crop_size", "[160, 80]"))
    assert sign.startswith("crops of 160x80 are 5 features wide at stride 16, but the smallest rate of the ASPP is 6")
    assert not found(config_of("prcl", "--data.crop_size", "[160, 80]", "--model.rates", "[2, 4, 6]"))
    assert not found(config_of("prcl", "--data.crop_size", "[81, 81]"))
    assert not found(config_of("prcl", "--data.crop_size", "[80, 80]", "--model.head", "v2"))  # without an ASPP
    # PRCL's deep stem keeps stride 8.
    assert not found(config_of("prcl", "--data.crop_size", "[48, 48]", "--model.stem", "deep"))


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory):
    """Folder in which the demo configs find built-in data: fewer images than the demo's."""
    folder = tmp_path_factory.mktemp("demo")
    make_shapes(folder / "data" / "shapes", "voc", train=40, val=1, size=(96, 128))
    make_shapes(folder / "data" / "shapes_b", "voc", train=8, val=1, size=(96, 128), domain="b")
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_demos_give_no_sign_at_the_start(script, demo_data, monkeypatch, capsys):
    """The demo config as it is, up to the point where the run has examined itself."""

    class Examined(Exception):
        pass

    def check_settings(run, *arguments) -> None:
        examined(run, *arguments)
        raise Examined

    examined = Run.check_settings
    monkeypatch.setattr(Run, "check_settings", check_settings)
    monkeypatch.chdir(demo_data)
    demo = "demo_v2.json" if script == "unimatch/train_v2.py" else "demo.json"
    with pytest.raises(Examined):
        train(script, ["--config", str(ROOT / script.split("/")[0] / "configs" / demo), "--run.device", "cpu"])
    assert "warning" not in capsys.readouterr().out


def test_signs_are_printed_before_training_for_what_the_run_uses(tiny, tmp_path, capsys):
    """Constants of pseudo-labels do not matter to a run on labels only."""
    late = ("--method.bank_start", "7", "--run.steps", "1", "--run.eval_every", "1")
    train("memory_bank/train.py", tiny("memory_bank/train.py", *late))
    assert capsys.readouterr().out.count("warning: method.bank_start is 7 steps, but the run has 1,") == 1
    AcceleratorState._reset_state(reset_partial_state=True)
    train("memory_bank/train.py", tiny("memory_bank/train.py", *late, *ONLY, "--run.dir", str(tmp_path / "only")))
    assert "bank_start" not in capsys.readouterr().out


# Signs during the run: 100 of 150 steps are done, so that predictions count


class Lines(list):
    """A log that keeps what is printed."""

    def print(self, text: str) -> None:
        self.append(text)


@pytest.fixture
def signs() -> tuple[Monitor, Lines]:
    lines = Lines()
    return Monitor(CLASSES, 150, Accelerator(cpu=True), lines), lines


def pixels(*counts: int) -> torch.Tensor:
    """Class ids [1,1,N]: so many pixels of each class, and two ignored ones."""
    ids = [number for number, count in enumerate(counts) for _ in range(count)] + [255, 255]
    return torch.tensor(ids).view(1, 1, -1)


def logits_of(label: torch.Tensor) -> torch.Tensor:
    """Logits [1,C,1,N] that predict `label`, and class 0 at ignored pixels."""
    return torch.nn.functional.one_hot(label % 255, len(CLASSES)).movedim(-1, 1).float()


def test_shares_are_counted_since_the_last_line(signs):
    counts, lines = signs
    label = pixels(60, 40, 0)
    counts.count_pseudo_labels(label, label == 1)
    counts.count_pseudo_labels(pixels(0, 100, 0), pixels(0, 100, 0) > 255)
    assert counts.read(100) == {
        "confident": 0.2,
        "confident/road": 0.0,
        "confident/car": pytest.approx(40 / 140),
        "largest_class": 0.7,
    }
    counts.count_pseudo_labels(pixels(1, 0, 1), pixels(1, 0, 1) <= 255)
    assert counts.read(101) == {"confident": 1, "confident/road": 1, "confident/sign": 1, "largest_class": 0.5}
    assert counts.read(102) == {}  # nothing counted, e.g. on labels only
    assert not lines


def test_papers_without_a_threshold_have_no_share_of_confident_pixels(signs):
    counts, lines = signs
    counts.count_pseudo_labels(pixels(1, 1, 0))
    assert counts.read(100) == {"largest_class": 0.5}
    assert not lines


def test_a_threshold_that_hardly_any_pixel_passes_is_a_sign_once(signs):
    counts, lines = signs
    for step in (74, 99, 100, 101):  # early in a run, networks are not confident yet
        label = pixels(500, 499, 1)
        counts.count_pseudo_labels(label, label == 2)
        counts.read(step)
        assert len(lines) == (step >= 100)
    assert lines[0].startswith("warning: 0.10% of the unlabeled pixels pass the confidence threshold")
    counts.count_pseudo_labels(label, label > 255)
    counts.read(101)
    assert len(lines) == 1


def test_pseudo_labels_of_one_class_are_a_sign_unless_the_labels_are_too(signs):
    counts, lines = signs
    counts.count_predictions(logits_of(pixels(91, 9, 0)), pixels(91, 9, 0))
    counts.count_pseudo_labels(pixels(96, 4, 0))
    assert counts.read(100)["largest_class"] == 0.96
    assert not lines  # most of the labels are road
    counts.evaluated(100)
    for confirmed in (95, 96):
        counts.count_predictions(logits_of(pixels(50, 50, 0)), pixels(50, 50, 0))
        counts.count_pseudo_labels(pixels(confirmed, 100 - confirmed, 0))
        counts.read(101)
    assert len(lines) == 1 and lines[0].startswith("warning: 96% of the pseudo-labels are road")


def test_classes_that_are_not_predicted_between_evaluations_are_a_sign(signs):
    counts, lines = signs
    counts.count_predictions(logits_of(pixels(2, 0, 0)), pixels(1, 1, 0))
    assert counts.evaluated(50) == ["car"]
    assert not lines  # too early
    counts.count_predictions(logits_of(pixels(1, 1, 0)), pixels(1, 1, 0))
    counts.count_predictions(logits_of(pixels(2, 0, 0)), pixels(1, 1, 0))
    assert counts.evaluated(100) == []
    counts.count_predictions(logits_of(pixels(2, 0, 0)), pixels(0, 1, 1))
    assert counts.evaluated(150) == ["car", "sign"]
    assert len(lines) == 1 and lines[0].startswith("warning: labels show car, sign, but the network has not predicted")


# Whole runs

LENGTH = ("--run.steps", "24", "--run.eval_every", "12", "--run.save_every", "24", "--run.log_every", "4")


def test_a_run_that_collapses_prints_it_and_a_healthy_one_does_not(tiny, tmp_path, capsys, monkeypatch):
    """A learning rate at which every prediction becomes one class, while labels show seven."""
    monkeypatch.setattr(signs_of, "LEAST_STEPS", 8)
    script = "prcl/train.py"
    wrong = ("--optim.lr", "0.5", "--method.un_threshold", "0", "--method.alpha", "0.5")
    train(script, tiny(script, *LENGTH, *wrong))
    output = capsys.readouterr().out
    assert output.count("so training collapses to it; lower optim.lr") == 1
    assert "but the network has not predicted them since the last evaluation" in output
    lines = metrics(tmp_path / "run")
    assert lines[-2]["largest_class"] > 0.95 and lines[-1]["classes_not_predicted"] > 0
    assert "confident/" not in output  # numbers per class are written only
    AcceleratorState._reset_state(reset_partial_state=True)
    healthy = ("--run.dir", str(tmp_path / "healthy"), "--method.un_threshold", "0")
    train(script, tiny(script, *LENGTH, *healthy))
    output = capsys.readouterr().out
    assert "training collapses" not in output
    assert all(line["largest_class"] < 0.95 for line in metrics(tmp_path / "healthy")[-3:-1])


@pytest.mark.parametrize("processes", [1, 2])
def test_counts_go_on_after_a_stop_whatever_the_cadences(processes, tiny, tmp_path):
    """A checkpoint between two log lines and between two evaluations: the continued run has the same log."""
    script = "prcl/train.py"
    cadence = {"steps": 10, "log_every": 4, "eval_every": 3, "save_every": 5, "keep": 9}
    arguments = tiny(script, *flags({f"run.{key}": value for key, value in cadence.items()}), "--optim.batch_size", "4")
    run, whole = tmp_path / "run", tmp_path / "whole"

    def train_in_processes() -> None:
        if processes == 1:
            train(script, arguments)
        else:
            for child in start_two(script, arguments, tmp_path / "log"):
                child.finish()

    train_in_processes()
    shutil.copytree(run, whole, symlinks=True)
    for path in (run / "checkpoints").iterdir():
        if path.is_symlink() or path.name > "step_00000005":
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
    AcceleratorState._reset_state(reset_partial_state=True)
    train_in_processes()
    assert_same_run(run, whole)
    assert any("confident" in line for line in metrics(run))
    assert [line["step"] for line in metrics(run) if "classes_not_predicted" in line] == [3, 6, 9, 10]


def test_checkpoints_without_counts_are_continued(tiny, tmp_path):
    """Runs that began before the signs existed: the weights end as they would have."""
    script = "supervised/train.py"
    arguments = tiny(script, "--run.save_every", "3")
    train(script, arguments)
    checkpoints = tmp_path / "run" / "checkpoints"
    final = (checkpoints / "step_00000006" / "model.safetensors").read_bytes()
    shutil.rmtree(checkpoints / "step_00000006")
    extra = checkpoints / "step_00000003" / "extra.safetensors"
    assert set(load_file(extra)) == {"signs/counts"}
    old = checkpoints_of.read(extra.parent)
    shutil.rmtree(extra.parent)
    checkpoints_of.write(checkpoints, old.meta, old.model, {}, old.state)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    for section, key in (("data", "class_balanced"), ("optim", "supervised_loss")):
        del config[section][key]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    AcceleratorState._reset_state(reset_partial_state=True)
    train(script, arguments)
    assert (checkpoints / "step_00000006" / "model.safetensors").read_bytes() == final


# Shares of the run


def test_shares_are_steps_and_decays_of_the_run():
    assert [in_steps(value, 600) for value in ("2%", "33.5%", "100%", "0%", 7)] == [12, 201, 600, 1, 7]
    assert decay_of("2%", 500) == pytest.approx(0.9) and decay_of("0%", 500) == 0 and decay_of(0.99, 5) == 0.99


def test_shares_are_read_from_files_and_the_command_line(tmp_path):
    path = tmp_path / "config.json"
    values = json.loads((ROOT / "memory_bank/configs/demo.json").read_text())
    values["method"] |= {"alpha": "3.5%", "bank_start": "7%"}
    path.write_text(json.dumps(values))
    method = parse(MemoryBank, "memory_bank/train.py", ["--config", str(path), "--method.ramp_steps", "40%"]).method
    assert (method.alpha, method.bank_start, method.ramp_steps) == ("3.5%", "7%", "40%")
    assert config_of("prcl", "--method.alpha=0.9").method.alpha == 0.9


@pytest.mark.parametrize("value", ["200%", "abc", "-3%", "2 %", "%"])
@pytest.mark.parametrize("key", ["alpha", "ramp_steps"])
def test_wrong_shares_are_refused_in_a_line(key, value, tiny, tmp_path, capsys):
    script, path = "memory_bank/train.py", tmp_path / "wrong.json"
    path.write_text(json.dumps({"method": {key: value}, "run": {}, "data": {}}))
    for more in ([f"--method.{key}={value}"], ["--config", str(path)]):
        message = refused(script, tiny(script, *more), capsys)
        assert f"method.{key}" in message and value in message and "Share" in message
        assert len(message.splitlines()) == 1
