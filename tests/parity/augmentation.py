"""Compare augmentations with goldens: by recorded draws, or by recorded distributions."""

import itertools
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from checks import GRAY_LEVEL, MEAN, STD, Golden, close, read, to_label
from torch import Tensor
from torch.testing import assert_close

from common import IGNORE
from common.augment import (
    CropGeometry,
    Photometric,
    apply_geometry_batch,
    apply_photometric_batch,
    flip_batch,
    mix_batch,
    mixing,
)
from common.images import IMAGENET_STD, normalize
from common.loaders import Transform


class Replay:
    """Recorded draws in place of random ones.

    Args:
        rows: [n,4] of (kind, low, high, value): 0 an integer from low to high (endless where the bounds were not
            recorded), 1 a number in [0,1), 2 one of a list.
        bounded: False where the release may draw an integer beyond the bounds of ours.
    """

    def __init__(self, rows: Tensor, bounded: bool = True) -> None:
        self.rows, self.bounded = rows.tolist(), bounded

    def integers(self, low: int, high: int, endpoint: bool) -> int:
        assert endpoint
        if low == high and not (self.rows and self.rows[0][0] == 0 and self.rows[0][1] == self.rows[0][2]):
            return low  # the release draws nothing where there is one place
        kind, _, _, value = self.rows.pop(0)
        assert kind == 0 and (low <= value <= high or not self.bounded)
        return int(value)

    def random(self) -> float:
        kind, *_, value = self.rows.pop(0)
        assert kind == 1
        return value

    def choice(self, values) -> float:
        kind, *_, value = self.rows.pop(0)
        assert kind == 2 and value in values
        return value


def check_crop(
    transform: Transform, image: Tensor, label: Tensor, draws: Tensor, want_image: Tensor, want_label: Tensor
) -> None:
    """Compare a crop of `image` [H,W,3] and `label` [H,W] by recorded draws: images within a gray level.

    OpenCV rounds to the pixel above and before, also of a mirrored image: labels are the wanted ones, or would be, were
    the label moved by a row, a column or both.
    """
    image, label = image.permute(2, 0, 1), label.to(torch.uint8)
    allowed = torch.zeros_like(want_label, dtype=torch.bool)
    for down, right in itertools.product((0, 1, -1), repeat=2):
        rows, columns = (torch.arange(side) for side in label.shape)
        moved = label[(rows - down).clamp(0, len(rows) - 1)][:, (columns - right).clamp(0, len(columns) - 1)]
        ours, our_label = transform(image, moved, Replay(draws))
        allowed |= our_label == want_label
    error = (normalize(ours) - want_image).abs()
    assert (error <= GRAY_LEVEL).all(), f"{(error / GRAY_LEVEL).max():.2f} gray levels"
    assert allowed.all(), f"{(~allowed).sum()} labels differ"


def check_batch_transform(path: Path) -> None:
    """Compare resize and crop, with flip or blur where one fits: only the name of a case states those two."""
    g = read(path)
    found = {
        (flips, blurs): transform_errors(g, flips, blurs) for flips, blurs in itertools.product((False, True), repeat=2)
    }
    assert not min(found.values(), key=len), found


def transform_errors(g: Golden, flips: bool, blurs: bool) -> list[str]:
    """List the differences from a file of `check_batch_transform`; empty if there is none.

    Images within a gray level (two, blurred), as Pillow rounds after rows and after columns; labels exact; confidences
    to 1/255. Where the center of a pixel falls between two source pixels, labels may be of the one before: Pillow adds
    up steps.
    """
    crop, scale = g["crop_size"].tolist(), float(g["scale_ratio"])
    height, width = (int(side * scale) for side in g["image_u8"].shape[-2:])
    geometries = [CropGeometry(height, width, top, left) for top, left, _, _ in g["crop_ijhw"].tolist()]

    def stacked(name: str) -> Tensor:
        """Stack the one map of the file, or all numbered ones: [B,K,H,W]."""
        return torch.stack([g[key] for key in sorted(g) if key.rstrip("0123456789") == name], dim=1)

    def transform(image: Tensor, label: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = apply_geometry_batch(image, label, confidence, geometries, crop)
        if blurs:
            blurred = apply_photometric_batch(maps[0], [Photometric((), float(g["blur_sigma"]))] * len(image))
            maps = (blurred, *maps[1:])
        return flip_batch(*maps, [flips] * len(image))

    label, want_label, confidence = to_label(stacked("label")), to_label(stacked("out_label")), stacked("conf")
    stored, errors = released_copy(g["image_u8"]), []
    for image, levels in ((stored / 255, 1), (stored, 2)):  # training has floats; uint8 rounds as often as Pillow
        levels += blurs
        error = (normalize(transform(image, label, confidence)[0]) - g["out_image"]).abs() / GRAY_LEVEL
        if error.max() > levels:
            errors.append(f"{image.dtype}: {error.max():.2f} gray levels, {levels} allowed")

    between = [between_pixels(geometry, label.shape[-2:], crop) for geometry in geometries]
    rows, columns = (torch.stack(each) for each in zip(*between))
    columns = flip_batch(columns, None, None, [flips] * len(columns))[0]
    allowed = torch.zeros_like(want_label[:, 0], dtype=torch.bool)
    for down, right in itertools.product((False, True), repeat=2):
        moved = (values.roll((int(down), int(right)), (-2, -1)) for values in (label, confidence))
        _, our_label, our_confidence = transform(stored, *moved)
        same = (our_label == want_label).all(1)
        same &= ((our_confidence - stacked("out_conf")).abs() <= 1 / 255 + 1e-6).all(1)
        allowed |= same & (rows if down else True) & (columns if right else True)
    return errors + ([] if allowed.all() else [f"{(~allowed).sum()} labels or confidences differ"])


def released_copy(image: Tensor) -> Tensor:
    """Reproduce the 8-bit copy that the released code makes of a normalized image, which loses up to a gray level."""
    inverse = torch.tensor([1 / std for std in IMAGENET_STD]).view(3, 1, 1)
    return ((normalize(image) / inverse + MEAN) * 255).to(torch.uint8)


def between_pixels(geometry: CropGeometry, size: tuple[int, int], crop: list[int]) -> tuple[Tensor, Tensor]:
    """Mark rows and columns of the crop whose center falls exactly between two of `size`: bool [h,1] and [1,w]."""
    axes = zip(size, (geometry.height, geometry.width), (geometry.top, geometry.left), crop)
    rows, columns = (
        (2 * torch.arange(start, start + length) + 1) * source % (2 * resized) == 0
        for source, resized, start, length in axes
    )
    return rows[:, None], columns[None]


def check_mix(path: Path) -> None:
    """Compare mixed batches, with recorded masks in place of drawn ones."""
    g = read(path)
    ranks, total = sum(key.endswith("_masks") for key in g), len(g["image"])
    if not ranks:
        close_mix(g, slice(total), g["mask"], "", [True] * total)
    for rank in range(ranks):
        own, size = slice(rank * total // ranks, (rank + 1) * total // ranks), total // ranks
        # Image i of the whole batch gets partner i + 1, there modulo one process's batch: compared where that is equal.
        same = [(i + 1) % size == (i + 1) % total for i in range(total)][own]
        close_mix(g, own, g[f"rank{rank}_masks"][own], f"rank{rank}_", same)


def close_mix(g: Golden, own: slice, mask: Tensor, prefix: str, same: list[bool]) -> None:
    """Mix the part `own` of the whole batch; its last image with the first of the next part.

    A file where all that is masked out is ignored with confidence 0 was cut out, any other mixed.
    """
    image = g["image"] * STD + MEAN  # the golden is normalized
    maps = image, to_label(g["label"]), g["conf"]
    want_label, want_confidence = to_label(g[f"{prefix}out_label"]), g[f"{prefix}out_conf"]
    removed = mask == 0
    emptied = (want_label[removed] == IGNORE).all() and (want_confidence[removed] == 0).all()
    following = None if len(mask) == len(image) else tuple(values[own.stop % len(values)] for values in maps)
    rngs = [np.random.default_rng(i) for i in range(len(mask))]
    with mock.patch.object(mixing, "box_mask", lambda *_: mask.bool()):
        mode = "cutout" if emptied else "cutmix"
        image, label, confidence = mix_batch(mode, *(values[own] for values in maps), rngs, following)
    close(normalize(image)[same], g[f"{prefix}out_image"][same])
    assert_close(label[same], want_label[same])
    assert_close(confidence[same], want_confidence[same], rtol=0, atol=0)


def check_class_masks(path: Path) -> None:
    """Compare how many classes stay, and of how many; a class stays as a whole or not at all."""
    g = read(path)
    label = to_label(g["label"])[None]
    for seed, (selected, total) in enumerate(g["selected_and_total"].tolist()):
        mask = mixing.class_mask(label, mixing.draw_class_keys(np.random.default_rng(seed))[None])
        kept, replaced = set(label[mask].tolist()), set(label[~mask].tolist())
        assert (len(kept), len(kept | replaced)) == (selected, total)
        assert not kept & replaced


class LegacyRandom:
    """Generator of the released draws: those of `numpy.random` after `numpy.random.seed`."""

    def __init__(self, seed: int) -> None:
        self.state = np.random.RandomState(seed)

    def integers(self, low: int, high: int) -> int:
        return self.state.randint(low, high)


def check_boxes(path: Path) -> None:
    g = read(path)
    for row in g["rows"].tolist():
        r = dict(zip(g["columns"].tolist(), row, strict=True))
        box = mixing.draw_box(LegacyRandom(r["np_seed"]), r["H"], r["W"])
        assert box == mixing.Box(r["y0"], r["x0"], r["y1"], r["x1"]), r


def check_box_statistics(path: Path) -> None:
    """Compare means and deviations within five standard errors; few of our boxes exceed the recorded extremes."""
    g = read(path)
    size, draws, rng = int(g["size"]), int(g["draws"]), np.random.default_rng(0)
    boxes = [mixing.draw_box(rng, size, size) for _ in range(draws)]
    drawn = {
        "h": [box.bottom - box.top for box in boxes],
        "w": [box.right - box.left for box in boxes],
        "y0": [box.top for box in boxes],
        "x0": [box.left for box in boxes],
    }
    for i, column in enumerate(g["columns"].tolist()):
        ours = np.array(drawn[column])
        mean, std, least, most = (float(g[name][i]) for name in ("mean", "std", "min", "max"))
        assert abs(ours.mean() - mean) < 5 * np.hypot(std, ours.std()) / np.sqrt(draws)
        assert ours.std() == pytest.approx(std, rel=5 / np.sqrt(draws))
        assert max((ours < least).sum(), (ours > most).sum()) <= 10
        assert ours.min() <= least + std / 2 and ours.max() >= most - std / 2
