"""Options of the test run, and a small built-in dataset with the arguments that train on it in seconds."""

import os
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from common.datasets.shapes import make_shapes

PAPERS = ("prcl", "supervised")


def pytest_addoption(parser) -> None:
    parser.addoption("--realdata", default=None, help="Folder with real data; tests on it are skipped without.")
    parser.addoption("--goldens", default=None, help="Folder <paper>/<file>.npz to compare with in place of our own.")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its state for the process: every test starts from none."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory) -> Path:
    """Built-in data, few and small."""
    root = tmp_path_factory.mktemp("shapes") / "shapes"
    make_shapes(root, "voc", train=24, val=7, size=(48, 64))
    return root


@pytest.fixture
def tiny(shapes_root, tmp_path):
    """Arguments of a paper's train.py for a run of seconds: `tiny("prcl", "--run.steps", "4")`."""
    # Two test processes may share the machine; one thread each also makes sums the same everywhere.
    os.environ["OMP_NUM_THREADS"] = "1"

    def arguments(paper: str, *more: str) -> list[str]:
        small = {
            "data.root": shapes_root,
            "data.split": shapes_root / "splits" / "6" / "0",
            "data.crop_size": "[32, 32]",
            "data.workers": 0,
            "model.channels": 8,
            "optim.batch_size": 2,
            "run.dir": tmp_path / "run",
            "run.steps": 6,
            "run.eval_every": 3,
            "run.save_every": 2,
            "run.log_every": 1,
            "run.threads": 1,
        }
        if paper == "prcl":
            small |= {"method.num_queries": 8, "method.num_negatives": 8, "method.embedding_dim": 8}
        flat = [text for key, value in small.items() for text in (f"--{key}", str(value))]
        return ["--config", f"{paper}/configs/demo.json", *flat, *more]

    return arguments
