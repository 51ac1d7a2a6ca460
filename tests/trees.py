"""Small generated copies of the native layouts of public data sets, with every trap of the real ones.

Each function writes a tree of 48-to-80-pixel images below a folder and returns the root a user would name. Nothing in
them is anyone's: pixels are noise and shapes, names are made up in the pattern of the real ones.
"""

import csv
import json
import plistlib
import zlib

import numpy as np
import pandas as pd
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import DigitalMammographyXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid


def noise(seed, height=64, width=48, top=255, dtype=np.uint8):
    """Return a smooth blob on a dark, noisy ground: enough of a breast or a chest for a crop to find."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    blob = ((y - height / 2) / (height / 2.2)) ** 2 + (x / (width / 1.3)) ** 2 < 1
    values = 0.05 * rng.random((height, width)) + blob * (0.4 + 0.3 * rng.random((height, width)))
    return (values * top).astype(dtype)


def square(height, width, *corners):
    """Return a 0/255 mask with filled boxes ``(x0, y0, x1, y1)``."""
    mask = np.zeros((height, width), np.uint8)
    for x0, y0, x1, y1 in corners:
        mask[y0:y1, x0:x1] = 255
    return mask


def write_image(path, pixels, **options):
    """Write PNG, JPEG or PGM, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def write_dicom(path, pixels, **tags):
    """Write an uncompressed DICOM file of an 8- or 16-bit array with the tags given."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = DigitalMammographyXRayImageStorageForPresentation
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(path)])
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8 * pixels.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, 0
    data.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    for name, value in tags.items():
        setattr(data, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def write_csv(path, header, rows, **options):
    """Write a table as it is, newlines inside cells included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream, **options)
        writer.writerow(header)
        writer.writerows(rows)


def rsna_pneumonia(folder):
    """Unique patientIds of shared NIH patients, a row a box, repeated class rows, an age of 155, unlabelled test."""
    root = folder / "rsna-pneumonia-detection-challenge"
    labels, classes, pairs = [], [], []
    for i in range(14):
        name = f"00{i:02d}cafb-14fd-4e49-80ba-63a80b6bddd6"
        boxes = {0: [(264, 152, 213, 379), (562, 152, 256, 453)], 1: [(100, 200, 300, 400)]}.get(i % 4, [])
        labels += [(name, *map(float, box), 1) for box in boxes] or [(name, "", "", "", "", 0)]
        kind = "Lung Opacity" if boxes else ("Normal", "No Lung Opacity / Not Normal")[i % 2]
        classes += [(name, kind)] * max(1, len(boxes))
        pairs.append({"img_id": f"{i // 2:08d}_{i % 2:03d}.png", "subset_img_id": name, "SOPInstanceUID": "1.2"})
        pixels = noise(i, 64, 64)
        tags = {"ViewPosition": "AP" if boxes else "PA", "PatientAge": "155Y", "PatientID": name, "Modality": "CR"}
        write_dicom(root / "stage_2_train_images" / f"{name}.dcm", pixels, **tags)
    write_dicom(root / "stage_2_test_images" / "0000a175-0e68-4ca4-b1af-167204a7e0bc.dcm", noise(99, 64, 64))
    write_csv(root / "stage_2_train_labels.csv", ["patientId", "x", "y", "width", "height", "Target"], labels)
    write_csv(root / "stage_2_detailed_class_info.csv", ["patientId", "class"], classes)
    write_csv(
        root / "stage_2_sample_submission.csv",
        ["patientId", "PredictionString"],
        [("0000a175-0e68-4ca4-b1af-167204a7e0bc", "0.5 0 0 100 100")],
    )
    (root / "pneumonia-challenge-dataset-mappings_2018.json").write_text(json.dumps(pairs))
    return root


def kermany(folder):
    """The Kaggle mirror: folders doubled, litter, 2 validation images, persons with several images, in both splits."""
    root = folder / "archive"
    names = {
        "train/NORMAL": [
            "IM-0115-0001",
            "IM-0115-0002",
            "NORMAL2-IM-0115-0001",
            *(f"IM-02{i:02d}-0001" for i in range(8)),
        ],
        "train/PNEUMONIA": [
            "person1_bacteria_1",
            "person1_bacteria_2",
            "person7_virus_8",
            "person7_bacteria_9",
            *(f"person2{i}_{'virus' if i % 2 else 'bacteria'}_{i}" for i in range(8)),
        ],
        "val/NORMAL": ["NORMAL2-IM-1427-0001"],
        "val/PNEUMONIA": ["person1946_bacteria_4874"],
        "test/NORMAL": ["IM-0001-0001", "NORMAL2-IM-0317-0001"],
        "test/PNEUMONIA": ["person7_virus_6", "person1672_virus_2888", "person100_bacteria_475"],
    }
    for place, stems in names.items():
        for stem in stems:
            write_image(root / "chest_xray" / "chest_xray" / place / f"{stem}.jpeg", noise(hash_of(place + stem)))
    litter = root / "chest_xray" / "chest_xray" / "train" / "NORMAL"
    (litter / ".DS_Store").write_bytes(b"\0")
    (litter / "._IM-0115-0001.jpeg").write_bytes(b"\0")
    (root / "chest_xray" / "__MACOSX" / "train" / "NORMAL").mkdir(parents=True)
    return root


def kermany_mendeley(folder):
    """The original archive: ``CellData``, the class in the name, an accession shared by two images and two splits."""
    root = folder / "mendeley"
    names = {
        "train/NORMAL": ["NORMAL-1049278-0001", "NORMAL-1049278-0002", "NORMAL-11419-0001"],
        "train/PNEUMONIA": ["BACTERIA-40699-0001", "VIRUS-1004-0001", "VIRUS-777-0001"],
        "test/NORMAL": ["NORMAL-1110860-0001"],
        "test/PNEUMONIA": ["BACTERIA-777-0002", "VIRUS-888-0001"],
    }
    for place, stems in names.items():
        for stem in stems:
            write_image(root / "CellData" / "chest_xray" / place / f"{stem}.jpeg", noise(hash_of(place + stem)))
    return root


def hash_of(text):
    """Return a stable number of a string (``hash`` is salted)."""
    return zlib.crc32(text.encode())


def covid_qu_ex(folder):
    """Doubled folder names, infection masks on a subset, zero masks of the other classes, a subject in two splits."""
    root = folder / "COVID-QU-Ex"
    lung = root / "Lung Segmentation Data" / "Lung Segmentation Data"
    infection = root / "Infection Segmentation Data" / "Infection Segmentation Data"
    names = {
        "Train/COVID-19": [
            "covid_1",
            "covid_2",
            "sub-S09345_ses-E24849_run-1_bp-chest_vp-ap_cr",
            "sub-S09001_ses-E24000_run-1_bp-chest_vp-pa_cr",
        ],
        "Train/Non-COVID": ["non_COVID (1)", "non_COVID (2)"],
        "Train/Normal": ["Normal (1)", "Normal (2)"],
        "Val/COVID-19": ["covid_3"],
        "Val/Non-COVID": ["non_COVID (3)"],
        "Val/Normal": ["Normal (3)"],
        "Test/COVID-19": ["covid_4", "sub-S09345_ses-E24850_run-1_bp-chest_vp-ap_cr"],
        "Test/Non-COVID": ["non_COVID (4)"],
        "Test/Normal": ["Normal (4)"],
    }
    for place, stems in names.items():
        for i, stem in enumerate(stems):
            pixels, lungs = noise(hash_of(place + stem), 64, 64), square(64, 64, (6, 10, 28, 56), (36, 10, 58, 56))
            write_image(lung / place / "images" / f"{stem}.png", pixels)
            write_image(lung / place / "lung masks" / f"{stem}.png", lungs)
            if i == 1:
                continue
            other = {"Train": "Test", "Test": "Train"}.get(place.split("/")[0], "Val") if stem == "covid_1" else None
            there = place if other is None else place.replace("Train", other)
            lesion = square(64, 64, (8, 30, 24, 50), (40, 20, 52, 34), (2, 2, 4, 4))
            found = lesion if "COVID-19" in place else np.zeros((64, 64), np.uint8)
            write_image(infection / there / "images" / f"{stem}.png", pixels)
            write_image(infection / there / "lung masks" / f"{stem}.png", lungs)
            write_image(infection / there / "infection masks" / f"{stem}.png", found)
    return root


def qata_cov19(folder):
    """Blanks in folder names, ``mask_`` before mask names, LViT's lists of mask names, subjects in both splits."""
    root = folder / "archive"
    data = root / "QaTa-COV19" / "QaTa-COV19-v2"
    train = [f"sub-S091{i:02d}_ses-E1_run-1_bp-chest_vp-ap_cr" for i in range(8)]
    train += ["sub-S09103_ses-E2_run-1_bp-chest_vp-pa_cr", "sub-S09999_ses-E1_run-1_bp-chest_vp-ap_cr"]
    train += ["covid_1", "covid_2"]
    test = ["sub-S09999_ses-E2_run-1_bp-chest_vp-ap_cr", "sub-S09800_ses-E1_run-1_bp-chest_vp-ap_cr", "covid_3"]
    for name, stems in (("Train Set", train), ("Test Set", test)):
        for stem in stems:
            write_image(data / name / "Images" / f"{stem}.png", noise(hash_of(stem), 56, 56))
            mask = square(56, 56, (4, 10, 20, 30), (30, 12, 48, 40), (52, 52, 54, 54))
            write_image(data / name / "Ground-truths" / f"mask_{stem}.png", mask)
    write_image(data / "Train Set" / "Images" / "covid_9.png", noise(9, 56, 56))
    val = ["sub-S09103_ses-E2_run-1_bp-chest_vp-pa_cr", "sub-S09104_ses-E1_run-1_bp-chest_vp-ap_cr", "covid_2"]
    pd.DataFrame({"Image": [f"mask_{stem}.png" for stem in val]}).to_excel(root / "Val_ID.xlsx", index=False)
    rest = [stem for stem in train if stem not in val]
    pd.DataFrame({"Image": [f"mask_{stem}" for stem in rest]}).to_excel(root / "Train_ID.xlsx", index=False)
    return root


def covid_chestxray(folder):
    """A header with a trailing comma, CT and lateral rows, findings of every depth, V7 masks with 127 and all zero."""
    root = folder / "covid-chestxray-dataset"
    header = [
        "patientid",
        "offset",
        "sex",
        "age",
        "finding",
        "RT_PCR_positive",
        "view",
        "modality",
        "date",
        "folder",
        "filename",
        "doi",
        "url",
        "notes",
        "",
    ]
    journal, covid = "https://www.nejm.org/doi/full/10.1056/x", "Pneumonia/Viral/COVID-19"
    cases = [
        ("2", covid, "PA", "X-ray", "a-1.jpeg", journal),
        ("2", covid, "AP", "X-ray", "a-2.jpeg", journal),
        ("2", covid, "L", "X-ray", "a-3.jpeg", journal),
        ("3", "Pneumonia/Viral/SARS", "AP Supine", "X-ray", "b.png", "https://radiopaedia.org/cases/1"),
        ("4", "Pneumonia/Bacterial/Streptococcus", "PA", "X-ray", "c.jpg", "https://www.eurorad.org/case/2"),
        ("5", "Pneumonia", "PA", "X-ray", "d.png", journal),
        ("6", "Pneumonia/Viral", "PA", "X-ray", "e.png", "https://www.sirm.org/2020/03/"),
        ("7", "No Finding", "PA", "X-ray", "f.png", journal),
        ("8", "todo", "PA", "X-ray", "g.png", journal),
        ("8", "Unknown", "AP", "X-ray", "h.png", journal),
        ("9", covid, "Axial", "CT", "i.png", journal),
        ("10", covid, "PA", "X-ray", "absent.png", journal),
        ("11", "Tuberculosis", "PA", "X-ray", "j.png", journal),
        ("12", "Pneumonia/Fungal/Pneumocystis", "PA", "X-ray", "k.png", journal),
        ("13a", "No Finding", "PA", "X-ray", "l.png", journal),
        ("14", covid, "PA", "X-ray", "m.png", journal),
        ("14", covid, "PA", "X-ray", "m.png", journal),
    ]
    rows = []
    for patient, finding, view, modality, name, url in cases:
        note = 'a note, with a comma and a "quote"'
        rows.append((patient, 0, "M", 65, finding, "Y", view, modality, "2020", "images", name, "10.1", url, note, ""))
        if name != "absent.png":
            write_image(root / "images" / name, noise(hash_of(name), 60, 50))
    write_csv(root / "metadata.csv", header, rows)
    lungs = square(60, 50, (4, 8, 20, 52), (28, 8, 46, 52))
    lungs[30:34, 28:46] = 127
    masks = root / "semantic_masks_v7labs_lungs"
    for name in ("a-1.jpeg", "b.png", "g.png"):
        write_image(masks / name, lungs, format="PNG")
    write_image(masks / "c.jpg", np.zeros((60, 50), np.uint8), format="PNG")
    write_image(root / "annotations" / "lungVAE-masks" / "d_mask.png", lungs)
    return root


BREAST_COLUMNS = [
    "left or right breast",
    "image view",
    "abnormality id",
    "abnormality type",
    "{0}",
    "{1}",
    "assessment",
    "pathology",
    "subtlety",
    "image file path",
    "cropped image file path",
    "ROI mask file path",
]
CBIS_FILMS = {
    # table: (patient, side, view, [(pathology, assessment), ...], what is wrong)
    "mass train": [
        ("P_00001", "LEFT", "CC", [("MALIGNANT", 4)], "crop first"),
        ("P_00001", "LEFT", "MLO", [("BENIGN", 3), ("MALIGNANT", 5)], "mask first"),
        ("P_00002", "RIGHT", "CC", [("BENIGN_WITHOUT_CALLBACK", 0)], "other series"),
        ("P_00003", "RIGHT", "MLO", [("BENIGN", 2)], "mask of other size"),
        ("P_00004", "LEFT", "CC", [("BENIGN", 2), ("BENIGN", 2)], "no mask"),
        ("P_00013", "LEFT", "CC", [("BENIGN", 3)], "crop first"),
        *[(f"P_0003{i}", "RIGHT", "CC", [("MALIGNANT" if i % 2 else "BENIGN", 4)], "crop first") for i in range(6)],
    ],
    "mass test": [
        ("P_00101", "LEFT", "CC", [("MALIGNANT", 5)], "crop first"),
        ("P_00102", "RIGHT", "CC", [("BENIGN", 2)], "mask first"),
        ("P_00018", "RIGHT", "MLO", [("BENIGN", 3)], "crop first"),
    ],
    "calc train": [
        ("P_00001", "LEFT", "CC", [("BENIGN", 2)], "mask first"),
        ("P_00018", "RIGHT", "CC", [("MALIGNANT", 4)], "mask first"),
        ("P_00020", "LEFT", "CC", [("BENIGN_WITHOUT_CALLBACK", 2)], "mask first"),
    ],
    "calc test": [
        ("P_00013", "LEFT", "CC", [("BENIGN", 2)], "mask first"),
        ("P_00201", "RIGHT", "CC", [("MALIGNANT", 4)], "mask first"),
    ],
}
CBIS_SIZE = (80, 60)


def cbis_ddsm(folder, layout="nbia"):
    r"""Paths that end in ``\n``, mask and crop in either order and series, masks of another size, leaks between types.

    Args:
        folder: Where to write.
        layout: ``nbia`` (descriptive names), ``classic`` (UIDs and ``000000.dcm``) or ``jpeg`` (the Kaggle mirror).
    """
    root = folder / f"cbis_{layout}"
    info = []
    for table, films in CBIS_FILMS.items():
        kind, split = table.split()
        density = "breast_density" if kind == "mass" else "breast density"
        names = ("mass shape", "mass margins") if kind == "mass" else ("calc type", "calc distribution")
        rows = []
        for patient, side, view, lesions, trouble in films:
            part = {"train": "Training", "test": "Test"}[split]
            case = f"{kind.capitalize()}-{part}_{patient}_{side}_{view}"
            height, width = CBIS_SIZE
            image = noise(hash_of(case), height, width, 60000, np.uint16)
            _cbis_write(root, layout, case, "full mammogram images", [image], info)
            for number, (pathology, assessment) in enumerate(lesions, start=1):
                x = 10 + 15 * (number - 1)
                mask = square(height, width, (x, 20, x + 8, 34))
                if trouble == "mask of other size":
                    mask = mask.repeat(2, axis=0).repeat(2, axis=1)
                crop = np.ascontiguousarray(image[14:40, max(0, x - 6) : x + 14])
                pair = {"mask first": [mask, crop], "no mask": [crop]}.get(trouble, [crop, mask])
                roi = f"{case}_{number}"
                if trouble == "other series":
                    _cbis_write(root, layout, roi, "cropped images", [crop], info)
                    _cbis_write(root, layout, roi, "ROI mask images", [mask], info)
                else:
                    _cbis_write(root, layout, roi, "cropped images", pair, info)
                uids = "1.3.6.1.4.1.9590.1/1.3.6.1.4.1.9590.2"
                crop_path, mask_path = f"{roi}/{uids}/000000.dcm", f"{roi}/{uids}/000001.dcm"
                if kind == "mass":
                    mask_path += "\n"
                else:
                    crop_path, mask_path = mask_path + "\n", crop_path
                film_path = f"{case}/{uids}/000000.dcm"
                rows.append(
                    (
                        patient,
                        3,
                        side,
                        view,
                        number,
                        kind,
                        "X",
                        "Y",
                        assessment,
                        pathology,
                        0 if number == 2 else 4,
                        film_path,
                        crop_path,
                        mask_path,
                    )
                )
        header = ["patient_id", density, *(name.format(*names) for name in BREAST_COLUMNS)]
        place = root / "csv" if layout == "jpeg" else root
        write_csv(place / f"{kind}_case_description_{split}_set.csv", header, rows)
    if layout == "jpeg":
        write_csv(root / "csv" / "dicom_info.csv", ["file_path", "image_path", "PatientID", "SeriesDescription"], info)
    return root


def _cbis_write(root, layout, case, series, arrays, info):
    uid = f"1.3.6.1.4.1.9590.100.{hash_of(case + series) % 10**9}{len(info)}"
    info.append(None) if layout != "jpeg" else None
    for i, pixels in enumerate(arrays):
        if layout == "jpeg":
            shown = (pixels // 256).astype(np.uint8) if pixels.dtype == np.uint16 else pixels
            name = f"{i + 1}-{len(info):03d}.jpg"
            write_image(root / "jpeg" / uid / name, shown, quality=70)
            path = f"CBIS-DDSM/jpeg/{uid}/{name}"
            info.append((f"CBIS-DDSM/dicom/{uid}/{i + 1}-1.dcm", path, case, series if i == 0 else ""))
        elif layout == "classic":
            file = root / "CBIS-DDSM" / case / f"1.3.6.{len(info)}" / uid / f"{i:06d}.dcm"
            write_dicom(file, pixels, PatientID=case, SeriesDescription=series)
        else:
            study = f"07-20-2016-DDSM-NA-{len(info):05d}"
            file = root / "CBIS-DDSM" / case / study / f"1.000000-{series}-{len(info):05d}" / f"1-{i + 1}.dcm"
            write_dicom(file, pixels, PatientID=case, SeriesDescription=series)


def inbreast(folder):
    """A ``;`` table without patients, an ACR of blanks, grades such as 4c, ``ML`` in names, points, two sizes."""
    root = folder / "INbreast Release 1.0"
    box = [(10.5, 12.5), (24.5, 12.5), (24.5, 30.5), (10.5, 30.5)]
    inner = [(12.0, 14.0), (20.0, 14.0), (20.0, 28.0), (12.0, 28.0)]
    far = [(5.0, 40.0), (15.0, 40.0), (15.0, 50.0)]
    cases = [
        # patient, side, view, ACR, BI-RADS, regions (None: no XML file)
        ("aaaa", "R", "CC", "2", "5", [("Mass", inner), ("Spiculated Region", box)]),
        ("aaaa", "R", "MLO", "2", "5", [("Espiculated Region", box), ("Calcification", [(30.2, 40.7)])]),
        ("aaaa", "L", "CC", "2", "1", None),
        ("aaaa", "L", "MLO", "2", "1", None),
        ("bbbb", "L", "CC", " " * 190, "4c", [("Cluster", far), ("Calcifications", [(8.0, 44.0), (9.0, 45.0)])]),
        ("bbbb", "L", "MLO", "1", "4a", [("Asimmetry", box), ("Assymetry", far)]),
        ("cccc", "R", "FB", "3", "3", [("Distortion", box)]),
        ("cccc", "R", "CC", "3", "3", [("Point 1", [(20.0, 20.0)]), ("", [(22.0, 21.0)])]),
        ("dddd", "L", "CC", "4", "6", [("UNNAMED", box), ("Mass", far)]),
        ("dddd", "L", "MLO", "4", "2", None),
        *[(f"e{i}e{i}", "R", "CC", "1", "1", None) for i in range(6)],
        *[(f"f{i}f{i}", "R", "CC", "2", "4b", [("mass ", box)]) for i in range(6)],
    ]
    rows = []
    for i, (patient, side, view, acr, birads, regions) in enumerate(cases):
        name = str(20586908 + 26 * i)
        size = (80, 64) if i % 2 else (72, 56)
        pixels = noise(i, *size, 4095, np.uint16)
        pixels = np.ascontiguousarray(pixels[:, ::-1]) if side == "R" else pixels
        written = "ML" if view == "MLO" else view
        file = root / "AllDICOMs" / f"{name}_{patient}a14b80a859_MG_{side}_{written}_ANON.dcm"
        write_dicom(file, pixels, PatientID="removed", ImageLaterality=side, BitsStored=12, HighBit=11)
        rows.append(("removed", "removed", side, view, "200801", name, acr, birads))
        if regions is not None:
            write_inbreast_xml(root / "AllXML" / f"{name}.xml", regions)
    write_dicom(root / "AllDICOMs" / "99999999_zzzza14b80a859_MG_R_CC_ANON.dcm", noise(99))
    header = ["Patient ID", "Patient age", "Laterality", "View", "Acquisition date", "File Name", "ACR", "Bi-Rads"]
    write_csv(root / "INbreast.csv", header, rows, delimiter=";")
    return root


def write_inbreast_xml(path, regions, number_of_rois=None):
    """Write an OsiriX plist of ``(name, points)``."""
    rois = [
        {
            "Name": name,
            "NumberOfPoints": len(points),
            "Point_px": [f"({x:.6f}, {y:.6f})" for x, y in points],
            "Area": 1.0,
        }
        for name, points in regions
    ]
    count = len(rois) if number_of_rois is None else number_of_rois
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(plistlib.dumps({"Images": [{"ImageIndex": 0, "NumberOfROIs": count, "ROIs": rois}]}))


VINDR_SIZE = (80, 64)


def vindr_mammo(folder):
    """Lists as text, boxes over every edge, no finding BI-RADS, an extra CC, no PatientID, MONOCHROME1, two windows."""
    root = folder / "vindr-mammo" / "1.0.0"
    height, width = VINDR_SIZE
    found = {
        ("s0", "L", "CC"): [("['Mass', 'Skin Retraction']", "BI-RADS 4", -3.0, 10.0, 20.0, 30.5)],
        ("s0", "L", "MLO"): [("['Suspicious Calcification']", "BI-RADS 4", 30.0, -2.0, width + 5.0, 20.0)],
        ("s1", "R", "CC"): [
            ("['Focal Asymmetry']", "", 5.0, 50.0, 25.0, height + 4.0),
            ("['Mass']", "BI-RADS 3", 20.0, 20.0, 30.0, 30.0),
        ],
        ("s8", "R", "CC"): [("['Nipple Retraction', 'Mass']", "BI-RADS 5", 8.0, 8.0, 28.0, 28.0)],
        ("s2", "R", "MLO"): [("['Global Asymmetry']", "BI-RADS 3", "", "", "", "")],
    }
    breasts, findings, metadata = [], [], []
    views = [("L", "CC"), ("L", "MLO"), ("R", "CC"), ("R", "MLO")]
    for study in range(10):
        split = "test" if study >= 8 else "training"
        for extra, (side, view) in enumerate(views + ([("L", "CC")] if study == 3 else [])):
            image = f"{study}{side}{view}{extra}".lower() + "0" * 8
            birads = "BI-RADS 5" if (f"s{study}", side) == ("s0", "L") else f"BI-RADS {1 + study % 3}"
            density = f"DENSITY {'ABCD'[study % 4]}"
            head = (f"s{study}", f"ser{study}", image, side, view, height, width, birads, density)
            breasts.append((*head, split))
            rows = found.get((f"s{study}", side, view), []) if extra < 4 else []
            for categories, grade, *box in rows or [("['No Finding']", "", "", "", "", "")]:
                findings.append((*head, categories, grade, *box, split))
            metadata.append((image, "Mammomat Inspiration" if study % 2 else "Planmed Nuance"))
            pixels = noise(hash_of(image), height, width, 4095, np.uint16)
            pixels = np.ascontiguousarray(pixels[:, ::-1]) if side == "R" else pixels
            tags = {"ImageLaterality": side, "ViewPosition": view, "BitsStored": 12, "HighBit": 11}
            tags |= {"WindowCenter": [2048, 1500], "WindowWidth": [4096, 900]}
            if study == 1:
                pixels, tags = (4095 - pixels).astype(np.uint16), tags | {"PhotometricInterpretation": "MONOCHROME1"}
            write_dicom(root / "images" / f"s{study}" / f"{image}.dicom", pixels, **tags)
    first = [
        "study_id",
        "series_id",
        "image_id",
        "laterality",
        "view_position",
        "height",
        "width",
        "breast_birads",
        "breast_density",
    ]
    write_csv(root / "breast-level_annotations.csv", [*first, "split"], breasts)
    box = ["finding_categories", "finding_birads", "xmin", "ymin", "xmax", "ymax", "split"]
    write_csv(root / "finding_annotations.csv", [*first, *box], findings)
    write_csv(root / "metadata.csv", ["SOP Instance UID", "Manufacturer's Model Name"], metadata)
    return root


MIAS_LINES = """
mdb001 G CIRC B 535 425 197
mdb002 G CIRC B 522 280 69
mdb003 D NORM\x20
mdb004 D NORM\x20
mdb005 F CIRC B 477 133 30
mdb005 F CIRC B 500 168 26
mdb006 F NORM\x20
mdb059 F CIRC B
mdb060 F NORM\x20
mdb144 F MISC B 233 994 29
mdb144 F MISC M 313 540 27
mdb184 F SPIC M 352 624 114
mdb200 F NORM\x20
mdb202 D SPIC M 557 772 37
mdb216 D CALC M *NOTE 3*\x20
mdb219 G CALC B 546 756 29
mdb249 D CALC M 544 508 48
mdb249 D CALC M 575 639 64
"""


def mini_mias(folder):
    """Prose before the table, trailing blanks, several rows an image, rows without a place, y from the bottom."""
    root = folder / "all-mias"
    prose = (
        "INFORMATION:\n1st column: MIAS database reference number.\n3) Coordinate system origin is the bottom-left.\n"
    )
    for name in sorted({line.split()[0] for line in MIAS_LINES.strip().splitlines()}):
        write_image(root / f"{name}.pgm", noise(hash_of(name), 1024, 1024))
    (root / "Info.txt").write_text(prose + MIAS_LINES + "mdb322 D NORM \n\n======\n")
    return root


def cmmd(folder):
    """An Excel table with a row a breast, four images where one side is labelled, the view in a code sequence only."""
    root = folder / "manifest-1616439774456"
    codes = {"CC": "399162004", "MLO": "399368009"}
    rows = []
    for i in range(10):
        patient = f"D{1 + i % 2}-{i + 1:04d}"
        sides = ["L", "R"] if i % 3 == 0 else ["R"]
        labelled = ["L", "R"] if i == 9 else sides[:1]
        for side in labelled:
            kind = ("mass", "calcification", "both")[i % 3]
            malignant = i % 2 == 0 or (i, side) == (9, "R")
            rows.append(
                (patient, side, 44, 2, kind, "Malignant" if malignant else "Benign", "Luminal A" if i % 2 else "")
            )
        number = 0
        for side in sides:
            for view in ("CC", "MLO"):
                number += 1
                pixels = noise(100 * i + number, 80, 64)
                pixels = np.ascontiguousarray(pixels[:, ::-1]) if side == "R" else pixels
                code = Dataset()
                code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = codes[view], "SCT", "view"
                file = root / "CMMD" / patient / "07-18-2010-NA-49690" / "1.000000-NA-35817" / f"1-{number}.dcm"
                tags = {"PatientID": patient, "ImageLaterality": side, "ViewCodeSequence": Sequence([code])}
                write_dicom(file, pixels, PresentationIntentType="FOR PRESENTATION", **tags)
    header = ["ID1", "LeftRight", "Age", "number", "abnormality", "classification", "subtype"]
    root.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=header).to_excel(root / "CMMD_clinicaldata_revision.xlsx", index=False)
    return root
