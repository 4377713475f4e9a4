"""Every parameter learns: three steps of each training script from scratch, with every loss active."""

import json
from collections import defaultdict
from typing import Any

import pytest
import torch

from common.engine.run import Run
from tests.conftest import FEW, ROOT, SCRIPTS
from tests.helpers.commands import train

HEADS = {
    "v3plus": {"model.output_stride": 16},
    "v3plus_cac": {"model.output_stride": 16},
    "v3plus_cps": {"model.output_stride": 16, "model.stem": "deep"},
    "v3plus_memory_bank": {"model.output_stride": 16},
    "v2": {"model.output_stride": 8},
    "v2_coco": {"model.output_stride": 8},
}
# The bank takes correct pixels only: a large step makes student and teacher predict the most frequent class.
BANK = {
    "method.bank_start": 0,
    "method.contrast_start": 0,
    "method.bank_threshold": 0,
    "method.alpha": 0,
    "optim.lr": 0.05,
}
# Settings with which every loss is active from the first step.
ACTIVE = {
    "cac_cps/train.py": {"method.cac.epoch_start_unsup": 0, "method.cac.pos_thresh_value": 0, "optim.lr": 0.05},
    "css/train.py": {"method.weak_threshold": 0, "method.strong_threshold": 1},
    "memory_bank/train.py": BANK,
    "memory_bank/train_less_memory.py": BANK,
    "memory_bank/train_domain_adaptation.py": BANK | {"method.adaptation.last_steps": 3},
    "prcl/train.py": {"method.weak_threshold": 0, "method.strong_threshold": 1},
}
# Parameters without a gradient, by script, and why. None of them is in a backbone or a decoder.
BEFORE_NORM = {"heads.selectors.first_bias": "a bias right before a batch norm, which subtracts it again; as released"}
EXCEPTIONS = {
    "memory_bank/train.py": BEFORE_NORM,
    "memory_bank/train_less_memory.py": BEFORE_NORM,
    "memory_bank/train_domain_adaptation.py": BEFORE_NORM,
}


@pytest.fixture
def learned(monkeypatch) -> dict[str, bool]:
    """For every trained parameter, True once it had a non-zero gradient."""
    found: dict[str, bool] = defaultdict(bool)
    step_optimizer, prepare = Run.step_optimizer, Run.prepare
    networks: list[Any] = []

    def watched_prepare(run, network, optimizer):
        networks.append(network)
        return prepare(run, network, optimizer)

    def watched_step(run, optimizer, losses):
        for name, parameter in networks[-1].named_parameters():
            if parameter.requires_grad:
                found[name] |= parameter.grad is not None and bool(parameter.grad.any())
        return step_optimizer(run, optimizer, losses)

    monkeypatch.setattr(Run, "prepare", watched_prepare)
    monkeypatch.setattr(Run, "step_optimizer", watched_step)
    return found


def own_head(script: str) -> str:
    """Head of the paper's demo config."""
    config = ROOT / script.split("/")[0] / "configs" / "demo.json"
    return json.loads(config.read_text())["model"].get("head", "v3plus")


def pytest_generate_tests(metafunc) -> None:
    """Every script with its own head and a few with every head; with --every-script, every pair."""
    every = metafunc.config.getoption("--every-script")
    pairs = [
        (script, head) for script in SCRIPTS for head in HEADS if every or script in FEW or head == own_head(script)
    ]
    metafunc.parametrize(("script", "head"), pairs)


def test_every_parameter_learns_from_scratch(script, head, tiny, learned):
    settings = {"run.steps": 3, "run.eval_every": 3, "run.save_every": 3, "model.pretrained": False, "model.head": head}
    settings |= HEADS[head] | ACTIVE.get(script, {})
    torch.manual_seed(0)
    train(script, tiny(script, *(text for key, value in settings.items() for text in (f"--{key}", str(value)))))
    dead = {name for name, is_learned in learned.items() if not is_learned}
    assert dead == EXCEPTIONS.get(script, {}).keys()
    assert any("encoder" in name for name in learned)
