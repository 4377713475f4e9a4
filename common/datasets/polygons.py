"""Masks drawn from the polygons of LabelMe and COCO files, once, into a cache of PNGs of class ids."""

import hashlib
import json
import os
import tempfile
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from common import IGNORE
from common.datasets.class_list import IGNORED
from common.errors import UserError

BACKGROUND = "background"
# Names that LabelMe's own tools give to pixels of no class.
FORMER_NAMES = {"_background_": BACKGROUND, "__ignore__": IGNORED}
CACHE = ".drawn_masks"
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Drawing:
    """Polygons of one image.

    Attributes:
        size: Width and height of the image; None if the file does not contain them.
        shapes: Class name and outline of each polygon, from the bottom to the top.
    """

    size: tuple[int, int]
    shapes: list[tuple[str, Points]]


def draw(drawing: Drawing, classes: Sequence[str], path: Path, known: str) -> np.ndarray:
    """Draw polygons as class ids uint8 [H,W]. Later polygons cover earlier ones.

    Pixels outside all polygons belong to the class `background`; without such a class they are ignored (255).

    Args:
        drawing: The polygons.
        classes: Names of the classes.
        path: Their file, for messages.
        known: Source of the names, for messages.

    Raises:
        UserError: a polygon of a class that is not listed.
    """
    ids = {name: index for index, name in enumerate(classes)} | {IGNORED: IGNORE}
    picture = Image.new("L", drawing.size, ids.get(BACKGROUND, IGNORE))
    brush = ImageDraw.Draw(picture)
    for name, points in drawing.shapes:
        name = FORMER_NAMES.get(name, name)
        if name not in ids and name != BACKGROUND:
            raise UserError(
                f"label {path} names the class {name!r}, which {known} does not list: add it there, or name it ignore"
            )
        brush.polygon([(float(x), float(y)) for x, y in points], fill=ids.get(name, IGNORE))
    return np.array(picture)


def read_labelme(path: Path) -> Drawing:
    """Polygons of a file that LabelMe wrote. Raises UserError for another file or another kind of shape."""
    content = _load(path)
    try:
        size = int(content["imageWidth"]), int(content["imageHeight"])
        shapes = [
            (shape["label"], _outline(shape.get("shape_type") or "polygon", shape["points"], path))
            for shape in content["shapes"]
        ]
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"label {path} is not a LabelMe file: it needs imageWidth, imageHeight and shapes with label and points"
        ) from None
    return Drawing(size, shapes)


def _outline(kind: str, points: list, path: Path) -> Points:
    """Corners of a shape of LabelMe."""
    if kind == "polygon" and len(points) > 2:
        return points
    if kind == "rectangle" and len(points) == 2:
        (left, top), (right, bottom) = points
        return [(left, top), (right, top), (right, bottom), (left, bottom)]
    if kind == "circle" and len(points) == 2:
        (x, y), edge = points
        radius = np.hypot(edge[0] - x, edge[1] - y)
        angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        return [(x + radius * np.cos(angle), y + radius * np.sin(angle)) for angle in angles]
    raise UserError(
        f"label {path} has a {kind} of {len(points)} points, which is no area: draw polygons, rectangles or circles"
    )


@dataclass(frozen=True)
class CocoFile:
    """Annotations of many images in one file of COCO's format.

    Attributes:
        path: The file.
        drawings: Polygons by the image's `file_name`, of images that have any.
        classes: Names of the categories, in the order of their ids.
    """

    path: Path
    drawings: dict[str, Drawing] = field(repr=False)
    classes: tuple[str, ...]

    def entry(self, image: Path) -> str | None:
        """`file_name` of the image at `path`: its name, with the folders that the file gives; None if absent."""
        parts = image.parts
        endings = ("/".join(parts[start:]) for start in range(len(parts)))
        return next((name for name in endings if name in self.drawings), None)


def read_coco(path: Path) -> CocoFile:
    """Read a COCO file. Raises UserError for another file, or for masks that are not polygons."""
    content = _load(path)
    try:
        names = {category["id"]: category["name"] for category in content["categories"]}
        images = {image["id"]: image for image in content["images"]}
        shapes = defaultdict(list)
        for annotation in content["annotations"]:
            shapes[annotation["image_id"]] += _coco_shapes(annotation, names[annotation["category_id"]], path)
        drawings = {
            images[key]["file_name"].replace("\\", "/"): Drawing(
                (int(images[key]["width"]), int(images[key]["height"])), outlines
            )
            for key, outlines in shapes.items()
        }
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"labels {path} are not in COCO's format: it needs images, categories, and annotations with a segmentation"
        ) from None
    return CocoFile(path, drawings, tuple(names[key] for key in sorted(names)))


def _coco_shapes(annotation: Mapping[str, Any], name: str, path: Path) -> Iterator[tuple[str, Points]]:
    outlines = annotation["segmentation"]
    if isinstance(outlines, dict):
        raise UserError(
            f"labels {path}: annotation {annotation.get('id')} is a run-length mask: export polygons, or masks as PNG"
        )
    for outline in outlines:
        points = list(zip(outline[::2], outline[1::2]))
        if len(points) > 2:
            yield name, points


class DrawnMasks:
    """PNGs of class ids, drawn from polygons when they are first needed.

    They are in the folder .drawn_masks of the dataset or, where that cannot be written, of the system's temporary
    folder. A mask is drawn again when its annotations or the class list change.

    Args:
        root: Folder of the dataset.
        classes: Names of the classes.
        known: Source of the names, for messages.
        coco: The COCO file; None for LabelMe files.
    """

    def __init__(self, root: Path, classes: Sequence[str], known: str, coco: CocoFile | None) -> None:
        self._folders = (root / CACHE, Path(tempfile.gettempdir(), CACHE.lstrip(".")))
        self._classes, self._known, self._coco = tuple(classes), known, coco

    def drawn(self, path: Path, entry: str | None = None) -> Path:
        """Path of the PNG of a LabelMe file, or of the image `entry` of the COCO file.

        Raises:
            UserError: see `read_labelme` and `draw`; no folder can be written.
        """
        if entry is not None:
            drawing = self._coco.drawings[entry]
            return self._cached(path, repr(drawing), lambda: drawing)
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"label {path} cannot be read: {error.strerror}") from None
        return self._cached(path, f"{status.st_mtime_ns} {status.st_size}", lambda: read_labelme(path))

    def _cached(self, path: Path, version: str, read: Callable[[], Drawing]) -> Path:
        content = repr((str(path.absolute()), version, self._classes))
        file = f"{path.stem}-{hashlib.sha256(content.encode()).hexdigest()[:20]}.png"
        for folder in self._folders:
            if (folder / file).is_file():
                return folder / file
        mask = draw(read(), self._classes, path, self._known)
        for folder in self._folders:
            try:
                return _write(mask, folder / file)
            except OSError:
                continue
        places = " or ".join(map(str, self._folders))
        raise UserError(f"the mask drawn from {path} cannot be written to {places}: free space, or allow writing")


def _write(mask: np.ndarray, path: Path) -> Path:
    """Write a PNG that appears whole or not at all: several processes may draw the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{uuid.uuid4().hex}")
    Image.fromarray(mask).save(unfinished, format="PNG")
    os.replace(unfinished, path)
    return path


def _load(path: Path) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"label {path} cannot be read as JSON ({str(error).split(': ')[0]}): restore it") from None
    if not isinstance(content, dict):
        raise UserError(f"label {path} is neither a LabelMe nor a COCO file")
    return content
