"""Pictures of what CAC and CPS learn from: who teaches whom where two crops overlap, where two networks disagree."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from cac_cps.crops import CELL, Pair, cut_pair, draw_pair
from cac_cps.losses import directions
from cac_cps.setting import Config, protocol_of
from common.augment import normalize
from common.datasets.source import Source
from common.datasets.splits import Split
from common.evaluation import sample_predictions, save_panel, spread
from common.inference import evaluation_mode
from common.run import Run
from common.seeding import generators
from common.visual import FAINT, GAP, INK, MARGIN, PAGE, TILE, colourise

if TYPE_CHECKING:
    from cac_cps.train import CACNetwork

FIRST, SECOND, NEITHER = (31, 119, 180), (255, 127, 14), (205, 205, 210)
DIFFERENT, SAME = (200, 30, 60), (235, 235, 238)


def save_pair_panel(network: "CACNetwork", source: Source, split: Split, config: Config, run: Run) -> None:
    """The usual panel, and pairs_<step>.png: crops of unlabeled images, what is seen in them, and who learns there."""
    save_panel(network.segmenter, source, split, run, protocol=protocol_of(config))
    if not run.is_main or not split.unlabeled:
        return
    method, crop = config.method, config.data.crop_size
    base = method.base_size or max(crop)
    names = spread(split.unlabeled)
    rows = []
    for name, rng in zip(names, generators(config.run.seed, "pictures", range(len(names)))):
        image = source.read_image(name)
        pair = draw_pair(rng, image.shape[-2:], crop, base, method.cac.scale_range, method.cac.iou_bound)
        pair = replace(pair, flips=(False, False))
        crops = cut_pair(image, pair, crop)
        confidence, label = _cell_predictions(network, crops.to(run.device))
        shown = [_outlined(picture, area) for picture, area in zip(crops, pair.overlaps)]
        shown += [_enlarged(colourise(one, source.palette)) for one in label]
        rows.append([*shown, _enlarged(_teaching(pair, confidence, method.cac.pos_thresh_value))])
    columns = ("crop 1", "crop 2", "prediction 1", "prediction 2", "who learns, in crop 1")
    note = "In the common area: blue, crop 1 learns from 2; orange, crop 2 learns from 1; grey, neither is confident."
    _save(_page(rows, columns, names, f"{run.folder.name}, step {run.step}: pairs of crops", note), "pairs", run)


def save_disagreement_panel(
    networks: Sequence[nn.Module], source: Source, split: Split, config: Config, run: Run
) -> None:
    """The usual panel of network 1, and networks_<step>.png: both networks' predictions and where they disagree."""
    protocol = protocol_of(config)
    save_panel(networks[0], source, split, run, protocol=protocol)
    if not run.is_main:
        return
    names = [*spread(split.valid), *spread(split.unlabeled)]
    both = (sample_predictions(network, source, names, protocol, run.device, False) for network in networks)
    rows, notes = [], []
    for first, second in zip(*both):
        differs = (first.prediction != second.prediction).numpy()
        pictures = [first.image.permute(1, 2, 0).numpy()]
        pictures += [colourise(sample.prediction, source.palette) for sample in (first, second)]
        rows.append([*pictures, np.where(differs[..., None], DIFFERENT, SAME).astype(np.uint8)])
        notes.append(f"{first.name}: different on {100 * differs.mean():.1f} % of the pixels")
    columns = ("image", "network 1", "network 2", "disagreement")
    title = f"{run.folder.name}, step {run.step}: valid, then unlabeled images"
    remark = "Red: either network's class is the other one's pseudo-label."
    _save(_page(rows, columns, notes, title, remark), "networks", run)


@torch.no_grad()
def _cell_predictions(network: "CACNetwork", crops: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence and class [2,h,w] of every cell of two crops uint8 [2,3,H,W], on the CPU."""
    with evaluation_mode(network):
        cells = F.avg_pool2d(network.segmenter.features(normalize(crops)), 2)
        confidence, label = network.segmenter.classifier(cells).float().softmax(1).max(1)
    return confidence.cpu(), label.cpu()


def _teaching(pair: Pair, confidence: Tensor, threshold: float) -> np.ndarray:
    """uint8 [h,w,3], the cells of crop 1 in the colour of the crop that learns there."""
    areas = [tuple(side // CELL for side in overlap) for overlap in pair.overlaps]
    common = tuple(one[top:bottom, left:right] for one, (top, left, bottom, right) in zip(confidence, areas))
    first, second = (mask.numpy()[..., None] for mask in directions(common, threshold))
    page = np.full((*confidence.shape[1:], 3), PAGE, np.uint8)
    top, left, bottom, right = areas[0]
    page[top:bottom, left:right] = np.where(first, FIRST, np.where(second, SECOND, NEITHER))
    return page


def _outlined(crop: Tensor, area: tuple[int, int, int, int]) -> np.ndarray:
    picture = Image.fromarray(crop.permute(1, 2, 0).numpy())
    top, left, bottom, right = area
    if bottom > top and right > left:
        width = max(1, crop.shape[-1] // 100)
        ImageDraw.Draw(picture).rectangle((left, top, right - 1, bottom - 1), outline=(255, 255, 0), width=width)
    return np.asarray(picture)


def _enlarged(picture: np.ndarray) -> np.ndarray:
    return picture.repeat(CELL, 0).repeat(CELL, 1)


def _page(
    rows: Sequence[Sequence[np.ndarray]], columns: Sequence[str], notes: Sequence[str], title: str, remark: str
) -> Image.Image:
    """Pictures uint8 [H,W,3] in rows, with a note below each row and a remark below the title."""
    heights = [round(TILE * row[0].shape[0] / row[0].shape[1]) for row in rows]
    title_font, font, small = (ImageFont.load_default(size) for size in (18, 14, 12))
    top = MARGIN + 80
    size = (2 * MARGIN + len(columns) * (TILE + GAP) - GAP, top + sum(heights) + 30 * len(rows) + MARGIN)
    page = Image.new("RGB", size, PAGE)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN - 4), title, INK, title_font)
    draw.text((MARGIN, MARGIN + 22), remark, FAINT, small)
    lefts = [MARGIN + index * (TILE + GAP) for index in range(len(columns))]
    for left, column in zip(lefts, columns):
        draw.text((left + TILE / 2, top - 10), column, INK, font, anchor="ms")
    y = top
    for row, height, note in zip(rows, heights, notes):
        for left, picture in zip(lefts, row):
            page.paste(Image.fromarray(picture).resize((TILE, height), Image.Resampling.NEAREST), (left, y))
        draw.text((MARGIN, y + height + 5), note, FAINT, small)
        y += height + 30
    return page


def _save(page: Image.Image, kind: str, run: Run) -> None:
    path = run.picture_path().with_name(f"{kind}_{run.step:08d}.png")
    try:
        page.save(path)
    except OSError as error:
        run.log.say(f"warning: picture {path} could not be written ({error.strerror}); going on")
