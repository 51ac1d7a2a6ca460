"""The white level of 16-bit images: one for a whole data set, found once and kept with the checkpoints of its runs.

The formats do not state which value is white: 12 or 14 bits are often stored in 16. A level per image would make an
image brighter the darker it is, so all images of a set are divided by the same level.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from tqdm import tqdm

from datamodules.cache.preprocessing import Preprocessing, digest
from datamodules.images.dicom_parsing import is_dicom
from datamodules.images.pixels import LEVELS, brightest, read_image
from datamodules.records import Record
from mtmedformer.errors import ConfigError
from mtmedformer.geometry import Floats
from mtmedformer.protocols import HasChannels
from mtmedformer.storage.atomic_write import atomic_write

log = logging.getLogger(__name__)

WhiteLevel = Literal["auto"] | int

_MEMORY = "brightest_values.json"
_BLOCK, _FEW, _TOO_FEW = 512, 32, 8
"""Numbers of files: read between two writes of what is known; read in this process; too few to compare levels."""


class PreparedImages:
    """The images of a data module, as files and as pixels, and the white level that they have in common.

    Attributes:
        records: The images.
        preprocessing: How they are decoded and framed, with the white level once it is known.
        white_level: As configured: a number, or ``auto``.
        files_of_set: Files of all images of the set, of which ``records`` may be a part.
        in_chans: Channels of the images without a model in a Trainer: 1 for grey, 3 for colour.
    """

    records: list[Record]
    preprocessing: Preprocessing
    white_level: WhiteLevel
    files_of_set: list[Path]
    in_chans: int = 1
    _trained: int | None = None

    @property
    def files(self) -> dict[str, Path]:
        """The image file of each record, by its id."""
        return {record.id: record.file for record in self.records}

    @property
    def frames(self) -> dict[str, int]:
        """The frame of each record of a multi-frame file, by its id."""
        return {record.id: record.frame for record in self.records if record.frame is not None}

    def original(self, file: Path, frame: int | None = None) -> Floats:
        """Read the whole image, or one of its frames, as displayed: float32 (H, W), or (H, W, 3) in colour, in [0, 1].

        A negative is inverted, as for the network.

        Raises:
            DataError: The file cannot be read.
        """
        pixels = read_image(file, self.preprocessing.white_level, self.preprocessing.channels == 3, frame).pixels
        negative = any(r.inverted and r.file == file and r.frame == frame for r in self.records)
        return 1 - pixels if negative else pixels

    def is_dicom(self, file: Path) -> bool:
        """Return whether an image file is DICOM, from its first bytes."""
        with file.open("rb") as stream:
            return is_dicom(stream.read(132))

    def settle_channels(self, trainer: Any) -> None:
        """Put the channels of the model's input into ``preprocessing``; without a model those of ``in_chans``.

        Args:
            trainer: The Trainer, or ``None``.

        Raises:
            ConfigError: The model takes neither 1 nor 3 channels.
        """
        model = trainer.lightning_module if trainer else None
        self.in_chans = model.in_chans if isinstance(model, HasChannels) else self.in_chans
        if self.in_chans not in (1, 3):
            raise ConfigError(
                f"encoder.in_chans is {self.in_chans}; image files are read with 1 channel (grey) or 3 (colour)"
            )
        self.preprocessing = replace(self.preprocessing, channels=self.in_chans)

    def settle_white_level(
        self, name: str, folder: Path | None = None, workers: int = 0, compare: bool = True
    ) -> dict[str, str]:
        """Put the white level into ``preprocessing``: that configured, that of the training, or that of the files.

        Args:
            name: Name of the set, for the log.
            folder: Folder that keeps the brightest values of files.
            workers: Processes that read them.
            compare: Compare the level of the training with the files; too few of them show nothing.

        Returns:
            A sentence by its subject where the level of the training and the files differ.
        """
        level = check_white_level(self.white_level)
        if level is None and self.preprocessing.white_level is None:
            compare = compare and len(self.files_of_set) > _TOO_FEW
            found = find_white_level(self.files_of_set, folder, workers) if compare or not self._trained else None
            level = self._trained or found
            if level is not None:
                whose = "of the training" if self._trained else f"found in {name}"
                rank_zero_info(f"16-bit images are divided by {level}, the white level {whose} (data.white_level).")
            if self._trained and found and found != self._trained:
                self.preprocessing = replace(self.preprocessing, white_level=level)
                return {
                    "white level": f"the 16-bit images reach the white level {found}, those of the training "
                    f"{self._trained}, which is used; if {found} is white in these images, set "
                    f"data.white_level={found}"
                }
        if level is not None:
            self.preprocessing = replace(self.preprocessing, white_level=level)
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the white level for checkpoints; nothing for a set without 16-bit images."""
        level = self.preprocessing.white_level
        return {} if level is None else {"white_level": level}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the white level of a checkpoint; without effect on a configured one or after ``setup``."""
        self._trained = common_level(state_dict)


def check_white_level(level: WhiteLevel) -> int | None:
    """Return a configured white level, ``None`` for ``auto``.

    Raises:
        ConfigError: It is neither ``auto`` nor from 1 to 65535.
    """
    if level == "auto":
        return None
    if not isinstance(level, int) or not 1 <= level <= 65535:
        raise ConfigError(f"data.init_args.white_level is {level}; give auto or a value from 1 to 65535, such as 4095")
    return level


def common_level(state: Mapping[str, Any]) -> int | None:
    """Return the white level in the state of a data module; ``None`` where there is none or the sites differ."""
    given = state.get("white_level")
    levels = set(given.values()) - {None} if isinstance(given, Mapping) else {given}
    level = next(iter(levels)) if len(levels) == 1 else None
    return level if isinstance(level, int) and 1 <= level <= 65535 else None


def find_white_level(files: Sequence[Path], folder: Path | None = None, workers: int = 0) -> int | None:
    """Return the smallest of ``LEVELS`` that no image exceeds; ``None`` if every format states what is white.

    Args:
        files: The images; unreadable ones do not count.
        folder: Folder in which the brightest values are kept by content, so that each file is decoded for it once.
        workers: Processes that read; 0 reads in this process.
    """
    memory = None if folder is None else folder / _MEMORY
    known = _remembered(memory)
    keys = {file: digest(file) for file in dict.fromkeys(files) if _regular(file)}
    unknown = [file for file, key in keys.items() if key not in known]
    blocks = range(0, len(unknown), _BLOCK)
    for start in tqdm(blocks, "Finding the white level", leave=False, disable=len(blocks) < 2):
        block = unknown[start : start + _BLOCK]
        loader: Any = DataLoader(
            block,  # type: ignore[arg-type]  # a list is a data set
            batch_size=None,
            num_workers=workers if len(block) > _FEW else 0,
            collate_fn=brightest,  # type: ignore[arg-type]  # of one file
            generator=torch.Generator().manual_seed(0),  # else it would move the global random stream
        )
        found = dict(zip((keys[file] for file in block), loader, strict=True))
        known |= found
        if memory is not None and any(value is not None for value in found.values()):
            _remember(memory, known)
    values = [value for key in keys.values() if (value := known[key]) is not None]
    return next(level for level in LEVELS if level >= max(values)) if values else None


def _regular(file: Path) -> bool:
    """Return whether a path is a file that can be opened; a pipe would not return."""
    try:
        return file.is_file()
    except (OSError, ValueError):  # a name that is too long or has a null character
        return False


def _remembered(memory: Path | None) -> dict[str, int | None]:
    try:
        return dict(json.loads(memory.read_text(encoding="utf-8"))) if memory is not None else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        log.warning("%s is damaged (%s); the brightest values are found again", memory, type(error).__name__)
        return {}


def _remember(memory: Path, known: Mapping[str, int | None]) -> None:
    try:
        with atomic_write(memory) as part:
            part.write_text(json.dumps(known), encoding="utf-8")
    except OSError as error:  # the cache itself reports a folder that cannot be written
        log.debug("%s cannot be written (%s)", memory, error)
