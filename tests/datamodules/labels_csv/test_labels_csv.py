from __future__ import annotations

import csv
import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonargparse import ArgumentParser
from PIL import Image

from datamodules.base import MedicalDataModule
from datamodules.labels_csv.columns import BoxColumns, ClassColumns, MaskColumns
from datamodules.labels_csv.datamodule import LabelsCSVDataModule
from datamodules.records import BoxTruth, Catalogue, ClassTruth, MaskSource, MaskTruth, Record
from mtmedformer.errors import ConfigError, DataError
from tests.fixtures.real_data import real

FINDING = {"finding": ClassColumns(column="label")}
LESIONS = {"lesions": BoxColumns()}
HEADER = "image,patient,label,boxes,box_labels\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in "abcdefghij":
        Image.fromarray(rng.integers(1, 255, (32, 32), np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


def module(root: Path, table: str | bytes | None = None, **arguments: Any) -> LabelsCSVDataModule:
    if table is not None:
        (root / "labels.csv").write_bytes(table.encode() if isinstance(table, str) else table)
    plain = {"image_size": 32, "num_workers": 0, "cache_dir": None, "batch_size": 2}
    return LabelsCSVDataModule(root, **plain | arguments)


def read(root: Path, table: str | bytes, **arguments: Any) -> tuple[dict[str, Record], LabelsCSVDataModule, Catalogue]:
    data = module(root, table, **arguments)
    found = data.catalogue()
    return {record.id: record for record in found.records}, data, found


def reasons(data: LabelsCSVDataModule) -> Counter[str]:
    return data.quarantine.by_reason()


def test_a_row_becomes_a_record(root: Path) -> None:
    table = (
        "image,patient,site,split,view,laterality,client,height,width,label,boxes,box_labels,mask\n"
        'a.png,p1,north,Test,CC,left,east,64,48,sick,"[[1, 2, 11, 12.5]]","[""spot""]",m.png\n'
        "b.png,p2,,,,,,,,,,,\n"
    )
    records, _, found = read(
        root,
        table,
        classification={"finding": ClassColumns(column="label", classes=["well", "sick"])},
        detection=LESIONS,
        segmentation={"lungs": MaskColumns(columns={"lung": "mask"})},
    )
    assert records["a"] == Record(
        id="a",
        file=root / "a.png",
        patient="p1",
        truth={
            "finding": ClassTruth((0.0, 1.0)),
            "lesions": BoxTruth(((1.0, 2.0, 11.0, 12.5),), (0,)),
            "lungs": MaskTruth((MaskSource(root / "m.png"),)),
        },
        site="north",
        view="CC",
        laterality="L",
        split="test",
        groups={"client": "east"},
        size=(64, 48),
    )
    assert records["b"] == Record("b", root / "b.png", "p2")
    assert found.tasks["finding"].classes == ("well", "sick")
    assert found.tasks["lesions"].classes == ("spot",)
    assert not found.tasks["finding"].multi_label
    assert found.tasks["lungs"].multi_label


def test_a_flag_separates_unknown_from_empty(root: Path) -> None:
    table = (
        "image,patient,boxes,has_det,mask,has_mask\n"
        "a.png,1,[],1,,1\n"  # looked, nothing there
        "b.png,2,[],0,,0\n"  # nobody looked
        "c.png,3,[],,,\n"  # nobody says that someone looked
        'd.png,4,"[[1,1,9,9]]",0,m.png,0\n'  # not to be used
        'e.png,5,"[[1,1,9,9]]",1,m.png,1\n'
    )
    records, _, _ = read(
        root,
        table,
        detection={"lesions": BoxColumns(labels=None, flag="has_det")},
        segmentation={"lesion": MaskColumns(columns={"lesion": "mask"}, flag="has_mask")},
    )
    assert records["a"].truth == {"lesions": BoxTruth(), "lesion": MaskTruth((MaskSource(),))}
    assert [records[i].truth for i in "bcd"] == [{}, {}, {}]
    assert records["e"].truth["lesions"] == BoxTruth(((1, 1, 9, 9),), (0,))
    assert records["e"].truth["lesion"] == MaskTruth((MaskSource(root / "m.png"),))


def test_without_a_flag_the_cell_decides(root: Path) -> None:
    table = "image,patient,boxes,left,right\na.png,1,[],l.png,\nb.png,2,,,\n"
    records, _, found = read(
        root,
        table,
        detection={"lesions": BoxColumns(labels=None)},
        segmentation={"lungs": MaskColumns(columns={"left": "left", "right": "right"})},
    )
    assert records["a"].truth == {"lesions": BoxTruth(), "lungs": MaskTruth((MaskSource(root / "l.png"), None))}
    assert records["b"].truth == {}
    assert found.tasks["lungs"].classes == ("left", "right")


def test_a_missing_flag_is_noted_and_a_misspelt_one_is_an_error(root: Path) -> None:
    table = "image,patient,boxes,has_det\na.png,1,[],0\n"
    records, _, found = read(root, table, detection={"lesions": BoxColumns(labels=None, flag="annotated")})
    assert records["a"].truth == {"lesions": BoxTruth()}
    assert any("no column 'annotated'" in note for note in found.notes)
    with pytest.raises(DataError, match=r"no column 'has_dets'.*did you mean 'has_det'"):
        read(root, table, detection={"lesions": BoxColumns(labels=None, flag="has_dets")})


def test_several_columns_are_a_multi_label_task_with_unknowns(root: Path) -> None:
    table = "image,patient,opacity,fluid\na.png,1,1,0\nb.png,2,,1.0\nc.png,3,-1,\nd.png,4,no,yes\ne.png,5,0.4,1\n"
    records, data, found = read(root, table, classification={"signs": ClassColumns(columns=["opacity", "fluid"])})
    assert found.tasks["signs"].multi_label
    assert records["a"].truth["signs"] == ClassTruth((1.0, 0.0))
    opacity, fluid = records["b"].truth["signs"].values
    assert math.isnan(opacity)
    assert fluid == 1.0
    assert "signs" not in records["c"].truth
    assert records["d"].truth["signs"] == ClassTruth((0.0, 1.0))
    assert "signs" not in records["e"].truth
    assert reasons(data) == {"signs: cell neither 0 nor 1": 1}
    renamed = {"signs": ClassColumns(columns={"Fluid": "fluid", "Opacity": "opacity"}, classes=["Opacity", "Fluid"])}
    records, _, found = read(root, table, classification=renamed)
    assert found.tasks["signs"].classes == ("Opacity", "Fluid")
    assert records["a"].truth["signs"] == ClassTruth((1.0, 0.0))


def test_one_mask_file_may_hold_several_classes(root: Path) -> None:
    spec = MaskColumns(column="mask", values={"lung": [1, 2], "heart": [3]})
    records, _, found = read(root, "image,patient,mask\na.png,1,m.png\n", segmentation={"organs": spec})
    assert not found.tasks["organs"].multi_label
    assert records["a"].truth["organs"] == MaskTruth(
        (MaskSource(root / "m.png", (1, 2)), MaskSource(root / "m.png", (3,)))
    )


def test_a_class_may_be_called_none_if_it_is_named(root: Path) -> None:
    table = "image,patient,label\na.png,1,none\nb.png,2,mass\n"
    records, _, _ = read(root, table, classification={"t": ClassColumns(column="label", classes=["none", "mass"])})
    assert records["a"].truth["t"] == ClassTruth((1.0, 0.0))
    records, _, found = read(root, table, classification={"t": ClassColumns(column="label")})
    assert found.tasks["t"].classes == ("mass",)
    assert records["a"].truth == {}


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_separator_and_encoding_are_recognised(root: Path, separator: str, encoding: str) -> None:
    rows = [
        ["image", "patient", "label", "boxes"],
        ["a.png", "1", "Ödem", "[[1,2,3,4], [2;2;5;5]]"],
        ["b.png", "2", "well", ""],
    ]
    rows[1][3] = "[[1, 2, 3, 4], [2, 2, 5, 5]]"
    text = "\r\n".join(separator.join(f'"{cell}"' if row else cell for cell in row) for row in rows)
    records, _, found = read(
        root, text.encode(encoding), classification=FINDING, detection={"l": BoxColumns(labels=None)}
    )
    assert found.tasks["finding"].classes == ("well", "Ödem")
    assert len(records["a"].truth["l"].boxes) == 2


def test_python_lists_blank_lines_and_backslashes_are_read(root: Path) -> None:
    table = HEADER + "\n" + 'sub\\a.png,1,x,"[(1, 2, 3, 4)]","[\'s\']"\n\n'
    records, _, _ = read(root, table, detection=LESIONS)
    assert records["a"].file == root / "sub" / "a.png"
    assert records["a"].truth["lesions"] == BoxTruth(((1, 2, 3, 4),), (0,))


def test_files_of_one_name_get_stable_ids(root: Path) -> None:
    table = "image,patient,label\nx/a.png,1,s\ny/a.png,2,s\nb.png,3,w\n"
    ids = [r.id for r in read(root, table, classification=FINDING)[2].records]
    assert len(set(ids)) == 3
    assert ids[2] == "b"
    header, *rows = table.splitlines()
    reverse = "\n".join([header, *reversed(rows)])
    assert sorted(r.id for r in read(root, reverse, classification=FINDING)[2].records) == sorted(ids)


STRUCTURE = {
    "empty": ("", "the table is empty"),
    "blank": ("\n\n  \n", "the table is empty"),
    "header only": (HEADER, "a header but no row"),
    "no image column": ("file,patient,label\na.png,1,s\n", r"no column 'image'.*columns are file, patient, label"),
    "no class column": ("image,patient,labels\na.png,1,s\n", r"no column 'label' \(task 'finding'.*mean 'labels'"),
    "no patient column": ("image,label\na.png,s\n", r"no column 'patient'.*null counts every image"),
    "a column twice": ("image,patient,label,label\na.png,1,s,s\n", "column 'label' appears more than once"),
    "unquoted list": (
        "image,patient,label,boxes\na.png,1,s,[[1,2,3,4]]\n",
        r"line 2 has 7 cells, the header 4.*quotes",
    ),
    "cut off": ("image,patient,label\na.png,1,s\nb.png,2", "line 3 has 2 cells, the header 3. Is the file complete"),
    "not a split": (
        "image,patient,label,split\na.png,1,s,holdout\n",
        "line 2, column 'split': 'holdout' is not a split",
    ),
    "path upwards": (
        "image,patient,label\n../a.png,1,s\n",
        r"labels.csv: line 2, column 'image': '../a.png' is outside",
    ),
    "path elsewhere": ("image,patient,label\n/etc/passwd,1,s\n", "'/etc/passwd' is outside the folder"),
    "no class": ("image,patient,label\na.png,1,\n", "column 'label' has no class in any labelled row"),
    "free text": (
        "image,patient,label\n" + "".join(f"a{n}.png,1,text {n}\n" for n in range(51)),
        "51 different values.*too many for classes",
    ),
    "two patients": ("image,patient,label\na.png,1,s\na.png,2,s\n", "lines 2 and 3 name the same image.*'patient'"),
    "two classes": ("image,patient,label\na.png,1,s\n./a.png,1,w\n", "lines 2 and 3 .*contradict each other in 'find"),
}


@pytest.mark.parametrize("case", STRUCTURE)
def test_a_table_that_cannot_be_used_is_refused(root: Path, case: str) -> None:
    table, message = STRUCTURE[case]
    with pytest.raises(DataError, match=f"(?s){message}"):
        read(root, table, classification=FINDING)


def test_an_excel_sheet_and_a_missing_table_are_refused(root: Path) -> None:
    with pytest.raises(DataError, match="not a text table; save an Excel sheet as CSV"):
        read(root, b"PK\x03\x04\x00\x00image", classification=FINDING)
    with pytest.raises(DataError, match=r"other.csv cannot be read .*check data.init_args.root"):
        module(root, table="", classification=FINDING).__class__(root, table="other.csv", classification=FINDING).plan()


ROWS = {
    "malformed list": ('"[[1, 2, 3, 4"', '"[""s""]"', "cell not a list"),
    "a number": ("7", '"[""s""]"', "cell not a list"),
    "code": ("\"__import__('os').getcwd()\"", '"[""s""]"', "cell not a list"),
    "deep": ('"' + "[" * 5000 + '"', '"[""s""]"', "cell not a list"),
    "three numbers": ('"[[1, 2, 3]]"', '"[""s""]"', "box not four numbers"),
    "words": ('"[[""a"", 2, 3, 4]]"', '"[""s""]"', "box not four numbers"),
    "no labels": ('"[[1, 2, 3, 4]]"', "[]", "not one label per box"),
    "unknown label": ('"[[1, 2, 3, 4]]"', '"[""t""]"', "unknown class"),
}


@pytest.mark.parametrize("case", ROWS)
def test_an_invalid_cell_makes_only_its_label_unknown(root: Path, case: str) -> None:
    boxes, labels, reason = ROWS[case]
    table = HEADER + f"a.png,1,x,{boxes},{labels}\n" + 'b.png,2,x,"[[1, 2, 3, 4]]","[""s""]"\n'
    spec = {"lesions": BoxColumns(classes=["s"])}
    records, data, _ = read(root, table, classification=FINDING, detection=spec)
    assert set(records["a"].truth) == {"finding"}
    assert set(records["b"].truth) == {"finding", "lesions"}
    assert reasons(data) == {f"lesions: {reason}": 1}
    assert data.quarantine.issues[0].id == "a"
    assert data.quarantine.issues[0].detail.startswith("labels.csv line 2, column 'box")


def test_an_unknown_class_names_the_known_ones(root: Path) -> None:
    spec = {"finding": ClassColumns(column="label", classes=["sick", "well"], flag="has")}
    records, data, _ = read(
        root,
        "image,patient,label,has\na.png,1,Sick,1\nb.png,2,,1\nc.png,3,Sick,0\nd.png,4,sick,maybe\n",
        classification=spec,
    )
    assert all(record.truth == {} for record in records.values())
    assert "the classes of finding are sick, well" in data.quarantine.issues[0].detail
    assert reasons(data) == {
        "finding: unknown class": 1,
        "finding: labelled but no class given": 1,
        "finding: cell neither 0 nor 1": 1,
    }


def test_rows_of_one_image_are_merged_if_they_agree(root: Path) -> None:
    table = (
        "image,patient,site,label,has_det,boxes,m1,m2,opacity,fluid\n"
        "a.png,1,north,sick,0,[],x.png,,1,\n"
        'a.png,1,,,1,"[[1, 2, 3, 4]]",,y.png,,0\n'
        "b.png,2,north,well,1,[],,,,\n"
        "b.png,2,north,well,1,[],,,,\n"
    )
    records, data, found = read(
        root,
        table,
        classification=FINDING | {"signs": ClassColumns(columns=["opacity", "fluid"])},
        detection={"lesions": BoxColumns(labels=None, flag="has_det")},
        segmentation={"lungs": MaskColumns(columns={"l": "m1", "r": "m2"})},
    )
    assert records["a"].site == "north"
    assert records["a"].truth == {
        "finding": ClassTruth((1.0, 0.0)),
        "signs": ClassTruth((1.0, 0.0)),
        "lesions": BoxTruth(((1, 2, 3, 4),), (0,)),
        "lungs": MaskTruth((MaskSource(root / "x.png"), MaskSource(root / "y.png"))),
    }
    assert records["b"].truth["lesions"] == BoxTruth()
    assert any("2 rows repeat an image of an earlier row" in note for note in found.notes)
    assert not data.quarantine.issues
    with pytest.raises(DataError, match=r"contradict each other in 'lesions'.*all its boxes in one list"):
        read(
            root,
            HEADER + 'a.png,1,x,"[[1,2,3,4]]",\na.png,1,x,"[[5,5,9,9]]",\n',
            detection={"lesions": BoxColumns(labels=None)},
        )


def test_a_row_without_an_image_is_listed(root: Path) -> None:
    records, data, _ = read(root, "image,patient,label\n,1,s\na.png,2,s\n", classification=FINDING)
    assert set(records) == {"a"}
    assert data.quarantine.issues[0].id == "line 2"


def test_invalid_sizes_and_sides_are_noted_and_read_as_blank(root: Path) -> None:
    table = "image,patient,label,laterality,height,width\na.png,1,s,both,many,32\nb.png,2,s,R,32,32\n"
    records, _, found = read(root, table, classification=FINDING)
    assert (records["a"].laterality, records["a"].size) == (None, None)
    assert (records["b"].laterality, records["b"].size) == ("R", (32, 32))
    assert sum("taken as blank" in note for note in found.notes) == 2


def test_configured_columns_must_exist(root: Path) -> None:
    table = "image,patient,label\na.png,1,s\n"
    read(root, table, classification=FINDING)
    for argument, value in (
        ("site_column", "hospital"),
        ("split_column", "fold"),
        ("view_column", "projection"),
        ("group_columns", ["vendor"]),
        ("size_columns", ("rows", "cols")),
    ):
        with pytest.raises(DataError, match="no column"):
            read(root, table, classification=FINDING, **{argument: value})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "name at least one task"),
        ({"classification": {"t": ClassColumns()}}, r"classification.t: give column .* or columns"),
        ({"classification": {"t": ClassColumns(column="a", columns=["b"])}}, "not both"),
        ({"classification": {"t": ClassColumns(column="a", classes=["x", "x"])}}, "name each class once"),
        ({"classification": FINDING, "detection": {"finding": BoxColumns()}}, "another task is called 'finding'"),
        ({"segmentation": {"t": MaskColumns()}}, "segmentation.t: give columns"),
        ({"segmentation": {"t": MaskColumns(column="m")}}, "column and values"),
    ],
)
def test_invalid_tasks_are_refused(root: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        module(root, "", **arguments)


def test_a_whole_run_leaves_out_what_is_broken(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [f"{n}.png,{n},{'sick' if i % 2 else 'well'},[],[]" for i, n in enumerate("abcdefghij")]
    rows[3] = 'd.png,d,sick,"[[9, 9, 3, 3]]","[""s""]"'  # inverted
    rows[4] = 'e.png,e,well,"[[NaN, 1, 3, 3]]","[""s""]"'
    rows[5] = 'f.png,f,sick,"[[1, 1, 300, 30]]","[""s""]"'  # reaches outside
    rows[6] = "gone.png,g,well,[],[]"
    rows[7] = 'h.png,h,sick,"[[100, 100, 120, 120]]","[""s""]"'
    with caplog.at_level(logging.WARNING):
        data = module(
            root, HEADER + "\n".join(rows), classification=FINDING, detection=LESIONS, max_quarantine_share=0.5
        )
        data.setup(None)
    assert reasons(data) == {
        "lesions: box without area or with corners swapped": 1,
        "lesions: box with a coordinate that is not a number": 1,
        "lesions: box outside the image": 1,
        "image: image file missing": 1,
    }
    assert data.quarantine.remarks == {"boxes clipped to their image": 1}
    assert sum("Left out 1 images and 3 labels" in record.getMessage() for record in caplog.records) == 1
    assert sum(len(d) for d in data.datasets.values()) == 9


def test_a_table_full_of_mistakes_stops_the_run(root: Path) -> None:
    rows = "".join(f"{n}.png,{n},x,oops,\n" for n in "abcdef")
    with pytest.raises(
        DataError, match=r"(?s)6 of 6 images labelled for task 'lesions'.*line 2, column 'boxes': 'oops'"
    ):
        module(root, HEADER + rows, detection={"lesions": BoxColumns(labels=None)}).plan()


def test_a_yaml_file_configures_it(root: Path) -> None:
    config = Path(__file__).resolve().parents[3] / "configs" / "data" / "labels_csv.yaml"
    assert config.read_text().startswith("# mtmedformer fit ")
    parser = ArgumentParser()
    parser.add_subclass_arguments(MedicalDataModule, "data")
    arguments = [f"--config={config}"]
    parser.add_argument("--config", action="config")
    built = parser.instantiate(
        parser.parse_args([*arguments, "--data.batch_size=3", "--data.where={site: eurorad}"])
    ).data
    assert isinstance(built, LabelsCSVDataModule)
    assert built.batch_size == 3
    assert built.where == {"site": "eurorad"}
    assert built.classification["finding"].classes == ["covid19", "other_pneumonia", "no_finding"]
    assert built.segmentation["lungs"] == MaskColumns(columns={"lung": "mask_lungs"}, flag="has_lungs")


def covid(root: Path, **more: Any) -> LabelsCSVDataModule:
    return LabelsCSVDataModule(
        root,
        classification={
            "finding": ClassColumns("label", classes=["covid19", "other_pneumonia", "no_finding"], flag="has_cls")
        },
        detection={"lesions": BoxColumns(flag="has_det")},
        segmentation={
            "lungs": MaskColumns({"lung": "mask_lungs"}, flag="has_lungs"),
            "infection": MaskColumns({"infection": "mask_infection"}, flag="has_infection"),
        },
        **{"image_size": 64, "num_workers": 0, "cache_dir": None} | more,
    )


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_real_chest_films_are_all_used_and_counted_by_task_and_site() -> None:
    root = real("covid_cxr")
    data = covid(root, split_column=None)
    data.setup(None)
    rows = rows_of(root / "labels.csv")
    flags = {"finding": "has_cls", "lesions": "has_det", "lungs": "has_lungs", "infection": "has_infection"}
    for task, flag in flags.items():
        there = Counter(record.site for record in data.records if task in record.truth)
        assert there == Counter(row["site"] for row in rows if row[flag] == "1")
    assert Counter(record.site for record in data.records) == {
        "journals": 178,
        "radiopaedia": 84,
        "eurorad": 50,
        "sirm_italy": 48,
    }
    assert sum("lesions" in record.truth for record in data.records) == 82
    assert data.quarantine.issues == []
    empty = sum(row["has_det"] == "1" and row["boxes"] == "[]" for row in rows)
    assert sum(record.truth.get("lesions") == BoxTruth() for record in data.records) == empty == 4
    samples = [dataset[i] for split, dataset in data.datasets.items() if split != "train" for i in range(len(dataset))]
    assert {name for sample in samples for name, truth in sample.truth.items() if truth is not None} == set(flags)


def test_real_mammograms_keep_true_negatives_apart_from_unknowns() -> None:
    root = real("mini_mias")
    data = LabelsCSVDataModule(
        root,
        classification={"pathology": ClassColumns("label", flag="has_cls")},
        detection={"lesions": BoxColumns(labels=None, flag="has_det", weak=True)},
        segmentation={
            "lesion": MaskColumns({"lesion": "mask_lesion"}, flag="has_seg_lesion", weak=True),
            "breast": MaskColumns({"breast": "mask_breast"}, flag="has_seg_breast"),
        },
        image_size=64,
        num_workers=0,
        cache_dir=None,
    )
    data.setup(None)
    assert len(data.records) == 274
    assert data.tasks["pathology"].classes == ("benign", "malignant", "normal")
    assert Counter(r.groups["client"] for r in data.records) == {"tissue_F": 92, "tissue_G": 88, "tissue_D": 94}
    negative, unknown, positive = MaskTruth((MaskSource(),)), None, 0
    for record in data.records:
        truth = record.truth.get("lesion", unknown)
        known = "lesions" in record.truth
        assert known == (truth is not None)
        if truth not in (negative, unknown):
            positive += 1
            assert record.truth["lesions"].boxes
    assert (positive, sum("lesions" not in r.truth for r in data.records)) == (94, 3)
    assert data.quarantine.issues == []
    dataset = data.datasets["val"]
    for i, record in enumerate(dataset.records):
        mask = dataset[i].truth["lesion"]
        if record.truth.get("lesion") == negative:
            assert mask is not None
            assert int(mask.sum()) == 0
        elif "lesion" in record.truth:
            assert mask.sum() > 0
        else:
            assert mask is None
