"""Tests that need a GPU: skipped without one, unless `--gpu-tests-anywhere` is given."""

import pytest
import torch


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "gpus(count): needs so many GPUs, one by default")


def pytest_collection_modifyitems(config, items) -> None:
    for item in items:
        if "tests/gpu" not in item.path.as_posix() or config.getoption("--gpu-tests-anywhere"):
            continue
        marker = item.get_closest_marker("gpus")
        needed = marker.args[0] if marker else 1
        if torch.cuda.device_count() < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU{'s' if needed > 1 else ''}"))


@pytest.fixture
def device() -> torch.device:
    """The GPU; the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
