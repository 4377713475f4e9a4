"""Config files: read JSON, and the translation of config files that a paper's repository released."""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.errors import UserError


@dataclass(frozen=True)
class Translation:
    """A released config file, translated to this project's config.

    Attributes:
        values: The sections of the config, as a JSON file of this project has them.
        rows: Each released key, its value, and what became of it, for the printed table.
        runs: Folder for runs, if the released file names one; by default runs/<paper>.
    """

    values: dict[str, Any]
    rows: list[tuple[str, str, str]]
    runs: str | None = None


Translate = Callable[[str], Translation | None]
"""Translate the text of a config file; None if it is not a released one. Raises UserError for unknown content."""


def read_config(path: str | Path, translate: Translate | None = None) -> Translation:
    """Read a config file; a released one is translated, and the translation is printed.

    Raises:
        UserError: unreadable file, not JSON, or content that the translation does not support.
    """
    text = read_text(path)
    translation = translate_text(text, path, translate) if translate else None
    if translation is None:
        return Translation(_parse_json(text, path), [])
    show_translation(translation, path)
    return translation


def translate_text(text: str, path: str | Path, translate: Translate) -> Translation | None:
    """Translate the text of `path`; errors name the file."""
    try:
        return translate(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def show_translation(translation: Translation, path: str | Path, console: Console | None = None) -> None:
    """Print what became of every key of a released file, on the main process only."""
    if int(os.environ.get("RANK", 0)) > 0:
        return
    table = Table(title=f"{path}, translated to this project's config", title_justify="left")
    for column in ("released key", "value", "this project"):
        table.add_column(column, overflow="fold")
    for row in translation.rows:
        table.add_row(*map(escape, row))
    (console or Console()).print(table)


def read_commented_json(text: str) -> Any:
    """Parse JSON with comments (`#` or `//` to the end of a line) and trailing commas.

    Raises:
        ValueError: not JSON.
    """
    string = r'"(?:\\.|[^"\\])*"'
    text = re.sub(rf"({string})|(?:#|//)[^\n]*", lambda found: found[1] or "", text)
    return json.loads(re.sub(rf"({string})|,(?=\s*[}}\]])", lambda found: found[1] or "", text))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested sections into one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def sections_of(flat: dict[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into nested sections, the inverse of `flatten`."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, name = key.split(".")
        section = nested
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = value
    return nested


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """End of a message about an unknown key: the most similar known key, if any is similar."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def read_text(path: str | Path) -> str:
    """Read a config file as text.

    Raises:
        UserError: unreadable, or not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # with or without the byte order mark of Windows editors
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"config {path} is not UTF-8 text; save it as UTF-8") from None


def _parse_json(text: str, path: str | Path) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(
            f"config {path} is not JSON: {error}.\n"
            f"If a paper's repository released it, translate it first: python <paper>/released.py {path}"
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"config {path} must be a JSON object with the sections data, model, optim, run and method")
    return values
