"""Lesions, drawings and shapes with soft edges, of which phantoms are made.

Everything is drawn in units of the image height with ``y`` downwards; ``x`` runs from the midline of a chest (patient's
left at positive ``x``, as films are hung) and from the chest wall of a breast. Absorption is additive along a ray, so
organs, bones and lesions are added up; 0 is air beside the patient, 1 the densest tissue shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import fft, ndimage

Float = NDArray[np.floating[Any]]
"""An image; float32 if it has two dimensions, for speed."""
Bool = NDArray[np.bool_]
Side = Literal["L", "R"]
BreastView = Literal["CC", "MLO"]
LesionKind = Literal["ground_glass", "consolidation", "mass", "calcification"]
SIDES: tuple[Side, ...] = ("L", "R")
VIEWS: tuple[BreastView, ...] = ("CC", "MLO")


@dataclass(frozen=True)
class Lesion:
    """One lesion of a patient, drawn in each of the patient's images.

    Attributes:
        kind: Class of the lesion's box.
        malignant: Whether a mass is spiculated or a cluster of calcifications fine and irregular.
        at: Position: chest ``(side, height, depth)`` with side -1 (image left) or 1; breast ``(depth, CC, MLO)``, each
            a share in [0, 1] of the available range.
        radius: Mean radius in image heights.
        strength: Absorption added, as a multiple of what is usual for the kind.
        seed: Seed of the lesion's shape.
    """

    kind: LesionKind
    malignant: bool
    at: tuple[float, float, float]
    radius: float
    strength: float
    seed: int


@dataclass(frozen=True)
class Drawing:
    """The absorption image before the scanner, and its labels.

    Attributes:
        absorption: float32 (H, W) in [0, 1].
        organ: Boolean (H, W): the lung fields, or the breast.
        lesions: Kind and boolean (H, W) mask of each lesion that can be seen.
    """

    absorption: Float
    organ: Bool
    lesions: list[tuple[LesionKind, Bool]] = field(default_factory=list)

    @property
    def diseased(self) -> Bool:
        """Return the union of the lesions' masks."""
        union = np.zeros_like(self.organ)
        for _, mask in self.lesions:
            union |= mask
        return union


def grid(h: int, w: int) -> tuple[Float, Float]:
    """Return ``y`` (H, 1) and ``x`` (1, W) of the pixel centres, in image heights."""
    return ((np.arange(h, dtype=np.float32) + 0.5) / h)[:, None], ((np.arange(w, dtype=np.float32) + 0.5) / h)[None]


def step(d: Float, soft: float) -> Float:
    """Return a smooth step from 0 to 1 over ``soft``, centred where ``d`` is 0."""
    u: Float = np.clip(d / np.float32(soft) + np.float32(0.5), 0, 1)
    smooth: Float = u * u * (3 - 2 * u)
    return smooth


def bump(d: Float, at: float, width: float) -> Float:
    """Return a Gaussian of height 1."""
    bell: Float = np.exp(-(((d - at) / width) ** 2))
    return bell


def rotated(x: Float, y: Float, turn: float, rx: float, ry: float) -> Float:
    """Return the squared radius of an ellipse turned clockwise: below 1 inside."""
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    squared: Float = ((x * cos + y * sin) / rx) ** 2 + ((y * cos - x * sin) / ry) ** 2
    return squared


def blob(x: Float, y: Float, rx: float, ry: float, soft: float = 1.0) -> Float:
    """Return a soft ellipse of height 1."""
    return step(1 - np.sqrt((x / rx) ** 2 + (y / ry) ** 2), soft)


def tube(distance: Float, radius: float) -> Float:
    """Return a bone seen from the side: a dense cortex round a paler marrow."""
    v = distance / radius
    dense: Float = 0.62 + 0.38 * np.minimum(v, 1) ** 3
    return dense * step(1 - v, 0.35)


def wobble(angle: Float, rng: Generator, amount: float, waves: int) -> Float:
    """Return a closed irregular outline: radius about 1 as a function of the angle."""
    out = np.ones_like(angle)
    for k in range(2, waves + 1):
        height, phase = np.float32(amount * rng.uniform(0.3, 1) / np.sqrt(k)), np.float32(rng.uniform(0, 2 * np.pi))
        out += height * np.cos(k * angle + phase)
    return np.clip(out, 0.45, 1.6)


def clouds(shape: tuple[int, int], beta: float, rng: Generator) -> Float:
    """Return a random field of unit variance whose power falls with frequency as ``f**-beta``, as in tissue."""
    h, w = (fft.next_fast_len(n, real=True) for n in shape)
    spectrum = fft.rfft2(rng.standard_normal((h, w), dtype=np.float32))
    out = fft.irfft2(spectrum * power((h, w), beta), s=(h, w))[: shape[0], : shape[1]]
    unit: Float = ((out - out.mean()) / out.std()).astype(np.float32)
    return unit


@lru_cache(maxsize=32)
def power(shape: tuple[int, int], beta: float) -> Float:
    """Return the amplitude of each frequency of noise whose power falls with its ``beta``-th power."""
    f = np.hypot(fft.fftfreq(shape[0])[:, None] * shape[0], fft.rfftfreq(shape[1])[None] * shape[0])
    filtered: Float = (np.maximum(f, 1.0) ** (-beta / 2) * (f > 0)).astype(np.float32)
    return filtered


def streaks(x: Float, y: Float, other: Bool, rng: Generator, trunk: float) -> tuple[Float, Float]:
    """Return thin lines that fan out of the origin and wander (0..1), and the distance from the origin.

    ``other`` marks pixels that take their lines from a second, independent fan; ``trunk`` is how much broader the lines
    begin than they end.
    """
    r, rows, angles = np.hypot(x, y), 12, 128
    table = rng.standard_normal((rows, 2 * angles)).astype(np.float32)
    for i, line in enumerate(table):  # few and broad at the origin, many and fine far out
        table[i] = ndimage.gaussian_filter1d(line, 0.9 + 3.0 * trunk * 0.6**i, mode="wrap")
        table[i] /= table[i].std()
    table = ndimage.gaussian_filter1d(table, 1.2, axis=0)
    column = (np.arctan2(y, x) * np.float32(0.5 / np.pi) + np.float32(0.5)) * (angles - 1) + angles * other
    row = np.minimum(r, 1) * (rows - 1)
    noise = ndimage.map_coordinates(table / table.std(), [row, column], order=1, mode="nearest")
    return np.clip(1 - 1.8 * np.abs(noise), 0, 1), r


@lru_cache(maxsize=32)
def letters(text: str, height: int) -> Float:
    """Return text as an image of 0 to 1, as high as the letters."""
    font = ImageFont.load_default(height)
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("L", (int(right - left) + 1, int(bottom - top) + 1))
    ImageDraw.Draw(image).text((-left, -top), text, 255, font)
    letters: Float = np.asarray(image, np.float32) / 255
    return letters


def stamp(image: Float, text: str, x: float, y: float) -> None:
    """Write text of lead into an image, centred at a share of its width and height."""
    lead = letters(text, max(round(image.shape[0] * 0.05), 6))
    h, w = (min(a, b) for a, b in zip(lead.shape, image.shape, strict=True))
    top, left = (int(np.clip(c * n - m / 2, 0, n - m)) for c, n, m in ((y, image.shape[0], h), (x, image.shape[1], w)))
    patch = image[top : top + h, left : left + w]
    np.maximum(patch, 0.95 * lead[:h, :w], out=patch)
