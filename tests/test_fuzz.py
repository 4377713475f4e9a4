"""A share of the mutated configs and files of `make stress`: each ends well or in a told error."""

import pytest

from tests.conftest import SCRIPTS
from tests.fuzz import fuzz_configs, fuzz_data

every_script = pytest.mark.parametrize("script", SCRIPTS)


@every_script
def test_mutated_configs_end_well_or_in_a_told_error(script, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # a mutated folder is often a relative one
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # waiting for a network is no hang
    fuzz_configs(script, tiny(script), tmp_path, 6, seed=1, capsys=capsys)


@every_script
def test_mutated_files_end_well_or_in_a_told_error(script, tiny, tmp_path, capsys):
    fuzz_data(script, tiny(script), tmp_path, 6, seed=1, capsys=capsys)
