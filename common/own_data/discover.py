"""Find the images and the masks in a folder, and the patterns of their names.

A file has a kind: photo, mask, or polygons of LabelMe or COCO. A *series* is what one pattern fits: files of one kind
below one folder, with the same text before and after their names. Of all pairs of a series of photos and one of masks,
the one with most names in common is chosen.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from common.datasets.folder import IMAGE_SUFFIXES, POLYGON_SUFFIX
from common.datasets.mask_files import ARRAY_SUFFIX
from common.datasets.patterns import ANY_SUFFIX, NAME_FIELD, SUBSET_FIELD
from common.errors import UserError

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".webp")  # too lossy for masks
MOST_COLORS = 64  # in a picture that is taken for a mask
SAMPLES = 3  # files per family that are opened
MOST_SERIES = 50  # per kind that are compared, the largest ones
MASK_WORDS = ("mask", "label", "annot", "gt", "groundtruth", "seg")
PHOTO_WORDS = ("image", "img", "photo", "picture", "rgb", "jpegimage")
PHOTO, MASK, POLYGONS, COCO = "photo", "mask", "polygons", "coco"


@dataclass(frozen=True)
class Layout:
    """Patterns of a folder, as in `data.image_dir` and `data.label_dir`, and the number of pairs that they make."""

    images: str
    labels: str
    pairs: int


@dataclass(frozen=True)
class Series:
    """Files that one pattern fits, by name."""

    folder: str
    before: str
    after: str
    files: Mapping[str, str]

    @property
    def pattern(self) -> str:
        suffixes = {PurePosixPath(file).suffix for file in self.files.values()}
        suffix = suffixes.pop() if len(suffixes) == 1 else ANY_SUFFIX
        return f"{self.folder}{self.before}{NAME_FIELD}{self.after}{suffix}"

    @property
    def plainness(self) -> tuple[int, int]:
        """Rank among series of the same files: little text around the name, then the deepest folder."""
        return -len(self.before) - len(self.after), len(self.folder)


def discover(root: Path, images: str | None = None, labels: str | None = None) -> Layout:
    """Find the patterns of images and masks below `root`.

    Args:
        root: The folder.
        images, labels: Patterns to choose, if several fit; others are left out.

    Raises:
        UserError: no images, no masks, no image with a mask, or several patterns that fit equally well.
    """
    files = _files(root)
    kinds = _kinds(root, files)
    if PHOTO not in kinds.values():
        raise UserError(f"no images in {root}: file endings are {', '.join(IMAGE_SUFFIXES)}")
    coco = sorted(file for file, kind in kinds.items() if kind == COCO)
    photos = _series([file for file, kind in kinds.items() if kind == PHOTO])
    photos = [series for series in photos if images in (None, series.pattern)]
    if not photos:
        raise UserError(f"no images {images} in {root}")
    if coco and (labels is None or labels in coco):
        return _with_coco(root, photos, [labels] if labels else coco)
    masks = _series([file for file, kind in kinds.items() if kind in (MASK, POLYGONS)])
    masks = [series for series in masks if labels in (None, series.pattern)]
    if not masks:
        raise UserError(
            f"no masks{f' {labels}' if labels else ''} in {root}: masks are PNG, TIFF or BMP pictures, .npy arrays,"
            " or .json files of LabelMe or COCO"
        )
    return _best_pair(root, photos, masks)


def _best_pair(root: Path, photos: Sequence[Series], masks: Sequence[Series]) -> Layout:
    pairs = [(len(image.files.keys() & mask.files.keys()), image, mask) for image in photos for mask in masks]
    most, image, mask = max(
        pairs, key=lambda pair: (pair[0], len(pair[1].files), *map(sum, zip(pair[1].plainness, pair[2].plainness)))
    )
    if most == 0:
        raise UserError(
            f"no image in {root} has a mask: e.g. {next(iter(image.files.values()))} and"
            f" {next(iter(mask.files.values()))} differ in more than one part of their names;"
            f" give --images and --labels, e.g. 'images/{NAME_FIELD}_image.png' 'masks/{NAME_FIELD}_mask.png'"
        )
    for shared, other_image, other_mask in pairs:
        same_names = shared == most and len(other_image.files) == len(image.files)
        if same_names and not {*other_mask.files.values()} & {*mask.files.values()}:
            raise _ambiguous("masks", "labels", root, mask.pattern, other_mask.pattern)
        if same_names and not {*other_image.files.values()} & {*image.files.values()}:
            raise _ambiguous("images", "images", root, image.pattern, other_image.pattern)
    return Layout(image.pattern, mask.pattern, most)


def _with_coco(root: Path, photos: Sequence[Series], coco: list[str]) -> Layout:
    if len(coco) > 1:
        raise _ambiguous("masks", "labels", root, *coco[:2])
    listed = {
        PurePosixPath(image["file_name"].replace("\\", "/")).name
        for image in json.loads((root / coco[0]).read_text(encoding="utf-8"))["images"]
    }

    def shared(series: Series) -> int:
        return sum(PurePosixPath(file).name in listed for file in series.files.values())

    image = max(photos, key=lambda series: (shared(series), len(series.files), *series.plainness))
    if not shared(image):
        raise UserError(f"none of the images that {root / coco[0]} lists is in {root}, e.g. {next(iter(listed), '-')}")
    return Layout(image.pattern, coco[0], shared(image))


def _ambiguous(what: str, flag: str, root: Path, first: str, second: str) -> UserError:
    return UserError(
        f"two patterns fit the {what} in {root} equally well: {first} and {second}; choose one, e.g. --{flag} '{first}'"
    )


def _files(root: Path) -> list[str]:
    """Paths below `root`, without hidden ones. `train` and `val` become `{subset}` where both are folders."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(folder).relative_to(root)
        found += [(below / name).as_posix() for name in sorted(names) if not name.startswith(".")]
    wanted = {*IMAGE_SUFFIXES, ARRAY_SUFFIX, POLYGON_SUFFIX}
    return [file for file in found if PurePosixPath(file).suffix.lower() in wanted]


def _with_subset(files: Sequence[str]) -> dict[str, str]:
    """The path to match by file: `train` and `val` become `{subset}` where both are folders at one place."""
    places = defaultdict(set)
    for file in files:
        parts = file.split("/")
        for place, part in enumerate(parts[:-1]):
            if part in ("train", "val"):
                places["/".join(parts[:place])].add(part)
    result = {}
    for file in files:
        parts = file.split("/")
        for place, part in enumerate(parts[:-1]):
            if part in ("train", "val") and len(places["/".join(parts[:place])]) == 2:
                parts[place] = SUBSET_FIELD
                break
        result[file] = "/".join(parts)
    return result


def _kinds(root: Path, files: Sequence[str]) -> dict[str, str]:
    """Kind of each file; of each family (folder, ending, words of the name) a few files are opened."""
    families = defaultdict(list)
    for file in files:
        path = PurePosixPath(file)
        words = tuple(re.findall(r"[A-Za-z]+", path.stem))
        families[path.parent, path.suffix.lower(), words[:1] + words[-1:]].append(file)
    kinds = {}
    for (_, suffix, _), members in families.items():
        step = max(1, len(members) // SAMPLES)
        kind = _kind(root, suffix, members[::step][:SAMPLES])
        kinds |= dict.fromkeys(members, kind) if kind else {}
    return kinds


def _kind(root: Path, suffix: str, samples: Sequence[str]) -> str | None:
    if suffix == ARRAY_SUFFIX:
        return MASK
    if suffix == POLYGON_SUFFIX:
        return _json_kind(root / samples[0])
    if suffix in PHOTO_SUFFIXES:
        return PHOTO
    path = PurePosixPath(samples[0])
    end = re.sub(r"^.*\d", "", path.stem)
    start = path.stem.removesuffix(end)
    # A photo's word at the start of a name counts last: the mask of IMG_1.jpg is masks/IMG_1.png.
    for text in (end, *([start] if _named(start) == MASK else []), *reversed(path.parent.parts), start):
        if kind := _named(text):
            return kind
    return MASK if all(_has_few_colors(root / sample) for sample in samples) else PHOTO


def _named(text: str) -> str | None:
    """Kind that the words of a name point to, if they point to one."""
    words = re.findall(r"[a-z]+", text.lower())
    is_mask, is_photo = (any(word.startswith(known) for word in words) for known in (MASK_WORDS, PHOTO_WORDS))
    return None if is_mask == is_photo else MASK if is_mask else PHOTO


def _json_kind(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return POLYGONS  # the reader names the fault
    if not isinstance(content, dict):
        return None
    return COCO if "annotations" in content else POLYGONS if "shapes" in content else None


def _has_few_colors(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            if picture.mode in ("1", "P"):
                return True
            if picture.mode in ("L", "RGB", "RGBA"):
                return picture.getcolors(MOST_COLORS) is not None
            return len(np.unique(np.array(picture))) <= MOST_COLORS
    except Exception:  # the reader names the fault
        return False


def _series(files: Sequence[str]) -> list[Series]:
    """All series of the files, largest first; those of the same files are reduced to the plainest one."""
    shown = _with_subset(files)
    found: dict[tuple[str, str, str], dict[str, str]] = defaultdict(dict)
    for file in files:
        path = PurePosixPath(shown[file])
        for start in range(len(path.parts)):
            folder = "".join(f"{part}/" for part in path.parts[:start])
            inner = "/".join([*path.parts[start:-1], path.stem])
            if SUBSET_FIELD in inner:
                continue
            # Text before the name is looked for only where the name has no folders.
            for before in _heads(path.stem) if start == len(path.parts) - 1 else ("",):
                for after in _tails(path.stem):
                    name = inner[len(before) : len(inner) - len(after)]
                    if name and len(before) + len(after) < len(path.stem):
                        found[folder, before, after].setdefault(name, file)
    series = sorted((Series(*key, names) for key, names in found.items()), key=lambda one: -len(one.files))
    return series[:MOST_SERIES]


def _heads(stem: str) -> Iterator[str]:
    """Words at the start of a name, up to a separator or to the first digit; a word begins with a letter."""
    yield ""
    for match in re.finditer(r"[_\-. ]+", stem):
        if _are_words(stem[: match.start()]):
            yield stem[: match.end()]
    if (match := re.match(r"[A-Za-z]+(?=\d)", stem)) is not None:
        yield match[0]


def _tails(stem: str) -> Iterator[str]:
    """Words at the end of a name, from a separator or from the last digit on; a word begins with a letter."""
    yield ""
    for match in re.finditer(r"[_\-. ]+", stem):
        if _are_words(stem[match.end() :]):
            yield stem[match.start() :]
    if (match := re.search(r"(?<=\d)[A-Za-z]+$", stem)) is not None:
        yield match[0]


def _are_words(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z]\w*([_\-. ]+[A-Za-z]\w*)*", text) is not None and not re.search(r"[_\-. ]\d", text)
