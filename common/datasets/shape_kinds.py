"""Outlines and textures of the objects in the built-in data, one kind per class.

Outlines are signed distances in pixels, negative inside, at object coordinates (u, v).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# ---- outlines: signed distance in pixels at object coordinates (u, v), for an object of the given radius ----


def box(u: np.ndarray, v: np.ndarray, half_u: float, half_v: float) -> np.ndarray:
    return np.maximum(np.abs(u) - half_u, np.abs(v) - half_v)


def _disc(u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    return np.hypot(u, v) - 0.9 * radius


def _ring(u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    return np.abs(np.hypot(u, v) - 0.7 * radius) - 0.3 * radius


def _rectangle(u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    return box(u, v, 0.95 * radius, 0.7 * radius)


def _triangle(u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    return np.maximum(0.866 * np.abs(u) - 0.5 * v, v) - 0.55 * radius


def _star(u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """Five points: the angle is folded onto half a point, whose one edge runs from the inner to the outer corner."""
    half, distance = np.pi / 5, np.hypot(u, v)
    angle = np.abs(np.mod(np.arctan2(v, u), 2 * half) - half)
    inner, outer = 0.5 * radius, 1.1 * radius * np.exp(1j * half)
    normal = (outer - inner) / abs(outer - inner) * -1j
    return (distance * np.cos(angle) - inner) * normal.real + distance * np.sin(angle) * normal.imag


def _cross(u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    return np.minimum(box(u, v, radius, 0.36 * radius), box(u, v, 0.36 * radius, radius))


# ---- textures: a pattern in [-1, 1] over object coordinates, with the given wavelength in pixels ----


def _stripes(u: np.ndarray, v: np.ndarray, wavelength: float) -> np.ndarray:
    return np.tanh(3 * np.sin(2 * np.pi * u / wavelength))


def _checks(u: np.ndarray, v: np.ndarray, wavelength: float) -> np.ndarray:
    return np.tanh(5 * np.sin(np.pi * u / wavelength) * np.sin(np.pi * v / wavelength))


def _dots(u: np.ndarray, v: np.ndarray, wavelength: float) -> np.ndarray:
    from_centre = np.hypot(np.mod(u, wavelength) - wavelength / 2, np.mod(v, wavelength) - wavelength / 2)
    return np.tanh(1.2 * (0.36 * wavelength - from_centre))


def _plain(u: np.ndarray, v: np.ndarray, wavelength: float) -> np.ndarray:
    return np.tanh(u / (4 * wavelength))


class Kind(NamedTuple):
    """How objects of one class look.

    `hue` is the middle of a range wider than the step between classes; `second` is how far from it, in turns, the other
    color of the texture lies: unlike the hue itself it outlasts the color jitter of the papers' augmentation.
    """

    outline: Callable[[np.ndarray, np.ndarray, float], np.ndarray]
    texture: Callable[[np.ndarray, np.ndarray, float], np.ndarray]
    hue: float
    second: float


KINDS = (  # in the order of CLASSES, background left out
    Kind(_disc, _plain, 0 / 6, 0),
    Kind(_ring, _stripes, 1 / 6, 1 / 2),
    Kind(_rectangle, _checks, 2 / 6, 0),
    Kind(_star, _plain, 3 / 6, 1 / 3),
    Kind(_triangle, _dots, 4 / 6, 1 / 3),
    Kind(_cross, _stripes, 5 / 6, 0),
)
