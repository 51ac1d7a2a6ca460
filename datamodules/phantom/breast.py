"""Draw mammograms of invented patients as absorption, before the scanner."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.random import Generator

from datamodules.phantom.drawing import (
    Bool,
    BreastView,
    Drawing,
    Float,
    Lesion,
    LesionKind,
    Side,
    blob,
    bump,
    clouds,
    grid,
    rotated,
    stamp,
    step,
    streaks,
    wobble,
)


@dataclass(frozen=True)
class Breast:
    """Anatomy of one patient's breasts; lengths in image heights.

    Attributes:
        reach: Chest wall to nipple.
        half: Half the height at the chest wall.
        density: Share of fibroglandular tissue, 0 (fatty, BI-RADS A) to 1 (extremely dense, D).
        muscle: Width of the pectoral muscle at the top of an MLO view.
        slope: Height at which the muscle's edge meets the chest wall.
        nipple: Height of the nipple in an MLO view.
        seed: Seed of the tissue's texture (both sides differ).
    """

    reach: float
    half: float
    density: float
    muscle: float
    slope: float
    nipple: float
    seed: int

    @classmethod
    def sample(cls, rng: Generator) -> Self:
        """Draw the anatomy of one patient."""
        u = rng.uniform
        return cls(
            reach=u(0.42, 0.6),
            half=u(0.32, 0.42),
            density=float(rng.choice([0.12, 0.38, 0.65, 0.9], p=[0.2, 0.4, 0.3, 0.1]) + u(-0.08, 0.08)),
            muscle=u(0.24, 0.36),
            slope=u(0.45, 0.62),
            nipple=u(0.55, 0.63),
            seed=int(rng.integers(2**31)),
        )


def sample_breast_lesions(rng: Generator, malignant: bool) -> list[Lesion]:
    """Draw the lesions of one breast: a mass, a cluster of calcifications, or (malignant only) both at one place."""
    what = rng.choice(["mass", "calcification", "both"], p=[0.6, 0.2, 0.2] if malignant else [0.7, 0.3, 0.0])
    at = (float(rng.uniform(0.3, 0.7)), float(rng.uniform(0.3, 0.7)), float(rng.uniform(0.3, 0.75)))
    radius, strength, seed = float(rng.uniform(0.035, 0.06)), float(rng.uniform(0.9, 1.2)), int(rng.integers(2**31))
    mass = Lesion("mass", malignant, at, radius, strength, seed)
    cluster = Lesion("calcification", malignant, at, float(rng.uniform(0.03, 0.05)), strength, seed + 1)
    return {"mass": [mass], "calcification": [cluster], "both": [mass, cluster]}[str(what)]


def draw_breast(
    breast: Breast, lesions: list[Lesion], side: Side, view: BreastView, size: int, marker: bool = True
) -> Drawing:
    """Draw a mammogram as displayed: the chest wall of a left breast at the left edge, of a right one at the right.

    Args:
        breast: Anatomy, shared by the four views of a patient.
        lesions: Lesions of this breast, see ``sample_breast_lesions``.
        side: ``L`` or ``R``.
        view: ``CC`` (from above) or ``MLO`` (oblique, with the pectoral muscle).
        size: Height in pixels; the width is four fifths of it.
        marker: Whether side and view stand in the air beside the breast.
    """
    h, w = size, round(0.8 * size)
    rng = np.random.default_rng([breast.seed, side == "R", view == "MLO"])
    mlo = view == "MLO"
    b = replace(breast, reach=breast.reach * (1 + 0.03 * rng.uniform(-1, 1)), nipple=breast.nipple if mlo else 0.5)
    y, x = grid(h, w)
    half = np.float32(min(b.half, 0.97 - b.nipple))
    v = (y - b.nipple) / half
    round_ = (1 - np.sqrt(np.abs(x / b.reach) ** 2.2 + np.abs(v) ** 2.2)) * b.reach
    if mlo:  # towards the armpit the outline runs off the top of the film
        top = 0.75 * b.muscle + 0.08
        rise = np.clip((b.nipple - y) / (0.92 * b.nipple), 0, 1)
        tail = top + (b.reach - top) * (0.5 + 0.5 * np.cos(np.pi * rise))
        tail_in = (tail - x) / np.sqrt(1 + (1.6 * (b.reach - top) / b.nipple) ** 2 * step(b.nipple - y, 0.3))
        inside = np.where(y > b.nipple, round_, tail_in)
    else:
        inside = round_
    tip = blob(x - b.reach + 0.004, y - b.nipple, 0.018, 0.02, 0.8)
    skin = np.maximum(step(inside, 0.006), tip)
    thick = np.clip(inside / 0.14, 0, 1)
    image = skin * (0.12 + 0.24 * np.sqrt(thick * (2 - thick)))
    image += 0.06 * bump(inside, 0.006, 0.004) + 0.08 * tip

    # Glandular tissue: clouds thresholded by density inside a cone behind the nipple, plus strands towards the nipple.
    cloud, fine = clouds((h, w), 3.2, rng), clouds((h, w), 2.2, rng)
    cone = np.clip((inside - 0.03) / 0.09, 0, 1) * step(1.1 - np.abs(v) - 0.3 * (1 - x / b.reach), 0.6)
    cone = cone * step(x - 0.45 * b.reach * (1 - b.density), 0.3)
    gland = cone * step(cloud + 0.3 * fine + 3.8 * (b.density - 0.45), 2.6)
    strands, _ = streaks(b.reach + 0.04 - x, y - b.nipple, np.zeros_like(x, np.bool_), rng, 0.0)
    web = np.clip(1 - 2.2 * np.abs(clouds((h, w), 3.0, rng)), 0, 1)
    image += gland * (0.24 + 0.035 * fine) + thick * skin * (0.3 + 0.7 * cone) * (0.07 * strands + 0.06 * web)
    image += 0.01 * skin * fine
    if mlo:
        edge = b.muscle * np.clip(1 - y / b.slope, 0, 1) ** np.float32(0.85) - x
        muscle = skin * step(edge - 0.01, 0.05) * (1 - 0.6 * gland)
        image += muscle * (0.26 + 0.08 * np.clip(edge / 0.2, 0, 1) + 0.012 * fine)

    organ = inside > 0
    seen: list[tuple[LesionKind, Bool]] = []
    for lesion in lesions:
        depth, above, oblique = lesion.at
        u = (oblique if mlo else above) - 0.5
        cx = b.reach * (0.25 + 0.5 * depth)
        cy = b.nipple + u * 1.1 * min(b.half, 0.97 - b.nipple) * float(np.sqrt(1 - (cx / b.reach) ** 2))
        draw = _mass if lesion.kind == "mass" else _calcifications
        added, mask = draw(lesion, x - np.float32(cx), y - np.float32(cy), size, mlo)
        image += added * skin
        seen.append((lesion.kind, mask & organ))
    image = np.clip(image, 0, 1)
    if side == "R":
        image, organ, seen = image[:, ::-1].copy(), organ[:, ::-1], [(kind, mask[:, ::-1]) for kind, mask in seen]
    if marker:
        stamp(image, f"{side} {view}", 0.8 if side == "L" else 0.2, 0.05 if view == "CC" else 0.9)
    return Drawing(image.astype(np.float32), organ, seen)


def _mass(lesion: Lesion, dx: Float, dy: Float, size: int, oblique: bool) -> tuple[Float, Bool]:
    """Return a mass: smooth and oval if benign, irregular with spicules if malignant."""
    rng = np.random.default_rng(lesion.seed)
    turn = np.float32(0.7 * oblique)
    angle, r = np.arctan2(dy, dx) + turn, np.hypot(dx, dy)
    if not lesion.malignant:
        oval: Float = lesion.radius * (1 + rng.uniform(0.05, 0.2) * np.cos(2 * angle + rng.uniform(0, 6)))
        lens = np.sqrt(np.clip(1 - (r / oval) ** 2, 0, 1))
        return (0.1 * step(oval - r, 0.012) + 0.15 * lens) * lesion.strength, r < oval
    edge = lesion.radius * wobble(angle, rng, 0.2, 7)
    spicules = np.zeros_like(r)
    for i in range(count := int(rng.integers(12, 18))):
        phi = np.float32(2 * np.pi * (i + rng.uniform(-0.5, 0.5)) / count) - turn
        length = np.float32(lesion.radius * rng.uniform(1.5, 3.0))
        along, across = dx * np.cos(phi) + dy * np.sin(phi), dx * np.sin(phi) - dy * np.cos(phi)
        thin = np.clip(1 - along / length, 0, 1) * (along > 0)
        spicules = np.maximum(spicules, np.exp(-((across / 0.0045) ** 2)) * np.sqrt(thin))
    core = step(edge - r, 0.6 * lesion.radius)
    return (0.24 * core + 0.11 * spicules * step(r - 0.5 * edge, 0.03)) * lesion.strength, r < 1.15 * edge


def _calcifications(lesion: Lesion, dx: Float, dy: Float, size: int, oblique: bool) -> tuple[Float, Bool]:
    """Return a cluster of bright grains (many and fine if malignant) and the ellipse around it."""
    rng = np.random.default_rng([lesion.seed, oblique])
    count = int(rng.integers(14, 24) if lesion.malignant else rng.integers(5, 9))
    stretch, turn = rng.uniform(0.65, 0.9), rng.uniform(0, np.pi)
    out: Float = np.zeros(np.broadcast_shapes(dx.shape, dy.shape), np.float32)
    for _ in range(count):
        rho, phi = np.sqrt(rng.uniform(0, 0.8)) * lesion.radius, rng.uniform(0, 2 * np.pi)
        px, py = rho * np.cos(phi), stretch * rho * np.sin(phi)
        gx, gy = px * np.cos(turn) - py * np.sin(turn), px * np.sin(turn) + py * np.cos(turn)
        grain = max(rng.uniform(0.0022, 0.0038) if lesion.malignant else rng.uniform(0.0035, 0.0055), 0.55 / size)
        spread = np.float32(-0.5 / grain**2)
        bell = np.exp((dx - np.float32(gx)) ** 2 * spread) * np.exp((dy - np.float32(gy)) ** 2 * spread)
        out = np.maximum(out, np.float32(rng.uniform(0.7, 1)) * bell)
    across = max(stretch * lesion.radius, 1.0 / size)
    return 0.5 * lesion.strength * out, rotated(dx, dy, turn, max(lesion.radius, across), across) < 1
