"""Propose a class list from the masks themselves."""

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from common import IGNORE
from common.datasets.class_list import IGNORED
from common.datasets.folder import POLYGON_SUFFIX, find_images, find_masks, is_coco
from common.datasets.label_colors import Color
from common.datasets.mask_files import open_mask
from common.datasets.patterns import NAME_FIELD
from common.datasets.polygons import BACKGROUND, FORMER_NAMES, draw, read_coco, read_labelme
from common.errors import UserError

MOST_COLORS = 64
COVERED = 0.99  # share of the pixels in polygons above which there is no class `background`
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


def propose_classes(root: Path, images: str, labels: str) -> list[str]:
    """Lines of a class list for the masks of a pattern; masks that belong to no image are not read.

    Polygons have names. Colors and numbers do not: their classes are `class_0`, `class_1`, ...; black is `background`.
    Numbers that leave large gaps (0 and 255; 0, 80, 160) are taken for grays, each a color of a class.

    Args:
        root: Folder of the dataset.
        images, labels: Patterns of images and masks; or a COCO file for the masks.

    Raises:
        UserError: a mask cannot be read; more than 64 colors; ids above 253; fewer than two classes.
    """
    if is_coco(root, labels):
        lines = _of_coco(root / labels)
    else:
        masks = find_masks(root, labels)
        if NAME_FIELD in images and NAME_FIELD in labels:
            owners, _ = find_images(root, images, set(masks.values()))
            masks = {name: path for name, path in masks.items() if name in owners}
        paths = sorted(masks.values())
        if not paths:
            raise UserError(f"no masks of the images fit the pattern {root / labels}: set it with --labels")
        polygons = [path for path in paths if path.suffix.lower() == POLYGON_SUFFIX]
        lines = _of_labelme(polygons) if polygons else _of_masks(paths)
    if len([line for line in lines if line.split()[0] != IGNORED]) < 2:
        raise UserError(
            f"the masks {root / labels} show one class ({', '.join(lines) or 'none'}): at least two are needed"
        )
    return lines


def _of_labelme(paths: Sequence[Path]) -> list[str]:
    drawings = [read_labelme(path) for path in paths]
    names = sorted({FORMER_NAMES.get(name, name) for drawing in drawings for name, _ in drawing.shapes})
    return _with_background([name for name in names if name != IGNORED], drawings, paths[0])


def _of_coco(path: Path) -> list[str]:
    coco = read_coco(path)
    return _with_background(list(coco.classes), list(coco.drawings.values()), path)


def _with_background(names: list[str], drawings: Sequence, path: Path) -> list[str]:
    """The names, after `background` if polygons leave pixels out."""
    names = [name for name in names if name != BACKGROUND]
    outside = pixels = 0
    for drawing in drawings:  # one at a time: all of them may not fit into memory
        mask = draw(drawing, names, path, "")
        outside, pixels = outside + int((mask == IGNORE).sum()), pixels + mask.size
    return [BACKGROUND, *names] if outside > (1 - COVERED) * pixels else names


def _of_masks(paths: Sequence[Path]) -> list[str]:
    with ThreadPoolExecutor() as pool:
        contents = list(pool.map(_content, paths))
    numbers, colors = _union(numbers for numbers, _ in contents), _union(colors for _, colors in contents)
    is_color = any(numbers is None for numbers, _ in contents)
    has_arrays = any(colors is None for _, colors in contents)
    if is_color and has_arrays:
        raise UserError(f"some masks beside {paths[0]} are pictures of colors, others hold numbers: convert one kind")
    if has_arrays or (not is_color and _is_dense(numbers)):
        return _numbered(numbers, paths[0])
    if len(colors) > MOST_COLORS:
        worst = max(zip(contents, paths), key=lambda item: len(item[0][1] or ()))[1]
        raise UserError(
            f"mask {worst} and others have {len(colors)} colors, more than {MOST_COLORS}: a mask has one flat color per"
            " class; save masks as PNG, without smoothing or resizing"
        )
    return [f"{name} {red} {green} {blue}" for name, (red, green, blue) in _named(sorted(colors))]


def _content(path: Path) -> tuple[Counter[int] | None, Counter[Color] | None]:
    """Numbers and colors in a mask; None for those that it does not have."""
    mask = open_mask(path)
    if not isinstance(mask, Image.Image):
        values, counts = np.unique(mask, return_counts=True)
        return Counter(dict(zip(values.tolist(), counts.tolist()))), None
    if mask.mode in ("P", "L"):
        values, counts = np.unique(np.array(mask), return_counts=True)
        numbers = Counter(dict(zip(values.tolist(), counts.tolist())))
        palette = mask.getpalette("RGB") if mask.mode == "P" else [gray for gray in range(256) for _ in range(3)]
        if 3 * max(numbers) >= len(palette):
            raise UserError(f"mask {path} holds {max(numbers)}, which its palette does not: restore it")
        return numbers, Counter({tuple(palette[3 * value : 3 * value + 3]): count for value, count in numbers.items()})
    # Millions of pixels, few colors: Pillow counts them at once.
    found = mask.convert("RGB").getcolors(1 << 24)
    return None, Counter({color: count for count, color in found})


def _union(counters: Iterable[Counter | None]) -> Counter:
    total: Counter = Counter()
    for counter in counters:
        total.update(counter or {})
    return total


def _is_dense(numbers: Iterable[int]) -> bool:
    """Are the numbers ids, rather than grays? 255 is neither."""
    ids = {*numbers} - {IGNORE}
    return len(ids) > 1 and max(ids) < 2 * len(ids)


def _numbered(numbers: Iterable[int], path: Path) -> list[str]:
    ids = sorted({*numbers} - {IGNORE})
    if ids and (ids[0] < 0 or ids[-1] >= IGNORE - 1):
        raise UserError(
            f"masks such as {path} hold numbers from {ids[0]} to {ids[-1]}: ids are 0 to 253, and 255 to ignore"
        )
    return [f"class_{index}" for index in range(ids[-1] + 1 if ids else 0)]


def _named(colors: Sequence[Color]) -> list[tuple[str, Color]]:
    """Names of colors; black comes first."""
    if list(colors) == [BLACK, WHITE]:
        return [(BACKGROUND, BLACK), ("foreground", WHITE)]
    return [(BACKGROUND if color == BLACK else f"class_{index}", color) for index, color in enumerate(colors)]
