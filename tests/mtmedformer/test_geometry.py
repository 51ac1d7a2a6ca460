"""The threads of OpenCV: the process of the user keeps its setting, and forked workers compute the same pixels."""

import subprocess
import sys

IMPORT = """
import cv2
before = cv2.getNumThreads()
import datamodules, mtmedformer.geometry, mtmedformer.plots.predictions
assert cv2.getNumThreads() == before, (before, cv2.getNumThreads())
"""

FORK = """
import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from mtmedformer.geometry import Frame, warp

IMAGE = np.random.default_rng(0).random((1200, 1200), np.float32)
ROTATED = Frame((1.2, -1.6, 900.0, 1.6, 1.2, -300.0), (500, 500))

class Warped(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.from_numpy(warp(IMAGE, ROTATED))

cv2.setNumThreads(1)
single = warp(IMAGE, ROTATED)
cv2.setNumThreads(4)
assert np.array_equal(warp(IMAGE, ROTATED), single)
for image in DataLoader(Warped(), batch_size=None, num_workers=2, multiprocessing_context="fork"):
    assert np.array_equal(image.numpy(), single)
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_imports_leave_the_number_of_opencv_threads_unchanged():
    run(IMPORT)


def test_forked_workers_compute_the_same_pixels_after_opencv_used_threads():
    run(FORK)
