"""MLflow, and the only file that imports it: a job folder is projected into a tracking store, as often as one likes."""

from __future__ import annotations

import base64
import getpass
import json
import logging
import math
import os
import re
import socket
import sqlite3
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote, unquote, urlparse
from uuid import uuid4

import psutil
from filelock import FileLock

from src.config import TrackingConfig
from src.errors import Pruned, UserError
from src.files import digest, remove_leftovers, written_atomically
from src.interrupts import under_way, undivided
from src.process import environment, importing
from src.results import PRUNED, outcome_file, read_table
from src.view import GREY, colour, sweep_view

# Set before mlflow is imported, where the user hasn't: no telemetry, no chatter, and minutes of retries cut short.
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
_TABLES = ("layers.csv", "pairs.csv", "training.csv", "results.json")
_UNTAGGED = ("mlflow_run_id", "sha256")  # texts of results.json that say nothing of a run
_SEARCHED = ("search.csv", PRUNED)  # of a search's job
_PATIENCE = "10"  # seconds for an answer when a run begins; a server that is down refuses at once
_MODE = "workflowType=machine_learning"  # else the UI opens on what it has for chat applications
_FIRST = (  # in this order before all other metrics: the UI lists them as they were logged, and compares by the first
    "control/margin_gain",
    "control/csls_p_at_1_before",
    "control/csls_p_at_1_after",
    "control_unalike/csls_p_at_1_after",
    "baseline/best_layer_csls_p_at_1_before",
    "control/specificity_pvalue",
    "control/near_pvalue",
)
_MARK = "uploaded"  # tag: the digest of what was uploaded; set last, so it vouches for everything before it
_PARAMS, _METRICS, _VALUE, _DIGEST = (
    100,
    1000,
    6000,
    36,
)  # MLflow's limits: per batch, per batch, characters, characters


# Environment variables that say which sweep's run and id a job belongs to, and its name; src.sweep sets them.
PARENT, SWEEP, NAME = "TLI_SWEEP_RUN", "TLI_SWEEP_ID", "TLI_RUN_NAME"
log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Store:
    """Where runs go: the store's full URI and the experiment's name."""

    uri: str
    experiment: str


@dataclass
class Run:
    """A job's run while the job is at work."""

    id: str | None = None  # None where the job isn't tracked, or not yet
    link: str | None = None  # where a person finds it, once the store holds the whole folder
    opening: str = field(default_factory=lambda: uuid4().hex)  # by which it is found where the store's answer was lost


class TrackingError(Exception):
    """The store refused, failed or couldn't be reached; one line, without credentials."""


# --- a job's tracking ---------------------------------------------------------------------------------------


def open_store(config: TrackingConfig, root: Path, folder: Path | None = None) -> Store | None:
    """The store that a job is tracked in, ready to be written; None for the backend "off". Raises UserError.

    For a job of a sweep, whose `folder` is given, trouble is a warning, and None: its sweep has begun.
    """
    if config.backend == "off":
        return None
    store = Store(store_uri(config.uri, root), config.experiment)
    try:
        check(store.uri, store.experiment)
    except UserError as error:
        if folder is None or NAME not in os.environ:
            raise
        _warn(str(error).partition(";")[0].removeprefix("tracking.uri="), later(folder))
        return None
    close_lost(store)
    return store


def close_lost(store: Store | None) -> None:
    """Marks as KILLED what processes of this machine left open that are gone."""
    if store:
        with warned("orphaned runs stay open"):
            close_orphans(store.uri, store.experiment)


@contextmanager
def tracked(folder: Path, store: Store | None, description: Mapping[str, Any]) -> Iterator[Run]:
    """Opens a run around the block that fills the job folder, yields it, and uploads the folder at the end.

    Trouble with the store is a warning, never the end of the job: the folder holds everything, `src.sync` uploads it.
    After it nothing more is tried here, as each try would wait for an answer once more.
    An exception in the block closes the run as FAILED, an interruption as KILLED, a search's pruning as FINISHED.
    """
    run, opening, pruned = Run(), False, None
    try:
        if store:
            opening = True
            with warned(later(folder)):
                run.id = _start_job(store, description, run.opening)
            opening = False
        try:
            yield run
        except Pruned as error:
            pruned = error
        if store and run.id:
            with warned(later(folder)):
                upload(folder, run.id, store.uri)
                finish(run.id, store.uri, "FINISHED")
                run.link = run_link(store.uri, run.id)
    except BaseException as error:
        if store and (run.id or opening):
            if under_way() or not isinstance(error, Exception):
                with undivided():
                    abandon(store, run.id, run.opening, "KILLED")
            else:
                abandon(store, run.id, run.opening, "FAILED")
        raise
    if pruned:
        raise pruned


def _start_job(store: Store, description: Mapping[str, Any], opening: str) -> str:
    tags = {key: description[key] for key in ("config_hash", "git_commit", "model_revision")}
    if SWEEP in os.environ:
        tags["sweep"] = os.environ[SWEEP]
    return start(
        store.uri,
        store.experiment,
        name=os.environ.get(NAME) or description["name"],
        params=description["params"],
        tags=tags,
        dataset=description["dataset"],
        parent=os.environ.get(PARENT),
        opening=opening,
    )


def abandon(store: Store, run_id: str | None, opening: str, status: Literal["FAILED", "KILLED"]) -> None:
    """Closes a run at whose work an exception has come; perhaps before anybody was told its id."""
    with warned("the run stays open"):
        if found := run_id or opened(store.uri, store.experiment, opening):
            finish(found, store.uri, status)


def complete(store: Store | None, folder: Path) -> None:
    """Uploads a finished job whose own process was ended before it could; nothing where the store has no such run."""
    run_id = json.loads((folder / "results.json").read_text(encoding="utf-8"))["mlflow_run_id"]
    if store is None or run_id is None:
        return
    with warned(later(folder)):
        if upload_state(folder, run_id, store.uri) in ("uploaded", "missing"):
            upload(folder, run_id, store.uri)
            finish(run_id, store.uri, "FINISHED")


def later(folder: Path) -> str:
    """What becomes of a folder that tracking failed with."""
    return f"{folder} is not uploaded: `python -m src.sync` does it later"


# --- a sweep's run, the parent of its jobs' runs ------------------------------------------------------------


def open_sweep(store: Store, name: str, tags: Mapping[str, str], opening: str, earlier: str | None) -> str:
    """Opens a sweep's run, or `earlier` again where the store has it. `tags` holds `sweep`. Raises TrackingError."""
    if earlier and _reopened(store, earlier, dict(tags) | {"opening": opening}):
        return earlier
    how: dict[str, Any] = {"params": {}, "dataset": None, "parent": None}
    return start(store.uri, store.experiment, name=name, tags=tags, opening=opening, **how)


def _reopened(store: Store, run_id: str, tags: Mapping[str, str]) -> bool:
    """Makes an ended sweep's run this process's, with the runs of its jobs; False where the store has none to take."""
    with _client(store.uri) as client:
        from mlflow.entities import RunTag

        run = _found(client, run_id)
        if run is None:
            return False
        experiment = _experiment(client, store.uri, store.experiment)
        ended = run.info.status != "RUNNING"  # else another process is at it; this host's orphans are closed by now
        if not ended or run.info.lifecycle_stage != "active" or run.info.experiment_id != experiment:
            return False
        shown = {key: _short(value) for key, value in (dict(tags) | _process_tags()).items()}
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in shown.items()])
        for child in _children(client, experiment, run_id):
            client.set_tag(child, "sweep", tags["sweep"])
        client.update_run(run_id, status="RUNNING")
    return True


def _children(client: Any, experiment: str, run_id: str) -> list[str]:
    runs = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{run_id}'", max_results=10_000)
    return [run.info.run_id for run in runs]


def close_sweep(
    store: Store,
    run_id: str,
    *,
    status: Literal["FINISHED", "FAILED", "KILLED"],
    ended: str,
    note: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    figures: Sequence[Path],
) -> None:
    """Closes a sweep's run with `note` as its description, the table as summary.json, and the figures.

    `ended` says of which end of the sweep all this tells. Raises TrackingError.
    """
    with _client(store.uri) as client:
        from mlflow.entities import RunTag

        table = {"path": "summary.json", "type": "table"}
        client.log_text(run_id, json.dumps({"columns": list(columns), "data": list(rows)}), table["path"])
        for figure in figures:
            client.log_artifact(run_id, str(figure), "overview")
        tags = {"mlflow.note.content": _short(note), "mlflow.loggedArtifacts": json.dumps([table])}
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        if client.get_run(run_id).info.status != status:
            client.set_terminated(run_id, status)
        client.set_tag(run_id, _MARK, ended)


def sweep_state(
    store: Store, run_id: str, sweep: str, ended: str
) -> Literal["recorded", "missing", "resumed", "deleted", "unknown"]:
    """Whether a sweep's run tells of this end of it; `resumed`: it is a later sweep's by now. Raises TrackingError."""
    with _client(store.uri) as client:
        run = _found(client, run_id)
    if run is None:
        return "unknown"
    if run.info.lifecycle_stage != "active":
        return "deleted"
    if run.data.tags.get("sweep") != sweep:
        return "resumed"
    return "recorded" if run.data.tags.get(_MARK) == ended else "missing"


def adopt(store: Store, parent: str, runs: Sequence[str]) -> None:
    """Puts those of the runs that have no parent below this one, a sweep's. Raises TrackingError."""
    with _client(store.uri) as client:
        above = client.get_run(parent)
        for run_id in set(runs) - set(_children(client, above.info.experiment_id, parent)):
            run = _found(client, run_id)
            if run and run.info.lifecycle_stage == "active" and "mlflow.parentRunId" not in run.data.tags:
                client.set_tag(run_id, "sweep", above.data.tags["sweep"])
                client.set_tag(run_id, "mlflow.parentRunId", parent)


def sweep_link(
    store: Store, run_id: str, sweep: str, runs: Sequence[str], columns: Sequence[str], *, order: str
) -> str:
    """Where a person finds a sweep: the model-training view with `columns`, by `order` falling, its jobs unfolded.

    `runs` are those of its jobs; some may belong to an earlier sweep. The saved view is an undocumented tag of the
    experiment: where MLflow refuses it, the link shows the same runs without it. Raises TrackingError.
    """
    with _client(store.uri) as client:
        experiment = client.get_run(run_id).info.experiment_id
        own = set(_children(client, experiment, run_id))
        for run, shade in [(run_id, GREY), *((run, colour(number)) for number, run in enumerate(runs) if run in own)]:
            client.set_tag(run, "mlflow.runColor", shade)
        chosen = f"tags.sweep = '{sweep}'"
        if not set(runs) <= own:
            chosen = f"attributes.run_id IN ({', '.join(repr(run) for run in (run_id, *runs))})"
        where = f"/#/experiments/{experiment}/runs?{_MODE}"
        view = sweep_view(run_id, chosen, columns, order)
        if _view_saved(client, experiment, run_id, f"sweep {sweep}", view):
            where += f"&viewStateShareKey={run_id}"
        else:
            where += f"&searchFilter={quote(chosen)}"
        return _in_ui(store.uri, where)


def _view_saved(client: Any, experiment: str, key: str, name: str, view: Mapping[str, Any]) -> bool:
    from mlflow.exceptions import MlflowException

    now = int(time.time() * 1000)
    state = "deflate;" + base64.b64encode(zlib.compress(json.dumps(view).encode())).decode()
    shared = json.dumps({"name": name, "createdAt": now, "updatedAt": now, "state": state})
    try:
        client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{key}", shared)
    except MlflowException as error:  # one with hundreds of jobs of earlier sweeps is too long
        log.info("no saved view: %s", error)
        return False
    return True


@contextmanager
def warned(consequence: str) -> Iterator[None]:
    """Makes a warning of a TrackingError."""
    try:
        yield
    except TrackingError as error:
        _warn(str(error), consequence)


def _warn(trouble: str, consequence: str) -> None:
    log.info("tracking: %s; %s", trouble, consequence)  # as a warning, it would be printed twice between a sweep's jobs
    print(f"warning: tracking: {trouble}; {consequence}", file=sys.stderr)


# --- the store ----------------------------------------------------------------------------------------------


def store_uri(uri: str | None, root: Path) -> str:
    """`tracking.uri` in full: null is `root`/mlruns/mlflow.db, a relative path is below `root`. Raises UserError."""
    if uri and uri.startswith(("http://", "https://")):
        return uri.rstrip("/")
    path = "mlruns/mlflow.db" if uri is None else uri.removeprefix("sqlite:///")
    if uri is not None and (not path or path == uri):
        raise UserError(f"tracking.uri={public_uri(uri)}: give sqlite:////path/to/mlflow.db, http://host:port, or null")
    file = (root / path).resolve()
    if set("?%") & set(str(file)):  # a database URI would read them as something else
        raise UserError(f"tracking.uri: the path {file} holds ? or %; give another, or rename the folder")
    return f"sqlite:///{file}"


def public_uri(text: str) -> str:
    """`text` with every `user:password@` behind a `://` taken out."""
    return re.sub(r"(?<=://)[^/\s'\"]*@", "", text)


class Discreet(logging.Formatter):
    """Formats run.log's lines, tracebacks included, without credentials: MLflow's messages hold the server's URI."""

    def format(self, record: logging.LogRecord) -> str:
        return public_uri(super().format(record))


class RunLog(logging.FileHandler):
    """run.log, which falls silent where its disk is full: logging would print tracebacks on the terminal instead."""

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        pass


def database(uri: str) -> Path | None:
    """The file of a local store; None for a server."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def check(uri: str, experiment: str) -> None:
    """Makes sure, before anything slow begins, that runs can be written to this store; creates a local one once.

    Safe in many processes at once. Raises UserError in one line: a server that isn't there or stays mute, a database
    that can't be written, is no MLflow's or another version's, a moved store, a deleted experiment.
    """
    file = database(uri)
    if file:
        _prepare(file)
    try:
        # One retry, as the server may close an idle connection in the very moment in which a request goes out on it.
        with (  # MLflow reads its settings anew for each request
            environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="1", MLFLOW_HTTP_REQUEST_TIMEOUT=_PATIENCE),
            _client(uri) as client,
        ):
            found = client.get_experiment_by_name(experiment)
    except TrackingError as error:
        if "error code 401" in str(error):
            names = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            raise UserError(f"tracking.uri={public_uri(uri)} asks for a password: set {names}, or to others") from error
        hint = "choose another" if file else "start it (`python -m src.ui` starts one on port 5000)"
        raise UserError(f"tracking.uri={error}; {hint}, or run with tracking=off") from error
    if found and found.lifecycle_stage != "active":
        raise UserError(
            f"tracking.experiment={experiment} was deleted in {public_uri(uri)}; restore it or name another"
        )


def moved(uri: str) -> set[str]:
    """Folders in which a local store believes its artifacts to lie, though it was moved or copied away from there.

    Raises UserError where the store is damaged or can't be read.
    """
    file = database(uri)
    if file is None or not file.exists():
        return set()
    here = file.parent / "artifacts"
    try:
        refuse_damaged(file)
        with closing(sqlite3.connect(file)) as connection:
            rows = connection.execute("SELECT artifact_location FROM experiments").fetchall()
    except sqlite3.Error as error:
        raise UserError(f"{file} can't be read ({error}); try again, or move it away") from error
    strangers = set()
    for (location,) in rows:
        folder = Path(unquote(urlparse(location).path) if location.startswith("file:") else location)
        elsewhere = folder.parent.name == "artifacts" and folder.parent.resolve() != here.resolve()
        if folder.is_absolute() and elsewhere and ((here / folder.name).exists() or not folder.parent.exists()):
            strangers.add(location.rpartition("/")[0])
    return strangers


@cache  # once in a process, as it reads the whole file; errors are not remembered
def refuse_damaged(file: Path) -> None:
    """Raises UserError where SQLite finds a local store damaged, and sqlite3's errors where it can't look.

    A number that has become another looks whole to SQLite, which keeps no checksums.
    """
    try:
        with closing(sqlite3.connect(file, timeout=30)) as connection:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise
        found = str(error)
    damage = " ".join(found.split()) if file.stat().st_size else "it is empty"
    if damage != "ok":
        raise UserError(
            f"{file} is damaged ({damage}); restore a backup of it, or move it away: "
            "`python -m src.sync` then records all jobs anew, in a new store"
        )


def _prepare(file: Path) -> None:
    """Creates the database in a temporary file that is renamed into place, as MLflow's own creation survives neither
    company nor a kill; refuses one that MLflow would try to migrate on the spot."""
    _settle()
    from mlflow.exceptions import MlflowException
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy.exc import SQLAlchemyError

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            with FileLock(file.with_name(f"{file.name}.lock")):
                if not file.exists():
                    remove_leftovers(file)
                    with written_atomically(file) as temporary:
                        SqlAlchemyStore(f"sqlite:///{temporary}", str(file.parent / "artifacts"))._dispose_engine()
        for place in (file.parent, file.parent / "artifacts"):  # SQLite writes a journal beside the database
            if place.exists() and not os.access(place, os.W_OK):
                raise OSError(f"{place} is read-only")
        refuse_damaged(file)
        with closing(sqlite3.connect(file, timeout=30)) as connection:
            connection.execute("BEGIN IMMEDIATE")  # fails here and now where the file can't be written
            connection.rollback()
            (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone() or (None,)
    except (OSError, sqlite3.Error, SQLAlchemyError, MlflowException) as error:
        reason = _disk(error) or (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"tracking.uri: {file} can't be used as MLflow's database ({reason}); "
            "choose another file, move this one away, or run with tracking=off"
        ) from error
    if revision != _schema():
        raise UserError(
            f"tracking.uri: {file} belongs to another MLflow version, or its creation was cut off; "
            f"keep a copy, then run `mlflow db upgrade sqlite:///{file}`, or move it away"
        )
    if moved(f"sqlite:///{file}"):
        raise UserError(f"tracking.uri: {file} was moved; run `python -m src.sync --relocate --uri sqlite:///{file}`")


@cache
def _schema() -> str:
    from mlflow.store.db.utils import _get_latest_schema_revision

    return _get_latest_schema_revision()  # it runs dozens of migration files, and a sweep asks before every job


def _settle() -> None:
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # each retry would be a line of its own
    with importing():
        import mlflow  # noqa: F401  it sets up its loggers, so the next line must follow

    logging.getLogger("alembic").setLevel(logging.ERROR)


def _once(create: Callable[[], T], find: Callable[[], T | None]) -> T:
    """Creates what must not be there twice: MLflow's client would ask again where only the answer was lost."""
    from mlflow.exceptions import MlflowException

    def tried() -> T:
        with environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0"):
            return create()

    try:
        return tried()
    except MlflowException as error:
        if found := find():  # this waits for the server as all else does
            return found
        if "timed out" in str(error):  # it may be at it still
            raise
    return tried()


@contextmanager
def _client(uri: str) -> Iterator[Any]:
    """Yields an MlflowClient; whatever goes wrong with the store inside becomes a TrackingError.

    A signal waits for the end where the store is a database of ours; a server's answer may take minutes.
    """
    _settle()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with undivided() if database(uri) else nullcontext():
            yield MlflowClient(tracking_uri=uri)
    except (MlflowException, RequestException, SQLAlchemyError, sqlite3.Error, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if failed := re.search(r"too many (\d+) error responses", reason):
            reason = f"it answers with error {failed[1]}"
        elif _mute(error):
            reason = "no answer"
        reason = _disk(error) or reason
        raise TrackingError(f"{public_uri(uri)}: {public_uri(reason)[:300]}") from error


def _disk(error: Exception) -> str | None:
    """What SQLite, copying files and our own writing say of a full or read-only disk, in one way."""
    if re.search(r"No space left on device|quota exceeded|disk is full", str(error)):
        return "its disk is full"
    closed = r"readonly database|unable to open database|Read-only file system"  # the second: its journal
    return "it can't be written" if re.search(closed, str(error)) else None


def _mute(error: Exception) -> bool:
    """Whether a server gave no answer, or none but errors of its own, however often it was asked."""
    from requests import RequestException

    return isinstance(error.__cause__, RequestException) or "Max retries exceeded" in str(error)


# --- a run --------------------------------------------------------------------------------------------------


def start(
    uri: str,
    experiment: str,
    *,
    name: str,
    params: Mapping[str, str],
    tags: Mapping[str, str],
    dataset: Mapping[str, Any] | None,
    parent: str | None,
    opening: str | None = None,
) -> str:
    """Opens a run, visible at once as RUNNING, and returns its id. Raises TrackingError.

    `dataset` has name, digest and source, and whatever else describes it; `parent` is the sweep's run. A tag
    `git_commit` also becomes MLflow's own. By `opening`, which no other run has, `opened` finds the run afterwards.
    """
    own = (
        {"opening": opening or uuid4().hex}
        | _process_tags()
        | {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}
    )
    with suppress(OSError, KeyError, ImportError):  # a container's user may have no name
        own["mlflow.user"] = getpass.getuser()
    if parent:
        own["mlflow.parentRunId"] = parent
    if commit := tags.get("git_commit"):
        own["mlflow.source.git.commit"] = commit
    with _client(uri) as client:
        from mlflow.exceptions import MlflowException

        shown = {key: _short(value) for key, value in (dict(tags) | own).items()}
        place = _experiment(client, uri, experiment)
        run_id = _once(
            lambda: client.create_run(place, tags=shown, run_name=name).info.run_id,
            lambda: _opened(client, place, own["opening"]),
        )
        try:
            _log_params(client, run_id, params)
            if dataset:
                _log_dataset(client, run_id, dataset)
        except (KeyboardInterrupt, SystemExit):  # nobody else knows the run yet
            with suppress(MlflowException):
                client.set_terminated(run_id, "KILLED")
            raise
    return run_id


def opened(uri: str, experiment: str, opening: str) -> str | None:
    """The run that was opened so, if the store has it. Raises TrackingError."""
    with _client(uri) as client:
        return _opened(client, _experiment(client, uri, experiment), opening)


def _opened(client: Any, experiment: str, opening: str) -> str | None:
    found = client.search_runs([experiment], f"tags.opening = '{opening}'", max_results=1)
    return found[0].info.run_id if found else None


def _found(client: Any, run_id: str) -> Any | None:
    """The run; None where the store has never had it."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _log_params(client: Any, run_id: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    entries = [Param(key[:250], _short(public_uri(value))) for key, value in params.items()]
    for first in range(0, len(entries), _PARAMS):
        client.log_batch(run_id, params=entries[first : first + _PARAMS])


def _log_dataset(client: Any, run_id: str, dataset: Mapping[str, Any]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException

    source = json.dumps({"uri": public_uri(dataset["source"])})
    entity = Dataset(dataset["name"], dataset["digest"][:_DIGEST], "local", source, profile=json.dumps(dict(dataset)))
    entry = DatasetInput(entity, [InputTag("mlflow.data.context", "training")])
    try:
        client.log_inputs(run_id, [entry])
    except MlflowException as error:
        if _mute(error):
            raise
        client.log_inputs(run_id, [entry])  # another job wrote it in this very moment: now it is there to be found


def _process_tags() -> dict[str, str]:
    """What tells later whether the process that opened a run is still alive."""
    process = psutil.Process()
    return {"host": socket.gethostname(), "pid": str(process.pid), "process_start": f"{process.create_time():.2f}"}


def finish(run_id: str, uri: str, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
    """Closes a run; one that is closed so already keeps its end, and so its duration. Raises TrackingError."""
    with _client(uri) as client:
        if client.get_run(run_id).info.status != status:
            client.set_terminated(run_id, status)


def close_orphans(uri: str, experiment: str) -> int:
    """Marks as KILLED this host's open runs whose process is gone; returns how many. Raises TrackingError."""
    with _client(uri) as client:
        known = client.get_experiment_by_name(experiment)
        mine = f"attributes.status = 'RUNNING' AND tags.host = '{socket.gethostname()}'"
        runs = client.search_runs([known.experiment_id], mine, max_results=1000) if known else []
        gone = [run.info.run_id for run in runs if not _alive(run.data.tags)]
        # Asked again now that the process is known to be dead: one that ended in the meantime has closed its run.
        orphans = [run_id for run_id in gone if client.get_run(run_id).info.status == "RUNNING"]
        for run_id in orphans:
            client.set_terminated(run_id, "KILLED")
    return len(orphans)


def run_link(uri: str, run_id: str) -> str:
    """Where a person finds the run: a URL, behind the command that opens the UI if the store is local."""
    with _client(uri) as client:
        experiment = client.get_run(run_id).info.experiment_id
    return _in_ui(uri, f"/#/experiments/{experiment}/runs/{run_id}?{_MODE}")


def _in_ui(uri: str, fragment: str) -> str:
    file = database(uri)
    if file is None:
        return public_uri(uri) + fragment
    ours = file == Path(__file__).resolve().parents[1] / "mlruns" / "mlflow.db"
    return f"python -m src.ui{'' if ours else f' --uri {uri}'}, then http://127.0.0.1:5000{fragment}"


def _experiment(client: Any, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    file = database(uri)
    place = str(file.parent / "artifacts" / re.sub(r"[^\w.-]", "_", name)) if file else None
    try:
        return client.create_experiment(name, artifact_location=place)
    except MlflowException:  # another process may have been quicker
        if found := client.get_experiment_by_name(name):
            return found.experiment_id
        raise


def _alive(tags: Mapping[str, str]) -> bool:
    try:
        process = psutil.Process(int(tags["pid"]))
        started = process.create_time()
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return abs(started - float(tags["process_start"])) < 2  # another start time: the number was given out again
    except (psutil.NoSuchProcess, KeyError, ValueError):
        return False
    except psutil.AccessDenied:
        return True


def _short(text: str) -> str:
    return text if len(text) <= _VALUE else text[: _VALUE - 1] + "…"


# --- a finished job folder ----------------------------------------------------------------------------------


def upload_lock(folder: Path) -> FileLock:
    """The lock under which a job folder is uploaded; a process that holds it may take it again."""
    return FileLock(folder / ".upload.lock", is_singleton=True)


def upload_state(folder: Path, run_id: str, uri: str) -> Literal["uploaded", "missing", "deleted", "unknown"]:
    """Whether the store has this folder as it is now; `unknown` means that it has no such run. Raises TrackingError."""
    with _client(uri) as client:
        run = _found(client, run_id)
    if run is None:
        return "unknown"
    if run.info.lifecycle_stage != "active":
        return "deleted"
    return "uploaded" if run.data.tags.get(_MARK) == _contents(folder) else "missing"


def upload(folder: Path, run_id: str, uri: str) -> None:
    """Projects an ended job's folder into its run: scalars, series, tags, files, the adapter as a logged model.

    Repeating it adds nothing: metrics carry the run's start as their time, so MLflow knows them again; files are
    replaced; the logged model is looked up. Raises TrackingError.
    """
    with _client(uri) as client, upload_lock(folder):
        from mlflow.entities import Metric, RunTag

        run = client.get_run(run_id)
        mark = _contents(folder)
        if run.data.tags.get(_MARK) == mark:
            return
        results = json.loads(outcome_file(folder).read_text(encoding="utf-8"))
        params = results.get("params", {})
        _log_params(client, run_id, {key: params[key] for key in params.keys() - run.data.params.keys()})
        if results.get("dataset") and not run.inputs.dataset_inputs:
            _log_dataset(client, run_id, results["dataset"])
        layers, losses = (read_table(folder / name) for name in ("layers.csv", "training.csv"))
        points = [*_scalars(results), *_series(layers), *_losses(losses), *_margins(read_table(folder / "search.csv"))]
        metrics = [Metric(key, value, run.info.start_time, step) for key, value, step in points if math.isfinite(value)]
        for first in range(0, len(metrics), _METRICS):
            client.log_batch(run_id, metrics=metrics[first : first + _METRICS])
        _upload_files(client, run_id, folder, layers)
        if (folder / "adapter").is_dir():
            _upload_adapter(client, run, folder / "adapter")
        tags = {key: value for key, value in results.items() if isinstance(value, str) and key not in _UNTAGGED}
        told = [results.get("verdict", "pruned"), results.get("verdict_reason") or results.get("pruned", "")]
        tags["mlflow.note.content"] = f"**{told[0]}** {told[1]}".strip()
        if layers:
            tags["mlflow.loggedArtifacts"] = json.dumps([{"path": "layers.json", "type": "table"}])  # as log_table does
        client.log_batch(run_id, tags=[RunTag(key, _short(value)) for key, value in tags.items()])
        client.set_tag(run_id, _MARK, mark)


def _contents(folder: Path) -> str:
    searched = [name for name in _SEARCHED if (folder / name).exists()]
    names = (*_TABLES, *searched)
    return digest(*((folder / name).read_bytes() if (folder / name).exists() else b"" for name in names))


def _scalars(results: Mapping[str, Any]) -> Iterator[tuple[str, float, int]]:
    for key, value in ({key: results[key] for key in _FIRST if key in results} | dict(results)).items():
        if "/" in key and isinstance(value, int | float) and not isinstance(value, bool):
            yield key, float(value), 0


def _series(layers: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, float, int]]:
    from src.layers import step  # it imports torch, which nothing else here needs

    depth = max((int(row["layer"]) for row in layers if row["layer"] != "final"), default=0)
    for row in layers:
        layer = "final" if row["layer"] == "final" else int(row["layer"])
        yield _series_name(row), float(row["value"] or "nan"), step(layer, depth)


def _series_name(row: Mapping[str, str]) -> str:
    stage = row["stage"] if row["split"] == "all" else f"{row['stage']}_{row['split']}"
    return f"{stage}/{row['measure']}"


def _losses(training: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, float, int]]:
    for row in training:
        yield "train/loss", float(row["loss"] or "nan"), int(row["step"])


def _margins(epochs: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, float, int]]:
    for row in epochs:
        yield "search/control_margin", float(row["control_margin"]), int(row["epoch"])


def _table(layers: Sequence[Mapping[str, str]]) -> dict[str, list[Any]]:
    """One row for each layer and one column for each series, in the form that MLflow shows as a table and compares."""
    names = list(dict.fromkeys(map(_series_name, layers)))
    rows: dict[str, dict[str, float | None]] = {}
    for row in layers:
        value = float(row["value"] or "nan")
        rows.setdefault(row["layer"], {})[_series_name(row)] = value if math.isfinite(value) else None
    return {
        "columns": ["layer", *names],
        "data": [[layer, *map(cells.get, names)] for layer, cells in rows.items()],
    }


def _inside(file: Path, folder: Path) -> bool:
    return file.resolve().is_relative_to(folder.resolve())


def _upload_files(client: Any, run_id: str, folder: Path, layers: Sequence[Mapping[str, str]]) -> None:
    for name in ("plots", "adapter"):
        if strange := [file for file in (folder / name).rglob("*") if not _inside(file, folder)]:
            raise OSError(f"{strange[0]} links to a file outside the job's folder: not uploaded")
        if (folder / name).is_dir():
            client.log_artifacts(run_id, str(folder / name), name)
    with tempfile.TemporaryDirectory() as temporary:
        stage = Path(temporary)
        (stage / "config").mkdir()
        texts = {name: folder / name for name in (*_TABLES, *_SEARCHED, "run.log")}
        texts |= {f"config/{file.name}": file for file in (folder / ".hydra").glob("*.yaml")}
        for name, file in texts.items():
            if file.exists():  # the config as Hydra wrote it may hold a password in tracking.uri
                text = file.read_text(encoding="utf-8", errors="replace")
                (stage / name).write_text(public_uri(text), encoding="utf-8")
        if layers:
            (stage / "layers.json").write_text(json.dumps(_table(layers)), encoding="utf-8")
        client.log_artifacts(run_id, temporary)


def _upload_adapter(client: Any, run: Any, adapter: Path) -> None:
    from mlflow.entities import LoggedModelOutput

    run_id, experiment = run.info.run_id, run.info.experiment_id
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    params = {key: str(value) for key, value in settings.items() if isinstance(value, str | int | float)}

    def made() -> str | None:
        models = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
        return models[0].model_id if models else None

    def create() -> str:
        return client.create_logged_model(experiment, "adapter", run_id, params=params, model_type="peft").model_id

    model_id = made() or _once(create, made)
    client.log_model_artifacts(model_id, str(adapter))
    client.finalize_logged_model(model_id, "READY")

    def shown() -> bool:
        return model_id in {output.model_id for output in client.get_run(run_id).outputs.model_outputs}

    if not shown():
        _once(lambda: client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)]), shown)
