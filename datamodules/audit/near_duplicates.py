"""Find images that are in a data set twice, for example in training and in test.

A perceptual hash of each image proposes pairs (every pair is compared, blockwise). The correlation of the fine
structure of their thumbnails decides, if necessary after one is registered to the other. The coarse structure of chest
films is alike: thumbnails of different patients correlate up to 0.97, their fine structure up to 0.55 (mammograms 0.71,
drawn phantoms 0.81). Copies correlate from 0.85 upwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from datamodules.records import Record, Split
from mtmedformer.errors import DataError
from mtmedformer.geometry import Floats, Frame, warp

SIDE = 64
"""Height and width of a thumbnail in pixels."""


@dataclass(frozen=True)
class Duplicate:
    """Two images that show the same exposure.

    Attributes:
        first: Id of the image that came first.
        second: Id of the other one.
        correlation: Correlation of their fine structure; 1 is identical, negative where one is inverted.
        distance: Bits of 63 in which their hashes differ.
        mirrored: Whether one is mirrored left to right.
    """

    first: str
    second: str
    correlation: float
    distance: int
    mirrored: bool = False


@dataclass(frozen=True)
class LeakReport:
    """Duplicates by what they cross; a pair is in the first list that fits, one within a patient and split in none.

    Attributes:
        images: Number of images compared.
        across_splits: Pairs in two splits: results on the test split are too good.
        across_sites: Pairs in one split at two sites: a federation uses the image twice.
        across_patients: Pairs in one split under two patient keys: another split may separate them.
    """

    images: int
    across_splits: list[Duplicate]
    across_sites: list[Duplicate]
    across_patients: list[Duplicate]

    def summary(self) -> str:
        """Return the numbers of pairs in one sentence."""
        counts = [
            f"{len(pairs)} {what}"
            for pairs, what in (
                (self.across_splits, "across splits"),
                (self.across_sites, "across sites"),
                (self.across_patients, "under two patient keys"),
            )
            if pairs
        ]
        if not counts:
            return f"no near-duplicate crosses a split, a site or a patient among {self.images} images"
        return f"near-duplicate pairs among {self.images} images: {', '.join(counts)}"


def thumbnail(pixels: Floats) -> NDArray[np.uint8]:
    """Shrink an image (H, W) in [0, 1] to uint8 (64, 64), its aspect ignored and its own range stretched to 0..255."""
    height, width = pixels.shape
    small = warp(pixels, Frame((width / SIDE, 0.0, 0.0, 0.0, height / SIDE, 0.0), (SIDE, SIDE)))
    low, high = float(small.min()), float(small.max())
    return np.round((small - low) * (255 / max(high - low, 1e-6))).astype(np.uint8)


def perceptual_hash(thumbnails: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Hash thumbnails (N, 64, 64) to bool (N, 63): which low frequencies of an image lie above their median.

    The 8 x 8 lowest frequencies of the cosine transform of the 32 x 32 image, without the mean (the "pHash" of
    C. Zauner, Implementation and benchmarking of perceptual image hash functions, 2010). Brightness and contrast do not
    change it, scaling, compression and noise hardly do; inversion flips every bit but the one at the median.
    """
    halves = thumbnails.reshape(len(thumbnails), 32, 2, 32, 2).mean((2, 4), dtype=np.float32)
    low = fft.dctn(halves, axes=(1, 2), norm="ortho")[:, :8, :8].reshape(len(thumbnails), 64)[:, 1:]
    above: NDArray[np.bool_] = low > np.median(low, axis=1, keepdims=True)
    return above


def fine_structure(thumbnails: NDArray[Any]) -> Floats:
    """Turn thumbnails (N, 64, 64) in 0..255 into unit vectors (N, 3136) whose products are correlations.

    Blur (σ = 1.5 pixels) is subtracted, the rest is divided by its local standard deviation (σ = 1), so that edges do
    not outweigh texture, and the outer 4 pixels, where frames and labels are, are left out.
    """
    images = thumbnails.astype(np.float32) / 255
    detail = images - ndimage.gaussian_filter(images, (0, 1.5, 1.5))
    detail /= np.sqrt(np.maximum(ndimage.gaussian_filter(detail**2, (0, 1, 1)), 0)) + 0.01
    flat = detail[:, 4:-4, 4:-4].reshape(len(images), -1)
    flat -= flat.mean(axis=1, keepdims=True)
    vectors: Floats = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
    return vectors


def find_duplicates(
    thumbnails: NDArray[np.uint8],
    ids: Sequence[str],
    min_correlation: float = 0.85,
    max_distance: int = 14,
    mirrored: bool = True,
    max_aligned: int = 10_000,
) -> list[Duplicate]:
    """Compare every image with every other.

    Finds copies that were rescaled, compressed, made brighter or darker, equalised, inverted, mirrored, made noisy, or
    cropped or stretched by a few per cent. Does not find stronger crops or rotations, nor a second exposure of the same
    patient (which is no duplicate). Blank images match nothing. Takes about 3 s for 3,000 images and 2 minutes for
    30,000, on one core.

    Args:
        thumbnails: uint8 (N, 64, 64), see `thumbnail`.
        ids: The images' names.
        min_correlation: Least correlation of the fine structure, either sign, before or after alignment.
        max_distance: Bits of 63 in which the hashes of a pair may differ.
        mirrored: Look for mirrored copies too; takes twice the time.
        max_aligned: Most pairs to align (about 2 ms each), the most alike first.

    Returns:
        Pairs, the most alike first.

    Raises:
        DataError: There are not as many ids as thumbnails.
    """
    if len(thumbnails) != len(ids):
        raise DataError(f"leak check: {len(thumbnails)} thumbnails but {len(ids)} ids")
    pairs: dict[tuple[int, int], Duplicate] = {}
    for flip in (False, True) if mirrored else (False,):
        others = np.ascontiguousarray(thumbnails[:, :, ::-1]) if flip else thumbnails
        for i, j, plain, distance in _candidates(thumbnails, others, max_distance, max_aligned):
            correlation = plain
            if abs(plain) < min_correlation:
                correlation = _aligned(thumbnails[i], others[j] if plain > 0 else 255 - others[j]) * np.sign(plain)
            known = pairs.get((i, j))
            if abs(correlation) >= max(min_correlation, abs(known.correlation) if known else 0):
                pairs[i, j] = Duplicate(ids[i], ids[j], float(correlation), distance, flip)
    return sorted(pairs.values(), key=lambda p: (-abs(p.correlation), p.first, p.second))


def leak_report(
    duplicates: Sequence[Duplicate], records: Sequence[Record], splits: dict[str, Split], images: int | None = None
) -> LeakReport:
    """Sort duplicates by whether they cross a split, a site or a patient.

    Args:
        duplicates: What `find_duplicates` found.
        records: The records the ids belong to.
        splits: Split by id.
        images: Number of images compared; all records where ``None``.
    """
    by_id = {record.id: record for record in records}
    across_splits, across_sites, across_patients = [], [], []
    for pair in duplicates:
        a, b = by_id[pair.first], by_id[pair.second]
        if splits[a.id] != splits[b.id]:
            across_splits.append(pair)
        elif a.site != b.site:
            across_sites.append(pair)
        elif a.patient != b.patient:
            across_patients.append(pair)
    return LeakReport(len(records) if images is None else images, across_splits, across_sites, across_patients)


def _candidates(
    images: NDArray[np.uint8], others: NDArray[np.uint8], max_distance: int, most: int, block: int = 1024
) -> list[tuple[int, int, float, int]]:
    """Return ``(i, j, correlation, distance)`` of pairs i < j that may be duplicates, at most so many, best first."""
    rows = [np.zeros((0, 4))]
    signs, structure = _signs(images), _structures(images)
    other_signs, others_structure = _signs(others), _structures(others)
    for top in range(0, len(images), block):
        mine = structure[top : top + block].astype(np.float32)
        for left in range(top, len(images), block):
            agreement = np.abs(signs[top : top + block] @ other_signs[left : left + block].T)
            if agreement.max() < 63 - 2 * max_distance:
                continue
            correlation = mine @ others_structure[left : left + block].astype(np.float32).T
            i, j = np.nonzero((agreement >= 63 - 2 * max_distance) & (np.abs(correlation) >= 0.2))
            later = i + top < j + left
            i, j = i[later], j[later]
            rows.append(np.stack([i + top, j + left, correlation[i, j], (63 - agreement[i, j]) / 2], axis=1))
            if sum(map(len, rows)) > 2 * most:
                rows = [_best(np.concatenate(rows), most)]
    return [(int(i), int(j), float(c), round(d)) for i, j, c, d in _best(np.concatenate(rows), most)]


def _best(rows: NDArray[np.float64], most: int) -> NDArray[np.float64]:
    return rows[np.argsort(-np.abs(rows[:, 2]), kind="stable")[:most]]


def _structures(thumbnails: NDArray[np.uint8], block: int = 1024) -> NDArray[np.float16]:
    """Return the fine structure of many thumbnails at half precision: 190 MB for 30,000."""
    vectors = np.empty((len(thumbnails), (SIDE - 8) ** 2), np.float16)
    for start in range(0, len(thumbnails), block):
        vectors[start : start + block] = fine_structure(thumbnails[start : start + block])
    return vectors


def _signs(thumbnails: NDArray[np.uint8]) -> Floats:
    """Return the hashes as ±1, so that a matrix product counts the bits in which they agree."""
    return np.where(perceptual_hash(thumbnails), np.float32(1), np.float32(-1))


def _aligned(image: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Return the correlation of fine structure after fitting one thumbnail to the other by a small affine.

    The fit is OpenCV's ECC (Evangelidis and Psarakis, PAMI 2008). One that stretches by over 15 % or turns by over
    about 6 degrees is refused, since it makes unrelated breasts alike; no fit at all counts as no likeness.
    """
    criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 30, 1e-4)
    start = np.eye(2, 3, dtype=np.float32)
    try:
        everywhere = np.ones((SIDE, SIDE), np.uint8)
        fit = np.asarray(cv2.findTransformECC(image, other, start, cv2.MOTION_AFFINE, criteria, everywhere, 5)[1])
    except cv2.error:  # raised where the iteration diverges or an image is blank
        return 0.0
    if abs(fit[0, 0] - 1) > 0.15 or abs(fit[1, 1] - 1) > 0.15 or abs(fit[0, 1]) > 0.1 or abs(fit[1, 0]) > 0.1:
        return 0.0
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    fitted = cv2.warpAffine(other, fit, (SIDE, SIDE), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    first, second = fine_structure(np.stack([image, fitted]))
    return float(first @ second)
