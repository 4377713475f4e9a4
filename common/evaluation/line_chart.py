"""A line chart as SVG text, which a page can hold without files or scripts beside it."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 14, 44  # margins around the axes, in pixels
# Colors of Okabe and Ito, which the color-blind can tell apart; later lines are dashed.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
TICKS = 5

Points = Sequence[tuple[float, float]]


def line_style(index: int) -> str:
    """SVG attributes of the `index`-th line: its color and, beyond the colors, dashes."""
    dashes = f' stroke-dasharray="{3 * (index // len(COLORS))} 3"' if index >= len(COLORS) else ""
    return f'stroke="{COLORS[index % len(COLORS)]}"{dashes}'


def line_chart(lines: Mapping[str, Points], ylabel: str, xlabel: str = "step") -> str:
    """Draw lines on one pair of axes; lines keep their color by their place in `lines`, also beside empty ones.

    Args:
        lines: Points (x, y), finite, by name; a line without points is not drawn.
        ylabel, xlabel: Names of the axes.

    Returns:
        An <svg> element; an empty text if no line has a point.
    """
    points = [point for line in lines.values() for point in line]
    if not points:
        return ""
    xs, ys = ([float(point[axis]) for point in points] for axis in (0, 1))
    x_ticks, y_ticks = ticks(min(0.0, *xs), max(xs)), ticks(min(ys), max(ys))
    x_of = _scale(min(0.0, *xs), max(max(xs), x_ticks[0] + 1), LEFT, WIDTH - RIGHT)
    y_of = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(ylabel)} by {escape(xlabel)}">']
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#e3e3e8"/>')
        parts.append(_label(LEFT - 8, y + 4, f"{tick:g}", "end"))
    parts += [_label(x_of(tick), HEIGHT - BOTTOM + 18, f"{tick:g}", "middle") for tick in x_ticks if tick <= max(xs)]
    parts.append(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}" stroke="#888"/>'
    )
    parts.append(_label(middle_x, HEIGHT - 6, xlabel, "middle"))
    turned = f' transform="rotate(-90 14 {middle_y})"'
    parts.append(_label(14, middle_y, ylabel, "middle", turned))
    for index, (name, line) in enumerate(lines.items()):
        parts += _line(name, [(x_of(x), y_of(y)) for x, y in line], line, index)
    return "\n".join([*parts, "</svg>"])


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, evenly spaced, from the last below `low` to the first above `high`; at least two."""
    span = (high - low) or abs(high) or 1.0
    raw = span / TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def _line(name: str, places: Points, values: Points, index: int) -> list[str]:
    if not places:
        return []
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline points="{path}" fill="none" stroke-width="2" {line_style(index)}/>']
    color = COLORS[index % len(COLORS)]
    for (x, y), (step, value) in zip(places, values):
        # Invisible until the pointer is over it; the browser shows the title.
        title = f"<title>{escape(name)}: {value:.4g} at {step:g}</title>"
        shown = "" if len(places) == 1 else ' class="dot"'
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"{shown}>{title}</circle>')
    return parts


def _label(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    style = 'font-size="13" fill="#55555e"'
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {style}{more}>{escape(text)}</text>'


def _scale(low: float, high: float, start: float, end: float):
    return lambda value: start + (value - low) / (high - low) * (end - start)
