"""Two processes see and do what one with the same total batch does."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.augment.views import CropTransform
from common.datasets.shapes import CLASSES
from common.datasets.voc import VOC
from common.loaders import StepBatches, TrainingImages
from tests.conftest import SCRIPTS, method_flags
from tests.helpers.hooks import record
from tests.helpers.kill_runs import same
from tests.helpers.subprocess_runs import start, start_two

STEPS = 3
FOUR = ["--optim.batch_size", "4"]


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, *arguments], capture_output=True, text=True, timeout=120, env=environment)


def batches(root: Path, processes: int, rank: int, step: int = 0, accumulation: int = 1, total: int = 4):
    """The batches one of `processes` gets, as a run with a total batch of `total` would make them."""
    config = SimpleNamespace(
        optim=SimpleNamespace(accumulation=accumulation), data=SimpleNamespace(workers=0), run=SimpleNamespace(seed=5)
    )
    run = SimpleNamespace(
        config=config,
        processes=processes,
        rank=rank,
        batch_size=total // processes // accumulation,
        step=step,
        device=torch.device("cpu"),
        register_batch=lambda batch: None,
    )
    source = VOC(root, CLASSES)
    transform = CropTransform((32, 40), (0.5, 1.5))
    images = TrainingImages(source, source.names("train")[:7], transform, 5, "labeled", with_label=True)
    return StepBatches(images, run)


def joined(parts: list) -> SimpleNamespace:
    return SimpleNamespace(
        image=torch.cat([part.image for part in parts]),
        label=torch.cat([part.label for part in parts]),
        names=[name for part in parts for name in part.names],
    )


def assert_same(one, other) -> None:
    assert one.names == other.names
    assert one.image.equal(other.image)
    assert one.label.equal(other.label)


def test_two_processes_share_the_batches_of_one(shapes_root):
    alone = batches(shapes_root, 1, 0)
    first, second = batches(shapes_root, 2, 0), batches(shapes_root, 2, 1)
    for _ in range(STEPS):
        assert_same(next(alone), joined([next(first), next(second)]))


def test_accumulated_passes_share_the_batch_of_one_step(shapes_root):
    alone, accumulated = batches(shapes_root, 1, 0), batches(shapes_root, 1, 0, accumulation=2)
    for _ in range(STEPS):
        assert_same(next(alone), joined([next(accumulated), next(accumulated)]))


def test_a_stream_continues_where_it_was(shapes_root):
    whole = batches(shapes_root, 1, 0)
    seen = [next(whole) for _ in range(STEPS)]
    assert_same(next(batches(shapes_root, 1, 0, step=STEPS - 1)), seen[-1])


def test_every_pass_shows_every_image_once_in_another_order_and_augmentation(shapes_root):
    stream = batches(shapes_root, 1, 0, total=7)
    first, second = next(stream), next(stream)
    assert sorted(first.names) == sorted(second.names) and len(set(first.names)) == 7
    assert first.names != second.names
    for name in first.names:
        assert not first.image[first.names.index(name)].equal(second.image[second.names.index(name)])


AUGMENT = """
import importlib, sys, torch
from common.config import parse
from common.engine.run import Run
out, paper, arguments = sys.argv[1], sys.argv[2], sys.argv[3:]
train = importlib.import_module(f"{paper}.train")
with Run(parse(train.Config, f"{paper}/train.py", arguments), f"{paper}/train.py") as run:
    numbers = torch.Generator().manual_seed(0)
    image = torch.rand(4, 3, 40, 48, generator=numbers)
    maps = {"css": (4, 2, 40, 48), "prcl": (4, 40, 48)}[paper]
    label = torch.randint(0, 7, maps, generator=numbers)
    confidence = torch.rand(maps, generator=numbers)
    mine = slice(run.rank * run.batch_size, (run.rank + 1) * run.batch_size)
    positions = list(range(8, 12))[mine]
    views = train.augment_unlabeled(image[mine], label[mine], confidence[mine], positions, run.config, run)
    torch.save([view.clone() for view in views], f"{out}/{run.processes}_{run.rank}.pt")
"""


@pytest.mark.parametrize(("paper", "mode"), [("prcl", "classmix"), ("prcl", "cutmix"), ("css", "classmix")])
def test_unlabeled_images_are_augmented_and_mixed_alike_on_one_and_two_processes(paper, mode, tiny, tmp_path):
    script = tmp_path / "augment.py"
    script.write_text(AUGMENT)
    extra = ["--optim.batch_size", "4", "--method.mix_mode", mode]
    arguments = [str(script), str(tmp_path), paper, *tiny(f"{paper}/train.py", *extra)]
    subprocess.run([sys.executable, *arguments], check=True)
    process = torchrun(*arguments)
    assert process.returncode == 0, process.stderr
    whole, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    for view, parts in zip(whole, zip(first, second)):
        assert view.equal(torch.cat(parts))


PROTOTYPES = """
import sys, torch
from functools import partial
from common.config import parse
from common.engine.run import Run
from css.losses import Prototypes
from css.train import Config
with Run(parse(Config, "css/train.py", sys.argv[2:]), "css/train.py") as run:
    numbers = torch.Generator().manual_seed(0)
    memory = Prototypes(7, 8)
    for _ in range(3):
        representation = torch.randn(4, 8, 6, 7, generator=numbers)
        label = torch.arange(4).view(4, 1, 1).expand(4, 6, 7)  # no class is seen by both processes
        mine = slice(run.rank * run.batch_size, (run.rank + 1) * run.batch_size)
        memory.update(representation[mine], label[mine], 0.9, partial(run.accelerator.reduce, reduction="sum"))
    torch.save(memory.state_dict(), f"{sys.argv[1]}/{run.processes}_{run.rank}.pt")
"""


def test_prototypes_are_those_of_one_process_and_identical_on_two(tiny, tmp_path):
    script = tmp_path / "prototypes.py"
    script.write_text(PROTOTYPES)
    arguments = [str(script), str(tmp_path), *tiny("css/train.py", "--optim.batch_size", "4")]
    subprocess.run([sys.executable, *arguments], check=True)
    process = torchrun(*arguments)
    assert process.returncode == 0, process.stderr
    whole, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    assert whole["seen"].tolist() == [True] * 4 + [False] * 3
    for name in whole:
        assert first[name].equal(second[name])
        torch.testing.assert_close(whole[name], first[name])


def seen(folder: Path, processes: int) -> tuple[list, list, list[dict]]:
    """Of a recorded run: batches and inputs of each step, parts of the processes joined, and what each held at last."""
    parts = [torch.load(folder / f"{processes}_{rank}.pt") for rank in range(processes)]
    batches = [
        ([name for names, _ in step for name in names], torch.cat([image for _, image in step]))
        for step in zip(*(part["batches"] for part in parts))
    ]
    inputs = [[torch.cat(images) for images in zip(*step)] for step in zip(*(part["inputs"] for part in parts))]
    return batches, inputs, [part["end"] for part in parts]


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_and_two_processes_see_the_same_also_where_one_continues_the_other(script, tiny, tmp_path):
    """Images, augmentation and mixing partners; and what the two processes hold in the end is equal on both."""
    length = [
        "--run.steps",
        "2",
        "--run.save_every",
        "1",
        "--run.keep",
        "9",
        *FOUR,
        *method_flags(SCRIPTS[script].blind),
    ]
    one, two = (tiny(script, *length, "--run.dir", str(tmp_path / name)) for name in ("one", "two"))
    log, recorded = tmp_path / "log", partial(record, tmp_path)
    start(script, one, log, recorded).finish()
    for child in start_two(script, two, log, (recorded, recorded)):
        child.finish()
    batches, inputs, _ = seen(tmp_path, 1)
    shared_batches, shared_inputs, (first, second) = seen(tmp_path, 2)
    assert same(batches, shared_batches)
    assert same(inputs, shared_inputs)
    assert same(first, second)

    # Each continues what the other has begun.
    for folder in (tmp_path / "one", tmp_path / "two"):
        shutil.rmtree(folder / "checkpoints" / "step_00000002")
    one[-1], two[-1] = two[-1], one[-1]
    assert "after step 1 of 2" in start(script, one, log, recorded).finish()
    for child in start_two(script, two, log, (recorded, recorded)):
        child.finish()
    streams, forwards = len(batches) // 2, len(inputs) // 2
    assert same(seen(tmp_path, 1)[0], batches[streams:])
    assert same(seen(tmp_path, 2)[0], batches[streams:])
    assert same(seen(tmp_path, 1)[1], inputs[forwards:])
    assert same(seen(tmp_path, 2)[1], inputs[forwards:])


def test_two_processes_tell_a_mistake_once(tiny):
    process = torchrun("supervised/train.py", *tiny("supervised/train.py", "--optim.batch_size", "5"))
    assert process.returncode
    assert process.stderr.count("error: optim.batch_size 5 cannot be divided over 2 processes") == 1
    assert process.stderr.count("error: ") == 1


def test_a_run_of_two_processes_trains_and_continues_in_one(some_script, tiny, tmp_path):
    length = ["--run.steps", "4", "--optim.batch_size", "4"]
    process = torchrun(some_script, *tiny(some_script, *length))
    assert process.returncode == 0, process.stderr
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    for link in ("last", "best"):
        (run / "checkpoints" / link).unlink(missing_ok=True)
    # As if it had been killed after step 2: one process goes on from there.
    for path in sorted((run / "checkpoints" / "step_00000004").iterdir()):
        path.unlink()
    (run / "checkpoints" / "step_00000004").rmdir()
    again = subprocess.run([sys.executable, some_script, *tiny(some_script, *length)], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "after step 3 of 4" in again.stdout
    continued = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in continued if "loss" in line] == [1, 2, 3, 4]
    before, after = ([line["loss"] for line in part if "loss" in line] for part in (lines, continued))
    assert before[:2] == after[:2]
    # The same images, augmentation and weights; batch norm over two halves of the batch is not that over the whole.
    assert after[3] == pytest.approx(before[3], rel=0.5)
    assert json.loads((run / "checkpoints" / "last" / "meta.json").read_text())["step"] == 4
