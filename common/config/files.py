"""Config files as they are read: ours, and those of the papers' releases in our words."""

import difflib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.errors import UserError


@dataclass(frozen=True)
class Translation:
    """What a config file of a paper's release says, in our words.

    A config class whose paper released config files reads them with a static method `from_released(text)`: it gets the
    text of any file after `--config`, tells by its content whether it is one of the release, whatever its format, and
    returns a `Translation`, or None where it is not. It raises UserError for what it does not know.

    Attributes:
        values: The sections of our config, as our JSON files have them.
        rows: Each of their keys, its value, and what became of it, for the table that is printed.
        runs: Folder for runs, where theirs names one; by default runs/<paper>.
    """

    values: dict[str, Any]
    rows: list[tuple[str, str, str]]
    runs: str | None = None


def read_config(config_class: type, path: str | Path) -> Translation:
    """A config file in our words: as it is, or as `config_class` translates it, which is printed.

    Raises:
        UserError: unreadable file, not JSON, or something in it that the translation does not know.
    """
    text = _read_text(path)
    translate = getattr(config_class, "from_released", lambda text: None)
    try:
        translation = translate(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if translation is None:
        return Translation(_as_json(text, path), [])
    show_translation(translation, path)
    return translation


def show_translation(translation: Translation, path: str | Path) -> None:
    """Print what became of every key of a released file, in the first process of a run."""
    if int(os.environ.get("RANK", 0)) > 0:
        return
    table = Table(title=f"{path}, in our words", title_justify="left")
    for column in ("theirs", "value", "here"):
        table.add_column(column, overflow="fold")
    for row in translation.rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def read_commented_json(text: str) -> Any:
    """What JSON with comments (`#` or `//` to the end of a line) and commas after the last item holds.

    Raises:
        ValueError: it is not JSON.
    """
    string = r'"(?:\\.|[^"\\])*"'
    text = re.sub(rf"({string})|(?:#|//)[^\n]*", lambda found: found[1] or "", text)
    return json.loads(re.sub(rf"({string})|,(?=\s*[}}\]])", lambda found: found[1] or "", text))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def sections_of(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested sections: what `flatten` undoes."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, name = key.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    return nested


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown key: the known one that was meant, if any is like it."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # with or without the mark that Windows' editors write
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"config {path} is no text in UTF-8: save it as UTF-8") from None


def _as_json(text: str, path: str | Path) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"config {path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"config {path} must be a JSON object with the sections data, model, optim, method, run")
    return values
