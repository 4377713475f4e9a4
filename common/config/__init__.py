"""Config sections shared by all papers, and reading configs from files and command lines."""

from common.config.files import Translation, flatten
from common.config.parsing import config_of, load_config, parse, to_dict
from common.config.sections import BaseConfig, DataConfig, ModelConfig, OptimConfig, RunConfig

__all__ = [
    "BaseConfig",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "Translation",
    "config_of",
    "flatten",
    "load_config",
    "parse",
    "to_dict",
]
