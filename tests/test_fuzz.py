"""A share of the mutated configs and files of `make stress`: each run succeeds or reports an error."""

from tests.helpers.fuzz import fuzz_configs, fuzz_data


def test_mutated_configs_succeed_or_report_an_error(some_script, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # a mutated folder is often a relative one
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # waiting for a network is not a hang
    fuzz_configs(some_script, tiny(some_script), tmp_path, 6, seed=1, capsys=capsys)


def test_mutated_files_succeed_or_report_an_error(some_script, tiny, tmp_path, capsys):
    fuzz_data(some_script, tiny(some_script), tmp_path, 6, seed=1, capsys=capsys)
