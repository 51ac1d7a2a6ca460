"""Presets: framing and augmentation of one kind of image (chest films, mammograms).

albumentations (unmaintained upstream) changes intensities only and is imported here and in `own_intensity`, so that it
can be replaced; geometry is `mtmedformer.geometry`.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from datamodules.images.breast_region import breast_region, breast_side
from datamodules.images.own_intensity import intensity_pipeline, intensity_text
from mtmedformer.batch import IGNORE
from mtmedformer.geometry import (
    IDENTITY,
    Affine,
    Bytes,
    Floats,
    Frame,
    Ints,
    boxes_to_frame,
    clip_boxes,
    letterbox,
    nearest_pixels,
    warp,
)


@dataclass(frozen=True)
class Augmented:
    """One augmented sample.

    Attributes:
        image: float32 (H, W) or (H, W, 3) in [0, 1].
        masks: uint8 (K, H, W) of 0/1/``IGNORE``.
        boxes: float32 (N, 4) xyxy inside the image.
        labels: int64 (N,) class index of each box.
        to_input: Affine from coordinates of this image to those before augmentation; the affine to the original is
            ``compose(frame.to_original, to_input)``.
        dropped: Number of boxes dropped, because too little of them is in the image or they have no area.
    """

    image: Floats
    masks: Bytes
    boxes: Floats
    labels: Ints
    to_input: Affine
    dropped: int


class Preset(ABC):
    """Framing and augmentation of one kind of image. Presets have no state; random numbers are an argument."""

    @abstractmethod
    def frame(self, pixels: Floats, size: tuple[int, int], laterality: str | None) -> Frame:
        """Return the position of the network's input in the original image; deterministic.

        Args:
            pixels: The whole original image, float32 (H, W) in [0, 1]; of a colour image its luminance.
            size: ``(height, width)`` of the input.
            laterality: ``L``, ``R`` or ``None``.
        """

    @abstractmethod
    def augment(self, image: Floats, masks: Bytes, boxes: Floats, labels: Ints, rng: np.random.Generator) -> Augmented:
        """Augment one framed sample; image, masks and boxes move together, and ``rng`` decides all of it.

        Args:
            image: float32 (H, W), or (H, W, 3) in red, green and blue for a network with 3 channels, in [0, 1].
            masks: uint8 (K, H, W) of 0/1/``IGNORE``; K may be 0.
            boxes: float32 (N, 4) xyxy.
            labels: int64 (N,).
            rng: Source of every random number.
        """


class PlainPreset(Preset):
    """The whole image, aspect kept, and no augmentation.

    Args:
        min_side: Smallest side in input pixels that a box may have.
    """

    def __init__(self, min_side: float = 1.0) -> None:
        self.min_side = min_side

    def frame(self, pixels: Floats, size: tuple[int, int], laterality: str | None) -> Frame:
        """Letterbox the whole image."""
        return letterbox((0.0, 0.0, float(pixels.shape[1]), float(pixels.shape[0])), size)

    def augment(self, image: Floats, masks: Bytes, boxes: Floats, labels: Ints, rng: np.random.Generator) -> Augmented:
        """Return the sample as it is, boxes clipped."""
        kept, kept_labels, dropped = clip_boxes(boxes, labels, (image.shape[0], image.shape[1]), self.min_side)
        return Augmented(image, masks, kept, kept_labels, IDENTITY, dropped)


class ChestPreset(Preset):
    """Frontal chest films: the whole image, small movements, changes of exposure.

    Never upside down, and by default not mirrored, since the side of the heart is anatomy.

    Args:
        rotation: Largest rotation in degrees, either way.
        zoom: Largest enlargement or reduction, as a share (0.1: 0.9 to 1.1 times).
        shift: Largest shift as a share of the image's height and width.
        brightness: Largest change of brightness, as a share of the full range.
        contrast: Largest change of contrast, as a share.
        gamma: Largest change of the exponent (0.2: 0.8 to 1.2).
        noise: Largest standard deviation of Gaussian noise, as a share of the full range; 0 is off.
        blur: Largest standard deviation of Gaussian blur in pixels; 0 is off.
        horizontal_flip: Probability of mirroring left and right.
        min_side: Smallest side in input pixels that a box may have.
        min_visible: Smallest share of a box that must stay inside the image.
        intensity: File with intensity changes of your own instead of brightness, contrast, gamma, noise and blur: the
            YAML that ``albumentations.save`` writes, or its text.
    """

    def __init__(
        self,
        rotation: float = 10.0,
        zoom: float = 0.1,
        shift: float = 0.05,
        brightness: float = 0.15,
        contrast: float = 0.2,
        gamma: float = 0.2,
        noise: float = 0.0,
        blur: float = 0.0,
        horizontal_flip: float = 0.0,
        min_side: float = 2.0,
        min_visible: float = 0.25,
        intensity: str | None = None,
    ) -> None:
        self.movement = Movement(rotation, zoom, shift, horizontal_flip, vertical_flip=0.0)
        self.exposure = Exposure(brightness, contrast, gamma, noise, blur, own=intensity)
        self.min_side = min_side
        self.min_visible = min_visible

    def frame(self, pixels: Floats, size: tuple[int, int], laterality: str | None) -> Frame:
        """Letterbox the whole image."""
        return letterbox((0.0, 0.0, float(pixels.shape[1]), float(pixels.shape[0])), size)

    def augment(self, image: Floats, masks: Bytes, boxes: Floats, labels: Ints, rng: np.random.Generator) -> Augmented:
        """Move, then change the exposure."""
        to_input = self.movement.sample(image.shape, rng)
        moved = move(image, masks, boxes, labels, to_input, self.min_side, self.min_visible)
        return self.exposure.apply(moved, rng)


class BreastPreset(Preset):
    """Mammograms: crop to the breast, turn all breasts to one side, then movements, changes of exposure and flips.

    By default half of the training images are turned upside down, since lesions have no orientation. Images are not
    mirrored left to right, since all breasts point to one side, unless ``flip_to`` is ``null``.

    Args:
        crop: Crop to the breast region, without labels and film borders.
        flip_to: The side every breast is turned to: ``L`` puts the chest wall at the left edge, as in a view of the
            left breast. ``null`` leaves images as they are.
        margin: Margin around the breast region, as a share of the image's longer side.
        rotation: Largest rotation in degrees, either way.
        zoom: Largest enlargement or reduction, as a share.
        shift: Largest shift as a share of the image's height and width.
        brightness: Largest change of brightness, as a share of the full range.
        contrast: Largest change of contrast, as a share.
        gamma: Largest change of the exponent.
        noise: Largest standard deviation of Gaussian noise, as a share of the full range; 0 is off.
        blur: Largest standard deviation of Gaussian blur in pixels; 0 is off.
        vertical_flip: Probability of turning upside down.
        horizontal_flip: Probability of mirroring left and right; used only if ``flip_to`` is ``null``.
        min_side: Smallest side in input pixels that a box may have.
        min_visible: Smallest share of a box that must stay inside the image.
        intensity: File with intensity changes of your own instead of brightness, contrast, gamma, noise and blur: the
            YAML that ``albumentations.save`` writes, or its text.
    """

    def __init__(
        self,
        crop: bool = True,
        flip_to: Literal["L", "R"] | None = "L",
        margin: float = 0.03,
        rotation: float = 15.0,
        zoom: float = 0.15,
        shift: float = 0.05,
        brightness: float = 0.1,
        contrast: float = 0.2,
        gamma: float = 0.2,
        noise: float = 0.0,
        blur: float = 0.0,
        vertical_flip: float = 0.5,
        horizontal_flip: float = 0.5,
        min_side: float = 2.0,
        min_visible: float = 0.25,
        intensity: str | None = None,
    ) -> None:
        self.crop = crop
        self.flip_to = flip_to
        self.margin = margin
        self.movement = Movement(rotation, zoom, shift, 0.0 if flip_to else horizontal_flip, vertical_flip)
        self.exposure = Exposure(brightness, contrast, gamma, noise, blur, own=intensity)
        self.min_side = min_side
        self.min_visible = min_visible

    def frame(self, pixels: Floats, size: tuple[int, int], laterality: str | None) -> Frame:
        """Letterbox the breast, with its chest wall at the edge of ``flip_to``."""
        height, width = pixels.shape
        source = (0.0, 0.0, float(width), float(height))
        region, scale = breast_region(pixels)
        if self.crop:
            pad = self.margin * max(height, width)
            rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
            source = (
                max(0.0, columns[0] * scale - pad),
                max(0.0, rows[0] * scale - pad),
                min(float(width), (columns[-1] + 1) * scale + pad),
                min(float(height), (rows[-1] + 1) * scale + pad),
            )
        if self.flip_to is None:
            return letterbox(source, size)
        side = breast_side(region) or laterality or self.flip_to
        return letterbox(source, size, flip=side != self.flip_to, align=0.0 if self.flip_to == "L" else 1.0)

    def augment(self, image: Floats, masks: Bytes, boxes: Floats, labels: Ints, rng: np.random.Generator) -> Augmented:
        """Move and flip, then change the exposure."""
        to_input = self.movement.sample(image.shape, rng)
        moved = move(image, masks, boxes, labels, to_input, self.min_side, self.min_visible)
        return self.exposure.apply(moved, rng)


@dataclass(frozen=True)
class Movement:
    """Draw random affines; the fields are arguments of `ChestPreset`, flips are probabilities."""

    rotation: float
    zoom: float
    shift: float
    horizontal_flip: float
    vertical_flip: float

    def sample(self, size: tuple[int, ...], rng: np.random.Generator) -> Affine:
        """Draw an affine about the centre, from coordinates of the moved image to those of the image before.

        Args:
            size: Height and width of the image, and perhaps its channels.
            rng: Source of every random number; the number of draws does not depend on the settings.
        """
        height, width = size[:2]
        draws = rng.uniform(-1, 1, 4) * (self.rotation, self.zoom, self.shift, self.shift)
        turn, scale, right, down = draws.tolist()
        mirror, upside_down = rng.random(2) < (self.horizontal_flip, self.vertical_flip)
        cos, sin = math.cos(math.radians(turn)) / (1 + scale), math.sin(math.radians(turn)) / (1 + scale)
        flip_x, flip_y = (-1.0 if mirror else 1.0), (-1.0 if upside_down else 1.0)
        a, b, d, e = flip_x * cos, -flip_x * sin, flip_y * sin, flip_y * cos
        x, y = width * (0.5 + right), height * (0.5 + down)  # where the old centre comes to lie
        return (a, b, width / 2 - a * x - b * y, d, e, height / 2 - d * x - e * y)


def move(
    image: Floats, masks: Bytes, boxes: Floats, labels: Ints, to_input: Affine, min_side: float, min_visible: float
) -> Augmented:
    """Move image, masks and boxes by one affine.

    Args:
        image: float32 (H, W) or (H, W, 3).
        masks: uint8 (K, H, W). Pixels from outside the image are background 0, except in a mask that is ``IGNORE``
            everywhere.
        boxes: float32 (N, 4) xyxy.
        labels: int64 (N,).
        to_input: Affine from coordinates of the moved image to those before.
        min_side: Smallest side in pixels that a box may have.
        min_visible: Smallest share of a box that must stay inside.
    """
    size = (image.shape[0], image.shape[1])
    inside, labels, dropped = clip_boxes(boxes, labels, size, min_side=0.0, min_visible=0.0)
    if to_input != IDENTITY:
        frame = Frame(to_input, size)
        image = warp(image, frame)
        if len(masks):
            unknown = (masks == IGNORE).all(axis=(1, 2))
            masks = nearest_pixels(masks, frame, np.where(unknown, IGNORE, 0).astype(np.uint8))
        inside = boxes_to_frame(inside, frame)
    kept, labels, lost = clip_boxes(inside, labels, size, min_side, min_visible)
    return Augmented(image, masks, kept, labels, to_input, dropped + lost)


class Exposure:
    """Random brightness, contrast, gamma, noise, blur, hue and saturation; see `ChestPreset` and `ColourPreset`."""

    def __init__(
        self,
        brightness: float,
        contrast: float,
        gamma: float,
        noise: float,
        blur: float,
        hue: float = 0.0,
        saturation: float = 0.0,
        own: str | None = None,
        channels: int = 1,
    ) -> None:
        changes = (brightness, contrast, gamma, noise, blur, hue, saturation)
        self.active = own is not None or any(changes)
        if own is not None:
            self.pipeline = intensity_pipeline(intensity_text(own), channels)
        else:
            self.pipeline = exposure_pipeline(*changes) if self.active else None

    def apply(self, sample: Augmented, rng: np.random.Generator) -> Augmented:
        """Change the exposure of an image; pixels that are exactly 0 (padding, air around the breast) stay 0."""
        seed = int(rng.integers(2**31))
        if self.pipeline is None:
            return sample
        self.pipeline.set_random_seed(seed)
        lit = sample.image > 0 if sample.image.ndim == 2 else sample.image.any(axis=2, keepdims=True)
        image = np.clip(self.pipeline(image=sample.image)["image"], 0, 1) * lit
        return replace(sample, image=image.astype(np.float32))


def exposure_pipeline(
    brightness: float, contrast: float, gamma: float, noise: float, blur: float, hue: float = 0, saturation: float = 0
) -> Any:
    """Build the intensity changes with albumentations.

    Returns:
        A pipeline with ``set_random_seed(int)``; called with ``image=`` (float32 (H, W) or (H, W, 3) in [0, 1]), it
        returns a dict with ``image``.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else the import requests its version from PyPI
    import albumentations as A

    steps = []
    if brightness or contrast:
        steps.append(A.RandomBrightnessContrast(brightness_limit=brightness, contrast_limit=contrast, p=0.8))
    if hue or saturation:
        steps.append(A.ColorJitter((1, 1), (1, 1), (1 - saturation, 1 + saturation), (-hue, hue), p=0.8))
    if gamma:
        steps.append(A.RandomGamma(gamma_limit=(100 * (1 - gamma), 100 * (1 + gamma)), p=0.5))
    if blur:
        steps.append(A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, blur), p=0.3))
    if noise:
        steps.append(A.GaussNoise(std_range=(0.0, noise), p=0.3))
    return A.Compose(steps)
