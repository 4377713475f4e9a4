"""Pictures of what CAC and CPS learn from: who teaches whom where two crops overlap, where two networks disagree."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from cac_cps.config import Config, protocol_of
from cac_cps.crops import CELL, Pair, augment_views, cut_pair
from cac_cps.losses import directions
from cac_cps.training import pair_crop
from common.datasets.reader import Reader
from common.engine.run import Run
from common.errors import UserError
from common.evaluation.evaluate import evenly_spaced, save_panel
from common.evaluation.inference import Protocol, evaluation_mode, predict
from common.images import denormalize
from common.seeding import generators
from common.splits.split import Split
from common.visual import FAINT, GAP, INK, MARGIN, PAGE, TILE, class_entries, colorize, legend

if TYPE_CHECKING:
    from cac_cps.train import CACNetwork

COMMON, FIRST, SECOND, NEITHER = (255, 255, 0), (31, 119, 180), (255, 127, 14), (205, 205, 210)
COLUMNS = ("crop 1", "crop 2", "prediction 1", "prediction 2", "who learns, in crop 1")
MEANING = (
    ("both crops show it", COMMON),
    ("crop 1 learns from crop 2", FIRST),
    ("crop 2 learns from crop 1", SECOND),
    ("neither learns", NEITHER),
)


@dataclass(frozen=True)
class Shown:
    """A pair of crops of an image: how they are seen, float [2,3,H,W] in [0,1], and each cell's class, [2,h,w]."""

    name: str
    pair: Pair
    crops: Tensor
    label: Tensor
    confidence: Tensor


def save_disagreement_panel(
    networks: Sequence[nn.Module], reader: Reader, split: Split, config: Config, run: Run
) -> None:
    """The usual panel of network 1, with network 2's prediction and where the two disagree (light)."""
    protocol = protocol_of(config)
    maps = partial(_second_opinion, networks, protocol)
    save_panel(networks[0], reader, split, run, maps=maps, protocol=protocol)


def save_pair_panel(network: "CACNetwork", reader: Reader, split: Split, config: Config, run: Run) -> None:
    """The usual panel, and pairs_<step>.png: crops of unlabeled images, what is seen in them, and who learns there."""
    save_panel(network.segmenter, reader, split, run, protocol=protocol_of(config))
    if not run.is_main or run.stop_requested():
        return
    pairs = list(_shown_pairs(network, reader, evenly_spaced(split.unlabeled), config, run))
    if not pairs:
        return
    path = run.picture_path().with_name(f"pairs_{run.step:08d}.png")
    title = f"{run.folder.name}, step {run.step}: pairs of crops, changed as for training but not mirrored"
    try:
        _page(pairs, reader, config.method.cac.pos_thresh_value, title).save(path)
    except OSError as error:
        run.log.print(f"warning: picture {path} could not be written ({error.strerror}); going on")


def _second_opinion(networks: Sequence[nn.Module], protocol: Protocol, image: Tensor) -> Mapping[str, Tensor]:
    """What network 2 says of an image uint8 [1,3,H,W], and where network 1 says something else: [1,H,W] each."""
    first, second = (predict(network, image, tuple(image.shape[-2:]), protocol).argmax(1) for network in networks)
    return {"network 2": second, "disagreement": first != second}


def _shown_pairs(
    network: "CACNetwork", reader: Reader, names: Sequence[str], config: Config, run: Run
) -> Iterator[Shown]:
    """A pair of crops of every image, the same at every step of a run."""
    crop, seed = pair_crop(config), config.run.seed
    for number, (name, rng) in enumerate(zip(names, generators(seed, "pictures", range(len(names))))):
        try:
            image = reader.read_image(name)
        except UserError:
            if reader.skip_bad_files:  # training tells them
                continue
            raise
        pair = replace(crop.draw(image.shape[-2:], rng), flips=(False, False))
        views = augment_views(cut_pair(image, pair, crop.crop_size)[None], [number], seed)[0]
        confidence, label = _cell_predictions(network, views.to(run.device))
        yield Shown(name, pair, denormalize(views), label, confidence)


@torch.no_grad()
def _cell_predictions(network: "CACNetwork", views: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence and class [2,h,w] of every cell of two views, normalized [2,3,H,W], on the CPU."""
    with evaluation_mode(network):
        cells = F.avg_pool2d(network.segmenter.features(views), 2)
        confidence, label = network.segmenter.classifier(cells).float().softmax(1).max(1)
    return confidence.cpu(), label.cpu()


def _page(pairs: Sequence[Shown], reader: Reader, threshold: float, title: str) -> Image.Image:
    """Every pair in a row of pictures, the class colors and what the others mean below."""
    height = round(TILE * pairs[0].crops.shape[2] / pairs[0].crops.shape[3])
    title_font, font, small = (ImageFont.load_default(size) for size in (18, 14, 12))
    width, top = 2 * MARGIN + len(COLUMNS) * (TILE + GAP) - GAP, MARGIN + 56
    entries = class_entries([shown.label for shown in pairs], reader.palette, reader.classes)
    keys = [legend(each, width - 2 * MARGIN) for each in (MEANING, entries)]
    page = Image.new("RGB", (width, top + (height + 30) * len(pairs) + sum(key.height for key in keys) + GAP), PAGE)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN - 4), title, INK, title_font)
    lefts = [MARGIN + index * (TILE + GAP) for index in range(len(COLUMNS))]
    for left, column in zip(lefts, COLUMNS):
        draw.text((left + TILE / 2, top - 10), column, INK, font, anchor="ms")
    y = top
    for shown in pairs:
        for left, tile in zip(lefts, _tiles(shown, reader.palette, threshold, (TILE, height))):
            page.paste(tile, (left, y))
        draw.text((MARGIN, y + height + 5), shown.name, FAINT, small)
        y += height + 30
    for key in keys:
        page.paste(key, (MARGIN, y))
        y += key.height
    return page


def _tiles(shown: Shown, palette: np.ndarray, threshold: float, size: tuple[int, int]) -> list[Image.Image]:
    """The pictures of a row, (width, height) `size` each."""
    seen = (shown.crops * 255).round().byte().permute(0, 2, 3, 1).numpy()
    tiles = [Image.fromarray(one).resize(size, Image.Resampling.LANCZOS) for one in seen]
    tiles += [Image.fromarray(colorize(one, palette)).resize(size, Image.Resampling.NEAREST) for one in shown.label]
    for tile, area in zip(tiles, shown.pair.overlaps * 2):
        _outline(tile, area, shown.crops.shape[-2:])
    teaching = Image.fromarray(_teaching(shown.pair, shown.confidence, threshold))
    return [*tiles, teaching.resize(size, Image.Resampling.NEAREST)]


def _teaching(pair: Pair, confidence: Tensor, threshold: float) -> np.ndarray:
    """uint8 [h,w,3], the cells of crop 1 in the color of the crop that learns there."""
    areas = [tuple(side // CELL for side in overlap) for overlap in pair.overlaps]
    common = tuple(one[top:bottom, left:right] for one, (top, left, bottom, right) in zip(confidence, areas))
    first, second = (mask.numpy()[..., None] for mask in directions(common, threshold))
    page = np.full((*confidence.shape[1:], 3), PAGE, np.uint8)
    top, left, bottom, right = areas[0]
    page[top:bottom, left:right] = np.where(first, FIRST, np.where(second, SECOND, NEITHER))
    return page


def _outline(tile: Image.Image, area: tuple[int, int, int, int], crop_size: Sequence[int]) -> None:
    """Draw the border of an area of a crop, (top, left, bottom, right) in its pixels, on the picture of the crop."""
    scale = (tile.height / crop_size[0], tile.width / crop_size[1])
    top, left, bottom, right = (round(side * factor) for side, factor in zip(area, scale * 2))
    if bottom > top and right > left:
        ImageDraw.Draw(tile).rectangle((left, top, right - 1, bottom - 1), outline=COMMON, width=3)
