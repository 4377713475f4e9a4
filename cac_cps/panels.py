"""Pictures of CAC and CPS: which of two overlapping crops teaches the other, and where two networks disagree."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

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
from common.losses import label_and_confidence
from common.seeding import generators
from common.splits.split import Split
from common.visual import FAINT, GAP, INK, MARGIN, PAGE, TILE, class_entries, colorize, legend

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
    """A pair of crops of an image, with predictions.

    Attributes:
        name: Id of the image.
        pair: Geometry of the crops.
        crops: float [2,3,H,W] in [0,1], with the color changes of training.
        label: int64 [2,h,w], predicted class of each cell.
        confidence: float [2,h,w], probability of that class.
    """

    name: str
    pair: Pair
    crops: Tensor
    label: Tensor
    confidence: Tensor


def save_disagreement_panel(
    networks: Sequence[nn.Module], reader: Reader, split: Split, config: Config, run: Run
) -> None:
    """Save the usual panel of network 1 with network 2's prediction and their disagreement (light)."""
    protocol = protocol_of(config)
    maps = partial(_second_opinion, networks, protocol)
    save_panel(networks[0], reader, split, run, maps=maps, protocol=protocol)


def save_pair_panel(network: nn.Module, reader: Reader, split: Split, config: Config, run: Run) -> None:
    """Save the usual panel, and pairs_<step>.png: pairs of crops of unlabeled images, predictions and learning cells.

    Args:
        network: Network with a `segmenter`, see `cac_cps.train`.
    """
    save_panel(network.segmenter, reader, split, run, protocol=protocol_of(config))
    if not run.is_main or run.stop_requested():
        return
    pairs = list(_shown_pairs(network, reader, evenly_spaced(split.unlabeled), config, run))
    if not pairs:
        return
    path = run.picture_path().with_name(f"pairs_{run.step:08d}.png")
    title = f"{run.folder.name}, step {run.step}: pairs of crops, augmented as in training but not mirrored"
    try:
        _page(pairs, reader, config.method.cac.pos_thresh_value, title).save(path)
    except OSError as error:
        run.log.print(f"warning: picture {path} could not be written ({error.strerror}); going on")


def _second_opinion(networks: Sequence[nn.Module], protocol: Protocol, image: Tensor) -> Mapping[str, Tensor]:
    """Prediction of network 2 for an image uint8 [1,3,H,W], and its disagreement with network 1: [1,H,W] each."""
    first, second = (predict(network, image, tuple(image.shape[-2:]), protocol).argmax(1) for network in networks)
    return {"network 2": second, "disagreement": first != second}


def _shown_pairs(network: nn.Module, reader: Reader, names: Sequence[str], config: Config, run: Run) -> Iterator[Shown]:
    """Yield a pair of crops of each image, the same at every step of a run."""
    crop, seed = pair_crop(config), config.run.seed
    for number, (name, rng) in enumerate(zip(names, generators(seed, "pictures", range(len(names))))):
        try:
            image = reader.read_image(name)
        except UserError:
            if reader.skip_bad_files:  # training reports them
                continue
            raise
        pair = replace(crop.draw(image.shape[-2:], rng), flips=(False, False))
        views = augment_views(cut_pair(image, pair, crop.crop_size)[None], [number], seed)[0]
        label, confidence = _cell_predictions(network, views.to(run.device))
        yield Shown(name, pair, denormalize(views), label, confidence)


@torch.no_grad()
def _cell_predictions(network: nn.Module, views: Tensor) -> tuple[Tensor, Tensor]:
    """Label and confidence [2,h,w] of the cells of two views, normalized [2,3,H,W]; the results are on the CPU.

    Args:
        network: Network with a `segmenter`, see `cac_cps.train`.
    """
    with evaluation_mode(network):
        cells = F.adaptive_avg_pool2d(network.segmenter.features(views), [side // CELL for side in views.shape[-2:]])
        label, confidence = label_and_confidence(network.segmenter.classifier(cells))
    return label.cpu(), confidence.cpu()


def _page(pairs: Sequence[Shown], reader: Reader, threshold: float, title: str) -> Image.Image:
    """Draw each pair as a row of pictures, with legends for the colors below."""
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
    """Draw the pictures of a row, each of `size` (width, height)."""
    seen = (shown.crops * 255).round().byte().permute(0, 2, 3, 1).numpy()
    tiles = [Image.fromarray(one).resize(size, Image.Resampling.LANCZOS) for one in seen]
    tiles += [Image.fromarray(colorize(one, palette)).resize(size, Image.Resampling.NEAREST) for one in shown.label]
    for tile, area in zip(tiles, shown.pair.overlaps * 2):
        _outline(tile, area, shown.crops.shape[-2:])
    teaching = Image.fromarray(_teaching(shown.pair, shown.confidence, threshold))
    return [*tiles, teaching.resize(size, Image.Resampling.NEAREST)]


def _teaching(pair: Pair, confidence: Tensor, threshold: float) -> np.ndarray:
    """uint8 [h,w,3]: the cells of crop 1 in the color of the crop that learns there."""
    areas = [tuple(side // CELL for side in overlap) for overlap in pair.overlaps]
    common = tuple(one[top:bottom, left:right] for one, (top, left, bottom, right) in zip(confidence, areas))
    first, second = (mask.numpy()[..., None] for mask in directions(common, threshold))
    page = np.full((*confidence.shape[1:], 3), PAGE, np.uint8)
    top, left, bottom, right = areas[0]
    page[top:bottom, left:right] = np.where(first, FIRST, np.where(second, SECOND, NEITHER))
    return page


def _outline(tile: Image.Image, area: tuple[int, int, int, int], crop_size: Sequence[int]) -> None:
    """Outline `area`, (top, left, bottom, right) in pixels of a crop, on the picture of that crop."""
    scale = (tile.height / crop_size[0], tile.width / crop_size[1])
    top, left, bottom, right = (round(side * factor) for side, factor in zip(area, scale * 2))
    if bottom > top and right > left:
        ImageDraw.Draw(tile).rectangle((left, top, right - 1, bottom - 1), outline=COMMON, width=3)
