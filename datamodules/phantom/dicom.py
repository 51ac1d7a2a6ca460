"""Write one phantom image as a DICOM file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless, generate_uid

from datamodules.phantom.drawing import Float
from datamodules.phantom.sites import TransferSyntax

SYNTAXES = {"rle": RLELossless, "jpeg2000": JPEG2000Lossless}
SOP_CLASSES = {
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "DX": "1.2.840.10008.5.1.4.1.1.1.1",
    "MG": "1.2.840.10008.5.1.4.1.1.1.2",
}
MARGIN = 0.06
"""Share of the stored range that stays unused at either end, so that a reader who ignores the window sees grey."""


def write_dicom(
    path: Path,
    image: Float,
    *,
    modality: Literal["CR", "DX", "MG"],
    patient: str,
    site: str,
    view: str,
    laterality: str | None,
    bits: int,
    monochrome1: bool,
    transfer_syntax: TransferSyntax,
    spacing: float,
    number: int,
) -> None:
    """Write grey values as one DICOM file; the same arguments give the same bytes.

    Args:
        path: The file to write.
        image: float32 (H, W) in [0, 1], white 1.
        modality: ``CR`` or ``DX`` (chest), ``MG`` (breast).
        patient: Invented PatientID.
        site: Goes into InstitutionName, and with patient and number into the UIDs.
        view: ViewPosition.
        laterality: ``L``, ``R`` or ``None``.
        bits: BitsStored: 8, 12 or 16.
        monochrome1: Whether the file stores white as 0 and states it.
        transfer_syntax: ``explicit``, ``rle`` or ``jpeg2000``, all lossless.
        spacing: Pixel spacing in mm.
        number: Number of the image within the patient.
    """
    top = 2**bits - 1
    low = round(MARGIN * top)
    stored = np.round(low + image.astype(np.float64) * (top - 2 * low))
    if monochrome1:
        stored = top - stored
    ds = Dataset()
    ds.SOPClassUID = SOP_CLASSES[modality]
    ds.SOPInstanceUID = generate_uid(entropy_srcs=["instance", patient, str(number)])
    ds.StudyInstanceUID = generate_uid(entropy_srcs=["study", patient])
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=["series", patient, str(number)])
    ds.StudyID, ds.SeriesNumber, ds.InstanceNumber = "1", number + 1, 1
    ds.StudyDate = ds.StudyTime = ds.AccessionNumber = ds.ReferringPhysicianName = ""
    ds.PatientID = ds.PatientName = patient
    ds.PatientBirthDate = ds.PatientSex = ""
    ds.Modality, ds.Manufacturer, ds.InstitutionName = modality, "MTMedFormer phantom", site
    ds.BodyPartExamined, ds.ViewPosition, ds.BurnedInAnnotation = "BREAST" if modality == "MG" else "CHEST", view, "NO"
    if modality == "MG":
        ds.ImageLaterality = laterality
        ds.PatientOrientation = ["A", "R"] if laterality == "L" else ["P", "L"]
        if view == "MLO":
            ds.PatientOrientation[1] = "F"
    else:
        ds.PatientOrientation = ["L", "F"]
    if modality != "CR":
        ds.PresentationIntentType = "FOR PRESENTATION"
        ds.PixelIntensityRelationship, ds.PixelIntensityRelationshipSign = "LOG", -1 if monochrome1 else 1
        ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", "1", "US"
        ds.PresentationLUTShape = "INVERSE" if monochrome1 else "IDENTITY"
        ds.LossyImageCompression = "00"
    ds.ImagerPixelSpacing = ds.PixelSpacing = [f"{spacing:.6g}"] * 2
    ds.Rows, ds.Columns = image.shape
    ds.SamplesPerPixel, ds.PixelRepresentation = 1, 0
    ds.PhotometricInterpretation = "MONOCHROME1" if monochrome1 else "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = (8 if bits == 8 else 16), bits, bits - 1
    ds.WindowCenter, ds.WindowWidth = f"{(top + 1) / 2:g}", f"{top - 2 * low + 1:g}"
    ds.PixelData = stored.astype("<u1" if bits == 8 else "<u2").tobytes()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    if transfer_syntax != "explicit":
        ds.compress(SYNTAXES[transfer_syntax], encoding_plugin="pylibjpeg", generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)
