"""`python -m src.ui`: opens MLflow's own UI on the project's store, reachable from this machine only."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

import psutil

from src import console, tracking
from src.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
_REFUSED = (5060, 5061)  # browsers don't open these
_PATIENCE = 120  # seconds; a cold start on a busy machine


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until Ctrl-C or SIGTERM, then ends the server and its children. Exit status 2 for the user's errors."""
    parser = argparse.ArgumentParser(prog="python -m src.ui", description=__doc__)
    parser.add_argument("--port", type=int, help="default: 5000, or the next free one")
    parser.add_argument("--uri", help="another store: sqlite:////path/to/mlflow.db")
    arguments = parser.parse_args(argv)
    try:
        uri = tracking.store_uri(arguments.uri, ROOT)
        file = tracking.database(uri)
        if file is None:
            raise UserError(f"{tracking.public_uri(uri)} is a server already: open it in a browser")
        if not file.exists():
            raise UserError(f"{file}: no store yet; `python -m src.run` makes it with the first run")
        port = _port(arguments.port)
        if tracking.moved(uri):
            print(f"{file} was moved, so files won't show: run `python -m src.sync --relocate --uri {uri}`")
        return serve(uri, file, port)
    except UserError as error:
        console.fail(str(error))
        return 2


def serve(uri: str, file: Path, port: int) -> int:
    """Runs the server on 127.0.0.1:`port` in the foreground. Raises UserError if it doesn't come up."""
    log = file.with_name("ui.log")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    server = None
    try:
        with log.open("w") as output:
            server = subprocess.Popen(
                _command(uri, file, port), env=_environment(uri), stdout=output, stderr=output, start_new_session=True
            )
        _wait(server, port, log)
        print(f"http://127.0.0.1:{port}  (Ctrl-C ends it; the server's log is {log})", flush=True)
        for number, name in _experiments(file):
            print(f"  {name}: http://127.0.0.1:{port}/#/experiments/{number}?workflowType=machine_learning", flush=True)
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        if server:
            _end(server)


def _command(uri: str, file: Path, port: int) -> list[str]:
    # Artifacts of experiments made through this server go beside the others, not into the working folder.
    store = ["--backend-store-uri", uri, "--artifacts-destination", str(file.parent / "artifacts")]
    return [sys.executable, "-m", "mlflow", "server", *store, "--host", "127.0.0.1", "--port", str(port), "-w", "1"]


def _environment(uri: str) -> dict[str, str]:
    return os.environ | {
        "MLFLOW_TRACKING_URI": uri,  # else the server opens a ./mlflow.db as well
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a third of the time to start
    }


def _port(asked: int | None) -> int:
    if asked is not None:
        if asked in _REFUSED or not _free(asked):
            raise UserError(f"--port {asked}: taken, or refused by browsers; choose another")
        return asked
    return next(port for port in range(5000, 5100) if port not in _REFUSED and _free(port))


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port just given back is free
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            return False
    return True


def _wait(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy can't reach this machine's port
    limit = time.monotonic() + _PATIENCE
    while server.poll() is None and time.monotonic() < limit:
        try:
            opener.open(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    raise UserError(f"the MLflow server didn't start; its last words are in {log}")


def _experiments(file: Path) -> list[tuple[int, str]]:
    with closing(sqlite3.connect(file)) as connection:
        return connection.execute(
            "SELECT experiment_id, name FROM experiments WHERE lifecycle_stage = 'active' AND experiment_id > 0"
        ).fetchall()


def _end(server: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # an impatient second Ctrl-C must not leave children behind
    try:
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        _signal(process, signal.SIGTERM)
    _, stubborn = psutil.wait_procs(family, timeout=5)
    for process in stubborn:
        _signal(process, signal.SIGKILL)
    server.wait()


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
