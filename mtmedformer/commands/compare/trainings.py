"""The trainings of a study: their keys, their folders, and what is known of each."""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from mtmedformer.commands.compare.code_version import code_version
from mtmedformer.commands.compare.configuration import data_sets, relevant_keys, resolved, write_config
from mtmedformer.commands.compare.study import Study
from mtmedformer.errors import ConfigError
from mtmedformer.storage.atomic_write import atomic_write

Split = Literal["test", "val"]
Models = Literal["global", "own"]
"""Which models are evaluated: the global one, or the model of each site on the images of that site."""


@dataclass
class Evaluation:
    """An evaluation that has been run: the models, and the seconds it took."""

    models: Models
    seconds: float = 0.0


@dataclass
class Status:
    """What is known of a training; ``status.json`` in its folder.

    Attributes:
        code: Version of the code.
        variant: Name of the variant.
        run: Name of the run.
        key: Key of the training.
        checkpoint: Which weights are kept and evaluated, ``last`` or ``best``.
        fitted: Whether it has been trained.
        seconds: Duration of the training; ``None`` if it was interrupted, because the first part is not known.
        processor_seconds: Processor time of the training, likewise.
        models: Which models it ends with.
        evaluated: The evaluations by split.
    """

    code: str
    variant: str = ""
    run: str = ""
    key: str = ""
    checkpoint: str = "last"
    fitted: bool = False
    seconds: float | None = None
    processor_seconds: float | None = None
    models: Models = "global"
    evaluated: dict[Split, Evaluation] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Status | None:
        """Return the status of the training in a folder; ``None`` if there is none."""
        file = folder / "status.json"
        if not file.is_file():
            return None
        stored = read_json(file)
        evaluated = {split: Evaluation(**one) for split, one in stored.pop("evaluated").items()}
        return cls(**stored, evaluated=evaluated)

    def write(self, folder: Path) -> None:
        """Write the status of the training in a folder."""
        write_json(asdict(self), folder / "status.json")


@dataclass(frozen=True)
class RoundCosts:
    """Costs of each round of a federation; empty for a training without rounds.

    Attributes:
        bytes: Bytes that all sites sent.
        bytes_down: Bytes that were sent to the sites.
        seconds: Duration.
    """

    bytes: list[int]
    bytes_down: list[int]
    seconds: list[float]

    @classmethod
    def read(cls, folder: Path) -> RoundCosts:
        """Return the costs of the training in a folder."""
        file = folder / "rounds.json"
        return cls(**read_json(file)) if file.is_file() else cls([], [], [])

    def write(self, folder: Path) -> None:
        """Write the costs of the training in a folder."""
        write_json(asdict(self), folder / "rounds.json")


@dataclass(frozen=True)
class Training:
    """One training of a study: a variant with one seed, one fold and one split.

    Attributes:
        variant: Name of the variant.
        run: Name of seed, fold and split, the same for every variant: ``seed0``, ``seed0-fold1``.
        config: The whole configuration.
        key: Digest of configuration and code.
        folder: Its folder.
    """

    variant: str
    run: str
    config: dict[str, Any]
    key: str
    folder: Path

    @property
    def status(self) -> Status | None:
        """Its stored status; ``None`` if it was never prepared."""
        return Status.read(self.folder)

    def finished(self, split: Split) -> bool:
        """Return whether it was trained, and evaluated on a split."""
        status = self.status
        return status is not None and split in status.evaluated

    def rows(self, split: Split, own: bool = False) -> list[Path]:
        """Return the files with the results of each image of a split.

        Args:
            split: ``test`` or ``val``.
            own: Those of the sites' own models, if there are any.
        """
        status, of_sites = self.status, sorted(self.folder.glob(f"run/sites/*/{split}_rows.npz"))
        evaluation = status.evaluated.get(split) if status else None
        if of_sites and (own or (evaluation and evaluation.models == "own")):
            return of_sites
        return [self.folder / "run" / f"{split}_rows.npz"]

    def logged(self) -> list[dict[str, str]]:
        """Return the rows of ``metrics.csv``; the last one may be half written and then has empty values."""
        file = self.folder / "run/metrics.csv"
        if not file.is_file():
            return []
        with file.open(newline="") as lines:
            return list(csv.DictReader(lines, restval=""))


def trainings_of(study: Study, output: Path, any_code: bool = False) -> list[Training]:
    """Return every training of a study, all variants of a run together, so that an interrupted study has pairs.

    Args:
        study: The study.
        output: Folder of the study.
        any_code: Use trainings that another version of the code has finished.

    Raises:
        ConfigError: A configuration is invalid, or the study has folds or splits and the data set has none.
    """
    configs = {name: resolved(study, variant) for name, variant in study.variants.items()}
    code = code_version()
    kept = {} if study.checkpoint == "last" else {"checkpoint": study.checkpoint}  # other weights are deleted
    trainings = []
    for seed, fold, split in product(study.seeds, study.folds, study.splits):
        run = f"seed{seed}" + ("" if fold is None else f"-fold{fold}") + ("" if split is None else f"-split{split}")
        for name, config in configs.items():
            config = copy.deepcopy(config) | {"seed_everything": seed}
            for key, value in (("fold", fold), ("seed", split)):
                _set_data(config, key, value, name)
            settings = digest(relevant_keys(config) | kept)
            parent = output / "trainings" / name / f"{run}-{settings[:8]}"
            folder = parent / code[:8]
            if any_code and not (folder / "status.json").is_file():
                folder = next(_finished_by_other_code(parent), folder)
            trainings.append(Training(name, run, config, digest([settings, folder.name]), folder))
    return trainings


def _finished_by_other_code(parent: Path) -> Iterator[Path]:
    """Yield the folders that other versions of the code have finished, the newest first."""
    files = sorted(parent.glob("*/status.json"), key=lambda file: -file.stat().st_mtime)
    for folder in (file.parent for file in files):
        status = Status.read(folder)
        if status is not None and status.evaluated:
            yield folder


def _set_data(config: dict[str, Any], key: str, value: int | None, variant: str) -> None:
    if value is None:
        return
    sets = list(data_sets(config.get("data")))
    if not sets:
        raise ConfigError(
            f"variant {variant}: its data set has no {key} to set; leave folds and splits out of the study"
        )
    for arguments in sets:
        arguments[key] = value


def prepare(training: Training, study: Study, salt_file: Path) -> None:
    """Write the configuration and the status of a training into its folder; an existing status is kept."""
    training.folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(training.config)
    trainer = config["trainer"]
    trainer["default_root_dir"] = str(training.folder / "run")
    trainer |= {"enable_progress_bar": False, "enable_model_summary": False}
    own = [
        {"class_path": "callbacks.PerImageResults", "init_args": {"salt_file": str(salt_file)}},
        {"class_path": "callbacks.StartWeights", "init_args": {"folder": str(training.folder)}},
    ]
    chosen = trainer.get("callbacks") or []
    trainer["callbacks"] = [*(chosen if isinstance(chosen, list) else [chosen]), *own]
    write_config(config, training.folder / "config.yaml")
    if training.status is None:
        status = Status(code_version(), training.variant, training.run, training.key, study.checkpoint)
        status.write(training.folder)


def salt_of(output: Path) -> Path:
    """Return the file with the secret key of the patient hashes of a study; created once, in the study's folder."""
    file = output / "salt"
    if not file.is_file():
        output.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(16))
        file.chmod(0o600)
    return file


def digest(value: Any) -> str:
    """Return the digest of plain containers."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file."""
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def write_json(value: Any, file: Path) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_write(file) as part:
        part.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
