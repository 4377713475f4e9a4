"""The built-in data: drawn scenes of simple objects, written as VOC, Cityscapes or GTA5 trees.

They are made in seconds on first use and are the same for the same seed, so that every command of this project can be
tried without a download. A scene is a background with clutter, then objects drawn from back to front, then light and
camera. Classes differ in outline and texture; the hues of neighboring classes overlap, and size, rotation, light,
occlusion, blur and noise vary, so that a few labels do not cover the variety of many scenes. The domains "a" and "b"
show the same classes in different light and colors and with different cameras, for domain adaptation.

Everything is drawn with signed distances (in pixels, negative inside an outline), from which both the soft edges and
the border of the label are derived.
"""

import colorsys
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageFilter

from common import IGNORE
from common.datasets import cityscapes
from common.datasets.reader import voc_palette
from common.datasets.shape_kinds import KINDS, box
from common.errors import UserError

Layout = Literal["voc", "cityscapes", "gta5"]
Domain = Literal["a", "b"]

CLASSES = ("background", "disc", "ring", "box", "star", "triangle", "cross")
STAMP = "shapes.json"
DRAWING = 1  # raised whenever scenes change, so that results never come from mixed data
# Difficulty of the data, chosen so that a ResNet-18 from scratch, in 600 steps of 8 crops, reaches an mIoU of 74 to 76
# with all 512 labels and of 46 to 53 with 16 (benchmarks/results/shapes.jsonl).
HUE_SPREAD = 0.12  # on either side of a class's hue, in turns of the color circle; classes are 1/6 apart
MARKS, OBJECTS = (3, 10), (1, 5)  # how many a scene has, the upper bound not included
RADIUS = (0.2, 0.4)  # of an object, in shorter sides of the scene
CONTRAST = (0.2, 0.6)  # by which the other color of a texture is darkened
GROUND_SATURATION = (0.0, 0.3)


class Scene(NamedTuple):
    """`image` uint8 [H, W, 3] RGB; `label` uint8 [H, W], a class id, or 255 on the border of an object."""

    image: np.ndarray
    label: np.ndarray


@dataclass(frozen=True)
class Look:
    """Look of the scenes of a domain. Pairs are ranges of uniform draws; colors are in [0, 1]."""

    hue_shift: float
    saturation: tuple[float, float]
    value: tuple[float, float]
    ground_value: tuple[float, float]
    wavelength: tuple[float, float]  # of textures, in radii of the object
    light: tuple[float, float]
    cast: tuple[float, float, float]
    blur: tuple[float, float]  # pixels
    noise: tuple[float, float]


# fmt: off
DAY = Look(
    hue_shift=0.0, saturation=(0.4, 0.95), value=(0.45, 1.0), ground_value=(0.2, 0.85), wavelength=(0.45, 0.85),
    light=(0.65, 1.2), cast=(1.0, 1.0, 0.97), blur=(0.0, 0.8), noise=(0.01, 0.05),
)
DUSK = Look(
    hue_shift=0.08, saturation=(0.25, 0.7), value=(0.45, 1.0), ground_value=(0.15, 0.5), wavelength=(0.35, 0.6),
    light=(0.55, 1.0), cast=(0.85, 0.95, 1.2), blur=(0.3, 1.1), noise=(0.02, 0.07),
)
# fmt: on
LOOKS: dict[str, Look] = {"a": DAY, "b": DUSK}


# ---- a scene ----


class Canvas:
    """The scene being drawn: `image` float [H, W, 3] in [0, 1] and `label` uint8 [H, W]."""

    def __init__(self, image: np.ndarray) -> None:
        self.image = image
        self.label = np.zeros(image.shape[:2], np.uint8)
        self.rows, self.columns = np.indices(self.label.shape, np.float32)

    def paint(self, color: np.ndarray, distance: np.ndarray) -> None:
        """Paint `color` ([3] or [H, W, 3]) where `distance` is negative, with a soft edge of one pixel."""
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        self.image += cover * (color - self.image)

    def place(self, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates [H, W] in pixels of an object with random position, rotation and stretch."""
        height, width = self.label.shape
        y, x = self.rows - rng.uniform(0, height), self.columns - rng.uniform(0, width)
        angle, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 1.25)
        u = x * np.cos(angle) + y * np.sin(angle)
        v = y * np.cos(angle) - x * np.sin(angle)
        return u * stretch, v / stretch


def draw_scene(rng: Generator, size: tuple[int, int], domain: Domain = "a") -> Scene:
    """Draw one scene of `size` (height, width) pixels. All random numbers come from `rng`."""
    look = LOOKS[domain]
    canvas = Canvas(_ground(rng, size, look))
    for _ in range(rng.integers(*MARKS)):
        _draw_mark(rng, canvas)
    radii = rng.uniform(*RADIUS, size=rng.integers(*OBJECTS)) * min(size)
    for radius in sorted(radii, reverse=True):  # large ones first, or they would hide the small ones
        _draw_object(rng, canvas, radius, look)
    return Scene(_photograph(rng, canvas, look), canvas.label)


def _ground(rng: Generator, size: tuple[int, int], look: Look) -> np.ndarray:
    """Background, float [H, W, 3]: two colors blended at a coarse and at a fine scale."""
    first, second = (_color(rng, rng.uniform(), GROUND_SATURATION, look.ground_value) for _ in range(2))
    flow = _smooth_noise(rng, size, cells=4) + rng.uniform(0, 0.5) * _smooth_noise(rng, size, cells=24)
    share = np.clip(0.5 + 0.5 * flow, 0, 1)[..., None]
    return share * first + (1 - share) * second


def _smooth_noise(rng: Generator, size: tuple[int, int], cells: int) -> np.ndarray:
    grid = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
    return np.asarray(grid.resize(size[::-1], Image.Resampling.BICUBIC))


def _color(rng: Generator, hue: float, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(*saturation), rng.uniform(*value)), np.float32)


def _draw_mark(rng: Generator, canvas: Canvas) -> None:
    """Clutter: a bar, an arc or a speck of any color, too thin or too small for an object. It stays background."""
    u, v = canvas.place(rng)
    length, width = rng.uniform(4, 40), rng.uniform(0.7, 2.2)
    bar = box(u, v, length, width)
    arc = np.maximum(np.abs(np.hypot(u, v) - length) - width, v)
    speck = np.hypot(u, v) - 2 * width
    canvas.paint(_color(rng, rng.uniform(), (0, 0.9), (0.1, 1)), (bar, arc, speck)[rng.integers(3)])


def _draw_object(rng: Generator, canvas: Canvas, radius: float, look: Look) -> None:
    """Draw one object of a random class over the scene, in image and label."""
    class_id = int(rng.integers(1, len(CLASSES)))
    kind = KINDS[class_id - 1]
    u, v = canvas.place(rng)
    distance = kind.outline(u, v, radius)
    hue = kind.hue + look.hue_shift + rng.uniform(-HUE_SPREAD, HUE_SPREAD)
    bright = _color(rng, hue, look.saturation, look.value)
    dark = _color(rng, hue + kind.second, look.saturation, look.value) * rng.uniform(*CONTRAST)
    share = 0.5 + 0.5 * kind.texture(u, v, radius * rng.uniform(*look.wavelength))[..., None]
    canvas.paint(share * bright + (1 - share) * dark, distance)

    canvas.label[distance < 0] = class_id
    canvas.label[np.abs(distance) < 0.7] = IGNORE


def _photograph(rng: Generator, canvas: Canvas, look: Look) -> np.ndarray:
    """Apply light from one side, a color cast, blur and noise; uint8 [H, W, 3]."""
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.cos(angle) * canvas.columns + np.sin(angle) * canvas.rows
    light = rng.uniform(*look.light) * (1 + rng.uniform(0, 0.5) * (slope - slope.mean()) / np.ptp(slope))
    lit = canvas.image * light[..., None] * look.cast * rng.uniform(0.92, 1.08, size=3)
    blur = ImageFilter.GaussianBlur(rng.uniform(*look.blur))
    blurred = Image.fromarray((255 * np.clip(lit, 0, 1)).astype(np.uint8)).filter(blur)
    grain = rng.normal(scale=255 * rng.uniform(*look.noise), size=lit.shape)
    return np.clip(blurred + grain, 0, 255).astype(np.uint8)


# ---- trees ----


def make_shapes(
    root: Path,
    layout: Layout,
    train: int = 512,
    val: int = 128,
    size: tuple[int, int] = (96, 128),
    seed: int = 0,
    domain: Domain = "a",
) -> None:
    """Make the tree at `root`, unless it exists. It appears complete or not at all.

    Args:
        root: Folder of the tree.
        layout: Dataset whose files are imitated: "voc" (class ids as in `CLASSES`, 255 = border), "cityscapes" (the
            label ids of the first train ids, 0 = unlabeled) or "gta5" (the same ids, in the colors of Cityscapes; it
            has no lists, all images are one set).
        train, val: Number of images for training and validation.
        size: (height, width) of the images, pixels.
        seed: Seed of the scenes.
        domain: "a" or "b".

    Raises:
        UserError: `root` contains anything else, including a tree of other parameters: nothing is overwritten.
    """
    if layout not in WRITERS:
        raise UserError(f'built-in data: no layout "{layout}", give one of {", ".join(WRITERS)}')
    if domain not in LOOKS:
        raise UserError(f'built-in data: no domain "{domain}", give one of {", ".join(LOOKS)}')
    stamp = {"drawing": DRAWING, "layout": layout, "domain": domain, "seed": seed}
    stamp |= {"train": train, "val": val, "size": list(size)}
    if _is_made(root, stamp):
        return
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"built-in data cannot be written to {root}: {error.strerror}; set data.root") from None
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as workshop:
        tree = Path(workshop) / "tree"
        tree.mkdir()
        for subset, first, count in (("train", 1, train), ("val", train + 1, val)):
            scenes = (draw_scene(_scene_rng(seed, domain, subset, i), size, domain) for i in range(count))
            WRITERS[layout](tree, subset, first, scenes)
        (tree / STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
        try:
            os.rename(tree, root)
        except OSError:
            # Another process was faster; its tree is the same if the parameters agree.
            if not _is_made(root, stamp):
                raise


def is_drawn(root: Path) -> bool:
    """Are built-in data of any size and seed at `root`? Raises UserError for data of another version of the drawing."""
    if not (root / STAMP).is_file():
        return False
    drawing = json.loads((root / STAMP).read_text(encoding="utf-8")).get("drawing")
    if drawing != DRAWING:
        raise UserError(f"{root} contains built-in data of another version ({drawing}, not {DRAWING}): remove it")
    return True


def _is_made(root: Path, stamp: dict) -> bool:
    """Is the tree of `stamp` at `root`? False if there is nothing; UserError for anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    if not (root / STAMP).is_file():
        raise UserError(f"{root} exists and is not built-in data: give another folder, nothing is overwritten")
    found = json.loads((root / STAMP).read_text(encoding="utf-8"))
    differing = [f"{key} {found.get(key)}, not {value}" for key, value in stamp.items() if found.get(key) != value]
    if differing:
        raise UserError(
            f"{root} contains other built-in data ({'; '.join(differing)}): remove it or give another folder"
        )
    return True


def _scene_rng(seed: int, domain: Domain, subset: str, index: int) -> Generator:
    """A generator per scene, so that a scene does not depend on the number of other scenes."""
    return np.random.default_rng([seed, sorted(LOOKS).index(domain), ("train", "val").index(subset), index])


def _write_voc(tree: Path, subset: str, first: int, scenes: Iterator[Scene]) -> None:
    names = []
    for number, scene in enumerate(scenes, first):
        names.append(f"2007_{number:06d}")
        _save(scene.image, tree / "JPEGImages" / f"{names[-1]}.jpg")
        _save(scene.label, tree / "SegmentationClassAug" / f"{names[-1]}.png", voc_palette())
    (tree / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
    (tree / "ImageSets" / "Segmentation" / f"{subset}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


def _write_cityscapes(tree: Path, subset: str, first: int, scenes: Iterator[Scene]) -> None:
    cities = {"train": ("aachen", "bochum"), "val": ("frankfurt",)}[subset]
    for index, scene in enumerate(scenes):
        city = cities[index % len(cities)]
        stem = f"{city}_{index // len(cities):06d}_000019"
        _save(scene.image, tree / "leftImg8bit" / subset / city / f"{stem}_leftImg8bit.png")
        _save(_to_label_ids(scene.label), tree / "gtFine" / subset / city / f"{stem}_gtFine_labelIds.png")


def _write_gta5(tree: Path, subset: str, first: int, scenes: Iterator[Scene]) -> None:
    palette = np.zeros((256, 3), np.uint8)
    palette[list(cityscapes.LABEL_IDS)] = cityscapes.COLORS
    for number, scene in enumerate(scenes, first):
        _save(scene.image, tree / "images" / f"{number:05d}.png")
        _save(_to_label_ids(scene.label), tree / "labels" / f"{number:05d}.png", palette)


WRITERS = {"voc": _write_voc, "cityscapes": _write_cityscapes, "gta5": _write_gta5}


def _save(pixels: np.ndarray, path: Path, palette: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    if palette is not None:
        picture.putpalette(palette.tobytes())
    picture.save(path, quality=95)  # has no effect on PNG


def _to_label_ids(label: np.ndarray) -> np.ndarray:
    """Convert class ids, taken as train ids, to the label ids of Cityscapes; 255 becomes 0, unlabeled."""
    table = np.zeros(256, np.uint8)
    table[: len(CLASSES)] = cityscapes.LABEL_IDS[: len(CLASSES)]
    return table[label]
