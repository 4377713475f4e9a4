"""The class list of a dataset of one's own: names, and colors or values to ignore."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common import IGNORE
from common.datasets.label_colors import Color
from common.datasets.reader import UNKNOWN, read_lines
from common.errors import UserError

IGNORED = "ignore"


@dataclass(frozen=True)
class ClassList:
    """Content of a class list.

    Attributes:
        names: Names of the classes, in the order of their ids.
        colors: Colors of the classes in label pictures; empty if labels contain ids.
        ignored_ids, ignored_colors: Label values and colors that become 255; the value 255 is always ignored.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    ignored_ids: tuple[int, ...]
    ignored_colors: tuple[Color, ...]


def read_classes(path: Path) -> ClassList:
    """Read a class list. Raises UserError if it is missing or wrong."""
    if not path.is_file():
        raise UserError(f"no class list {path}: write one name per line, in the order of the ids, and set data.classes")
    lines = [_class_line(line) for line in read_lines(path)]
    classes = [(name, values) for name, values in lines if name != IGNORED or not values]
    ignored = [values for name, values in lines if name == IGNORED and values]
    found = ClassList(
        tuple(name for name, _ in classes),
        tuple(values for _, values in classes if values),
        tuple(values[0] for values in ignored if len(values) == 1),
        tuple(values for values in ignored if len(values) == 3),
    )
    if wrong := _wrong_classes(found, [name for name, values in classes if not values]):
        raise UserError(f"class list {path}: {wrong}")
    return found


def _class_line(line: str) -> tuple[str, tuple[int, ...]]:
    """Name in a line, and the numbers after it: a color, an ignored value, or nothing."""
    words = line.replace(",", " ").split()
    count = 1 if words[0] == IGNORED and len(words) == 2 else 3
    values = words[-count:]
    if len(words) > count and all(value.isdecimal() for value in values):
        return " ".join(words[:-count]), tuple(map(int, values))
    return line, ()


def _wrong_classes(found: ClassList, colorless: list[str]) -> str | None:
    """Description of the first problem of a class list; None if there is none."""
    count = len(found.names)
    if not 1 < count <= UNKNOWN:
        return f"it has {count} names; it must have 2 to {UNKNOWN}"
    if IGNORED in found.names:
        return f"the line {IGNORED!r} has no value: write `{IGNORED} 250` or `{IGNORED} 0 0 0`"
    if found.colors and colorless:
        return f"{colorless[0]} has no color, but other classes have one"
    if any(max(color) > IGNORE for color in (*found.colors, *found.ignored_colors, found.ignored_ids or (0,))):
        return f"a value is above {IGNORE}"
    for values in (found.names, (*found.colors, *found.ignored_colors)):
        value, times = Counter(values).most_common(1)[0] if values else (None, 1)
        if times > 1:
            return f"{value} occurs {times} times"
    if taken := [value for value in found.ignored_ids if value < count]:
        return f"{taken[0]} is to be ignored, but is the id of {found.names[taken[0]]}: ids are 0 to {count - 1}"
    return None
