"""Files of a pattern such as `images/{name}_image.png`: the id of a file is the text at `{name}`."""

import re
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError

NAME_FIELD, SUBSET_FIELD = "{name}", "{subset}"
ANY_SUFFIX = ".*"


def find_files(root: Path, pattern: str, suffixes: Sequence[str], key: str) -> dict[str, Path]:
    """Files by id.

    Args:
        root: Folder that a relative pattern starts from.
        pattern: A folder, whose files have their stem as id; or a path with `{name}`, which stands for the id and may
            contain subfolders. `.*` at its end stands for any of `suffixes`.
        suffixes: File endings that can be read.
        key: Config key of the pattern, for messages.

    Raises:
        UserError: a suffix that is not supported, or two files with the same id.
    """
    if NAME_FIELD not in pattern:
        paths = sorted(path for path in Path(root, pattern).glob("*") if path.suffix.lower() in suffixes)
        return _by_id([(path.stem, path) for path in paths], pattern, key)
    suffix = Path(pattern).suffix
    if suffix != ANY_SUFFIX and suffix.lower() not in suffixes:
        raise UserError(f"{key} {pattern} must end in {', '.join(suffixes)}, or in {ANY_SUFFIX} for any of them")
    folder, rest = _fixed_folder(pattern)
    expression = re.compile(_expression(rest, suffixes))
    found = []
    for path in sorted(Path(root, folder).rglob("*")):
        match = expression.fullmatch(path.relative_to(Path(root, folder)).as_posix())
        if match and not match["name"].startswith(".") and "/." not in match["name"]:
            found.append((match["name"], path))
    return _by_id(found, pattern, key)


def _fixed_folder(pattern: str) -> tuple[str, str]:
    """The folders before `{name}`, and the rest of the pattern."""
    start = pattern.index(NAME_FIELD)
    end = pattern.rfind("/", 0, start) + 1
    return pattern[:end], pattern[end:]


def _expression(pattern: str, suffixes: Sequence[str]) -> str:
    """Regular expression of a pattern; a repeated `{name}` must have the same text."""
    ending = ""
    if pattern.endswith(ANY_SUFFIX):
        pattern = pattern.removesuffix(ANY_SUFFIX)
        ending = "(?i:" + "|".join(map(re.escape, suffixes)) + ")"
    first, *others = map(re.escape, pattern.split(NAME_FIELD))
    return first + "(?P<name>.+)" + "(?P=name)".join(others) + ending


def _by_id(found: list[tuple[str, Path]], pattern: str, key: str) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for name, path in found:
        if name in files:
            wide = pattern if NAME_FIELD in pattern else f"{pattern}/{NAME_FIELD}{ANY_SUFFIX}"
            narrow = wide.removesuffix(ANY_SUFFIX) + (path.suffix if wide.endswith(ANY_SUFFIX) else "")
            raise UserError(
                f"{files[name]} and {path} have the same id {name}: rename one, or set {key} to a pattern that fits"
                f" one of them, e.g. {narrow}"
            )
        files[name] = path
    return files
