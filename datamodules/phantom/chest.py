"""Draw chest films of invented patients as absorption, before the scanner."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
from numpy.random import Generator

from datamodules.phantom.drawing import (
    Bool,
    Drawing,
    Float,
    Lesion,
    LesionKind,
    blob,
    bump,
    clouds,
    grid,
    rotated,
    stamp,
    step,
    streaks,
    tube,
)


@dataclass(frozen=True)
class Chest:
    """Anatomy of one chest, shared by all films of a patient; lengths in image heights."""

    width: float
    apex: float
    dome: float
    heart: float
    heart_tilt: float
    wall: float
    shoulder: float
    ribs: float
    rib_drop: float
    clavicles: float
    breasts: float
    gas: float
    texture: float
    seed: int

    @classmethod
    def sample(cls, rng: Generator) -> Self:
        """Draw the anatomy of one patient."""
        u = rng.uniform
        return cls(
            width=u(0.365, 0.425),
            apex=u(0.09, 0.13),
            dome=u(0.71, 0.79),
            heart=u(0.88, 1.12),
            heart_tilt=u(0.45, 0.8),
            wall=u(0.045, 0.1),
            shoulder=u(0.12, 0.34),
            ribs=u(0.064, 0.074),
            rib_drop=u(0.24, 0.34),
            clavicles=u(0.15, 0.19),
            breasts=u(0.05, 0.13) if u() < 0.5 else 0.0,
            gas=u(0.3, 1.0) if u() < 0.6 else 0.0,
            texture=u(0.8, 1.2),
            seed=int(rng.integers(2**31)),
        )

    def posed(self, rng: Generator, portable: bool) -> tuple[Self, tuple[float, float]]:
        """Return the anatomy of one film (breathing state, larger heart if portable) and the patient's shift."""
        breath = rng.uniform(-0.015, 0.015) - 0.02 * portable
        pose = replace(self, dome=self.dome + breath, heart=self.heart * (1.1 if portable else 1.0))
        return pose, (float(rng.uniform(-0.025, 0.025)), float(rng.uniform(-0.02, 0.02)))


def sample_opacities(rng: Generator, kind: Literal["ground_glass", "consolidation"]) -> list[Lesion]:
    """Draw the opacities of one diseased chest, one to three, of which at least the first is of the given kind."""
    quadrants = rng.permutation([(side, height) for side in (-1.0, 1.0) for height in (0.3, 0.72)])
    count = int(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2]))
    lesions = []
    for i, (side, height) in enumerate(quadrants[:count]):
        this: LesionKind = "ground_glass" if i and rng.random() < 0.5 else kind
        lesions.append(
            Lesion(
                kind=this,
                malignant=False,
                at=(float(side), float(height + rng.uniform(-0.12, 0.12)), float(rng.uniform(0.3, 0.7))),
                radius=float(rng.uniform(0.075, 0.125) if this == "ground_glass" else rng.uniform(0.06, 0.1)),
                strength=float(rng.uniform(0.85, 1.2)),
                seed=int(rng.integers(2**31)),
            )
        )
    return lesions


def draw_chest(
    chest: Chest, lesions: list[Lesion], size: int, shift: tuple[float, float] = (0.0, 0.0), marker: bool = True
) -> Drawing:
    """Draw a frontal chest film.

    Args:
        chest: Anatomy as this film shows it, see ``Chest.posed``.
        lesions: Opacities, see ``sample_opacities``.
        size: Height and width in pixels.
        shift: Displacement ``(x, y)`` of the patient.
        marker: Whether a lead letter L lies beside the patient's left shoulder.
    """
    rng = np.random.default_rng(chest.seed)
    y, x = grid(size, size)
    x, y, c = x - np.float32(0.5 + shift[0]), y - np.float32(shift[1]), chest
    ax, left = np.abs(x), (x > 0).astype(np.float32)

    # The cage: half-width at each height; lungs fill it between mediastinum, heart and diaphragm.
    t = np.clip((y - c.apex) / (0.9 - c.apex), 0, 1)
    cage = c.width * np.sqrt(np.clip(1 - (1 - np.minimum(t / 0.85, 1)) ** 2.5, 1e-6, 1))
    s = np.clip(ax / cage, 0, 1)
    hr = rotated(x - 0.05, y - (c.dome - 0.085), c.heart_tilt, 0.185 * c.heart, 0.14 * c.heart)
    bulge = left * (bump(y, 0.34, 0.05) * 0.04 + bump(y, 0.45, 0.07) * 0.03) + (1 - left) * bump(y, 0.63, 0.13) * 0.05
    medial = 0.052 + 0.09 * np.exp(-t / 0.045) + bulge
    off = (ax - 0.2 * c.width / 0.39) / 0.2
    dome = c.dome + 0.022 * step(x, 0.16) + 0.11 * np.maximum(off, 0) ** 2.3 + 0.05 * np.minimum(off, 0) ** 2
    soft = 0.012
    side = step(cage - ax, soft) * step(ax - medial, 2 * soft)
    above = step(dome - y, soft)
    lung = side * step(y - c.apex, soft) * above * step(hr - 1, 0.1)
    air = lung * (1 - s * s) ** np.float32(0.3)

    lateral = c.width + c.wall + 0.35 * step(0.36 - y, 0.12)
    body = step(y - c.shoulder * (ax - 0.09), 0.03) * step(lateral - ax, 0.03)
    image = body * (0.33 + 0.27 * np.sqrt(np.clip(1 - (ax / (lateral + 0.02)) ** 2, 0, 1)))
    image -= 0.42 * air

    # Behind and between the lungs.
    middle = step(0.075 + bulge - ax, 0.09) * step(y - 0.16, 0.3)
    heart = np.clip(1 - hr, 0, 1)
    thick = 0.15 * middle + (0.03 * step(heart, 0.2) + 0.15 * np.sqrt(heart)) * step(y - c.dome + 0.17, 0.2)
    abdomen = (0.21 - 0.1 * step(ax - c.width, 0.08)) * (1 - above)
    image += body * np.maximum(thick * (0.3 + 0.7 * above), abdomen) + 0.02 * body * (1 - above) * heart
    vertebra = np.cos(2 * np.pi * y / (0.045 + 0.012 * y))
    image += body * step(0.032 - ax, 0.014) * (0.03 + 0.012 * vertebra)
    image -= 0.1 * step(0.022 - np.abs(x + 0.006), 0.014) * step(0.33 - y, 0.03)  # trachea
    if c.gas:
        bubble = blob(x - 0.19, y - (c.dome + 0.1), 0.085, 0.045)
        image -= 0.16 * c.gas * bubble * step(y - dome - 0.015, 0.015)
    if c.breasts:
        edge = rotated(ax - 0.24, y - (c.dome - 0.05), 0.0, 0.17, 0.19)
        image += c.breasts * np.sqrt(np.clip(1 - edge, 0, 1)) * step(y - c.dome + 0.2, 0.2)

    # Vessels fan out of the hila and thin towards the periphery.
    hilum = 0.47 + 0.02 * (1 - left)
    fan, far = streaks(ax - 0.075, y - hilum, x > 0, rng, 1.0)
    mottle = clouds((size, size), 2.4, rng)
    image += c.texture * air * (0.24 * fan * (1 - np.exp(-far / 0.03)) * np.exp(-far / 0.16) + 0.025 * mottle)
    image += 0.09 * blob(ax - 0.085, y - hilum, 0.055, 0.085, 1.3) * body
    image += body * (1 - 0.6 * step(thick - 0.08, 0.1)) * _bones(y, ax, s, cage, above, c)
    image += 0.012 * body * (1 - lung) * mottle

    seen: list[tuple[LesionKind, Bool]] = []
    organ = lung > 0.5
    for lesion in lesions:
        alpha = _opacity(lesion, x, y, c) * lung
        mask = (alpha > 0.4) & organ
        if mask.sum() < 0.0004 * size * size:
            continue
        amount, grain = (0.2, 0.25) if lesion.kind == "ground_glass" else (0.37, 0.05)
        image += amount * lesion.strength * alpha * (1 + grain * mottle) * (0.7 + 0.3 * air)
        seen.append((lesion.kind, mask))
    image = np.clip((image + 0.01) / 1.02, 0, 1)
    if marker:
        stamp(image, "L", 0.93, 0.04)
    return Drawing(image.astype(np.float32), organ, seen)


def _bones(y: Float, ax: Float, s: Float, cage: Float, above: Float, c: Chest) -> Float:
    """Return ribs, clavicles, shoulder blades and humeral heads.

    A rib runs round the cage from the spine (angle 0) to the sternum (angle 1) while it drops, so that the near and
    the far half of every rib follow from one curve, and all ribs from one phase.
    """
    turn = np.arcsin(np.minimum(s, 0.995)) / np.float32(np.pi)
    slope = 1 / (np.pi * cage * np.sqrt(1.003 - s * s))
    shown = (0.3 + 0.7 * above) * (1 + 0.7 * s**6) * step(cage + 0.004 - ax, 0.008)
    out = np.zeros_like(s)
    for angle, amount, fade in (
        (turn, 0.095, step(ax - 0.03, 0.02)),
        (1 - turn, 0.04, step(s - 0.45, 0.15) * step(0.78 - y, 0.1)),
    ):
        drop = c.rib_drop * angle * np.sqrt(angle) - 0.02 * np.sin(np.minimum(angle, 0.25) * np.float32(4 * np.pi))
        steep = np.sqrt(1 + (1.5 * c.rib_drop * np.sqrt(angle) * slope) ** 2)
        phase = (y - c.apex - 0.02 - drop) / c.ribs
        number = np.clip(np.round(phase), 0, 10)
        out += amount * fade * tube(np.abs(phase - number) * c.ribs / steep, 0.0145)
    out *= shown
    out += 0.06 * np.exp(-(((ax - cage) / 0.008) ** 2)) * (0.4 + 0.6 * above) * step(ax - 0.1, 0.08)
    along = (ax - 0.04) / 0.34
    collar = c.clavicles + 0.03 - 0.085 * along + 0.018 * np.sin(2 * np.pi * along)
    out += 0.12 * tube(np.abs(y - collar) / 1.06, 0.0155) * step(along, 0.06) * step(1.05 - along, 0.08)
    blade = step(ax - (0.285 + 0.2 * (y - 0.22)), 0.012) * step(0.52 - y, 0.03) * step(y - collar, 0.03)
    out += 0.04 * blade * step(0.43 - ax, 0.08)
    out += 0.1 * blob(ax - 0.455, y - 0.2, 0.06, 0.065, 0.3)
    return out


def _opacity(lesion: Lesion, x: Float, y: Float, c: Chest) -> Float:
    """Return the share (0..1) of the lung's depth that an opacity fills: confluent patches with a soft border."""
    side, height, depth = lesion.at
    cy = c.apex + height * (c.dome - c.apex)
    reach = c.width * np.sqrt(1 - (1 - min((cy - c.apex) / (0.9 - c.apex) / 0.85, 1)) ** 2.5)
    inner = 0.1 + (0.07 if side > 0 and height > 0.55 else 0.0)
    cx = side * (inner + depth * (reach - inner))
    rng = np.random.default_rng(lesion.seed)
    total: Float = np.zeros((), np.float32)
    for i in range(7):
        phi, far = rng.uniform(0, 2 * np.pi), lesion.radius * (rng.uniform(0.5, 1.05) if i else 0.0)
        width = lesion.radius * (rng.uniform(0.18, 0.48) if i else 0.55)
        dx, dy = x - np.float32(cx + far * np.cos(phi)), y - np.float32(cy + far * np.sin(phi))
        total = total + np.exp(dx * dx * (-0.5 / width**2)) * np.exp(dy * dy * (-0.5 / width**2))
    filled = (total / np.float32(0.5)) ** np.float32(1.6 if lesion.kind == "ground_glass" else 2.5)
    return filled / (1 + filled)
