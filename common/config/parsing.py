"""Read a script's config from JSON files and the command line.

A script's `Config` is a dataclass that adds the paper's section `method` to the shared sections of `BaseConfig`.
`parse` reads it from a JSON file, and `--section.key value` replaces single values:

    accelerate launch prcl/train.py --config prcl/configs/voc.json --optim.lr 1e-3 --run.steps 600
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from common.config.files import Translate, Translation, did_you_mean, flatten, read_config
from common.errors import UserError

T = TypeVar("T")

# Groups of `data` keys that state a split; a config has one of the groups.
SPLIT_SOURCES = (("split",), ("labeled_list", "unlabeled_list"), ("split_id", "labeled_samples", "split_seed"))
PLAIN_TYPES = {
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a string",
    "<class 'list'>": "a list",
    "<class 'tuple'>": "a list",
}


def parse(
    config_class: type[T], script: str, argv: Sequence[str] | None = None, translate: Translate | None = None
) -> T:
    """Read and check the config of a run.

    Args:
        config_class: Config dataclass of the script.
        script: Name of the script, e.g. `prcl/train.py`. Runs of a paper's train.py go to runs/<paper>/<name of the
            config file> by default, and those of its other scripts to runs/<paper>/<script>/<name of the config file>.
        argv: Arguments; by default those of the process.
        translate: Translation of the config files that the paper's repository released, if there are any.

    Raises:
        UserError: unreadable file, unknown key (the message suggests the closest one), wrong type, value out of bounds,
            or values that contradict each other.
    """
    config, files = read_arguments(config_class, script, argv, translate)
    if config.run.dir is None:
        config.run.dir = str(_run_folder(script, files))
    _check_values(config)
    return config


def read_arguments(
    config_class: type[T],
    prog: str,
    argv: Sequence[str] | None = None,
    translate: Translate | None = None,
    description: str | None = None,
) -> tuple[T, dict[str, Translation]]:
    """Read `--config FILE`, then the values that `--section.key value` replaces.

    Args:
        config_class, argv, translate: See `parse`. A class without `method` skips that section of the file.
        prog: Name of the program, for `--help`.
        description: Text for `--help`.

    Returns:
        The config, and the content of each file. With several `--config`, later files replace values of earlier ones.

    Raises:
        UserError: see `load_config`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    option = {"action": "append", "default": [], "metavar": "FILE", "help": "JSON file with the config"}
    parser = _parser(config_class, prog=prog, description=description)
    parser.add_argument("--config", **option)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", **option)
    try:
        paths = finder.parse_known_args(argv)[0].config
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    files = {path: read_config(path, translate) for path in paths}
    values: dict[str, Any] = {}
    for path, file in files.items():
        values |= _known_values(config_class, file.values, path)
    config = _fill(parser, config_class, values, argv)
    _resolve_conflicts(config, {argument.split("=")[0] for argument in argv})
    if config.data.split_id is not None and config.data.split_seed is None:
        config.data.split_seed = config.run.seed
    return config, files


def load_config(config_class: type[T], path: str | Path, translate: Translate | None = None) -> T:
    """Read a config from a file alone, e.g. a run's config.json.

    Args:
        config_class: Config dataclass; `BaseConfig` reads the shared sections of any paper's config.
        path: The JSON file.
        translate: See `parse`.

    Raises:
        UserError: unreadable file, unknown key (the message suggests the closest one), wrong type or value out of
            bounds.
    """
    return config_of(config_class, read_config(path, translate).values, path)


def config_of(config_class: type[T], values: dict[str, Any], path: str | Path) -> T:
    """Build a config from nested `values`; `path` is where they are from, for messages. Errors as `load_config`."""
    flat = _known_values(config_class, values, path)
    try:
        return _fill(_parser(config_class), config_class, flat, [])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config to nested plain values (tuples become lists), as config.json stores it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _parser(config_class: type, **options: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, parser_mode="json", **options)
    parser.add_class_arguments(config_class)
    return parser


def _fill(parser: ArgumentParser, config_class: type[T], values: dict[str, Any], argv: list[str]) -> T:
    """Build a config from values under dotted keys and the arguments that replace them."""
    given = Namespace()
    for key, value in values.items():
        given[key] = value
    try:
        sections = parser.instantiate(parser.parse_args(argv, namespace=given))
    except ArgumentError as error:
        raise UserError(_readable_error(str(error), parser)) from None
    config = config_class(**{field.name: sections[field.name] for field in dataclasses.fields(config_class)})
    _numbers_to_builtin(config)
    return config


def _resolve_conflicts(config: Any, given: set[str]) -> None:
    """Drop the length or split of a file if the command line gives another kind of length or split."""
    length = given & {"--run.steps", "--run.epochs"}
    if length == {"--run.steps"}:
        config.run.epochs = None
    elif length == {"--run.epochs"}:
        config.run.steps = None
    for source in SPLIT_SOURCES:
        if f"--data.{source[0]}" in given:
            for other in SPLIT_SOURCES:
                if other is not source and not given & {f"--data.{key}" for key in other}:
                    for key in other:
                        setattr(config.data, key, None)


def _numbers_to_builtin(section: Any) -> None:
    """Convert the number types of `common.config.types` to int and float, which can be stored without pickle."""
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
    """Reduce an error of the parser to one line with the key, the value and what is accepted."""
    if message.startswith("unrecognized arguments:"):
        argument = message.split(":", 1)[1].split()[0].split("=")[0]
        known = ["--" + action.dest for action in parser._actions]
        return f"unknown argument {argument}{did_you_mean(argument, known)}"
    if message.startswith("the following arguments are required:"):
        return f"{message.split(': ')[1]} missing: give a --config FILE with them, or set them as --section.key value"
    key = re.match(r'Parser key "([^"]+)"', message)
    accepted = re.findall(r"(?:Not of type|Expected an?) (.+?)(?=: |\. Got value|$)", message, re.MULTILINE)
    if not key or not accepted:
        return " ".join(message.split())
    value = re.search(r": (\S+) (?:does not conform|not an? )|G(?:iven|ot) value: (.*)|: ('[^']*')$", message)
    given = f" is {value[value.lastindex]}; it" if value else ""
    must_be = dict.fromkeys(_in_words(name) for name in accepted if name != "<class 'NoneType'>")
    return f"{key[1]}{given} must be {' or '.join(must_be)}"


def _in_words(name: str) -> str:
    """Describe a type as the parser names it."""
    if name in PLAIN_TYPES:
        return PLAIN_TYPES[name]
    if elements := re.fullmatch(r"tuple with (\d+) elements", name):
        return f"a list of {elements[1]} values"
    if choices := re.fullmatch(r"typing\.Literal\[(.*)\]", name):
        return f"one of {choices[1].replace(chr(39), '')}"
    return f"a {name}"


def _run_folder(script: str, files: dict[str, Translation]) -> Path:
    paper, name = script.removesuffix(".py").split("/")
    last = list(files)[-1] if files else "default"
    runs = files[last].runs if files else None
    folder = Path(runs or Path("runs", paper))
    return (folder if name == "train" else folder / name) / Path(last).stem


def _known_values(config_class: type, values: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Flatten the sections of a file that `config_class` has to dotted keys.

    Raises:
        UserError: see `_check_keys`.
    """
    names = {field.name for field in dataclasses.fields(config_class)}
    if "method" not in names:
        values = {key: value for key, value in values.items() if key != "method"}
    if not values.keys() <= names and not {"data", "run"} & values.keys():
        raise UserError(
            f"{path} is not a config of this project; translate it first: python <paper>/released.py {path}"
        )
    _check_keys(config_class, values, path)
    return flatten(values)


def _check_keys(config_class: type, values: dict[str, Any], path: str | Path, prefix: str = "") -> None:
    """Check that every key of a file exists and that sections, and only they, hold keys.

    Raises:
        UserError: naming the key, and the closest existing one.
    """
    fields = {field.name: field.type for field in dataclasses.fields(config_class)}
    for key, value in values.items():
        if key not in fields:
            close = did_you_mean(prefix + key, [prefix + name for name in fields])
            raise UserError(f"unknown key {prefix}{key} in {path}{close}")
        is_section = dataclasses.is_dataclass(fields[key])
        if is_section != isinstance(value, dict):
            must = "must be a section (a JSON object)" if is_section else "must be a value, not a section"
            raise UserError(f"{prefix}{key} in {path} {must}")
        if is_section:
            _check_keys(fields[key], value, path, f"{prefix}{key}.")


def _leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, value and type of everything in a config."""
    for key, kind in get_type_hints(type(section)).items():
        value = getattr(section, key)
        if dataclasses.is_dataclass(kind):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value, kind


def _check_values(config: Any) -> None:
    for key, value, kind in _leaves(config):
        if value is None and type(None) not in get_args(kind):
            raise UserError(f"{key} is null; leave it out for its default")
        if key.endswith(("_range", "_bound")) and value is not None and value[0] > value[1]:
            raise UserError(f"{key} is [{value[0]}, {value[1]}]; give the smaller one first")
    if config.model.bgr and config.model.input_mean is None:
        raise UserError("model.bgr is set without model.input_mean; set model.input_mean too")
    if config.run.steps is None and config.run.epochs is None:
        raise UserError("the length of the run is missing: set run.steps or run.epochs")
    if config.run.steps is not None and config.run.epochs is not None:
        raise UserError("both run.steps and run.epochs are set; give exactly one of them")
