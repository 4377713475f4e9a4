"""Config sections shared by all papers, and reading them from files and command lines."""

from common.config.files import Translation, flatten
from common.config.parsing import config_of, load_config, parse, to_dict
from common.config.sections import (
    DataConfig,
    ModelConfig,
    NonPositiveFloat,
    OptimConfig,
    RunConfig,
    SharedConfig,
)

__all__ = [
    "DataConfig",
    "ModelConfig",
    "NonPositiveFloat",
    "OptimConfig",
    "RunConfig",
    "SharedConfig",
    "Translation",
    "config_of",
    "flatten",
    "load_config",
    "parse",
    "to_dict",
]
