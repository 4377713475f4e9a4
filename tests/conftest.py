"""Options of the test run, and a small built-in dataset with the arguments that train on it in seconds."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from common.config.sections import DataConfig
from common.datasets import open_reader
from common.datasets.shapes import make_shapes
from common.splits.split import split_of
from tests.helpers.narrow import NARROW

ROOT = Path(__file__).parent.parent
# Test processes share the machine; one thread each also makes sums the same everywhere.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@dataclass(frozen=True)
class Small:
    """How one training script is tested.

    Attributes:
        method: Settings of its `method` section that make a run one of seconds.
        blind: Settings under which the images of a step do not depend on what a network says of them.
    """

    method: dict[str, Any] = field(default_factory=dict)
    blind: dict[str, Any] = field(default_factory=dict)


# Every training script: what is listed here is trained, killed, continued, fed nonsense and run by two processes.
CAC = {"base_size": 48, "cac.selected_num": 32, "cac.epoch_start_unsup": 20}
CONTRAST = {"num_queries": 8, "num_negatives": 8, "embedding_dim": 8}
# Bank and contrastive loss within the first steps; unlabeled images for each of two processes.
BANK = {
    "bank_start": 0,
    "contrast_start": 1,
    "bank_size": 8,
    "embedding_dim": 8,
    "unlabeled_batch_size": 4,
    "bank_threshold": 0.1,
    "refresh_batches": 1,
}
SCRIPTS = {
    # Two of eight steps from labels alone, and a bank that does not take all cells of two processes.
    "cac_cps/train.py": Small(CAC),
    "cac_cps/train_semiseg.py": Small(CAC),
    "cac_cps/train_semiseg_cutmix.py": Small(CAC),
    "cpcl/train.py": Small(),
    "css/train.py": Small(CONTRAST, blind={"mix_mode": "cutmix"}),
    "memory_bank/train.py": Small(BANK, blind={"refresh_batches": 0}),
    "memory_bank/train_domain_adaptation.py": Small(
        BANK | {"adaptation.source_dataset": "shapes", "adaptation.last_steps": 1}, blind={"refresh_batches": 0}
    ),
    # Each step is two here.
    "memory_bank/train_less_memory.py": Small(BANK, blind={"refresh_batches": 0, "contrast_start": 9}),
    "prcl/train.py": Small(CONTRAST, blind={"mix_mode": "cutmix"}),
    "supervised/train.py": Small(),
    "unimatch/train.py": Small(),
    "unimatch/train_v2.py": Small({"alpha": 0.9}),
    "unimatch/train_fixmatch.py": Small({"alpha": 0.9}),
}


# Where the shared machinery alone is tested, these stand for all: one with a bank, one with nothing of its own.
FEW = ("cac_cps/train.py", "supervised/train.py")


def flags(values: dict[str, Any]) -> list[str]:
    """Settings as arguments of a command line."""
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


def method_flags(values: dict[str, Any]) -> list[str]:
    """Settings of the `method` section as arguments of a command line."""
    return flags({f"method.{key}": value for key, value in values.items()})


def module_of(script: str) -> str:
    """`prcl/train.py` as it is imported."""
    return script.removesuffix(".py").replace("/", ".")


def pytest_addoption(parser) -> None:
    parser.addoption("--realdata", default=None, help="Folder with real data; tests on it are skipped without.")
    parser.addoption(
        "--published", default=None, help="Folder with published lists; tests on them are skipped without."
    )
    parser.addoption("--every-script", action="store_true", help="Test shared machinery with every training script.")
    parser.addoption(
        "--gpu-tests-anywhere", action="store_true", help="Run the tests of tests/gpu also where there is no GPU."
    )
    parser.addoption("--goldens", default=None, help="Folder <paper>/<file>.npz to compare with in place of our own.")


def pytest_generate_tests(metafunc) -> None:
    if "some_script" in metafunc.fixturenames:
        every = metafunc.config.getoption("--every-script")
        metafunc.parametrize("some_script", SCRIPTS if every else FEW)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its state for the process: every test starts from none."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Drawing a curve takes longer than a small run: only tests that ask for `curves` have matplotlib."""
    if "curves" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.fixture
def curves():
    """Curves are drawn."""
    pytest.importorskip("matplotlib")


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory) -> Path:
    """Built-in data, few and small, with a split; beside them, those of the second domain."""
    root = tmp_path_factory.mktemp("shapes") / "shapes"
    make_shapes(root, "voc", train=24, val=7, size=(48, 64))
    make_shapes(root.with_name("shapes_b"), "voc", train=24, val=1, size=(48, 64), domain="b")
    data = DataConfig("shapes", str(root), str(root / "splits" / "6" / "0"))
    split_of(data, open_reader(data))
    return root


@pytest.fixture(scope="session")
def small_run(shapes_root):
    """Arguments of a training script for a run of seconds: `small_run("prcl/train.py", folder, "--run.steps", "4")`."""

    def arguments(script: str, folder: Path, *more: str) -> list[str]:
        small = {
            "data.root": shapes_root,
            "data.split": shapes_root / "splits" / "6" / "0",
            "data.crop_size": "[32, 32]",
            "data.workers": 0,
            "model.backbone": NARROW,
            "model.channels": 8,
            "optim.batch_size": 2,
            "run.dir": folder,
            "run.steps": 6,
            "run.eval_every": 3,
            "run.save_every": 2,
            "run.snapshot_from": "null",
            "run.log_every": 1,
            "run.threads": 1,
        }
        config = ROOT / script.split("/")[0] / "configs" / "demo.json"
        return ["--config", str(config), *flags(small), *method_flags(SCRIPTS[script].method), *more]

    return arguments


@pytest.fixture
def tiny(small_run, tmp_path):
    """Arguments of a run of seconds in `tmp_path`/run: `tiny("prcl/train.py", "--run.steps", "4")`."""
    return lambda script, *more: small_run(script, tmp_path / "run", *more)
