"""Checks shapes and types of every call into src while testing, and keeps tests off the network."""

# ruff: noqa: E402, I001 (what is set here must be set before the imports below)

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # as src.tracking does, where a test imports mlflow first

import hypothesis  # noqa: F401 (first: it asks who refers to trio's random numbers, which gc.freeze would hide)
import tests.typechecker  # noqa: F401 (the hook finds it by name)
from jaxtyping import install_import_hook

install_import_hook("src", "tests.typechecker.checked")

import pytest
import torch

from src.config import ModelConfig, QuantConfig
from src.models import LoadedModel, load_model

ROOT = Path(__file__).parent.parent


def model_config(**values: object) -> ModelConfig:
    """conf/model/tiny.yaml, with other values where given."""
    from omegaconf import OmegaConf

    shared = OmegaConf.load(ROOT / "conf/model/smollm2_135m.yaml")
    own = OmegaConf.load(ROOT / "conf/model/tiny.yaml")
    merged = {**OmegaConf.to_container(shared), **OmegaConf.to_container(own), **values}  # pyright: ignore
    merged.pop("defaults", None)
    return ModelConfig(**merged)


def quant_config(name: str = "none", **values: object) -> QuantConfig:
    """conf/quant/<name>.yaml, with other values where given."""
    from omegaconf import OmegaConf

    return QuantConfig(**{**OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/quant/{name}.yaml")), **values})  # pyright: ignore


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs `python -m src.run` in this process and returns its exit status; its signal handlers don't stay."""
    from src import run as command

    monkeypatch.setattr(command, "_errors", [])
    monkeypatch.setattr(sys, "argv", ["src.run", *arguments])
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # a signal puts another in its place
    try:
        return command.main()
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


Cli = Callable[..., tuple[int, str, str]]  # arguments → (exit status, stdout, stderr)


def call_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """Runs the command in this process; (exit status, stdout, stderr)."""
    status = run_command(monkeypatch, *arguments)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs the command in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return partial(call_command, monkeypatch, capsys)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def tiny() -> LoadedModel:
    """The random Llama of 4 blocks with one token a character."""
    return load_model(model_config(), quant_config())


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own."""
    folder = Path(tempfile.mkdtemp())
    monkeypatch.setenv("TLI_CACHE", str(folder))
    return folder
