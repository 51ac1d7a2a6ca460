"""Original images of a data set, for those who show predictions on them."""

from __future__ import annotations

from pathlib import Path

from datamodules.images.dicom import is_dicom
from datamodules.images.pixels import read_image
from datamodules.records import Record
from mtmedformer.geometry import Floats


class Originals:
    """Finds the file and the pixels of an image by its id."""

    records: list[Record]

    @property
    def files(self) -> dict[str, Path]:
        """The image file of each record, by its id."""
        return {record.id: record.file for record in self.records}

    def original(self, file: Path) -> Floats:
        """Return the whole image as it is displayed: float32 (H, W) in [0, 1].

        Raises:
            DataError: The file cannot be read (any more).
        """
        return read_image(file).pixels

    def is_dicom(self, file: Path) -> bool:
        """Tell whether an image file is DICOM, by its first bytes."""
        with file.open("rb") as stream:
            return is_dicom(stream.read(132))
