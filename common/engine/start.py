"""Start a run from a script's command line."""

from collections.abc import Sequence

from common.config import parse
from common.config.files import Translate
from common.config.sections import BaseConfig
from common.engine.run import Run


def start(
    config_class: type[BaseConfig],
    script: str,
    argv: Sequence[str] | None = None,
    translate: Translate | None = None,
) -> Run:
    """Read the config and open the run, to be used as `with start(Config, "prcl/train.py", argv) as run`.

    Arguments: see `common.config.parse`. The run's `config` is the one that was read.

    Raises:
        UserError: see `common.config.parse` and `Run`.
    """
    return Run(parse(config_class, script, argv, translate), script)
