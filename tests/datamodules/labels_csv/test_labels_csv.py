from __future__ import annotations

import csv
import itertools
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
            root, HEADER + "\n".join(rows), classification=FINDING, detection=LESIONS, max_quarantine_share=0.5, seed=3
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


def details(data: LabelsCSVDataModule) -> list[str]:
    return [issue.detail for issue in data.quarantine.issues]


@pytest.mark.parametrize("word", ["None", "NA", "N/A", "null", "nan", "NONE"])
def test_words_read_as_blank_are_named_where_no_other_class_is_a_negative_one(root: Path, word: str) -> None:
    table = f"image,patient,label\na.png,1,mass\nb.png,2,{word}\nc.png,3,mass\nd.png,4,{word}\n"
    _, data, found = read(root, table, classification=FINDING)
    assert found.tasks["finding"].classes == ("mass",)
    [note] = found.notes
    assert f"column 'label': 2 cells {word!r} (lines 3, 5) read as blank (unknown)" in note
    assert f"classes: [{word!r}, 'mass']. Task 'finding' is left with a single class, 'mass'" in note
    given = {"finding": ClassColumns("label", classes=["well", "mass"])}
    assert "left with a single class, 'mass'" in read(root, table, classification=given)[2].notes[0]
    assert data.class_place("finding", "mass").startswith("labels.csv, column 'label': 2 cells 'mass' (lines 2, 4); ")
    spec = {"finding": ClassColumns("label", classes=[word, "mass"])}
    records, data, found = read(root, table, classification=spec)
    assert (found.notes, data.quarantine.issues) == ([], [])
    assert [records[i].truth["finding"].values for i in "ab"] == [(0.0, 1.0), (1.0, 0.0)]


def test_unknown_labels_beside_a_negative_class_are_read_without_a_word(root: Path) -> None:
    table = "image,patient,label\na.png,1,mass\nb.png,2,NA\nc.png,3,No_Finding\nd.png,4,\n"
    records, data, found = read(root, table, classification=FINDING)
    assert (found.notes, data.quarantine.issues) == ([], [])
    assert [sorted(records[i].truth) for i in "abcd"] == [["finding"], [], ["finding"], []]
    table = table.replace("No_Finding", "cyst")
    assert len(read(root, table, classification=FINDING)[2].notes) == 1
    assert read(root, table, classification=FINDING, negative_classes=["cyst"])[2].notes == []


def test_a_class_none_in_another_case_is_not_read_as_blank(root: Path) -> None:
    spec = {"finding": ClassColumns("label", classes=["none", "mass"])}
    _, data, _ = read(root, "image,patient,label\na.png,1,None\nb.png,2,mass\nc.png,3,none\n", classification=spec)
    assert details(data) == [
        "labels.csv line 2, column 'label': 'None'; did you mean 'none'? the classes of finding are none, mass"
    ]


@pytest.mark.parametrize("image", ["", "Total", "Sum:", "n = 3", "None", "x" * 300 + ".png", "a\tb.png"])
def test_a_row_without_an_image_adds_no_class(root: Path, image: str) -> None:
    table = f"image,patient,label\na.png,1,s\nb.png,2,w\nc.png,3,w\n{image},,12\n"
    records, data, found = read(root, table, classification=FINDING, max_quarantine_share=0.25)
    assert found.tasks["finding"].classes == ("s", "w")
    assert set(records) == {"a", "b", "c"}
    [issue] = data.quarantine.issues
    assert (issue.id, issue.subject) == ("line 5", "image")
    assert issue.detail.startswith("labels.csv line 5, column 'image': ")
    data.setup(None)
    assert len(data.records) == 3


def test_images_without_a_suffix_are_images(root: Path) -> None:
    for name in "abc":
        (root / f"{name}.png").rename(root / name)
    table = "image,patient,label\na,1,s\nb,2,w\nc,3,w\nd,4,v\nTotal,,12\n"
    records, data, found = read(root, table, classification=FINDING)
    assert (set(records), found.tasks["finding"].classes) == (set("abc"), ("s", "w"))
    assert reasons(data) == {"image: image file missing": 2}
    records, _, _ = read(root, "image,patient,label\nx,1,s\ny,2,w\n", classification=FINDING)
    assert set(records) == {"x", "y"}  # none exists: the root is wrong, which decoding reports


def test_a_header_that_is_repeated_is_no_row(root: Path) -> None:
    table = "image,patient,label\na.png,1,s\nimage,patient,label\nb.png,2,w\n"
    records, _, found = read(root, table, classification=FINDING)
    assert (set(records), found.tasks["finding"].classes) == (set("ab"), ("s", "w"))
    assert any("1 further header line(s) skipped" in note for note in found.notes)


def test_one_number_in_several_formats_is_one_class(root: Path) -> None:
    values = ["0", "0.0", "00", "1", "1.0", "01"]
    table = "image,patient,label\n" + "".join(f"{n}.png,{n},{v}\n" for n, v in zip("abcdef", values, strict=True))
    for classes in (None, ["0", "1"]):
        records, data, found = read(root, table, classification={"t": ClassColumns("label", classes=classes)})
        assert found.tasks["t"].classes == ("0", "1")
        assert [records[n].truth["t"].values.index(1) for n in "abcdef"] == [0, 0, 0, 1, 1, 1]
        assert "1 cell '0.0' (line 3)" in found.notes[0]
        assert "read as class '0', '1' of 't'" in found.notes[0]
        assert not data.quarantine.issues
    assert read(root, "image,patient,label\na.png,1,0\nb.png,2,1\n", classification=FINDING)[2].notes == []


YES = ("1", "1.0", "01", "Y", "y", "yes", "Yes", "TRUE", "true", "t", "T", "x", "X", "present", "pos", "on", "✓")
NO = ("0", "0.0", "00", "N", "n", "no", "No", "FALSE", "false", "f", "F", "absent", "neg", "-0", "off")


@pytest.mark.parametrize("yes, no", list(itertools.zip_longest(YES, NO, fillvalue="0")))
def test_clear_flags_are_read(root: Path, yes: str, no: str) -> None:
    table = (
        "image,patient,has_det,boxes,box_labels,fluid\n"
        f'a.png,1,{yes},"[[1, 2, 9, 9]]","[""mass""]",{yes}\n'
        f'b.png,2,{no},"[[1, 2, 9, 9]]","[""mass""]",{no}\n'
        f"c.png,3,{yes},[],[],\n"
    )
    records, data, found = read(
        root,
        table,
        classification={"signs": ClassColumns(columns=["fluid"])},
        detection={"d": BoxColumns(flag="has_det")},
    )
    assert found.tasks["d"].classes == ("mass",)
    assert [sorted(records[i].truth) for i in "abc"] == [["d", "signs"], ["signs"], ["d"]]
    assert [records[i].truth["signs"].values for i in "ab"] == [(1.0,), (0.0,)]
    assert records["c"].truth["d"] == BoxTruth()
    assert not data.quarantine.issues


@pytest.mark.parametrize("flag", ["maybe", "2", "?", "1,0", "ja", "11", "NaN1"])
def test_a_flag_that_is_not_clear_names_row_column_and_fix(root: Path, flag: str) -> None:
    flag = f'"{flag}"'
    rows = "".join(f'{n}.png,{n},{flag},"[[1, 2, 9, 9]]","[""mass""]"\n' for n in "abc")
    table = "image,patient,has_det,boxes,box_labels\n" + rows
    spec = {"d": BoxColumns(flag="has_det")}
    match = r"(?s)3 of 3 images labelled for task 'd'.*labels.csv line 2, column 'has_det': .*write 0 or 1"
    with pytest.raises(DataError, match=match):
        module(root, table, detection=spec).plan()
    one = table.replace(f"b.png,b,{flag}", "b.png,b,1")
    records, data, _ = read(root, one, detection=spec)
    assert [sorted(records[i].truth) for i in "abc"] == [[], ["d"], []]
    assert [detail[:37] for detail in details(data)] == [f"labels.csv line {n}, column 'has_det': " for n in (2, 4)]


@pytest.mark.parametrize(
    "labels", ["opacity", '"""opacity"""', "7", "\"['a'\"", "[[1]]", "[null]", "[true]", '"[""""]"']
)
def test_labels_of_boxes_that_are_no_list_name_row_column_and_fix(root: Path, labels: str) -> None:
    rows = "".join(f'{n}.png,{n},"[[1, 2, 9, 9]]",{labels}\n' for n in "abc")
    table = "image,patient,boxes,box_labels\n" + rows
    with pytest.raises(DataError, match=r"labels.csv line 2, column 'box_labels': .*such as \[\"opacity\"\]"):
        read(root, table, detection={"d": BoxColumns()})
    records, data, found = read(root, table + 'd.png,d,"[[1, 2, 9, 9]]","[""mass""]"\n', detection={"d": BoxColumns()})
    assert found.tasks["d"].classes == ("mass",)
    assert [sorted(records[i].truth) for i in "abcd"] == [[], [], [], ["d"]]
    assert all("column 'box_labels'" in detail for detail in details(data))


@pytest.mark.parametrize(
    "box",
    [
        *("[NaN, 1, 2, 2]", "[1e400, 1, 2, 2]", "[-Infinity, 1, 2, 2]", "[1, 2, 3, true]", '""1234""', "{a: 1}"),
        *("[1, 2, 3]", "[1, 2, 3, 4, 5]", "[1, 2, 3, null]", "[1, 2, 3, [4]]", f"[1, 2, 3, 1{'0' * 400}]", "null"),
        *('[1, 2, 3, ""1_0""]', '[1, 2, 3, ""four""]', '[1, 2, 3, ""٣""]', '[1, 2, 3, ""inf""]'),
    ],
)
def test_a_box_that_is_not_four_numbers_is_quarantined(root: Path, box: str) -> None:
    table = 'image,patient,boxes\na.png,1,"[' + box + ']"\nb.png,2,"[[1, 2, 9, ""9.5""]]"\n'
    records, data, _ = read(root, table, detection={"d": BoxColumns(labels=None)})
    assert "d" not in records["a"].truth
    assert records["b"].truth["d"] == BoxTruth(((1, 2, 9, 9.5),), (0,))
    assert details(data)[0].startswith("labels.csv line 2, column 'boxes': ")


@pytest.mark.parametrize("size", ["inf", "-inf", "nan1", "1e400", "-64", "0", "0.5", "many", "1_000", "1" * 400, "6,4"])
def test_boxes_in_pixels_of_an_unknown_size_are_quarantined(root: Path, size: str) -> None:
    table = (
        "image,patient,boxes,height,width\n"
        f'a.png,1,"[[1, 2, 9, 9]]","{size}",64\n'
        'b.png,2,"[[1, 2, 9, 9]]",,64\n'
        f'c.png,3,[],"{size}",64\n'
        'd.png,4,"[[1, 2, 9, 9]]",64.0,64\n'
        'e.png,5,"[[1, 2, 9, 9]]",,\n'
    )
    records, data, found = read(root, table, detection={"d": BoxColumns(labels=None)})
    assert ["d" in records[i].truth for i in "abcde"] == [False, False, True, True, True]
    assert records["d"].size == (64, 64)
    assert reasons(data) == {"d: image size not a whole number": 2}
    assert "column 'height'" in details(data)[0]
    assert any("1 × image size not a whole number, taken as blank" in note for note in found.notes)


@pytest.mark.parametrize("column", ["image", "patient", "site", "view", "client", "label", "boxes", "mask"])
@pytest.mark.parametrize("cell", ["a" * 200_000, "/" * 5000, "x\x1b[31m", "x\ny", "./" + "b" * 300])
def test_an_impossible_cell_is_quarantined_alone(root: Path, column: str, cell: str) -> None:
    names = ["image", "patient", "site", "view", "client", "label", "boxes", "mask"]
    rows = [[f"{n}.png", n, "s", "PA", "k", label, "[]", ""] for n, label in zip("abcdef", "ststst", strict=True)]
    rows[2][names.index(column)] = cell
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    records, data, _ = read(
        root,
        (root / "labels.csv").read_bytes(),
        classification=FINDING,
        detection={"d": BoxColumns(labels=None)},
        segmentation={"m": MaskColumns({"m": "mask"})},
        max_quarantine_share=1.0,
    )
    data.plan()
    [issue] = data.quarantine.issues
    assert f"line 4, column {column!r}" in issue.detail
    assert len(issue.detail) < 400
    assert issue.detail.isprintable()
    lost = {"label": "finding", "boxes": "d", "mask": "m"}
    if column in lost:
        assert lost[column] not in records["c"].truth
    else:
        assert "c" not in records


def test_a_quote_that_is_left_open_is_no_cell_of_several_rows(root: Path) -> None:
    table = 'image,patient,label\na.png,1,"s\nb.png,2,w\nc.png,3,"w"\n'
    with pytest.raises(DataError, match=r"lines 2 to 4: no row of a table .*is a quote left open"):
        read(root, table, classification=FINDING)
    with pytest.raises(DataError, match=r"is a quote left open"):
        read(root, 'image,patient,label\na.png,1,s\nb.png,2,"w\n', classification=FINDING)


def test_what_spreadsheets_add_is_read(root: Path) -> None:
    plain = "image,patient,label\na.png,1,s\nb.png,2,w\n"
    first, _, _ = read(root, plain, classification=FINDING)
    for table in (
        plain.replace("\n", "\r"),
        plain.replace("\n", "\r\n"),
        "sep=;\n" + plain.replace(",", ";"),
        plain.replace("\n", ",,\n"),
        "\ufeff\ufeff" + plain,
        plain.replace("1,s", '1,"s"').replace("2,w", '"2", "w"'),
        plain.encode("utf-16-le"),
        plain.encode("utf-16-be"),
        plain + "\n,,\n \n",
    ):
        records, data, found = read(root, table, classification=FINDING)
        assert {i: r.truth for i, r in records.items()} == {i: r.truth for i, r in first.items()}
        assert (data.quarantine.issues, found.notes) == ([], [])


def test_a_nul_character_is_named_with_its_line(root: Path) -> None:
    with pytest.raises(DataError, match="line 3 has a NUL character"):
        read(root, "image,patient,label\na.png,1,s\nb.png,2,\x00w\n", classification=FINDING)


def test_a_table_in_two_encodings_names_the_odd_line(root: Path) -> None:
    good, odd = "image,patient,label\na.png,1,Ödem\n".encode(), "b.png,2,Ödem\n".encode("cp1252")
    with pytest.raises(DataError, match="line 3 is not UTF-8, but other lines are"):
        read(root, good + odd, classification=FINDING)
    with pytest.raises(DataError, match="line 2 is not UTF-8"):
        read(root, b"\xef\xbb\xbfimage,patient,label\n" + odd, classification=FINDING)


def test_odd_names_of_columns_are_listed_without_control_characters(root: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'image'") as caught:
        read(root, "imag\x1b[31m,patient,label," + "x" * 5000 + "\na.png,1,s,t\n", classification=FINDING)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_one_odd_split_is_quarantined_and_a_name_of_a_part_is_refused(root: Path) -> None:
    rows = "".join(f"{n}.png,{n},s,{'test' if n in 'ab' else 'train'}\n" for n in "abcdef")
    table = "image,patient,label,split\n" + rows
    records, data, _ = read(root, table.replace("f,s,train", "f,s,?"), classification=FINDING)
    assert set(records) == set("abcde")
    assert details(data) == [
        "labels.csv line 7, column 'split': '?' is not a split; write train, val or test, or leave it blank"
    ]
    with pytest.raises(DataError, match="line 2, column 'split': 'holdout' is not a split"):
        read(root, table.replace("test", "holdout"), classification=FINDING)


def test_a_row_without_a_patient_is_quarantined(root: Path) -> None:
    table = "image,patient,label\n" + "".join(f"{n}.png,{n},{c}\n" for n, c in zip("abcdef", "ststst", strict=True))
    records, data, _ = read(root, table.replace("c.png,c", "c.png,NA"), classification=FINDING)
    assert set(records) == set("abdef")
    assert "line 4, column 'patient': 'NA'; fill it" in details(data)[0]
    data.plan()
    with pytest.raises(DataError, match=r"no row can be used.*column 'patient'.*patient_column to null"):
        read(root, "image,patient,label\na.png,,s\nb.png,,t\n", classification=FINDING)


@pytest.mark.parametrize("fault", ["#REF!", "#VALUE!", "#DIV/0!", "#NAME?"])
def test_a_fault_of_a_formula_is_no_class(root: Path, fault: str) -> None:
    table = f"image,patient,label\na.png,1,s\nb.png,2,t\nc.png,3,{fault}\nd.png,4,#N/A\n"
    records, data, found = read(root, table, classification=FINDING)
    assert found.tasks["finding"].classes == ("s", "t")
    assert [sorted(records[i].truth) for i in "abcd"] == [["finding"], ["finding"], [], []]
    assert reasons(data) == {"finding: cell is a fault of a formula": 1}
