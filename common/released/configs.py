"""Translate config files that papers' repositories released; see `common.config.files.Translation`.

A rule turns a released key into settings of this project (dotted keys), or into the reason why it has none.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from common.config.files import (
    Translate,
    Translation,
    did_you_mean,
    read_text,
    sections_of,
    show_translation,
    translate_text,
)
from common.errors import UserError, report_errors

Settings = dict[str, Any]
Rule = Callable[[str, Settings], Settings | str]

# Top-level folders of a VOC or Cityscapes tree, as released or as unpacked from their archives.
TREES = ("JPEGImages", "leftImg8bit", "leftImg8bit_trainvaltest", "images")


@report_errors
def main_translate(paper: str, translate: Translate, argv: Sequence[str] | None = None) -> None:
    """Command line of every paper's `released.py`: translate one config file and print it, or write it with `--out`.

    The table of what became of each key goes to stderr, so that stdout holds the JSON alone.

    Args:
        paper: Folder of the paper.
        translate: The paper's translation.
        argv: Arguments; by default those of the process.

    Raises:
        UserError: unreadable file, one that is not of the paper's release, or an output that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog=f"{paper}/released.py",
        description="Translate a config file of the paper's own repository to a config of this project.",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help="the released config file")
    parser.add_argument("--out", metavar="OUT.json", type=Path, help="write the config here instead of printing it")
    args = parser.parse_args(argv)
    translation = translate_text(read_text(args.file), args.file, translate)
    if translation is None:
        raise UserError(f"{args.file} is not a config file of the repository that {paper}/ follows; give one of those")
    show_translation(translation, args.file, Console(stderr=True))
    text = json.dumps(translation.values, indent=2)
    if args.out is None:
        print(text)
        return
    try:
        args.out.write_text(text + "\n")
    except OSError as error:
        raise UserError(f"{args.out} cannot be written: {error.strerror}; give another --out") from None
    print(f"written to {args.out}")


def translate_keys(
    flat: Settings, rules: Mapping[str, Rule], required: Iterable[str], always: Settings, release: str
) -> Translation:
    """Translate a file key by key.

    Args:
        flat: Values of the file under dotted keys.
        rules: Rule for each key of the release.
        required: Keys that the file must have.
        always: Settings of this project that hold for every file of the release.
        release: Name of the release, for messages, e.g. `CAC's release`.

    Raises:
        UserError: a key that the release does not have (the message suggests the closest one), a missing key, or what a
            rule raises.
    """
    for key in flat:
        if key not in rules:
            raise UserError(f"unknown key {key}{did_you_mean(key, rules)}")
    if missing := [key for key in required if key not in flat]:
        raise UserError(f"{', '.join(missing)} missing; a config of {release} has them")
    translated, rows = dict(always), []
    for key, value in flat.items():
        outcome = rules[key](key, flat)
        rows.append((key, json.dumps(value, default=str), _describe(outcome)))
        if isinstance(outcome, dict):
            translated |= outcome
    rows.append(("(every config)", "", _describe(always)))
    return Translation(sections_of(translated), rows)


def same(table: Mapping[str, str]) -> dict[str, Rule]:
    """Rules for keys whose values keep their meaning; `table` maps each to this project's key."""
    return dict.fromkeys(table, lambda key, flat: {table[key]: flat[key]})


def only(table: Mapping[str, tuple[Any, str]], release: str = "the release") -> dict[str, Rule]:
    """Rules for keys that have a single valid value, in any case; `table` maps each to it and to its meaning here."""

    def rule(key: str, flat: Settings) -> str:
        value, meaning = table[key]
        if str(flat[key]).lower() != str(value).lower():
            raise UserError(f"{key} is {flat[key]!r}; {release} supports only {value}")
        return f"ignored: {meaning}"

    return dict.fromkeys(table, rule)


def ignored(keys: str, why: str) -> dict[str, Rule]:
    """Rules for keys without a counterpart, given as one string with blanks between them."""
    return dict.fromkeys(keys.split(), lambda key, flat: f"ignored: {why}")


def whole(flat: Settings, key: str) -> int:
    """Read a count of the released file.

    Raises:
        UserError: not a whole number above 0.
    """
    value = flat[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{key} is {value!r}; it must be a whole number above 0")
    return value


def choice(flat: Settings, key: str, known: Mapping[str, Any]) -> Any:
    """Look up a word of the released file, in any case, in `known`.

    Raises:
        UserError: unknown word; the known ones are listed.
    """
    words = {name.lower(): value for name, value in known.items()}
    if (word := str(flat[key]).lower()) not in words:
        raise UserError(f"{key} is {flat[key]!r}; the release supports {', '.join(known)}")
    return words[word]


def root_of(given: Any, default: str) -> str:
    """Find a data tree in the folder that the released file names; `default` if there is none."""
    folder = Path(str(given))
    candidates = [folder / "VOCdevkit" / "VOC2012", folder / "VOC2012", folder]
    return next((str(path) for path in candidates if any((path / top).is_dir() for top in TREES)), default)


def _describe(outcome: Settings | str) -> str:
    if isinstance(outcome, str):
        return outcome
    return "\n".join(f"{key} {json.dumps(value)}" for key, value in outcome.items())
