"""The large run of mutated configs and files: `make stress` prints how they ended."""

import pytest

from tests.conftest import SCRIPTS
from tests.helpers.fuzz import fuzz_configs, fuzz_data

SEED = 300


@pytest.mark.parametrize("script", SCRIPTS)
def test_configs(script, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # a mutated folder is often a relative one
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # waiting for a network is no hang
    outcomes = fuzz_configs(script, tiny(script), tmp_path, 300, SEED, capsys)
    with capsys.disabled():
        print(f"{script:20} 300 mutated configs: {dict(outcomes)}", flush=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_files(script, tiny, tmp_path, capsys):
    outcomes = fuzz_data(script, tiny(script), tmp_path, 200, SEED, capsys)
    with capsys.disabled():
        print(f"{script:20} 200 mutated image, label and list files: {dict(outcomes)}", flush=True)
