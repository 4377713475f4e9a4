"""The sections every paper's `Config` is made of, and how a config is read.

A script's config is a dataclass with the sections `data`, `model`, `optim`, `method` (the paper's own) and `run`.
`parse` reads it from a JSON file and lets `--dotted.overrides` replace single values:

    accelerate launch prcl/train.py --config prcl/configs/voc.json --optim.lr 1e-3 --run.steps 600
"""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace

from common.config.files import Translation, did_you_mean, flatten, read_config
from common.config.sections import DataConfig
from common.errors import UserError

T = TypeVar("T")

# Keys of `data` of which one excludes the others', with those that go with it.
SPLIT_SOURCES = (("split",), ("labeled_list", "unlabeled_list"), ("split_id", "labeled_samples", "split_seed"))
# What only a slip of the hand goes beyond: crops that a network's last features do not show, and what would end in a
# machine without memory.
LARGEST = 2**31 - 1
LIMITS: dict[str, tuple[float, float]] = {
    "data.crop_size": (16, 2**14),
    "data.scale_range": (2**-10, 2**6),
    "data.split_seed": (0, 2**32 - 1),
    "data.workers": (0, 2**10),
    "method.bank_rows_factor": (2**-10, 2**10),
    "method.bank_size": (1, 2**16),
    "method.base_size": (1, 2**14),
    "method.cac.proj_final_dim": (1, 2**14),
    "method.cac.scale_range": (2**-10, 2**6),
    "method.cac.step_save": (0, 2**10),
    "method.cutmix_boxmask_n_boxes": (1, 2**10),
    "method.embedding_dim": (1, 2**14),
    "method.num_negatives": (1, 2**14),
    "method.num_queries": (1, 2**14),
    "method.scale_range": (2**-10, 2**6),
    "method.scales": (2**-10, 2**6),
    "method.train_scale_array": (2**-10, 2**6),
    "method.unlabeled_batch_size": (1, 2**16),
    "model.channels": (1, 2**14),
    "model.rates": (1, 2**10),
    "optim.batch_size": (1, 2**16),
    "run.seed": (0, 2**32 - 1),
    "run.threads": (1, 2**12),
}


def parse(config_class: type[T], script: str, argv: list[str] | None = None) -> T:
    """Read a script's config from the command line: `--config FILE` and `--section.key value`.

    Args:
        config_class: Dataclass of the script, made of the sections above and its own `method`; see `Translation`.
        script: `prcl/train.py` say. By default runs of a paper's `train.py` go to runs/<paper>/<name of the config
            file>, those of its other scripts to runs/<paper>/<script>/<name of the config file>.
        argv: Arguments; by default those of the process.

    Raises:
        UserError: unknown key (the nearest one is named), wrong type, impossible value, unreadable file.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = ArgumentParser(prog=script, exit_on_error=False, allow_abbrev=False, parser_mode="json")
    parser.add_argument("--config", action=ActionConfigFile, help="JSON file with the config.")
    parser.add_class_arguments(config_class)
    files = {path: read_config(config_class, path) for path in _given_files(argv)}
    for path, read in files.items():
        _check_keys(config_class, read.values, path)
    arguments = _with_contents(argv, {path: json.dumps(read.values) for path, read in files.items()})
    config = _parse(parser, config_class, lambda: parser.parse_args(arguments))
    _apply_cli_overrides(config, {argument.split("=")[0] for argument in argv})
    if config.run.dir is None:
        config.run.dir = str(_run_folder(script, files))
    seed_split(config)
    _check_values(config)
    return config


def seed_split(config: Any) -> None:
    """A random split without a seed of its own gets the run's."""
    if config.data.split_id is not None and config.data.split_seed is None:
        config.data.split_seed = config.run.seed


def load_config(config_class: type[T], path: str | Path, only_known: bool = False) -> T:
    """Read a config from a JSON file alone, a run's `config.json` say.

    Args:
        config_class: Dataclass to fill.
        path: The JSON file.
        only_known: Leave out top-level sections that `config_class` does not have.

    Raises:
        UserError: as `parse`.
    """
    values = read_config(config_class, path).values
    return config_of(config_class, values, path, only_known)


def config_of(config_class: type[T], values: dict[str, Any], path: str | Path, only_known: bool = False) -> T:
    """The config that `values`, read from `path`, hold; arguments and errors as `load_config`."""
    if only_known:
        names = {field.name for field in dataclasses.fields(config_class)}
        values = {key: value for key, value in values.items() if key in names}
    _check_keys(config_class, values, path)
    parser = ArgumentParser(exit_on_error=False, parser_mode="json")
    parser.add_class_arguments(config_class)
    try:
        return _parse(parser, config_class, lambda: parser.parse_object(values))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested plain values (tuples become lists), as `config.json` holds it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _parse(parser: ArgumentParser, config_class: type[T], read: Callable[[], Namespace]) -> T:
    try:
        sections = parser.instantiate(read())
    except ArgumentError as error:
        raise UserError(_readable_error(str(error), parser)) from None
    config = config_class(**{field.name: sections[field.name] for field in dataclasses.fields(config_class)})
    for field in dataclasses.fields(config):
        _numbers_to_builtin(getattr(config, field.name))
    return config


def _apply_cli_overrides(config: Any, given: set[str]) -> None:
    """Of two keys that exclude each other, one on the command line replaces the other of the file."""
    length = given & {"--run.steps", "--run.epochs"}
    if length == {"--run.steps"}:
        config.run.epochs = None
    elif length == {"--run.epochs"}:
        config.run.steps = None
    override_split_source(config.data, given)


def override_split_source(data: DataConfig, given: set[str]) -> None:
    """Of what says which images are labeled, that on the command line replaces that of the file."""
    for kind in SPLIT_SOURCES:
        if f"--data.{kind[0]}" in given:
            for other in SPLIT_SOURCES:
                if other is not kind and not given & {f"--data.{key}" for key in other}:
                    for key in other:
                        setattr(data, key, None)


def _numbers_to_builtin(section: Any) -> None:
    """Turn the parser's own number types (PositiveInt, ...) into int and float, which can be stored without pickle."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            _numbers_to_builtin(value)
        else:
            setattr(section, field.name, _to_builtin(value))


def _to_builtin(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_to_builtin(item) for item in value)
    kind = next((kind for kind in (bool, int, float) if isinstance(value, kind)), None)
    return kind(value) if kind else value


def _readable_error(message: str, parser: ArgumentParser) -> str:
    """One line of what the parser said, with the nearest key where one was misspelled."""
    if message.startswith("unrecognized arguments:"):
        key = message.split(":", 1)[1].split()[0].split("=")[0]
        known = ["--" + action.dest for action in parser._actions]
        return f"unknown argument {key}{did_you_mean(key, known)}"
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Subtypes", "Errors", "Given value type", "Does not"))]
    text = re.sub(r'^Parser key "([^"]+)":;? ?', r"\1: ", "; ".join(told))
    return re.sub(r"<class '([\w.]+)'>", r"\1", text)


def _given_files(argv: list[str]) -> list[str]:
    files = [value for flag, value in pairwise(argv) if flag == "--config"]
    return files + [argument.split("=", 1)[1] for argument in argv if argument.startswith("--config=")]


def _with_contents(argv: list[str], contents: dict[str, str]) -> list[str]:
    """The arguments with the content of config files in place of their paths."""
    flags = ["", *argv]
    replaced = [contents[value] if flag == "--config" else value for flag, value in pairwise(flags)]
    return [
        f"--config={contents[value.removeprefix('--config=')]}" if value.startswith("--config=") else value
        for value in replaced
    ]


def _run_folder(script: str, files: dict[str, Translation]) -> Path:
    """<runs>/<name of the config file>, of other scripts than train.py <runs>/<script>/<name>."""
    paper, name = script.removesuffix(".py").split("/")
    last = list(files)[-1] if files else "default"
    runs = files[last].runs if files else None
    place = Path(runs or Path("runs", paper))
    return (place if name == "train" else place / name) / Path(last).stem


def _check_keys(config_class: type, values: dict[str, Any], path: str | Path, prefix: str = "") -> None:
    """Name a misspelled key of a config file before the parser sees it."""
    fields = {field.name: field.type for field in dataclasses.fields(config_class)}
    for key, value in values.items():
        if key not in fields:
            close = did_you_mean(prefix + key, [prefix + name for name in fields])
            raise UserError(f"unknown key {prefix}{key} in {path}{close}")
        if dataclasses.is_dataclass(fields[key]):
            if not isinstance(value, dict):
                raise UserError(f"{prefix}{key} in {path} must be a section, {{...}}, not {value!r}")
            _check_keys(fields[key], value, path, f"{prefix}{key}.")


def _check_values(config: Any) -> None:
    for part in dataclasses.fields(config):
        section = getattr(config, part.name)
        for key, kind in get_type_hints(type(section)).items():
            if getattr(section, key) is None and type(None) not in get_args(kind):
                raise UserError(f"{part.name}.{key} is null; leave it out for its default")
    for key, value in flatten(to_dict(config)).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{key} is {number}; it must be a finite number")
            if isinstance(number, int) or (isinstance(number, float) and key in LIMITS):
                least, most = LIMITS.get(key, (-LARGEST, LARGEST))
                if not least <= number <= most:
                    raise UserError(f"{key} is {number}; it goes from {least:g} to {most:.10g}")
        if key.endswith(("_range", "_bound")) and value[0] > value[1]:
            raise UserError(f"{key} is [{value[0]}, {value[1]}]; give the smaller one first")
    if config.model.bgr and config.model.input_mean is None:
        raise UserError("model.bgr goes with model.input_mean, the mean of the images in that order's network")
    if config.run.steps is None and config.run.epochs is None:
        raise UserError("the length of the run is missing: set run.steps or run.epochs")
    if config.run.steps is not None and config.run.epochs is not None:
        raise UserError("both run.steps and run.epochs are set; a config states exactly one of them")
