"""Pictures: labels in color, panels of samples, training curves."""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common import IGNORE
from common.errors import UserError

IGNORE_COLOR = (255, 255, 255)
PAGE, INK, FAINT = (240, 240, 243), (30, 30, 35), (115, 115, 125)
TILE = 256  # width of a picture in a panel, in pixels
LIGHT, DARK = (230, 230, 232), (45, 45, 50)  # True and False of bool maps
MARGIN, GAP, SWATCH = 20, 8, 14
# Shares in metrics.jsonl that the curve shows, with their descriptions.
SHARES = {"confident": "pixels above the threshold", "largest_class": "largest pseudo-label class"}
# Dark blue over teal to yellow: lightness rises with confidence, also in print and for the color-blind.
CONFIDENCE_STOPS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


@dataclass(frozen=True)
class Sample:
    """One image with its label and predictions; tensors on the CPU.

    Args:
        name: Id of the image.
        image: uint8 [3,H,W].
        prediction: Class ids [H,W].
        label: Class ids [H,W], 255 = ignore; None for an unlabeled image.
        confidence: [H,W] in [0,1].
        pseudo_label: Class ids [H,W], 255 = ignore.
        maps: Further maps of a paper, by column title: class ids [H,W], 255 = ignore; or bool [H,W], where True is
            light.
    """

    name: str
    image: Tensor
    prediction: Tensor
    label: Tensor | None = None
    confidence: Tensor | None = None
    pseudo_label: Tensor | None = None
    maps: Mapping[str, Tensor] = field(default_factory=dict)


def colorize(label: Tensor | np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Map class ids [H,W] to colors uint8 [H,W,3]; 255 (ignore) is white.

    Args:
        label: Class ids [H,W].
        palette: uint8 [256,3].
    """
    return _with_ignore(palette)[np.asarray(label).astype(np.uint8)]


def save_label(
    label: Tensor | np.ndarray, palette: np.ndarray, path: Path, ignore_color: Sequence[int] = IGNORE_COLOR
) -> None:
    """Write class ids [H,W] as a palette PNG: pixel values are ids, shown in the colors uint8 [256,3]."""
    picture = Image.fromarray(np.asarray(label).astype(np.uint8)).convert("P")
    picture.putpalette(_with_ignore(palette, ignore_color).tobytes())
    picture.save(path)


def save_ids(label: Tensor | np.ndarray, path: Path) -> None:
    """Write class ids [H,W] as a gray PNG whose pixel values are the ids."""
    Image.fromarray(np.asarray(label).astype(np.uint8)).save(path)


def overlay(image: Tensor, label: Tensor | np.ndarray, palette: np.ndarray, opacity: float = 0.55) -> Image.Image:
    """Blend an image uint8 [3,H,W] with the colors of class ids [H,W]; borders between classes are white.

    A black class (VOC's background) leaves the image unchanged.
    """
    colors, ids = colorize(label, palette), np.asarray(label)
    shares = opacity * colors.any(-1, keepdims=True)
    mixed = (1 - shares) * _image(image) + shares * colors
    border = np.zeros(ids.shape, bool)
    border[:-1] |= ids[:-1] != ids[1:]
    border[:, :-1] |= ids[:, :-1] != ids[:, 1:]
    mixed[border] = 255
    return Image.fromarray(mixed.round().astype(np.uint8))


def side_by_side(pictures: Sequence[np.ndarray], gap: int = 15) -> Image.Image:
    """Join pictures uint8 [H,W,3] of one height in a row, with `gap` black pixels between them."""
    black = np.zeros((pictures[0].shape[0], gap, 3), np.uint8)
    row = [part for picture in pictures for part in (picture, black)][:-1]
    return Image.fromarray(np.concatenate(row, axis=1))


def compare(sample: Sample, palette: np.ndarray) -> Image.Image:
    """Show image, prediction and label of a sample side by side; ignored pixels are white in the last two."""
    prediction = colorize(sample.prediction, palette)
    pictures = [_image(sample.image), prediction]
    if sample.label is not None:
        prediction[np.asarray(sample.label) == IGNORE] = IGNORE_COLOR
        pictures.append(colorize(sample.label, palette))
    return side_by_side(pictures)


def panel(samples: Sequence[Sample], palette: np.ndarray, classes: Sequence[str], title: str) -> Image.Image:
    """Draw samples in rows: image, label, prediction and, if any sample has them, pseudo-label, confidence and maps.

    The tile of a map that a sample lacks stays blank. A legend below the rows names the classes that occur.

    Args:
        samples: At least one.
        palette: uint8 [256,3].
        classes: Names, by class id.
        title: First line, e.g. run and step.
    """
    columns = ["image", "label", "prediction"]
    columns += [name for name in ("pseudo_label", "confidence") if any(getattr(s, name) is not None for s in samples)]
    columns += dict.fromkeys(name for sample in samples for name in sample.maps)
    heights = [round(TILE * sample.image.shape[1] / sample.image.shape[2]) for sample in samples]
    width = 2 * MARGIN + len(columns) * TILE + (len(columns) - 1) * GAP
    title_font, font, small = (ImageFont.load_default(size) for size in (18, 14, 12))
    title_lines = _wrap(title, title_font, width - 2 * MARGIN)
    maps = [m for s in samples for m in (s.label, s.prediction, s.pseudo_label, *s.maps.values()) if m is not None]
    key = legend(class_entries(maps, palette, classes), width - 2 * MARGIN)
    top = MARGIN + 24 * len(title_lines) + 32
    page = Image.new("RGB", (width, top + sum(heights) + 30 * len(samples) + key.height + MARGIN), PAGE)
    draw = ImageDraw.Draw(page)

    draw.multiline_text((MARGIN, MARGIN - 4), "\n".join(title_lines), INK, title_font, spacing=6)
    lefts = [MARGIN + index * (TILE + GAP) for index in range(len(columns))]
    for left, column in zip(lefts, columns):
        draw.text((left + TILE / 2, top - 10), column.replace("_", "-"), INK, font, anchor="ms")
    y = top
    for sample, height in zip(samples, heights):
        for left, column in zip(lefts, columns):
            tile = _tile(sample, column, palette, (TILE, height))
            if tile is not None:
                page.paste(tile, (left, y))
            else:
                draw.rectangle((left, y, left + TILE - 1, y + height - 1), outline=(210, 210, 215))
        draw.text((MARGIN, y + height + 5), sample.name, FAINT, small)
        y += height + 30
    page.paste(key, (MARGIN, y))
    if "confidence" in columns:
        _confidence_key(page, draw, lefts[columns.index("confidence")], y - 18, small)
    return page


def class_entries(
    maps: Sequence[Tensor | np.ndarray], palette: np.ndarray, classes: Sequence[str]
) -> list[tuple[str, tuple]]:
    """List names and colors of the classes that occur in maps of class ids; bool maps are skipped.

    Args:
        maps: Class ids [H,W], or bool [H,W].
        palette: uint8 [256,3].
        classes: Names, by class id.
    """
    present = np.unique(np.concatenate([np.unique(m) for m in map(np.asarray, maps) if m.dtype != bool]))
    colors = _with_ignore(palette)
    names = dict(enumerate(classes)) | {IGNORE: "ignore"}
    return [(names[index], tuple(colors[index].tolist())) for index in present.tolist()]


def legend(entries: Sequence[tuple[str, tuple]], width: int) -> Image.Image:
    """Draw a swatch and a name per entry (name, RGB), in lines of at most `width` pixels."""
    font = ImageFont.load_default(14)
    places, height = _flow(entries, font, width)
    strip = Image.new("RGB", (width, height + 2 * GAP), PAGE)
    draw = ImageDraw.Draw(strip)
    for (name, color), (x, y) in zip(entries, places):
        draw.rectangle((x, y + GAP, x + SWATCH, y + GAP + SWATCH), fill=color, outline=FAINT)
        draw.text((x + SWATCH + 6, y + GAP + SWATCH / 2), name, INK, font, anchor="lm")
    return strip


def curve(metrics_file: Path, out: Path) -> None:
    """Draw the losses, the mIoU and, where they were counted, the signs of a run (docs/troubleshooting.md).

    Args:
        metrics_file: The run's `metrics.jsonl`.
        out: Picture to write. Without matplotlib nothing is written, and one line names the package to install.

    Raises:
        UserError: the log cannot be read.
    """
    lines = _read_lines(metrics_file)
    shares = [_series(lines, name) for name in SHARES]
    lost = _series(lines, "classes_not_predicted")
    figure = _figure()
    if figure is None:
        return
    has_signs = any(steps for steps, _ in [*shares, lost])
    losses, scores, *below = figure.subplots(2 + has_signs, 1, sharex=True)
    for name in sorted({name for line in lines for name in line if "loss" in name}):
        steps, values = _series(lines, name)
        losses.plot(steps, values, label=name, linewidth=1.8 if name == "loss" else 1.0)
    _plot_scores(scores, *_series(lines, "valid/miou"), "step")
    if losses.lines:
        losses.legend(frameon=False)
    losses.set_ylabel("loss")
    for axes in below:
        _plot_signs(axes, dict(zip(SHARES.values(), shares)), lost)
        scores.set_xlabel("")
        figure.set_size_inches(8, 9)
    _save_figure(figure, out)


def _plot_signs(axes, shares: Mapping[str, tuple], lost: tuple[Sequence[int], Sequence[float]]) -> None:
    """Draw shares (%) by their description on the left scale, and numbers of classes on the right one."""
    for color, (name, (steps, values)) in zip(("tab:blue", "tab:red"), shares.items()):
        if steps:
            axes.plot(steps, [100 * value for value in values], label=name, color=color)
    axes.set(ylim=(-4, 104), ylabel="share (%)", xlabel="step")
    if lost[0]:
        numbers = axes.twinx()
        numbers.plot(*lost, "s:", color="tab:gray", markersize=4, label="classes not predicted (right)")
        numbers.set(ylim=(-0.04 * max(1, *lost[1]), 1.04 * max(1, *lost[1])), ylabel="number of classes")
        numbers.yaxis.get_major_locator().set_params(integer=True)
    handles = [line for part in axes.figure.axes[2:] for line in part.lines]
    labels = [line.get_label() for line in handles]
    axes.legend(handles, labels, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize="small")


def score_curve(numbers: Sequence[float], miou: Sequence[float], unit: str, out: Path) -> None:
    """Draw the mIoU (a share; NaN is left out) of evaluated checkpoints against their epoch or step (`unit`).

    Without matplotlib nothing is written, and one line names the package to install.
    """
    figure = _figure()
    if figure is None:
        return
    points = [(number, value) for number, value in zip(numbers, miou) if math.isfinite(value)]
    _plot_scores(figure.subplots(), [number for number, _ in points], [value for _, value in points], unit)
    _save_figure(figure, out)


def _figure():
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no curve drawn: matplotlib is missing (pip install matplotlib)")
        return None
    return Figure(figsize=(8, 6), layout="constrained")


def _plot_scores(axes, numbers: Sequence[float], miou: Sequence[float], unit: str) -> None:
    axes.plot(numbers, [100 * value for value in miou], marker="o", markersize=3, color="tab:green")
    if miou:
        best = max(range(len(miou)), key=miou.__getitem__)
        where, offset = (numbers[best], 100 * miou[best]), (0, 6)
        axes.annotate(f"{where[1]:.2f}", where, offset, textcoords="offset points", ha="center")
        axes.margins(y=0.15)
    axes.set_ylabel("mIoU of the validation images (%)")
    axes.set_xlabel(unit)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _save_figure(figure, out: Path) -> None:
    for axes in figure.axes:
        is_right = axes.yaxis.get_label_position() == "right"
        if not is_right:
            axes.grid(alpha=0.3)
        axes.spines["top"].set_visible(False)
        axes.spines["right"].set_visible(is_right)
    figure.savefig(out, dpi=120)


def _read_lines(metrics_file: Path) -> list[dict]:
    try:
        text = metrics_file.read_text()
    except OSError as error:
        raise UserError(f"no curve drawn: {metrics_file} cannot be read ({error.strerror})") from None
    # While a run is writing, the last line may be incomplete.
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _series(lines: list[dict], name: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[name]) for line in lines if math.isfinite(line.get(name, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def _with_ignore(palette: np.ndarray, ignore_color: Sequence[int] = IGNORE_COLOR) -> np.ndarray:
    return np.concatenate([palette[:IGNORE], np.array([ignore_color], np.uint8)])


def _image(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def _tile(sample: Sample, column: str, palette: np.ndarray, size: tuple[int, int]) -> Image.Image | None:
    content = sample.maps[column] if column in sample.maps else getattr(sample, column, None)
    if content is None:
        return None
    if column == "image":
        return Image.fromarray(_image(content)).resize(size, Image.Resampling.LANCZOS)
    content = np.asarray(content)
    if content.dtype == bool:
        colors = np.where(content[..., None], LIGHT, DARK).astype(np.uint8)
    else:
        colors = _confidence_colors(content) if column == "confidence" else colorize(content, palette)
    return Image.fromarray(colors).resize(size, Image.Resampling.NEAREST)


def _confidence_colors(confidence: np.ndarray) -> np.ndarray:
    """Map confidence [...] in [0,1] to colors uint8 [...,3]."""
    stops = np.linspace(0, 1, len(CONFIDENCE_STOPS))
    channels = [np.interp(confidence, stops, channel) for channel in zip(*CONFIDENCE_STOPS)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _confidence_key(page: Image.Image, draw: ImageDraw.ImageDraw, left: int, y: int, font) -> None:
    """Draw a bar of the confidence colors from 0 to 1 below their column."""
    bar = _confidence_colors(np.tile(np.linspace(0, 1, TILE - 40), (8, 1)))
    page.paste(Image.fromarray(bar), (left + 20, y))
    draw.text((left + 10, y + 4), "0", FAINT, font, anchor="mm")
    draw.text((left + TILE - 10, y + 4), "1", FAINT, font, anchor="mm")


def _flow(entries: Sequence[tuple[str, tuple]], font, width: int) -> tuple[list[tuple[int, int]], int]:
    """Place legend entries line by line, like text. Returns their corners (x, y) and the height of all lines."""
    places, x, y = [], 0, 0
    for name, _ in entries:
        length = SWATCH + 6 + round(font.getlength(name)) + 18
        if x and x + length - 18 > width:
            x, y = 0, y + SWATCH + 8
        places.append((x, y))
        x += length
    return places, y + SWATCH


def _wrap(text: str, font, width: int) -> list[str]:
    return textwrap.wrap(text, max(10, int(width / font.getlength("n")))) or [""]
