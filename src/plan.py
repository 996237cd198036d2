"""What a sweep will do: all its jobs, composed and checked before the first one starts, and which are done already."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.config import Config, DatasetConfig, config_hash, inputs_digest, read_config, run_name
from src.errors import UserError
from src.tracking import public_uri
from src.workers import prepare

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

_NAMED = ("lora.layers", "lora.rank", "objective", "objective.name", "objective.layer", "experiment")  # by run_name


@dataclass(frozen=True)
class Plan:
    """A sweep's folder, its overrides as given, the values of each swept key, the first job's config, and its jobs."""

    folder: Path
    overrides: list[str]
    swept: dict[str, list[str]]
    first: Config  # whose tracking and sweep are those of all jobs
    jobs: list[dict[str, Any]]  # as sweep.json holds them


def plan(config: DictConfig) -> Plan:
    """Checks all jobs and looks up which are done. Raises UserError, and Hydra's errors for what can't be composed."""
    prepare(config)
    folder = Path(config.hydra.sweep.dir).absolute()  # first, as it holds the time: Hydra hands it to all jobs
    given, swept, overrides = list_jobs(config)
    composed = [_compose(config, number, job) for number, job in enumerate(overrides)]
    labels = [" ".join(one for one in job if one.split("=")[0] in swept) for job in overrides]
    configs = _checked([outcome for outcome, _ in composed], labels)
    finished = {} if configs[0].sweep.force else done_jobs(sweep_root(folder))
    digests = _pairs_digests([job.dataset for job in configs])
    jobs = []
    for number, (job, (_, own)) in enumerate(zip(configs, composed, strict=True)):
        stranger = _identity(own / "results.json")
        if stranger and stranger[0] != config_hash(job):  # under a fixed hydra.sweep.dir
            raise UserError(f"hydra.sweep.dir: {own} holds another job's results; choose another folder")
        done = finished.get((config_hash(job), digests[number], inputs_digest(job)))
        jobs.append(_entry(number, overrides[number], job, swept, done or own, reused=done is not None))
    return Plan(folder, given, swept, configs[0], jobs)


def list_jobs(config: DictConfig) -> tuple[list[str], dict[str, list[str]], list[list[str]]]:
    """(overrides as given, values of each swept key, overrides of each job), as Hydra's basic sweeper will make them.

    Raises UserError for another sweeper, whose jobs nobody knows ahead, and for a sweep without any job.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    sweeper = config.hydra.sweeper
    if not sweeper._target_.endswith(".BasicSweeper"):
        raise UserError(f"hydra/sweeper={sweeper._target_}: only basic, so that every job is known and checked ahead")
    given = [f"{key}={value}" for key, value in (sweeper.params or {}).items()] + list(config.hydra.overrides.task)
    if not given:
        raise UserError("the sweep is empty: give a key several values, as lora.rank=4,16, or leave out -m")
    parsed = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader()).parse_overrides(given)
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    last: dict[str, Override] = {override.get_key_element(): override for override in parsed}
    swept = {key: list(one.sweep_string_iterator()) for key, one in last.items() if one.is_sweep_override()}
    if not jobs:
        empty = next(key for key, values in swept.items() if not values)
        raise UserError(f"the sweep is empty: {empty} has no values")
    return given, swept, jobs


def _compose(config: DictConfig, number: int, overrides: Sequence[str]) -> tuple[Config | UserError, Path]:
    """(config, or why it is refused; folder) of one job, as Hydra's launcher will make it."""
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import open_dict, read_write

    composed = GlobalHydra.instance().config_loader().load_sweep_config(config, list(overrides))
    with read_write(composed), open_dict(composed):
        composed.hydra.job.id = composed.hydra.job.num = number
    folder = (Path(str(composed.hydra.sweep.dir)) / str(composed.hydra.sweep.subdir)).absolute()
    try:
        return read_config(without_hydra(composed)), folder
    except UserError as error:
        return error, folder


def without_hydra(config: DictConfig) -> DictConfig:
    from omegaconf import open_dict, read_write

    task = config.copy()
    with read_write(task), open_dict(task):
        del task["hydra"]
    return task


def _checked(outcomes: Sequence[Config | UserError], labels: Sequence[str]) -> list[Config]:
    """The configs of all jobs. Raises UserError if one is refused, if two are the same, if tracking differs."""
    refused = [(label, found) for label, found in zip(labels, outcomes, strict=True) if isinstance(found, UserError)]
    if refused:
        label, error = refused[0]
        if len(refused) == len(outcomes):
            raise error
        raise UserError(f"{label}: {error} (refused: {len(refused)} of {len(outcomes)} jobs; none was started)")
    configs = [found for found in outcomes if isinstance(found, Config)]
    seen: dict[str, str] = {}
    for label, config in zip(labels, configs, strict=True):
        if (config.tracking, config.sweep) != (configs[0].tracking, configs[0].sweep):
            raise UserError("tracking and sweep can't be swept: all of a sweep's jobs go to one place")
        if twin := seen.get(config_hash(config)):
            raise UserError(f"two jobs are the same: {twin} and {label}; leave one out")
        seen[config_hash(config)] = label
    return configs


def _pairs_digests(datasets: Sequence[DatasetConfig]) -> list[str]:
    """The digest of the pairs that each job will read. Raises UserError: a bad file is refused before the first job."""
    from src.study import read_words

    found: dict[str, str] = {}
    for dataset in datasets:
        if repr(dataset) not in found:
            found[repr(dataset)] = read_words(dataset)[0].digest
    return [found[repr(dataset)] for dataset in datasets]


def _entry(
    number: int, overrides: Sequence[str], config: Config, swept: Mapping[str, Any], folder: Path, *, reused: bool
) -> dict[str, Any]:
    return {
        "number": number,
        "name": job_name(config, overrides, swept),
        "overrides": [public_uri(override) for override in overrides],
        "config_hash": config_hash(config),
        "folder": str(folder),
        "status": "done" if reused else "pending",
        "error": None,
        "reused": reused,
    }


def job_name(config: Config, overrides: Sequence[str], swept: Mapping[str, Any]) -> str:
    """The run's short name and, where a sweep's jobs would be called the same without, the other swept values."""
    name = run_name(config)
    for key, value in (override.lstrip("+~").split("=", 1) for override in overrides):
        if key in swept and key not in _NAMED and value not in name.split():
            ambiguous = sum(other.rpartition(".")[2] == key.rpartition(".")[2] for other in swept) > 1
            label = key if ambiguous else key.rpartition(".")[2]
            name += f" {label}={value}" if "." in key else f" {value}"
    return name


# --- what is done already -----------------------------------------------------------------------------------


def sweep_root(folder: Path) -> Path:
    """Where finished jobs are looked for: the folder `multirun` that the sweep lies in, else the sweep's own."""
    return next((parent for parent in folder.parents if parent.name == "multirun"), folder)


def sweep_id(folder: Path) -> str:
    """What `python -m src.report` takes: the path below `multirun`, or the whole path of a sweep elsewhere."""
    root = sweep_root(folder)
    return str(folder) if root == folder else folder.relative_to(root).as_posix()


def done_jobs(root: Path) -> dict[tuple[str, str, str], Path]:
    """Folders of the whole jobs below `root`, by config hash and digests of pairs and inputs; the newest of several."""
    found = {}
    for file in sorted(root.rglob("results.json"), key=lambda file: file.stat().st_mtime):
        if identity := _identity(file):
            found[identity] = file.parent
    return found


def _identity(results: Path) -> tuple[str, str, str] | None:
    with suppress(OSError, ValueError, KeyError, TypeError):  # absent or damaged: not done
        found = json.loads(results.read_text(encoding="utf-8"))
        return str(found["config_hash"]), str(found["dataset"]["digest"]), str(found["inputs_digest"])
    return None
