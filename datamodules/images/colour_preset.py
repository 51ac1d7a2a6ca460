"""Preset of photographs in colour: fundus, skin, endoscopy."""

from __future__ import annotations

import numpy as np

from datamodules.images.presets import Augmented, Exposure, Movement, Preset, move
from mtmedformer.geometry import Bytes, Floats, Frame, Ints, letterbox


class ColourPreset(Preset):
    """Photographs without a fixed orientation (fundus, skin, endoscopy): the whole image, movements, flips, exposure.

    By default no colour is changed: brightness, contrast and gamma are the same for red, green and blue. ``hue`` and
    ``saturation`` change the colours too, for cameras and lights that differ.

    Args:
        rotation: Largest rotation in degrees, either way.
        zoom: Largest enlargement or reduction, as a share.
        shift: Largest shift as a share of the image's height and width.
        brightness: Largest change of brightness, as a share of the full range.
        contrast: Largest change of contrast, as a share.
        gamma: Largest change of the exponent.
        hue: Largest change of hue, as a share of the colour circle (0.05: 18 degrees), at most 0.5; 0 is off.
        saturation: Largest change of saturation, as a share, at most 1; 0 is off.
        noise: Largest standard deviation of Gaussian noise, as a share of the full range; 0 is off.
        blur: Largest standard deviation of Gaussian blur in pixels; 0 is off.
        horizontal_flip: Probability of mirroring left and right.
        vertical_flip: Probability of turning upside down.
        min_side: Smallest side in input pixels that a box may have.
        min_visible: Smallest share of a box that must stay inside the image.
        intensity: File with changes of intensity and colour of your own instead of those of this preset: the YAML that
            ``albumentations.save`` writes, or its text.
    """

    def __init__(
        self,
        rotation: float = 30.0,
        zoom: float = 0.15,
        shift: float = 0.05,
        brightness: float = 0.1,
        contrast: float = 0.2,
        gamma: float = 0.2,
        hue: float = 0.0,
        saturation: float = 0.0,
        noise: float = 0.0,
        blur: float = 0.0,
        horizontal_flip: float = 0.5,
        vertical_flip: float = 0.5,
        min_side: float = 2.0,
        min_visible: float = 0.25,
        intensity: str | None = None,
    ) -> None:
        self.movement = Movement(rotation, zoom, shift, horizontal_flip, vertical_flip)
        self.exposure = Exposure(brightness, contrast, gamma, noise, blur, hue, saturation, intensity, channels=3)
        self.min_side = min_side
        self.min_visible = min_visible

    def frame(self, pixels: Floats, size: tuple[int, int], laterality: str | None) -> Frame:
        """Letterbox the whole image."""
        return letterbox((0.0, 0.0, float(pixels.shape[1]), float(pixels.shape[0])), size)

    def augment(self, image: Floats, masks: Bytes, boxes: Floats, labels: Ints, rng: np.random.Generator) -> Augmented:
        """Move and flip, then change exposure and colours."""
        to_input = self.movement.sample(image.shape, rng)
        moved = move(image, masks, boxes, labels, to_input, self.min_side, self.min_visible)
        return self.exposure.apply(moved, rng)
