"""Every command in a README or a page of docs/ runs: its script, in this process, on data and steps cut small."""

import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from common.datasets.ade20k import ADE20K
from common.datasets.cityscapes import Cityscapes
from common.datasets.coco import COCO
from common.datasets.shapes import make_shapes
from common.datasets.voc import VOC
from common.splits.split import Split, write_split
from tests.conftest import SCRIPTS, method_flags
from tests.helpers.commands import SMALL_MODEL, run_python, without_launcher
from tests.test_ade20k_coco import ade20k, coco
from tests.test_your_data import draw

ROOT = Path(__file__).parent.parent
# The commands of these go together: test_your_data.py, test_add_a_paper.py and, for auto-labels, a test below run them.
TOGETHER = {ROOT / "docs/your_data.md", ROOT / "docs/add_a_paper.md", ROOT / "docs/auto_labels.md"}
PAGES = sorted({ROOT / "README.md", *ROOT.glob("*/README.md"), *ROOT.glob("docs/*.md")} - TOGETHER)
SMALL_DATA = ["--data.crop_size", "[32,32]", "--data.workers", "0", "--data.allow_overlap", "true"]
SMALL_RUN = ["--optim.batch_size", "2", "--run.steps", "2", "--run.eval_every", "2", "--run.threads", "1"]


def commands() -> list[str]:
    """Commands of all fenced blocks and, in tables, of code that starts with a launcher; without their remarks."""
    found = []
    for page in PAGES:
        text = page.read_text()
        fences = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        blocks = [block for language, block in fences if not language]
        found += [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]
        found += re.findall(r"^\|.*?\| `((?:accelerate launch|python) [^`]*)`", text, re.MULTILINE)
    return sorted(set(found))


COMMANDS = commands()
PYTHON = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "predict.md").read_text(), re.MULTILINE | re.DOTALL)
OTHERS = ("make ", "git clone ")  # tested below and in test_adopt.py
DRAWING = ("python benchmarks/pictures.py", "python benchmarks/results.py")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The project with small data where the commands look for it, and a short run to evaluate."""
    folder = tmp_path_factory.mktemp("project")
    for name in sorted({script.split("/")[0] for script in SCRIPTS} | {"splits", "benchmarks", "common"}):
        (folder / name).symlink_to(ROOT / name)
    make_shapes(folder / "data" / "shapes", "voc", train=40, val=4, size=(48, 64))
    make_shapes(folder / "data" / "shapes_b", "voc", train=8, val=1, size=(48, 64), domain="b")
    make_shapes(folder / "data" / "VOCdevkit" / "VOC2012", "voc", train=700, val=4, size=(32, 32))
    make_shapes(folder / "data" / "gta5", "gta5", train=4, val=0, size=(32, 32))
    make_shapes(folder / "data" / "cityscapes", "cityscapes", train=400, val=4, size=(32, 32))
    (folder / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "results.md", folder / "docs")
    (folder / "splits").unlink()
    shutil.copytree(ROOT / "splits", folder / "splits")
    ade20k(folder / "data" / "ADEChallengeData2016")
    coco(folder / "data" / "coco")
    coco(folder / "data" / "coco", stuff=True)
    write_cac_lists(folder)
    write_cps_lists(folder / "data")
    write_orders(folder)
    write_published(folder)
    write_unimatch_lists(folder)
    return folder


def run_here(arguments: list[str], folder: Path) -> str:
    """Output of a command that ends well, run in `folder`."""
    ended = run_python(arguments, folder)
    assert ended.status == 0, ended.err
    return ended.out


def shortened(arguments: list[str]) -> list[str]:
    """A training command or benchmark with less of everything; other commands as they are."""
    if arguments[0].endswith("losses.py"):
        # Each row is a process with an import of torch.
        plain = ["plain formula"] if "prcl" in arguments else []
        return [*arguments, "--rows", "ours", *plain, "--scale", "0.03", "--repeats", "1"]
    if arguments[0].endswith("hardware.py"):
        return [*arguments, *SMALL_MODEL, "--data.crop_size", "[32,32]"]
    if arguments[0].endswith("loader.py"):
        return [*arguments, "--repeats", "1"]
    if arguments[0] in ("benchmarks/step.py", "benchmarks/memory.py"):
        # Batch norm of single images has no variance.
        less = ["--method.unlabeled_batch_size", "4"] if "memory" in arguments[0] else []
        if (script := f"{arguments[1]}/train.py") in SCRIPTS:
            less = method_flags(SCRIPTS[script].method)
        return [*arguments, "--steps", "1", *SMALL_DATA, *SMALL_MODEL, *SMALL_RUN, *less, "--run.steps", "6"]
    if arguments[0].endswith("launches.py"):
        scripts = [] if "--scripts" in arguments else ["--scripts", "supervised/train.py"]
        return [*arguments, *scripts, "--steps", "1", *SMALL_DATA, *SMALL_MODEL]
    if arguments[0] not in SCRIPTS:
        return ["2-" if text == "300-" else text for text in arguments]
    small = [*SMALL_DATA, *SMALL_MODEL, *SMALL_RUN, *method_flags(SCRIPTS[arguments[0]].method)]
    return arguments + small


def make_split_for(arguments: list[str], folder: Path) -> None:
    """Make the split that a paper's config on real data names, with the command that its absence would name."""
    data = json.loads((ROOT / arguments[arguments.index("--config") + 1]).read_text())["data"]
    named = arguments[arguments.index("--data.split") + 1] if "--data.split" in arguments else data.get("split")
    if named is None:
        return  # lists
    split = Path(named)
    if data["dataset"] != "shapes" and split.parts[-2].isdigit() and not (folder / split).exists():
        flags = f"--data-root {data['root']} --labels {split.parts[-2]} --seed {split.name} --out {split.parents[1]}"
        run_here(shlex.split(f"splits/make.py --dataset {data['dataset']} {flags}"), folder)


def write_cac_lists(folder: Path) -> None:
    """Lists as CAC published them, for the small data."""
    for dataset, labels, root, subsets in (
        ("voc", 1323, "VOCdevkit/VOC2012", VOC),
        ("city", 372, "cityscapes", Cityscapes),
    ):
        source = subsets(folder / "data" / root)
        train = source.names("train")
        for number in (0, 1, 2):
            lists = folder / "splits" / f"{dataset}_splits{number}"
            lists.mkdir(parents=True)
            parts = {f"{labels}_train_supervised": train[:6], f"{labels}_train_unsupervised": train[6:]}
            for name, names in (parts | {"val": source.names("val")}).items():
                lines = [f"/images/{name}.jpg /labels/{name}.png" for name in names]
                (lists / f"{name}.txt").write_text("\n".join(lines) + "\n")


def write_cps_lists(data: Path) -> None:
    """The trees of CPCL's configs, with lists as CPS published them, for the small data."""
    (data / "pascal_voc").symlink_to(data / "VOCdevkit" / "VOC2012")
    (data / "city").symlink_to(data / "cityscapes")
    for root, folder, source in (
        ("pascal_voc", "subset_train_aug", VOC(data / "pascal_voc")),
        ("city", "config_new/subset_train", Cityscapes(data / "city")),
    ):
        train = source.names("train")
        lines = (
            train if root == "pascal_voc" else [f"/images/train/{n}.png\t/segmentation/train/{n}.png" for n in train]
        )
        lists = data / root / folder
        lists.mkdir(parents=True)
        for name, chosen in (("train_aug_labeled_1-8", lines[:6]), ("train_aug_unlabeled_1-8", lines[6:])):
            (lists / f"{name}.txt").write_text("\n".join(chosen) + "\n")


def write_unimatch_lists(folder: Path) -> None:
    """Lists as UniMatch published them, for the small data."""
    voc, city = VOC(folder / "data/VOCdevkit/VOC2012"), Cityscapes(folder / "data/cityscapes")
    ade, coco = ADE20K(folder / "data/ADEChallengeData2016"), COCO(folder / "data/coco")
    for source, place in (
        (voc, "splits/unimatch/pascal/366"),
        (city, "splits/unimatch/cityscapes/1_8"),
        (ade, "splits/unimatch/ade20k/1_8"),
        (coco, "splits/unimatch/coco/1_128"),
        (ade, "published/UniMatch-V2/splits/ade20k/1_8"),
        (coco, "published/UniMatch/splits/coco/1_128"),
    ):
        lists, train = folder / place, source.names("train")
        lists.mkdir(parents=True)
        for file, names in (("labeled", train[:6]), ("unlabeled", train[6:]), ("../val", source.names("val"))):
            lines = [f"/images/{one}.jpg /labels/{one}.png" for one in names]
            (lists / f"{file}.txt").write_text("\n".join(lines) + "\n")


def write_orders(folder: Path) -> None:
    """Orders as memory bank published them, for the small data."""
    for dataset, source in (
        ("voc", VOC(folder / "data/VOCdevkit/VOC2012")),
        ("city", Cityscapes(folder / "data/city")),
    ):
        (folder / "splits" / dataset).mkdir(exist_ok=True)
        order = np.random.RandomState(0).permutation(len(source.names("train")))
        (folder / "splits" / dataset / "split_0.pkl").write_bytes(pickle.dumps(order, protocol=3))


def write_published(folder: Path) -> None:
    """Below `published`, for the small data, what the README adopts."""
    lists = folder / "published"
    for source, name in (
        (VOC(folder / "data" / "VOCdevkit" / "VOC2012"), "PRCL/VOC_split/662/3407"),
        (Cityscapes(folder / "data" / "cityscapes"), "PRCL/CityScapes_split/150/3407"),
    ):
        names = source.names("train")
        write_split(lists / name, Split(names[:6], names[6:], source.names("val")))
    (lists / "CAC" / "dataloaders").mkdir(parents=True)
    shutil.copytree(folder / "splits" / "voc_splits0", lists / "CAC" / "dataloaders" / "voc_splits0")
    for kind, name in (("supervised", "92/labeled"), ("unsupervised", "92/unlabeled")):
        copy = lists / "UniMatch" / "splits" / "pascal" / f"{name}.txt"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(lists / "CAC" / "dataloaders" / "voc_splits0" / f"1323_train_{kind}.txt", copy)
    shutil.copy(folder / "splits" / "voc_splits0" / "val.txt", lists / "UniMatch" / "splits" / "pascal" / "val.txt")
    order = lists / "SemiSeg-Contrastive" / "splits" / "voc" / "split_0.pkl"
    order.parent.mkdir(parents=True)
    order.write_bytes(pickle.dumps(np.arange(700)))


def make_runs_for(arguments: list[str], folder: Path) -> None:
    """Make the runs `runs/<paper>/demo` that a command names, or that an evaluation finds as the newest."""
    named = [paper for text in arguments for paper in re.findall(r"^runs/(\w+)/demo", text)]
    evaluated = [arguments[0].split("/")[0]] if arguments[0].endswith("/eval.py") else []
    for paper in named or evaluated:
        if not (folder / "runs" / paper / "demo").exists():
            make_run(paper, folder)


def make_run(paper: str, folder: Path) -> None:
    length = ["--run.steps", "4", "--run.snapshot_every", "2"]
    if paper == "cpcl":  # its evaluations name epochs: 30 and 60 are kept
        length = ["--run.steps", "null", "--run.epochs", "61", "--run.steps_per_epoch", "1", "--run.eval_every", "61"]
        length += ["--run.snapshot_every", "30", "--run.snapshot_from", "31"]
    script = "train_semiseg.py" if paper == "cac_cps" else "train.py"
    run_here(shortened([f"{paper}/{script}", "--config", f"{paper}/configs/demo.json"]) + length, folder)


def test_there_are_commands():
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith(OTHERS + DRAWING)])
def test_command(command, project, monkeypatch):
    arguments = without_launcher(command)
    if arguments[0] in SCRIPTS:
        make_split_for(arguments, project)
        shutil.rmtree(project / "runs", ignore_errors=True)
    if arguments[0] not in SCRIPTS:
        make_runs_for(arguments, project)
    if arguments[0].endswith("accuracy.py") and "--show" not in arguments:
        arguments.append("--show")  # running a table takes an hour
    if arguments[:2] == ["-m", "common.draw_shapes"]:
        monkeypatch.setattr("common.datasets.shapes.make_shapes", partial(make_shapes, train=4, val=2))
    if arguments[0] == "splits/adopt.py":  # lists of the small data differ from those published under their names
        monkeypatch.setattr("common.splits.published.record", lambda: {"lists": [], "splits": []})
        if "--out" in arguments:  # a split made for a config of the same name
            shutil.rmtree(project / arguments[arguments.index("--out") + 1], ignore_errors=True)
    if any(argument.endswith(".onnx") for argument in arguments):
        pytest.importorskip("onnxruntime")
    assert run_here(shortened(arguments), project).strip()


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith(DRAWING)])
def test_command_with_matplotlib(command, curves, project, monkeypatch):
    test_command(command, project, monkeypatch)


def test_the_loop_of_auto_labels_runs(tmp_path):
    mine = draw(tmp_path)
    for name in ("prcl", "splits"):
        (tmp_path / name).symlink_to(ROOT / name)
    (block,) = re.findall(r"^```\n(.*?)^```", (ROOT / "docs" / "auto_labels.md").read_text(), re.MULTILINE | re.DOTALL)
    out = [run_here(shortened(without_launcher(command)), tmp_path) for command in block.splitlines()]
    assert "12 masks of people kept" in out[2]
    printed = re.search(r"^train with (.*)$", out[2], re.MULTILINE)[1]
    assert printed in block  # the page trains with the settings that the command prints
    assert "mIoU" in out[4] and len(list((mine / "round1" / "pseudo_label").glob("*.png"))) == 20


@pytest.mark.parametrize("code", PYTHON, ids=[code.strip().splitlines()[-1] for code in PYTHON])
def test_python_code_of_the_page_runs(code, project, monkeypatch, capsys):
    if "onnxruntime" in code:
        pytest.importorskip("onnxruntime")
    for file in re.findall(r"seen/[^\"]+", code):
        if not (project / file).exists():
            test_command(f"python -m common.predict runs/prcl/demo --export {file}", project, monkeypatch)
    for run in re.findall(r"runs/\w+/demo", code):
        make_runs_for([run], project)
    monkeypatch.chdir(project)
    exec(code, {})
    assert "background" in capsys.readouterr().out


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_make_target_exists(command):
    subprocess.run([*shlex.split(command.split("#")[0]), "--dry-run"], check=True, cwd=ROOT, capture_output=True)


def test_the_demo_is_launched_by_accelerate(tiny, tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    arguments = tiny("prcl/train.py", "--run.steps", "2", "--model.backbone", "resnet18")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, "prcl/train.py", *arguments], check=True, cwd=ROOT, env=environment, capture_output=True)
    assert (tmp_path / "run" / "checkpoints" / "last").exists()
