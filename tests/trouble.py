"""A real MLflow server, and a proxy in front of it that gets into trouble when a test says so."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

from src import tracking
from tests.conftest import ROOT, free_port

# What becomes of a request: error 500; no answer until the proxy ends; the connection closed at once, in the middle
# of the body, or after the server has done what was asked; the whole proxy gone with it; a number: seconds late.
Fault = Literal["500", "mute", "hang up", "cut", "lose", "down"] | float
Rule = Callable[[str], Fault | None]  # of a request, as "POST /api/2.0/mlflow/runs/create"


def always(fault: Fault, part: str = "") -> Rule:
    """All requests with `part` in their first line meet the fault."""
    return lambda request: fault if part in request else None


def after(fault: Fault, part: str) -> Rule:
    """All requests after the first one with `part` meet the fault."""
    seen: list[str] = []

    def rule(request: str) -> Fault | None:
        met = fault if seen else None
        if part in request:
            seen.append(request)
        return met

    return rule


def every_other(fault: Fault) -> Rule:
    """Of requests with the same first line the first, the third … meet the fault."""
    counts: Counter[str] = Counter()

    def rule(request: str) -> Fault | None:
        counts[request] += 1
        return fault if counts[request] % 2 else None

    return rule


def in_turn(part: str, *faults: Fault | None) -> Rule:
    """The requests with `part` meet these faults, one after the other; those after the last meet none."""
    left = list(faults)
    return lambda request: left.pop(0) if left and part in request else None


class Proxy:
    """Forwards to `server`, by `rule`; `requests` lists the first lines that came."""

    def __init__(self, server: str) -> None:
        self.server = urlparse(server).netloc
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.rule: Rule = lambda _: None
        self.requests: list[str] = []
        self.ended = threading.Event()
        self.up()

    def up(self) -> None:
        """Listens, again after `down`."""
        self._listener = ThreadingHTTPServer(("127.0.0.1", self.port), _Handler)
        self._listener.proxy = self  # pyright: ignore[reportAttributeAccessIssue]
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.02,))
        self._thread.start()

    def down(self) -> None:
        """Refuses connections, as a machine does on which no server runs."""
        if self._thread.is_alive():
            self._listener.shutdown()
            self._thread.join()
            self._listener.server_close()

    def close(self) -> None:
        self.ended.set()
        self.down()


class _Handler(BaseHTTPRequestHandler):
    """One request on each connection, as HTTP 1.0 has it."""

    def _serve(self) -> None:
        proxy: Proxy = self.server.proxy  # pyright: ignore[reportAttributeAccessIssue]
        line = f"{self.command} {self.path.partition('?')[0]}"
        fault = proxy.rule(line)
        proxy.requests.append(line)
        if fault == "cut":
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            return
        body = self._body()
        match fault:
            case "500":
                self._answer(500, [], b"out of order")
            case "mute":
                proxy.ended.wait(60)
            case "hang up":
                pass
            case "down":
                proxy.down()
            case "lose":
                self._forward(proxy.server, body)
            case _:
                time.sleep(fault or 0)
                with suppress(OSError):  # who asked may have lost patience
                    self._answer(*self._forward(proxy.server, body))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _forward(self, server: str, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        ours = ("host", "connection", "transfer-encoding", "content-length")
        headers = {name: text for name, text in self.headers.items() if name.lower() not in ours}
        connection = http.client.HTTPConnection(server, timeout=60)
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        for name, text in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815 (the base class looks for these)

    def log_message(self, format: str, *_: object) -> None:
        """Nothing on stderr."""


@contextmanager
def served(store: str, folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`python -m src.ui`, which is MLflow's own server, started in `folder`: its process and its address."""
    port = free_port()
    command = [sys.executable, "-m", "src.ui", "--uri", store, "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            uri = process.stdout.readline().split()[0]
            assert uri == f"http://127.0.0.1:{port}"
            yield process, uri
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=15)


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """The address of a server on a store of its own."""
    store = tracking.store_uri(None, folder)
    tracking.check(store, "tli")
    with served(store, folder) as (_, uri):
        yield uri
