"""Searches: Optuna proposes a setting from what earlier ones gave; each trial is a job of a sweep.

python -m src.run -m hydra/sweeper=optuna 'lora.rank=choice(4,16)' 'train.learning_rate=tag(log,interval(1e-5,1e-3))'
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from filelock import FileLock, Timeout
from optuna.trial import FrozenTrial, TrialState

from src import console, tracking
from src.config import ROOT, Config, config_hash
from src.errors import UserError
from src.files import digest, written_atomically
from src.plan import (
    Plan,
    bare_key,
    checked,
    compose,
    done_jobs,
    entry,
    given_overrides,
    identity,
    refuse_shared_folder,
    refuse_unread,
    sweep_root,
    whole_job,
)
from src.results import (
    SETTLED,
    SWEEP,
    DamageError,
    clear,
    outcome,
    read_document,
    read_results,
    record_failure,
    write_table,
)
from src.space import as_overrides, as_text, distribution, ends, read_settings, refuse_metric

if TYPE_CHECKING:
    from omegaconf import DictConfig

# (epoch, control margin) → why the job ends here, for pruned.json
Judge = Callable[[int, float], dict[str, Any] | None]

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Search:
    """A study, and the jobs that its trials have become."""

    def __init__(self, config: DictConfig) -> None:
        """Checks settings and space, looks up what is done, starts nothing. Raises UserError, and Hydra's errors."""
        folder = Path(config.hydra.sweep.dir).absolute()  # first, as it holds the time
        self.settings = read_settings(config.hydra.sweeper)
        given, parsed = given_overrides(config)
        last = {override.get_key_element(): override for override in parsed}
        searched = {key: one for key, one in last.items() if one.is_sweep_override()}
        if not searched:
            raise UserError("there is nothing to search: give a key several values, as 'lora.rank=choice(4,16)'")
        self._config = config
        self._fixed = [str(one.input_line) for one in last.values() if not one.is_sweep_override()]
        self._digests: dict[str, str] = {}
        self._space = {key: distribution(key, one, config) for key, one in searched.items()}
        first = self._checked_corner()
        self.study = self._study_name(first)
        self._file = _database(first, folder)
        self._lock = FileLock(self._file.with_name(f"optuna-{self.study}.lock"))
        swept = {bare_key(key): [one.get_value_string()] for key, one in searched.items()}
        self.plan = Plan(folder, given, swept, first, [])
        self._refuse_stranger()
        self._done = {} if first.sweep.force else done_jobs(sweep_root(folder))
        self.told = self.repeats = 0
        if not first.sweep.force and self._exists():
            self._keep(optuna.load_study(study_name=self.study, storage=_storage(self._file)).trials)

    def _checked_corner(self) -> Config:
        """The config at one corner of the space, once every choice and both ends of every interval are seen to do."""
        values = {key: ends(one) for key, one in self._space.items()}
        corner = {key: several[0] for key, several in values.items()}
        settings = [corner, *({**corner, key: other} for key, several in values.items() for other in several[1:])]
        assigned = [as_overrides(setting) for setting in settings]
        composed = [compose(self._config, 0, [*self._fixed, *overrides]) for overrides in assigned]
        configs = checked([found for found, _ in composed], [" ".join(overrides) for overrides in assigned])
        refuse_unread(configs, map(bare_key, self._space))
        refuse_shared_folder([composed[0][1], compose(self._config, 1, [*self._fixed, *assigned[0]])[1]])
        for config in configs:
            identity(config, self._digests)
            refuse_metric(self.settings.metric, config)
        return configs[0]

    def _study_name(self, first: Config) -> str:
        """Names all that a result or a proposal depends on, so that the same command finds its study again."""
        space = {key: optuna.distributions.distribution_to_json(one) for key, one in self._space.items()}
        settings = {key: value for key, value in asdict(self.settings).items() if key not in ("n_trials", "n_jobs")}
        return digest(json.dumps([space, settings, identity(first, self._digests)], sort_keys=True))[:16]

    def _refuse_stranger(self) -> None:
        try:
            document = read_document(self.plan.folder)
        except OSError:  # none there, as the folder is new; else it is a fixed hydra.sweep.dir
            return
        except DamageError as error:
            said = f"hydra.sweep.dir: {self.plan.folder}: {error}: it doesn't tell whose jobs these are"
            raise UserError(f"{said}; move {SWEEP} away if they are this search's, or choose another folder") from error
        if document.get("search", {}).get("study") != self.study:
            raise UserError(f"hydra.sweep.dir: {self.plan.folder} holds another sweep; choose another folder")

    def _exists(self) -> bool:
        return self._file.exists() and self.study in optuna.get_all_study_names(_storage(self._file))

    def _keep(self, trials: Sequence[FrozenTrial]) -> None:
        """Takes over the jobs of earlier attempts that are done or pruned, and counts the trials they settle."""
        self.plan.jobs.clear()
        for trial in trials:
            job = trial.user_attrs.get("job")
            if job and trial.state != TrialState.FAIL:
                status, error = outcome(Path(job["folder"]))
                if status in SETTLED:
                    self.plan.jobs.append(job | {"status": status, "error": error, "reused": True})
                elif status == "failed" and trial.state != TrialState.RUNNING:  # it was settled: damaged since
                    console.warn(f"{job['folder']}: {error}: this trial doesn't count as done")
        numbers = [job["number"] for job in self.plan.jobs]
        self.repeats = sum(trial.user_attrs.get("repeats") in numbers for trial in trials)
        self.told = len(numbers) + self.repeats

    @property
    def missing(self) -> int:
        """How many trials are still to be made."""
        return max(0, self.settings.n_trials - self.told)

    def describe(self) -> dict[str, Any]:
        """What sweep.json says of the search; its jobs find their study by it."""
        where = {"study": self.study, "storage": str(self._file), "told": self.told, "repeats": self.repeats}
        return asdict(self.settings) | where

    def preview(self) -> str:
        """What would be done."""
        space = [f"{key}: {as_text(one)}" for key, one in self._space.items()]
        done = [f"already {job['status']}  {job['name']}  {job['folder']}" for job in self.plan.jobs]
        count = f"{self.settings.n_trials} trials, {self.told} of them done already; {self.missing} would run"
        return "\n".join([*space, *done, count])

    def open(self) -> None:
        """Takes the study for this process, and settles what an interruption has left. Raises UserError."""
        with FileLock(self._file.with_name(f"{self._file.name}.lock")):
            if not self._file.exists():
                with written_atomically(self._file) as temporary:
                    _storage(temporary)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError("this search is under way in another process: wait until it ends") from error
        storage = _storage(self._file)
        if self.plan.first.sweep.force and self._exists():
            optuna.delete_study(study_name=self.study, storage=storage)
        self._study = optuna.create_study(
            storage=storage,
            study_name=self.study,
            direction=self.settings.direction,  # pyright: ignore[reportArgumentType]
            load_if_exists=True,
        )
        for trial in self._study.get_trials(states=(TrialState.RUNNING,)):
            if job := trial.user_attrs.get("job"):
                told = self._tell(trial.number, job)
            else:
                told = self._study.tell(trial.number, state=TrialState.FAIL)
            if told.state == TrialState.FAIL and trial.params:
                self._study.enqueue_trial(trial.params)
        trials = self._study.trials
        self._keep(trials)
        numbers = [trial.user_attrs["job"]["number"] for trial in trials if "job" in trial.user_attrs]
        self._next = max(numbers, default=-1) + 1  # so that no folder of a fixed hydra.sweep.dir is used twice

    def close(self) -> None:
        """Leaves the study to other processes."""
        self._lock.release()

    def ask(self) -> tuple[int, dict[str, Any], list[str]]:
        """(a new trial's number, its job, the job's overrides); the job is an earlier one where the settings agree."""
        asked = len(self._study.get_trials(deepcopy=False))
        # A seed for each trial: with one for all, a search that goes on would propose the first trials once more.
        self._study.sampler = optuna.samplers.TPESampler(seed=self.settings.seed + asked)
        trial = self._study.ask(self._space)
        overrides = [*self._fixed, *as_overrides(trial.params)]
        found, own = compose(self._config, self._next, overrides)
        done = None
        if isinstance(found, Config):
            for job in self.plan.jobs:
                if job["config_hash"] == config_hash(found) and job["status"] in (*SETTLED, "pending"):
                    trial.set_user_attr("repeats", job["number"])
                    self.repeats += 1
                    return trial.number, job, overrides
            done = whole_job(self._done.get(identity(found, self._digests), ()))
        job = entry(self._next, overrides, found, self.plan.swept, done or own, reused=done is not None)
        job["trial"] = trial.number
        trial.set_user_attr("job", job)
        self.plan.jobs.append(job)
        self._next += 1
        return trial.number, job, overrides

    def tell(self, number: int, job: dict[str, Any]) -> None:
        """Tells the study how a trial's job ended, and the person. Raises UserError where it lacks the metric."""
        told = self._tell(number, job)
        self.told += 1
        job["status"], job["error"] = outcome(Path(job["folder"]))
        said = f"{self.settings.metric} {told.value:.4g}" if job["status"] == "done" else job["status"]
        again = "" if job["trial"] == number else " (the same setting again)"
        print(f"{self.told} of {self.settings.n_trials} trials: {job['name']}{again}: {said}")

    def _tell(self, number: int, job: Mapping[str, Any]) -> FrozenTrial:
        match outcome(Path(job["folder"]))[0]:
            case "done":
                results = read_results(Path(job["folder"]), alone=True)
                if not isinstance(value := results.get(self.settings.metric), int | float):
                    raise UserError(f"hydra.sweeper.metric={self.settings.metric}: {job['folder']} has no such number")
                return self._study.tell(number, value)
            case "pruned":
                return self._study.tell(number, state=TrialState.PRUNED)
            case _:
                return self._study.tell(number, state=TrialState.FAIL)


def run(
    search: Search, store: tracking.Store | None, launch: Callable[..., Sequence[Any]], changed: Callable[[], None]
) -> None:
    """Asks, launches and tells, as many trials at once as `n_jobs` says, until there are enough.

    `changed` is called whenever there are new jobs or new outcomes, so that sweep.json says so.
    """
    while search.missing:
        asked = [search.ask() for _ in range(min(search.settings.n_jobs, search.missing))]
        for _, job, _ in asked:
            if job["status"] == "done":
                tracking.complete(store, Path(job["folder"]))
        changed()
        _run_jobs(launch, [(job, overrides) for number, job, overrides in asked if job["trial"] == number])
        for number, job, _ in asked:
            search.tell(number, job)
        changed()


def _run_jobs(launch: Callable[..., Sequence[Any]], batch: Sequence[tuple[dict[str, Any], list[str]]]) -> None:
    """Runs the jobs of a batch; one that another sweep has done says so and ends."""
    new = [Path(job["folder"]) for job, _ in batch if not job["reused"]]
    for folder in new:
        clear(folder)  # of what an earlier study has left under a fixed hydra.sweep.dir
    returned = launch([overrides for _, overrides in batch], initial_job_idx=batch[0][0]["number"]) if new else ()
    for (job, _), result in zip(batch, returned, strict=False):
        try:
            _ = result.return_value
        except Exception as error:
            record_failure(Path(job["folder"]), error)


# --- where studies are kept, and what a job does with its own -----------------------------------------------


def _database(config: Config, folder: Path) -> Path:
    """Beside MLflow's database; where that is a server or absent, beside the jobs."""
    mlflow = tracking.database(tracking.store_uri(config.tracking.uri, ROOT))
    local = mlflow if config.tracking.backend == "local" else None
    return (local.parent if local else sweep_root(folder)) / "optuna.db"


def _storage(file: Path) -> optuna.storages.RDBStorage:
    """SQLite, as it survives kill -9 at any moment; no connection is kept open. Raises UserError."""
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.pool import NullPool

    options = {"connect_args": {"timeout": 60}, "poolclass": NullPool}
    try:
        return optuna.storages.RDBStorage(f"sqlite:///{file}", engine_kwargs=options)
    except (SQLAlchemyError, RuntimeError) as error:
        raise UserError(f"{file} can't be used as Optuna's database ({str(error).splitlines()[0]}); move it") from error


def judge(job: Mapping[str, Any], folder: Path, epochs: int) -> Judge:
    """What a job does with its control margin after each epoch: writes it down, reports it, perhaps ends the job."""
    search = job["search"]
    pruner = optuna.pruners.MedianPruner(search["warmup_trials"], search["warmup_epochs"] + 1)
    storage = _storage(Path(search["storage"]))
    study = optuna.load_study(study_name=search["study"], storage=storage, pruner=pruner)
    study_id = storage.get_study_id_from_name(search["study"])
    trial = optuna.trial.Trial(study, storage.get_trial_id_from_study_id_trial_number(study_id, job["trial"]))
    sign = 1 if search["direction"] == "maximize" else -1  # the margin should be large, whatever is searched for
    margins: list[tuple[int, float]] = []
    attempts = 1

    def judged(epoch: int, margin: float) -> dict[str, Any] | None:
        nonlocal attempts
        if margins and epoch <= margins[-1][0]:  # memory ran out, and training has begun anew
            margins.clear()
            attempts += 1
        margins.append((epoch, margin))
        write_table(folder / "search.csv", ("epoch", "control_margin"), margins)
        if attempts > 1:  # Optuna keeps what the first attempt reported, and would judge this one by it
            return None
        trial.report(sign * margin, epoch)
        if epoch < epochs and trial.should_prune():
            said = f"after epoch {epoch} of {epochs}: control margin {margin:.4g}, below the finished trials' median"
            return {"pruned": said, "epoch": epoch, "margin": margin}
        return None

    return judged
