"""Draws chest films and mammograms of invented patients: what the rays meet, before any scanner has touched it.

Everything is drawn in units of the image height with ``y`` downwards; ``x`` runs from the midline of a chest (patient's
left at positive ``x``, as films are hung) and from the chest wall of a breast. Absorption is additive along a ray, so
organs, bones and lesions are added up; 0 is air beside the patient, 1 the densest tissue shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, Self

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import fft, ndimage

Float = NDArray[np.floating[Any]]
"""An image; float32 wherever it has two dimensions, for speed."""
Bool = NDArray[np.bool_]
Side = Literal["L", "R"]
BreastView = Literal["CC", "MLO"]
LesionKind = Literal["ground_glass", "consolidation", "mass", "calcification"]
SIDES: tuple[Side, ...] = ("L", "R")
VIEWS: tuple[BreastView, ...] = ("CC", "MLO")


@dataclass(frozen=True)
class Lesion:
    """One lesion of a patient, seen in each of the patient's images.

    Attributes:
        kind: Class of the lesion's box.
        malignant: Whether a mass is spiculated or a cluster of calcifications fine and irregular.
        at: Position: chest ``(side, height, depth)`` with side -1 (image left) or 1; breast ``(depth, CC, MLO)``, each
            in [0, 1] of the room there is.
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
    """An image without a scanner, and its truth.

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
        """Return the anatomy as one film shows it (breathing, large heart if portable) and the patient's shift."""
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
    y, x = _grid(size, size)
    x, y, c = x - np.float32(0.5 + shift[0]), y - np.float32(shift[1]), chest
    ax, left = np.abs(x), (x > 0).astype(np.float32)

    # The cage: half-width at each height; lungs fill it between mediastinum, heart and diaphragm.
    t = np.clip((y - c.apex) / (0.9 - c.apex), 0, 1)
    cage = c.width * np.sqrt(np.clip(1 - (1 - np.minimum(t / 0.85, 1)) ** 2.5, 1e-6, 1))
    s = np.clip(ax / cage, 0, 1)
    hr = _rotated(x - 0.05, y - (c.dome - 0.085), c.heart_tilt, 0.185 * c.heart, 0.14 * c.heart)
    bulge = (
        left * (_bump(y, 0.34, 0.05) * 0.04 + _bump(y, 0.45, 0.07) * 0.03) + (1 - left) * _bump(y, 0.63, 0.13) * 0.05
    )
    medial = 0.052 + 0.09 * np.exp(-t / 0.045) + bulge
    off = (ax - 0.2 * c.width / 0.39) / 0.2
    dome = c.dome + 0.022 * _step(x, 0.16) + 0.11 * np.maximum(off, 0) ** 2.3 + 0.05 * np.minimum(off, 0) ** 2
    soft = 0.012
    side = _step(cage - ax, soft) * _step(ax - medial, 2 * soft)
    above = _step(dome - y, soft)
    lung = side * _step(y - c.apex, soft) * above * _step(hr - 1, 0.1)
    air = lung * (1 - s * s) ** np.float32(0.3)

    lateral = c.width + c.wall + 0.35 * _step(0.36 - y, 0.12)
    body = _step(y - c.shoulder * (ax - 0.09), 0.03) * _step(lateral - ax, 0.03)
    image = body * (0.33 + 0.27 * np.sqrt(np.clip(1 - (ax / (lateral + 0.02)) ** 2, 0, 1)))
    image -= 0.42 * air

    # Behind and between the lungs.
    middle = _step(0.075 + bulge - ax, 0.09) * _step(y - 0.16, 0.3)
    heart = np.clip(1 - hr, 0, 1)
    thick = 0.15 * middle + (0.03 * _step(heart, 0.2) + 0.15 * np.sqrt(heart)) * _step(y - c.dome + 0.17, 0.2)
    abdomen = (0.21 - 0.1 * _step(ax - c.width, 0.08)) * (1 - above)
    image += body * np.maximum(thick * (0.3 + 0.7 * above), abdomen) + 0.02 * body * (1 - above) * heart
    vertebra = np.cos(2 * np.pi * y / (0.045 + 0.012 * y))
    image += body * _step(0.032 - ax, 0.014) * (0.03 + 0.012 * vertebra)
    image -= 0.1 * _step(0.022 - np.abs(x + 0.006), 0.014) * _step(0.33 - y, 0.03)  # trachea
    if c.gas:
        bubble = _blob(x - 0.19, y - (c.dome + 0.1), 0.085, 0.045)
        image -= 0.16 * c.gas * bubble * _step(y - dome - 0.015, 0.015)
    if c.breasts:
        edge = _rotated(ax - 0.24, y - (c.dome - 0.05), 0.0, 0.17, 0.19)
        image += c.breasts * np.sqrt(np.clip(1 - edge, 0, 1)) * _step(y - c.dome + 0.2, 0.2)

    # Vessels fan out of the hila and thin towards the periphery.
    hilum = 0.47 + 0.02 * (1 - left)
    fan, far = _streaks(ax - 0.075, y - hilum, x > 0, rng, 1.0)
    mottle = _clouds((size, size), 2.4, rng)
    image += c.texture * air * (0.24 * fan * (1 - np.exp(-far / 0.03)) * np.exp(-far / 0.16) + 0.025 * mottle)
    image += 0.09 * _blob(ax - 0.085, y - hilum, 0.055, 0.085, 1.3) * body
    image += body * (1 - 0.6 * _step(thick - 0.08, 0.1)) * _bones(y, ax, s, cage, above, c)
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
        _stamp(image, "L", 0.93, 0.04)
    return Drawing(image.astype(np.float32), organ, seen)


def _bones(y: Float, ax: Float, s: Float, cage: Float, above: Float, c: Chest) -> Float:
    """Return ribs, clavicles, shoulder blades and humeral heads.

    A rib runs round the cage from the spine (angle 0) to the sternum (angle 1) while it drops, so that the near and
    the far half of every rib follow from one curve, and all ribs from one phase.
    """
    turn = np.arcsin(np.minimum(s, 0.995)) / np.float32(np.pi)
    slope = 1 / (np.pi * cage * np.sqrt(1.003 - s * s))
    shown = (0.3 + 0.7 * above) * (1 + 0.7 * s**6) * _step(cage + 0.004 - ax, 0.008)
    out = np.zeros_like(s)
    for angle, amount, fade in (
        (turn, 0.095, _step(ax - 0.03, 0.02)),
        (1 - turn, 0.04, _step(s - 0.45, 0.15) * _step(0.78 - y, 0.1)),
    ):
        drop = c.rib_drop * angle * np.sqrt(angle) - 0.02 * np.sin(np.minimum(angle, 0.25) * np.float32(4 * np.pi))
        steep = np.sqrt(1 + (1.5 * c.rib_drop * np.sqrt(angle) * slope) ** 2)
        phase = (y - c.apex - 0.02 - drop) / c.ribs
        number = np.clip(np.round(phase), 0, 10)
        out += amount * fade * _tube(np.abs(phase - number) * c.ribs / steep, 0.0145)
    out *= shown
    out += 0.06 * np.exp(-(((ax - cage) / 0.008) ** 2)) * (0.4 + 0.6 * above) * _step(ax - 0.1, 0.08)
    along = (ax - 0.04) / 0.34
    collar = c.clavicles + 0.03 - 0.085 * along + 0.018 * np.sin(2 * np.pi * along)
    out += 0.12 * _tube(np.abs(y - collar) / 1.06, 0.0155) * _step(along, 0.06) * _step(1.05 - along, 0.08)
    blade = _step(ax - (0.285 + 0.2 * (y - 0.22)), 0.012) * _step(0.52 - y, 0.03) * _step(y - collar, 0.03)
    out += 0.04 * blade * _step(0.43 - ax, 0.08)
    out += 0.1 * _blob(ax - 0.455, y - 0.2, 0.06, 0.065, 0.3)
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
    """Draw a mammogram as it is hung: the chest wall of a left breast at the left edge, of a right one at the right.

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
    y, x = _grid(h, w)
    half = np.float32(min(b.half, 0.97 - b.nipple))
    v = (y - b.nipple) / half
    round_ = (1 - np.sqrt(np.abs(x / b.reach) ** 2.2 + np.abs(v) ** 2.2)) * b.reach
    if mlo:  # towards the armpit the outline runs off the top of the film
        top = 0.75 * b.muscle + 0.08
        rise = np.clip((b.nipple - y) / (0.92 * b.nipple), 0, 1)
        tail = top + (b.reach - top) * (0.5 + 0.5 * np.cos(np.pi * rise))
        tail_in = (tail - x) / np.sqrt(1 + (1.6 * (b.reach - top) / b.nipple) ** 2 * _step(b.nipple - y, 0.3))
        inside = np.where(y > b.nipple, round_, tail_in)
    else:
        inside = round_
    tip = _blob(x - b.reach + 0.004, y - b.nipple, 0.018, 0.02, 0.8)
    skin = np.maximum(_step(inside, 0.006), tip)
    thick = np.clip(inside / 0.14, 0, 1)
    image = skin * (0.12 + 0.24 * np.sqrt(thick * (2 - thick)))
    image += 0.06 * _bump(inside, 0.006, 0.004) + 0.08 * tip

    # Glandular tissue: clouds thresholded by density inside a cone behind the nipple, plus strands towards the nipple.
    cloud, fine = _clouds((h, w), 3.2, rng), _clouds((h, w), 2.2, rng)
    cone = np.clip((inside - 0.03) / 0.09, 0, 1) * _step(1.1 - np.abs(v) - 0.3 * (1 - x / b.reach), 0.6)
    cone = cone * _step(x - 0.45 * b.reach * (1 - b.density), 0.3)
    gland = cone * _step(cloud + 0.3 * fine + 3.8 * (b.density - 0.45), 2.6)
    strands, _ = _streaks(b.reach + 0.04 - x, y - b.nipple, np.zeros_like(x, np.bool_), rng, 0.0)
    web = np.clip(1 - 2.2 * np.abs(_clouds((h, w), 3.0, rng)), 0, 1)
    image += gland * (0.24 + 0.035 * fine) + thick * skin * (0.3 + 0.7 * cone) * (0.07 * strands + 0.06 * web)
    image += 0.01 * skin * fine
    if mlo:
        edge = b.muscle * np.clip(1 - y / b.slope, 0, 1) ** np.float32(0.85) - x
        muscle = skin * _step(edge - 0.01, 0.05) * (1 - 0.6 * gland)
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
        _stamp(image, f"{side} {view}", 0.8 if side == "L" else 0.2, 0.05 if view == "CC" else 0.9)
    return Drawing(image.astype(np.float32), organ, seen)


def _mass(lesion: Lesion, dx: Float, dy: Float, size: int, oblique: bool) -> tuple[Float, Bool]:
    """Return a mass: smooth and oval if benign, irregular with spicules if malignant."""
    rng = np.random.default_rng(lesion.seed)
    turn = np.float32(0.7 * oblique)
    angle, r = np.arctan2(dy, dx) + turn, np.hypot(dx, dy)
    if not lesion.malignant:
        oval: Float = lesion.radius * (1 + rng.uniform(0.05, 0.2) * np.cos(2 * angle + rng.uniform(0, 6)))
        lens = np.sqrt(np.clip(1 - (r / oval) ** 2, 0, 1))
        return (0.1 * _step(oval - r, 0.012) + 0.15 * lens) * lesion.strength, r < oval
    edge = lesion.radius * _wobble(angle, rng, 0.2, 7)
    spicules = np.zeros_like(r)
    for i in range(count := int(rng.integers(12, 18))):
        phi = np.float32(2 * np.pi * (i + rng.uniform(-0.5, 0.5)) / count) - turn
        length = np.float32(lesion.radius * rng.uniform(1.5, 3.0))
        along, across = dx * np.cos(phi) + dy * np.sin(phi), dx * np.sin(phi) - dy * np.cos(phi)
        thin = np.clip(1 - along / length, 0, 1) * (along > 0)
        spicules = np.maximum(spicules, np.exp(-((across / 0.0045) ** 2)) * np.sqrt(thin))
    core = _step(edge - r, 0.6 * lesion.radius)
    return (0.24 * core + 0.11 * spicules * _step(r - 0.5 * edge, 0.03)) * lesion.strength, r < 1.15 * edge


def _calcifications(lesion: Lesion, dx: Float, dy: Float, size: int, oblique: bool) -> tuple[Float, Bool]:
    """Return a cluster of bright grains (many and fine if malignant) and the ellipse that holds it."""
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
    return 0.5 * lesion.strength * out, _rotated(dx, dy, turn, max(lesion.radius, across), across) < 1


def _grid(h: int, w: int) -> tuple[Float, Float]:
    """Return ``y`` (H, 1) and ``x`` (1, W) of the pixel centres, in image heights."""
    return ((np.arange(h, dtype=np.float32) + 0.5) / h)[:, None], ((np.arange(w, dtype=np.float32) + 0.5) / h)[None]


def _step(d: Float, soft: float) -> Float:
    """Return a smooth step from 0 to 1 over ``soft``, centred where ``d`` is 0."""
    u: Float = np.clip(d / np.float32(soft) + np.float32(0.5), 0, 1)
    smooth: Float = u * u * (3 - 2 * u)
    return smooth


def _bump(d: Float, at: float, width: float) -> Float:
    """Return a Gaussian of height 1."""
    bell: Float = np.exp(-(((d - at) / width) ** 2))
    return bell


def _rotated(x: Float, y: Float, turn: float, rx: float, ry: float) -> Float:
    """Return the squared radius of an ellipse turned clockwise: below 1 inside."""
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    squared: Float = ((x * cos + y * sin) / rx) ** 2 + ((y * cos - x * sin) / ry) ** 2
    return squared


def _blob(x: Float, y: Float, rx: float, ry: float, soft: float = 1.0) -> Float:
    """Return a soft ellipse of height 1."""
    return _step(1 - np.sqrt((x / rx) ** 2 + (y / ry) ** 2), soft)


def _tube(distance: Float, radius: float) -> Float:
    """Return a bone seen from the side: a dense cortex round a paler marrow."""
    v = distance / radius
    dense: Float = 0.62 + 0.38 * np.minimum(v, 1) ** 3
    return dense * _step(1 - v, 0.35)


def _wobble(angle: Float, rng: Generator, amount: float, waves: int) -> Float:
    """Return a closed irregular outline: radius about 1 as a function of the angle."""
    out = np.ones_like(angle)
    for k in range(2, waves + 1):
        height, phase = np.float32(amount * rng.uniform(0.3, 1) / np.sqrt(k)), np.float32(rng.uniform(0, 2 * np.pi))
        out += height * np.cos(k * angle + phase)
    return np.clip(out, 0.45, 1.6)


def _clouds(shape: tuple[int, int], beta: float, rng: Generator) -> Float:
    """Return a random field of unit variance whose power falls with frequency as ``f**-beta``, tissue's own texture."""
    h, w = (fft.next_fast_len(n, real=True) for n in shape)
    spectrum = fft.rfft2(rng.standard_normal((h, w), dtype=np.float32))
    out = fft.irfft2(spectrum * _power((h, w), beta), s=(h, w))[: shape[0], : shape[1]]
    unit: Float = ((out - out.mean()) / out.std()).astype(np.float32)
    return unit


@lru_cache(maxsize=32)
def _power(shape: tuple[int, int], beta: float) -> Float:
    f = np.hypot(fft.fftfreq(shape[0])[:, None] * shape[0], fft.rfftfreq(shape[1])[None] * shape[0])
    filtered: Float = (np.maximum(f, 1.0) ** (-beta / 2) * (f > 0)).astype(np.float32)
    return filtered


def _streaks(x: Float, y: Float, other: Bool, rng: Generator, trunk: float) -> tuple[Float, Float]:
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
def _letters(text: str, height: int) -> Float:
    font = ImageFont.load_default(height)
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("L", (int(right - left) + 1, int(bottom - top) + 1))
    ImageDraw.Draw(image).text((-left, -top), text, 255, font)
    letters: Float = np.asarray(image, np.float32) / 255
    return letters


def _stamp(image: Float, text: str, x: float, y: float) -> None:
    """Write text of lead into an image, centred at a share of its width and height."""
    letters = _letters(text, max(round(image.shape[0] * 0.05), 6))
    h, w = (min(a, b) for a, b in zip(letters.shape, image.shape, strict=True))
    top, left = (int(np.clip(c * n - m / 2, 0, n - m)) for c, n, m in ((y, image.shape[0], h), (x, image.shape[1], w)))
    patch = image[top : top + h, left : left + w]
    np.maximum(patch, 0.95 * letters[:h, :w], out=patch)
