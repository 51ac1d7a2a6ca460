"""One training of a study: its key, its folder, and whether it is finished."""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from mtmedformer.commands.compare.code_version import code_version
from mtmedformer.commands.compare.configuration import data_sets, essence, resolved, write_config
from mtmedformer.commands.compare.study import Study
from mtmedformer.errors import ConfigError
from mtmedformer.storage.atomic_write import whole

Split = Literal["test", "val"]


@dataclass(frozen=True)
class Cell:
    """One training: a variant, a seed, a fold, a split.

    Attributes:
        variant: Name of the variant.
        run: Name of the rest, the same for every variant: ``seed0``, ``seed0-fold1``.
        config: The whole configuration.
        key: Hash of configuration and code.
        folder: Where it lies.
    """

    variant: str
    run: str
    config: dict[str, Any]
    key: str
    folder: Path

    @property
    def state(self) -> dict[str, Any]:
        """What is written of it: ``fitted``, ``seconds``, the splits it was judged on; empty if it never ran."""
        return read_json(self.folder / "cell.json") if (self.folder / "cell.json").is_file() else {}

    def finished(self, split: Split) -> bool:
        """Return whether it was trained and judged on a split."""
        return split in self.state.get("judged", {})

    def rows(self, split: Split, own: bool = False) -> list[Path]:
        """Return the files of what was seen of the images of a split.

        Args:
            split: ``test`` or ``val``.
            own: Those of each site's own model at its own site, where sites keep one.
        """
        mine = sorted(self.folder.glob(f"run/sites/*/{split}_rows.npz"))
        judged = self.state.get("judged", {}).get(split, {})
        if mine and (own or judged.get("by") == "own"):
            return mine
        return [self.folder / "run" / f"{split}_rows.npz"]

    def logged(self) -> list[dict[str, str]]:
        """Return what its training has logged so far; empty where a line that is being written does not reach yet."""
        file = self.folder / "run/metrics.csv"
        if not file.is_file():
            return []
        with file.open(newline="") as lines:
            return list(csv.DictReader(lines, restval=""))


def cells_of(study: Study, output: Path, any_code: bool = False) -> list[Cell]:
    """Return every cell of a study, variants in turn for each run, so that a study cut short is still paired.

    Args:
        study: The study.
        output: Folder of the study.
        any_code: Take a cell that an earlier version of the code has finished for finished.

    Raises:
        ConfigError: A configuration that cannot be, or folds of data that has none.
    """
    configs = {name: resolved(study, variant) for name, variant in study.variants.items()}
    code = code_version()
    judged = {} if study.checkpoint == "last" else {"checkpoint": study.checkpoint}  # the other weights are not kept
    found = []
    for seed, fold, split in product(study.seeds, study.folds, study.splits):
        run = f"seed{seed}" + ("" if fold is None else f"-fold{fold}") + ("" if split is None else f"-split{split}")
        for name, config in configs.items():
            config = copy.deepcopy(config) | {"seed_everything": seed}
            for key, value in (("fold", fold), ("seed", split)):
                _set_data(config, key, value, name)
            plain = digest(essence(config) | judged)
            folder = output / "cells" / name / f"{run}-{plain[:8]}"
            wanted = folder / code[:8]
            if any_code and not (wanted / "cell.json").is_file():
                wanted = next(_earlier(folder), wanted)
            found.append(Cell(name, run, config, digest([plain, wanted.name]), wanted))
    return found


def _earlier(folder: Path) -> Iterator[Path]:
    """Yield the finished folders of other versions of the code, the newest first."""
    done = [file for file in folder.glob("*/cell.json") if read_json(file).get("judged")]
    yield from (file.parent for file in sorted(done, key=lambda f: -f.stat().st_mtime))


def _set_data(config: dict[str, Any], key: str, value: int | None, variant: str) -> None:
    if value is None:
        return
    sets = list(data_sets(config.get("data")))
    if not sets:
        raise ConfigError(f"variant {variant}: its data has no {key} to set; leave folds and splits out of the study")
    for arguments in sets:
        arguments[key] = value


def prepare(cell: Cell, study: Study, salt_file: Path) -> None:
    """Write what a cell needs to run: its configuration and what is known of it."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(cell.config)
    trainer = config["trainer"]
    trainer["default_root_dir"] = str(cell.folder / "run")
    trainer |= {"enable_progress_bar": False, "enable_model_summary": False}
    own = [
        {
            "class_path": "callbacks.PerImageResults",
            "init_args": {"salt_file": str(salt_file)},
        },
        {"class_path": "callbacks.StartWeights", "init_args": {"folder": str(cell.folder)}},
    ]
    chosen = trainer.get("callbacks") or []
    trainer["callbacks"] = [*(chosen if isinstance(chosen, list) else [chosen]), *own]
    write_config(config, cell.folder / "config.yaml")
    if not cell.state:
        facts = {"variant": cell.variant, "run": cell.run, "key": cell.key, "code": code_version()}
        write_json({**facts, "checkpoint": study.checkpoint, "judged": {}}, cell.folder / "cell.json")


def salt_of(output: Path) -> Path:
    """Return the file with the study's secret key of the hashes of patients, drawn once and kept in its folder."""
    file = output / "salt"
    if not file.is_file():
        output.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(16))
        file.chmod(0o600)
    return file


def digest(value: Any) -> str:
    """Return the hash of plain containers."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file."""
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def write_json(value: Any, file: Path) -> None:
    """Write JSON, whole or not at all."""
    with whole(file) as part:
        part.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
