"""One case per golden: `tests/parity/goldens/<paper>/<file>`, or the same below the folder given as `--goldens`."""

from pathlib import Path

import pytest

pytest.register_assert_rewrite("checks", "augmentation", "networks")

OWN = Path(__file__).parent / "goldens"


def pytest_generate_tests(metafunc) -> None:
    """Run a test in `test_<paper>.py` that has the argument `golden` once per file of the paper."""
    if "golden" not in metafunc.fixturenames:
        return
    given = metafunc.config.getoption("goldens")
    if given is not None and not Path(given).is_dir():
        raise pytest.UsageError(f"--goldens {given} is not a folder")
    paper = metafunc.module.__name__.removeprefix("test_")
    files = [path for path in (Path(given or OWN) / paper).glob("*") if path.name.endswith((".npz", ".json.gz"))]
    if given is None and not files:
        raise pytest.UsageError(f"no goldens in {OWN / paper}")
    metafunc.parametrize("golden", sorted(files), ids=lambda path: f"{paper}/{path.name}")
