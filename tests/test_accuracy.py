"""benchmarks/accuracy.py on runs of seconds, the trial on CamVid on made-up images, and the tables of the project."""

import json
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from benchmarks import accuracy
from benchmarks.camvid import prepare
from common.config import load_config
from common.config.sections import BaseConfig
from common.datasets import open_reader
from common.splits.split import split_of
from tests.conftest import ROOT, SCRIPTS
from tests.helpers.commands import train as train_here

DEMO = {"prcl/train.py": "prcl/configs/demo.json", "supervised/train.py": "supervised/configs/demo.json"}
TABLES = sorted((ROOT / "benchmarks" / "tables").glob("*.json"))


@pytest.fixture
def table(small_run, shapes_root, tmp_path, monkeypatch):
    """A table of tiny runs in `tmp_path`; its runs are trained in this process, and noted in `table.trained`."""

    class Written:
        path, results, trained = tmp_path / "tiny.json", tmp_path / "results" / "tiny.jsonl", []

        def write(self, rows: dict, **fields) -> None:
            self.path.write_text(json.dumps({"seeds": [0, 1], "set": settings(), "rows": rows} | fields))

        def run(self, *arguments: str) -> None:
            accuracy.main([str(self.path), *arguments])

        def lines(self) -> dict:
            return accuracy.read_results(self.results)

    def settings() -> dict:
        words = small_run("supervised/train.py", tmp_path)[2:]
        values = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2])}
        del values["run.dir"]
        return values | {"run.steps": "4", "run.eval_every": "2"}

    def train(arguments: list[str], folder: Path) -> dict:
        Written.trained.append(folder.relative_to("runs/benchmarks/tiny").as_posix())
        is_whole = not (folder / "config.json").exists()
        train_here(arguments[0], arguments[1:])
        AcceleratorState._reset_state(reset_partial_state=True)
        return {"seconds": 1.0, "peak_memory_mb": 100} if is_whole else {}

    Written.trained = []
    for name in {script.split("/")[0] for script in SCRIPTS}:
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(accuracy, "train", train)
    return Written()


def row(script: str, **fields) -> dict:
    few = {f"method.{key}": value for key, value in SCRIPTS[script].method.items()}
    return {"script": script, "config": DEMO[script], "set": few} | fields


def test_a_row_is_run_and_compared_beside_its_own_run_on_labels_only(table, shapes_root, capsys):
    table.write({"PRCL": row("prcl/train.py")}, also=str(shapes_root / "splits" / "6" / "0"))
    table.run()
    assert table.trained == ["PRCL/0", "PRCL/1", "PRCL,_labels_only/0", "PRCL,_labels_only/1"]
    lines = table.lines()
    own = json.loads(Path("runs/benchmarks/tiny/PRCL,_labels_only/1/config.json").read_text())
    assert own["method"]["labels_only"] and own["run"]["seed"] == 1
    line = lines["PRCL", 0]
    assert line["scores"] == line["also"] and line["scores"]["images"] == 7
    assert len(line["scores"]["per_class_iou"]) == 7
    ious = [iou for iou in line["scores"]["per_class_iou"].values() if iou is not None]
    assert len(ious) == line["scores"]["classes_counted"]
    assert line["scores"]["miou"] == pytest.approx(statistics.mean(ious), abs=0.01)
    # PRCL's own protocol is the table's: whole images. Its demo trains in fp32.
    assert line["miou_last"] == pytest.approx(line["scores"]["miou"], abs=0.01)
    gains = [lines["PRCL", s]["scores"]["miou"] - lines["PRCL, labels only", s]["scores"]["miou"] for s in (0, 1)]
    expected = f"{statistics.mean(gains):+.1f} ± {statistics.stdev(gains) / 2**0.5:.1f}"
    assert expected in capsys.readouterr().out

    table.trained.clear()
    table.run()
    assert not table.trained and table.lines() == lines


def test_finished_folders_are_only_evaluated_and_unfinished_ones_continued(table, capsys):
    table.write({"16": row("supervised/train.py", baseline=False)}, protocol={"crop": [32, 32], "flip": True})
    table.run("--seeds", "0")
    (line,) = table.lines().values()
    assert line["protocol"] == "sliding window 32x32 stride 22x22, scale 1, flip"

    # A line of an earlier version keeps its times.
    old = {key: line[key] for key in ("row", "seed", "miou_last", "miou_best", "command")} | {"seconds": 7.0}
    table.results.write_text(json.dumps(old) + "\n")
    table.run("--seeds", "0")
    assert table.trained == ["16/0"]
    assert table.lines()["16", 0] == {
        key: value for key, value in line.items() if key not in ("hardware", "torch", "peak_memory_mb")
    } | {"seconds": 7.0}

    # So does a line without its folder.
    table.results.write_text(json.dumps(old) + "\n")
    folder = Path("runs/benchmarks/tiny/16/0")
    moved = folder.rename("moved")
    table.run("--seeds", "0")
    assert table.lines()["16", 0] == old and table.trained == ["16/0"]
    moved.rename(folder)

    table.results.unlink()
    shutil.rmtree(folder / "checkpoints" / "step_00000004")
    table.run("--seeds", "0")
    assert table.trained == ["16/0", "16/0"]
    assert table.lines()["16", 0]["scores"] == line["scores"]
    assert "seconds" not in table.lines()["16", 0]


def test_results_from_before_a_change_are_marked_and_measured_again(table, capsys):
    table.write({"16": row("supervised/train.py", baseline=False)})
    table.results.parent.mkdir()
    old = {"row": "16", "seed": 0, "miou_last": 12.3, "miou_best": 12.3, "seconds": 7.0, "command": ""}
    table.results.write_text(json.dumps(old | {"before": "all is different"}) + "\n")
    table.run("--show")
    shown = capsys.readouterr().out
    assert "16 *" in shown and "* measured before this change: all is different" in shown and "12.3" in shown
    assert not table.trained

    table.run("--seeds", "0")
    assert table.trained == ["16/0"]
    assert "before" not in table.lines()["16", 0]
    assert "*" not in capsys.readouterr().out

    # A folder of that time is not taken for a new run.
    table.results.unlink()
    config = Path("runs/benchmarks/tiny/16/0/config.json")
    values = json.loads(config.read_text())
    del values["optim"]["supervised_loss"]
    config.write_text(json.dumps(values))
    with pytest.raises(SystemExit):
        table.run("--seeds", "0")
    assert "earlier version" in capsys.readouterr().err


def test_changed_settings_and_unknown_baselines_are_refused(table, capsys):
    table.write({"16": row("supervised/train.py", baseline="nothing")})
    with pytest.raises(SystemExit):
        table.run()
    assert "names the baseline 'nothing', which is not a row" in capsys.readouterr().err
    table.write({"16": row("supervised/train.py", baseline=False)})
    table.results.parent.mkdir()
    stored = {"row": "16", "seed": 0, "miou_last": 1.0, "miou_best": 1.0, "command": "other"}
    table.results.write_text(json.dumps(stored) + "\n")
    with pytest.raises(SystemExit):
        table.run()
    assert "was measured without" in capsys.readouterr().err


def test_a_run_is_launched_without_warnings_and_its_memory_measured(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    arguments = tiny("supervised/train.py", "--run.steps", "2", "--model.backbone", "resnet18")
    costs = accuracy.train(["supervised/train.py", *arguments], tmp_path / "run")
    assert costs["seconds"] > 0 and costs["peak_memory_mb"] > 100
    printed = capfd.readouterr()
    assert "following values were not passed" not in printed.out + printed.err


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_row_of_a_paper_has_a_baseline_on_labels_only(path):
    rows = accuracy.read_table(path)["rows"]
    assert json.loads(path.read_text())["rows"].keys() <= rows.keys()
    for this in rows.values():
        if this["baseline"] is not None:
            baseline = rows[this["baseline"]]
            settings = baseline["set"]
            labels_only = settings.get("method.labels_only") or settings.get("method.cac.supervised")
            assert labels_only or baseline["script"] == "supervised/train.py"
            assert baseline["script"] == this["script"]


@pytest.fixture
def camvid(tmp_path) -> Path:
    """Two drives of 100 and 40 images for training, and a clip of 5, in the layout of the real data."""
    data = tmp_path / "camvid"
    images, masks = data / prepare.IMAGES, data / prepare.MASKS
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    lines = ["voc_id\tcamvid_split\tcamvid_file"]
    drives = [("A", "train", 100), ("B", "train", 40), ("B", "val", 5)]
    frames = [(drive, subset, 1000 * (subset == "val") + k) for drive, subset, count in drives for k in range(count)]
    rng = np.random.default_rng(0)
    for number, (drive, subset, frame) in enumerate(frames):
        name = f"2007_{number:06d}"
        lines.append(f"{name}\t{subset}\t{drive}_{frame:06d}.png")
        Image.fromarray(rng.integers(0, 256, (18, 24, 3), dtype=np.uint8)).save(images / f"{name}.jpg")
        mask = Image.fromarray(rng.choice([*range(1, 12), 255], (18, 24)).astype(np.uint8), "P")
        mask.putpalette(np.array(prepare.voc_palette()).flatten().tolist())
        mask.save(masks / f"{name}.png")
    (data / "source_names.tsv").write_text("\n".join(lines) + "\n")
    return data


def test_the_trial_on_camvid_holds_out_blocks_of_every_drive(camvid, monkeypatch, capsys):
    prepare.main(["--data", str(camvid)])
    assert "100 images to train on, 40 held out, 5 of the official clip" in capsys.readouterr().out
    monkeypatch.chdir(camvid.parent)
    data = load_config(BaseConfig, ROOT / "benchmarks" / "camvid" / "config.json").data
    data.root = "camvid"
    reader = open_reader(data)
    held_out = set()
    for labels in prepare.LABELS[:1]:
        for seed in (0, 1):
            data.split = f"camvid/trial/{labels}/{seed}"
            split = split_of(data, reader)
            held_out.add(tuple(split.valid))
            assert len(split.labeled) == labels and len(split.labeled) + len(split.unlabeled) == 100
            assert not set(split.valid) & {*split.labeled, *split.unlabeled}
    (valid,) = held_out  # the same for all seeds
    numbers = sorted(int(name[5:]) for name in valid)
    starts = [number for number in numbers if number - 1 not in numbers]
    assert starts == [30, 60, 90, 130]
    data.split = "camvid/trial/official/0"
    assert len(split_of(data, reader).valid) == 5
    _, label = reader.read_pair(valid[0])
    assert set(label.unique().tolist()) <= {*range(11), 255}


def test_names_of_other_columns_are_refused(camvid, capsys):
    (camvid / "source_names.tsv").write_text("id\tname\na\tb\n")
    with pytest.raises(SystemExit):
        prepare.main(["--data", str(camvid)])
    assert "must have three columns" in capsys.readouterr().err
