"""Two processes see and do what one with the same total batch does."""

import importlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.augment.views import CropTransform
from common.config import parse
from common.datasets.shapes import CLASSES
from common.datasets.voc import VOC
from common.engine.run import Run
from common.loaders import StepBatches, TrainingImages
from css.losses import Prototypes
from css.train import Config
from tests.conftest import SCRIPTS, method_flags, module_of
from tests.helpers.hooks import record
from tests.helpers.kill_runs import metrics, same
from tests.helpers.subprocess_runs import call_in_two, start, start_two

SCRIPT = "supervised/train.py"
STEPS = 3
FOUR = ["--optim.batch_size", "4"]


def on_one_and_two_processes(function: Callable[[], None], folder: Path) -> tuple[Any, Any, Any]:
    """Results that `function` saves to `folder`/<processes>_<rank>.pt: by one process, and by the two of one run."""
    function()
    for child in call_in_two([function, function], folder / "log"):
        child.finish()
    return tuple(torch.load(folder / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))


def batches(root: Path, processes: int, rank: int, step: int = 0, accumulation: int = 1, total: int = 4):
    """The batches one of `processes` gets, as a run with a total batch of `total` would make them."""
    config = SimpleNamespace(
        optim=SimpleNamespace(accumulation=accumulation),
        data=SimpleNamespace(workers=0, class_balanced=False),
        run=SimpleNamespace(seed=5),
    )
    run = SimpleNamespace(
        config=config,
        processes=processes,
        rank=rank,
        process_batch_size=total // processes // accumulation,
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


def save_views(folder: Path, paper: str, arguments: list[str]) -> None:
    """Save this process's part of four augmented and mixed images."""
    train = importlib.import_module(f"{paper}.train")
    with Run(parse(train.Config, f"{paper}/train.py", arguments), f"{paper}/train.py") as run:
        numbers = torch.Generator().manual_seed(0)
        image = torch.rand(4, 3, 40, 48, generator=numbers)
        maps = {"css": (4, 2, 40, 48), "prcl": (4, 40, 48)}[paper]
        label = torch.randint(0, 7, maps, generator=numbers)
        confidence = torch.rand(maps, generator=numbers)
        own = slice(run.rank * run.process_batch_size, (run.rank + 1) * run.process_batch_size)
        positions = list(range(8, 12))[own]
        views = train.augment_unlabeled(image[own], label[own], confidence[own], positions, run.config, run)
        torch.save([view.clone() for view in views], folder / f"{run.processes}_{run.rank}.pt")


@pytest.mark.parametrize(("paper", "mode"), [("prcl", "classmix"), ("prcl", "cutmix"), ("css", "classmix")])
def test_unlabeled_images_are_augmented_and_mixed_alike_on_one_and_two_processes(paper, mode, tiny, tmp_path):
    arguments = tiny(f"{paper}/train.py", "--optim.batch_size", "4", "--method.mix_mode", mode)
    whole, first, second = on_one_and_two_processes(partial(save_views, tmp_path, paper, arguments), tmp_path)
    for view, parts in zip(whole, zip(first, second)):
        assert view.equal(torch.cat(parts))


def save_prototypes(folder: Path, arguments: list[str]) -> None:
    """Save the prototypes after three updates with this process's part of four images."""
    with Run(parse(Config, "css/train.py", arguments), "css/train.py") as run:
        numbers = torch.Generator().manual_seed(0)
        memory = Prototypes(7, 8)
        for _ in range(3):
            representation = torch.randn(4, 8, 6, 7, generator=numbers)
            label = torch.arange(4).view(4, 1, 1).expand(4, 6, 7)  # no class is seen by both processes
            own = slice(run.rank * run.process_batch_size, (run.rank + 1) * run.process_batch_size)
            memory.update(representation[own], label[own], 0.9, partial(run.accelerator.reduce, reduction="sum"))
        torch.save(memory.state_dict(), folder / f"{run.processes}_{run.rank}.pt")


def test_prototypes_are_those_of_one_process_and_identical_on_two(tiny, tmp_path):
    arguments = tiny("css/train.py", "--optim.batch_size", "4")
    whole, first, second = on_one_and_two_processes(partial(save_prototypes, tmp_path, arguments), tmp_path)
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


def run_on_one_and_two(script: str, tiny, folder: Path, swap: bool = False) -> tuple[str, tuple, tuple]:
    """Train two steps on one process and on two, and return the output of the first run and what `seen` finds.

    Args:
        swap: Each continues the run folder of the other.
    """
    length = ["--run.steps", "2", "--run.save_every", "1", "--run.keep", "9", "--run.eval_every", "2"]
    own = method_flags(SCRIPTS[script].blind)
    one, two = (tiny(script, *length, *FOUR, *own, "--run.dir", str(folder / name)) for name in ("one", "two"))
    if swap:
        one[-1], two[-1] = two[-1], one[-1]
    log, recorded = folder / "log", partial(record, folder)
    children = [start(script, one, log, recorded), *start_two(script, two, folder / "log_two", (recorded, recorded))]
    output, *_ = [child.finish() for child in children]
    return output, seen(folder, 1), seen(folder, 2)


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_and_two_processes_see_the_same(script, tiny, tmp_path):
    """Images, augmentation and mixing partners; and what the two processes hold in the end is equal on both."""
    _, (batches, inputs, _), (shared_batches, shared_inputs, (first, second)) = run_on_one_and_two(
        script, tiny, tmp_path
    )
    assert same(batches, shared_batches)
    assert same(inputs, shared_inputs)
    assert same(first, second)


def test_runs_of_one_and_two_processes_continue_each_other(some_script, tiny, tmp_path):
    _, (batches, inputs, _), _ = run_on_one_and_two(some_script, tiny, tmp_path)
    for folder in (tmp_path / "one", tmp_path / "two"):
        shutil.rmtree(folder / "checkpoints" / "step_00000002")
    output, one, two = run_on_one_and_two(some_script, tiny, tmp_path, swap=True)
    assert "after step 1 of 2" in output
    streams, forwards = len(batches) // 2, len(inputs) // 2
    for continued_batches, continued_inputs, _ in (one, two):
        assert same(continued_batches, batches[streams:])
        assert same(continued_inputs, inputs[forwards:])


def test_two_processes_report_a_mistake_once(tiny, tmp_path):
    first, second = start_two(SCRIPT, tiny(SCRIPT, "--optim.batch_size", "5"), tmp_path / "log")
    assert first.status() == 2
    second.process.terminate()  # as a launcher does when one has ended
    second.process.join()
    output = first.log.read_text() + second.log.read_text()
    assert output.count("error: optim.batch_size 5 cannot be divided over 2 processes") == 1
    assert output.count("error: ") == 1


def test_a_run_of_two_processes_trains_and_continues_in_one(some_script, tiny, tmp_path, capsys):
    arguments = tiny(some_script, "--run.steps", "4", *FOUR)
    for child in start_two(some_script, arguments, tmp_path / "log"):
        child.finish()
    run = tmp_path / "run"
    before = [line for line in metrics(run) if "loss" in line]
    assert [line["step"] for line in before] == [1, 2, 3, 4]
    for link in ("last", "best"):
        (run / "checkpoints" / link).unlink(missing_ok=True)
    # As if it had been killed after step 3, which an evaluation saved: one process goes on from there.
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    importlib.import_module(module_of(some_script)).main(arguments)
    assert "after step 3 of 4" in capsys.readouterr().out
    after = [line for line in metrics(run) if "loss" in line]
    assert [line["step"] for line in after] == [1, 2, 3, 4]
    assert [line["loss"] for line in before[:2]] == [line["loss"] for line in after[:2]]
    # The same images, augmentation and weights; batch norm over two halves of the batch is not that over the whole.
    assert after[3]["loss"] == pytest.approx(before[3]["loss"], rel=0.5)
    assert json.loads((run / "checkpoints" / "last" / "meta.json").read_text())["step"] == 4
