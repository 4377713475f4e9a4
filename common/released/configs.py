"""What the translations of released config files share; see `common.config.files.Translation`.

A rule says what a key of theirs became: settings of ours (dotted keys), or a text that tells why there is none.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from common.config.files import Translation, did_you_mean, sections_of
from common.errors import UserError

Settings = dict[str, Any]
Rule = Callable[[str, Settings], Settings | str]

# What a tree of VOC or Cityscapes has at its top, as released or as their archives hold it.
TREES = ("JPEGImages", "leftImg8bit", "leftImg8bit_trainvaltest", "images")


def translate_keys(
    flat: Settings, rules: Mapping[str, Rule], required: Iterable[str], always: Settings, release: str
) -> Translation:
    """What a file says, key by key.

    Args:
        flat: Its values under dotted keys.
        rules: Of every key that the release has.
        required: Keys without which the file says too little.
        always: What the release does for every file, in our words.
        release: Whose it is, for messages: `CAC's release`.

    Raises:
        UserError: a key that the release does not have (with the nearest it has), one that is missing, or what a rule
            raises.
    """
    for key in flat:
        if key not in rules:
            raise UserError(f"unknown key {key}{did_you_mean(key, rules)}")
    if missing := [key for key in required if key not in flat]:
        raise UserError(f"{', '.join(missing)} missing: a config of {release} has them")
    ours, rows = dict(always), []
    for key, value in flat.items():
        became = rules[key](key, flat)
        rows.append((key, json.dumps(value, default=str), _told(became)))
        if isinstance(became, dict):
            ours |= became
    rows.append(("(every config)", "", _told(always)))
    return Translation(sections_of(ours), rows)


def same(table: Mapping[str, str]) -> dict[str, Rule]:
    """Rules of keys that have the same meaning here, with our key of each."""
    return dict.fromkeys(table, lambda key, flat: {table[key]: flat[key]})


def only(table: Mapping[str, tuple[Any, str]], release: str = "the release") -> dict[str, Rule]:
    """Rules of keys that may have a single value, with it and what it means here; words in any case."""

    def rule(key: str, flat: Settings) -> str:
        value, meaning = table[key]
        if str(flat[key]).lower() != str(value).lower():
            raise UserError(f"{key} is {flat[key]!r}; {release} has {value} alone")
        return f"ignored: {meaning}"

    return dict.fromkeys(table, rule)


def ignored(keys: str, why: str) -> dict[str, Rule]:
    """Rules of keys, separated by blanks, without a counterpart."""
    return dict.fromkeys(keys.split(), lambda key, flat: f"ignored: {why}")


def whole(flat: Settings, key: str) -> int:
    """A count in their file.

    Raises:
        UserError: it is none.
    """
    value = flat[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{key} is {value!r}; it must be a whole number above 0")
    return value


def choice(flat: Settings, key: str, known: Mapping[str, Any]) -> Any:
    """What `known` has for a word in their file, in any case.

    Raises:
        UserError: nothing; the words it knows are named.
    """
    words = {name.lower(): value for name, value in known.items()}
    if (word := str(flat[key]).lower()) not in words:
        raise UserError(f"{key} is {flat[key]!r}; the release knows {', '.join(known)}")
    return words[word]


def root_of(given: Any, ours: str) -> str:
    """The folder their file names, or VOC's in it, where a data tree is; else ours: releases name placeholders."""
    folder = Path(str(given))
    places = [folder / "VOCdevkit" / "VOC2012", folder / "VOC2012", folder]
    return next((str(place) for place in places if any((place / top).is_dir() for top in TREES)), ours)


def _told(became: Settings | str) -> str:
    if isinstance(became, str):
        return became
    return "\n".join(f"{key} {json.dumps(value)}" for key, value in became.items())
