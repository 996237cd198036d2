"""What a sweep will do: all its jobs, composed and checked before the first one starts, and which are done already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src import console
from src.config import Config, config_hash, inputs_digest, read_config, run_name, unread
from src.errors import UserError
from src.results import RESULTS, DamageError, is_repetition, read_results
from src.tracking import public_uri

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

_NAMED = ("lora.layers", "lora.rank", "objective", "objective.name", "objective.layer", "experiment")  # by run_name
Identity = tuple[str, str, str]  # config hash, digest of the pairs, digest of the other inputs


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
    folder = Path(config.hydra.sweep.dir).absolute()  # first, as it holds the time: Hydra hands it to all jobs
    given, swept, overrides = list_jobs(config)
    composed = [compose(config, number, job) for number, job in enumerate(overrides)]
    labels = [" ".join(one for one in job if bare_key(one) in swept) for job in overrides]
    configs = checked([outcome for outcome, _ in composed], labels)
    refuse_unread(configs, swept)
    refuse_shared_folder([own for _, own in composed])
    finished = {} if configs[0].sweep.force else done_jobs(sweep_root(folder))
    digests: dict[str, str] = {}
    identities = [identity(job, digests) for job in configs]
    jobs = []
    for number, (job, (_, own)) in enumerate(zip(configs, composed, strict=True)):
        stranger = None
        with suppress(DamageError):
            stranger = _written_identity(own)
        if stranger and stranger[0] != config_hash(job):  # under a fixed hydra.sweep.dir
            raise UserError(
                f"hydra.sweep.dir: {own} holds the results of another job or version; choose another folder"
            )
        done = whole_job(finished.get(identities[number], ()))
        jobs.append(entry(number, overrides[number], job, swept, done or own, reused=done is not None))
    return Plan(folder, given, swept, configs[0], jobs)


def given_overrides(config: DictConfig) -> tuple[list[str], list[Override]]:
    """What a sweep was asked for, the sweeper's own params first: as given and as parsed. Raises UserError for none."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    params = config.hydra.sweeper.params or {}
    given = [f"{key}={value}" for key, value in params.items()] + list(config.hydra.overrides.task)
    if not given:
        raise UserError("the sweep is empty: give a key several values, as lora.rank=4,16, or leave out -m")
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    parsed = parser.parse_overrides(given)
    for one in parsed:  # Hydra draws once more when it makes the jobs, and they would get each other's names
        if one.is_sweep_override() and getattr(one.value(), "shuffle", False):
            raise UserError(f"{one.input_line}: can't be shuffled; list the values in the order that you want")
    return given, parsed


def list_jobs(config: DictConfig) -> tuple[list[str], dict[str, list[str]], list[list[str]]]:
    """(overrides as given, values of each swept key, overrides of each job), as Hydra's basic sweeper will make them.

    Raises UserError for another sweeper, whose jobs nobody knows ahead, and for a sweep without any job.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    sweeper = config.hydra.sweeper._target_
    if not sweeper.endswith(".BasicSweeper"):
        raise UserError(f"hydra/sweeper={sweeper}: only basic and optuna, so that all is known and checked ahead")
    given, parsed = given_overrides(config)
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    last: dict[str, Override] = {override.get_key_element(): override for override in parsed}
    swept = {bare_key(key): list(one.sweep_string_iterator()) for key, one in last.items() if one.is_sweep_override()}
    if not jobs:
        empty = next(key for key, values in swept.items() if not values)
        raise UserError(f"the sweep is empty: {empty} has no values")
    return given, swept, jobs


def compose(config: DictConfig, number: int, overrides: Sequence[str]) -> tuple[Config | UserError, Path]:
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


def refuse_shared_folder(folders: Sequence[Path]) -> None:
    """Raises UserError where two jobs would write to one folder."""
    ((shared, times),) = Counter(folders).most_common(1)
    if times > 1:
        hint = "leave the key out, or use ${hydra.job.num}"
        raise UserError(f"hydra.sweep.subdir: more than one job would write to {shared}; {hint}")


def without_hydra(config: DictConfig) -> DictConfig:
    from omegaconf import open_dict, read_write

    task = config.copy()
    with read_write(task), open_dict(task):
        del task["hydra"]
    return task


def checked(outcomes: Sequence[Config | UserError], labels: Sequence[str]) -> list[Config]:
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


def refuse_unread(configs: Sequence[Config], swept: Iterable[str]) -> None:
    """Raises UserError for a swept key that none of the jobs reads: nothing but their names would differ."""
    for key in swept:
        said = [unread(config, key) for config in configs]
        if all(said):
            raise UserError(str(said[0]))


def identity(config: Config, digests: dict[str, str]) -> Identity:
    """What tells whether a job is done already; `digests` keeps those of the datasets that were read before.

    Raises UserError: a bad pair file is refused before the first job.
    """
    from src.pairs import read_words

    dataset = repr(config.dataset)
    if dataset not in digests:
        digests[dataset] = read_words(config.dataset)[0].digest
    return config_hash(config), digests[dataset], inputs_digest(config)


def entry(
    number: int,
    overrides: Sequence[str],
    config: Config | UserError,
    swept: Mapping[str, Any],
    folder: Path,
    *,
    reused: bool,
) -> dict[str, Any]:
    """A job as sweep.json holds it; one that is refused has no config hash, and fails when it is run."""
    refused = not isinstance(config, Config)
    return {
        "number": number,
        "name": " ".join(overrides) if refused else job_name(config, overrides, swept),
        "overrides": [public_uri(override) for override in overrides],
        "config_hash": None if refused else config_hash(config),
        "folder": str(folder),
        "status": "done" if reused else "pending",
        "error": None,
        "reused": reused,
    }


def job_name(config: Config, overrides: Sequence[str], swept: Mapping[str, Any]) -> str:
    """The run's short name and, where a sweep's jobs would be called the same without, the other swept values."""
    name = run_name(config)
    for override in overrides:
        key, value = bare_key(override), override.partition("=")[2]
        if key in swept and key not in _NAMED and value not in name.split():
            ambiguous = sum(other.rpartition(".")[2] == key.rpartition(".")[2] for other in swept) > 1
            label = key if ambiguous else key.rpartition(".")[2]
            name += f" {label}={value}" if "." in key else f" {value}"
    return name


def bare_key(override: str) -> str:
    """What an override sets, be it there already or not (`+key=value`)."""
    return override.partition("=")[0].lstrip("+~")


# --- what is done already -----------------------------------------------------------------------------------


def sweep_root(folder: Path) -> Path:
    """Where finished jobs are looked for: the folder `multirun` that the sweep lies in, else the sweep's own."""
    return next((parent for parent in folder.parents if parent.name == "multirun"), folder)


def sweep_id(folder: Path) -> str:
    """What `python -m src.report` takes: the path below `multirun`, or the whole path of a sweep elsewhere."""
    root = sweep_root(folder)
    return str(folder) if root == folder else folder.relative_to(root).as_posix()


def done_jobs(root: Path) -> dict[Identity, list[Path]]:
    """Folders of the jobs below `root` with results, by config hash and digests of pairs and inputs, the newest first.

    Names those whose results.json is damaged; for the other files see `whole_job`.
    """
    found: dict[Identity, list[Path]] = {}
    for file in sorted(root.rglob(RESULTS), key=lambda file: file.stat().st_mtime, reverse=True):
        if is_repetition(file.parent):
            continue
        try:
            if written := _written_identity(file.parent):
                found.setdefault(written, []).append(file.parent)
        except DamageError as error:
            _warn_damaged(file.parent, error)
    return found


def whole_job(folders: Sequence[Path]) -> Path | None:
    """The first of these jobs of one setting that is whole to the last file; what is damaged before it is named."""
    for folder in folders:
        try:
            read_results(folder)
        except (DamageError, OSError) as error:
            _warn_damaged(folder, error)
        else:
            return folder
    return None


def _warn_damaged(folder: Path, error: Exception) -> None:
    console.warn(f"{folder}: {error}: this job doesn't count as done")


def _written_identity(folder: Path) -> Identity | None:
    with suppress(OSError, KeyError, TypeError):  # absent, or of an earlier version: not done
        found = read_results(folder, alone=True)
        return str(found["config_hash"]), str(found["dataset"]["digest"]), str(found["inputs_digest"])
    return None
