"""Planted models and words run nothing and reach no other folder, a password stays out, and an offline run is one."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from src import tracking
from src.errors import UserError
from src.models import LoadedModel, load_model
from tests.conftest import ROOT, free_port, model_config, quant_config, run_command

SECRET = "geh3imnis"
SMALL = (
    "model=tiny", "dataset.limit=40", "dataset.control_size=10", "train.epochs=1", "lora.layers=[1]",
    "eval.permutations=99", "eval.probes=false",
)  # fmt: skip

# Planted models ----------------------------------------------------------------------------------------------------


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def planted(tiny: LoadedModel, tmp_path: Path) -> Path:
    """The tiny model's folder, to be tampered with; whatever runs there makes tmp_path/ran."""
    folder = tmp_path / "model"
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return folder


def loaded(folder: Path, **values: object) -> LoadedModel:
    return load_model(model_config(source="hub", id=str(folder), n_layers=None, **values), quant_config())


def refusal(folder: Path, **values: object) -> str:
    with pytest.raises(UserError) as refused:
        loaded(folder, **values)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)
    return str(refused.value)


def plant_pickle(file: Path, mark: Path, **tensors: torch.Tensor) -> None:
    torch.save({"model.embed_tokens.weight": Touch(mark), **tensors}, file)


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_the_planted_pickle_would_run(tmp_path: Path) -> None:
    plant_pickle(tmp_path / "a.bin", tmp_path / "ran")
    torch.load(tmp_path / "a.bin", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_a_pickle_alone_is_refused(planted: Path, tmp_path: Path) -> None:
    (planted / "model.safetensors").unlink()
    plant_pickle(planted / "pytorch_model.bin", tmp_path / "ran")
    assert "holds no safetensors" in refusal(planted)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_beside_the_weights_is_left_alone(planted: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl"):
        plant_pickle(planted / name, tmp_path / "ran")
    assert loaded(planted).n_layers == 4
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_the_weights_clothes_is_refused(planted: Path, tmp_path: Path) -> None:
    plant_pickle(planted / "model.safetensors", tmp_path / "ran")
    assert "can't be loaded" in refusal(planted)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_does_not_run_even_where_pickles_are_allowed(planted: Path, tmp_path: Path) -> None:
    (planted / "model.safetensors").unlink()
    plant_pickle(planted / "pytorch_model.bin", tmp_path / "ran")
    assert "a pickle that wants to run code: not loaded" in refusal(planted, safetensors_only=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("shard", ["pytorch_model.bin", "../other.safetensors", "/other.safetensors"])
def test_an_index_that_points_elsewhere_is_refused(planted: Path, tmp_path: Path, shard: str) -> None:
    weights = planted / "model.safetensors"
    shutil.copy(weights, tmp_path / "other.safetensors")
    weights.rename(planted / "unused.safetensors")
    plant_pickle(planted / "pytorch_model.bin", tmp_path / "ran")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": shard}}
    (planted / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"names {shard!r}, no safetensors of this folder" in refusal(planted)
    (planted / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    assert "index.json can't be read" in refusal(planted)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["llama", "planted"])
def test_remote_code_is_not_run(planted: Path, tmp_path: Path, kind: str) -> None:
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nclass Model: ...\nclass Words: ...\n"
    (planted / "planted.py").write_text(code)
    model = {"AutoConfig": "planted.Model", "AutoModelForCausalLM": "planted.Model"}
    change(planted / "config.json", auto_map=model, model_type=kind)
    words = {"AutoTokenizer": ["planted.Words", "planted.Words"]}
    change(planted / "tokenizer_config.json", auto_map=words, tokenizer_class="Words")
    try:
        loaded(planted)
    except UserError as error:
        assert "can't be loaded" in str(error) and "\n" not in str(error)
    assert not (tmp_path / "ran").exists()


def test_an_adapter_leads_to_no_other_folder(planted: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(planted, other)
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(other), "r": 2, "target_modules": ["q_proj"]}
    (planted / "adapter_config.json").write_text(json.dumps(settings))
    assert "holds an adapter" in refusal(planted)


def test_an_adapters_link_to_another_place_is_not_uploaded(tmp_path: Path) -> None:
    from tests.test_tracking import job_folder

    uri = tracking.store_uri(None, tmp_path)
    tracking.check(uri, "tli")
    run_id = tracking.start(uri, "tli", name="a", params={}, tags={}, dataset=None, parent=None)
    folder = job_folder(tmp_path / "job", uri, run_id)
    (tmp_path / "private").write_text(SECRET)
    (folder / "adapter" / "README.md").symlink_to(tmp_path / "private")
    with pytest.raises(tracking.TrackingError, match=r"README\.md links to a file outside the job's folder"):
        tracking.upload(folder, run_id, uri)
    (tmp_path / "private").unlink()
    assert SECRET.encode() not in everything(tmp_path)


# The code itself ---------------------------------------------------------------------------------------------------


def test_the_code_reads_no_pickle_and_starts_no_shell() -> None:
    """Modules that unpickle, and calls that run text."""
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    calls = {"eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load", "os.system", "yaml.load"}
    for file in [*(ROOT / "src").glob("*.py"), *(ROOT / "hydra_plugins").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.names[0].name != "UnpicklingError":
                names.append(node.module or "")
            assert not {name.partition(".")[0] for name in names} & modules, file
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in calls, f"{file}:{node.lineno}"
                assert not [word for word in node.keywords if word.arg == "shell"], f"{file}:{node.lineno}"


# Passwords ---------------------------------------------------------------------------------------------------------


def everything(folder: Path) -> bytes:
    return b"\n".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


Cli = Callable[..., tuple[int, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs the command in this process, in a folder of its own: (exit status, all that it printed)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TLI_DEBUG", "")
    monkeypatch.setenv("TLI_CACHE", str(tmp_path / "cache"))

    def call(*arguments: str) -> tuple[int, str]:
        return run_command(monkeypatch, *arguments), "".join(capsys.readouterr())

    return call


@pytest.fixture
def server(tmp_path: Path) -> Iterator[int]:
    """The port of MLflow's server, as `python -m src.ui` starts it."""
    local = tracking.store_uri(None, tmp_path)
    tracking.check(local, "tli")
    port = free_port()
    words = [sys.executable, "-m", "src.ui", "--uri", local, "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and process.stdout.readline().startswith("http://127.0.0.1:")
            family = psutil.Process(process.pid).children(recursive=True)
            listening = [one for each in family for one in each.net_connections("inet") if one.status == "LISTEN"]
            assert {one.laddr.ip for one in listening} == {"127.0.0.1"}
            yield port
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=20)


def test_a_password_is_in_nothing_that_a_run_or_a_sweep_leaves(cli: Cli, server: int, tmp_path: Path) -> None:
    from src import report, sync

    uri = f"tracking.uri=http://anna:{SECRET}@127.0.0.1:{server}"
    status, printed = cli(*SMALL, "tracking=server", uri)
    assert status == 0, printed
    assert f"http://127.0.0.1:{server}/#/experiments" in printed
    status, also = cli("-m", *SMALL, "tracking=server", uri, "lora.rank=2,4", "lora.target_modules=[q_proj],[nosuch]")
    assert status == 1  # two of the jobs fail, so there are logs of failures, too
    assert report.main([]) == 0
    assert (tmp_path / "multirun").is_dir() and sync.main([str(tmp_path / "multirun")]) == 0
    settings = list(tmp_path.rglob(".hydra/*.yaml"))
    assert len(settings) == 15  # where a sweep's overrides are written, colons are escaped
    assert all(f"127.0.0.1:{server}" in file.read_text().replace("\\", "") for file in settings)
    assert SECRET.encode() not in everything(tmp_path)
    assert SECRET not in printed + also


@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=["", "debug"])
def test_a_password_is_in_nothing_that_a_refused_run_leaves(cli: Cli, tmp_path: Path, debug: list[str]) -> None:
    for host in (f"127.0.0.1:{free_port()}", "127.0.0.1:99999"):
        status, printed = cli(*SMALL, "tracking=server", f"tracking.uri=http://anna:{SECRET}@{host}", *debug)
        assert status == 2 and host in printed
        assert ("Traceback" in printed) == bool(debug)
        assert SECRET not in printed
    for uri in (f"ftp://anna:{SECRET}@host", f"[http://anna:{SECRET}@host]", f"${{nosuch:http://anna:{SECRET}@host}}"):
        status, printed = cli(*SMALL, f"tracking.uri={uri}", *debug)
        assert status == 2
        assert SECRET not in printed
    assert list(tmp_path.rglob("run.log"))
    assert SECRET.encode() not in everything(tmp_path)


# An offline run ----------------------------------------------------------------------------------------------------

GUARD = """
import os, sys
def guard(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.bind"):
        place = arguments[1]
        told = isinstance(place, tuple) and place[0] not in ("127.0.0.1", "::1", "localhost")
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        place = arguments[0]
        told = place not in ("127.0.0.1", "::1", "localhost", b"localhost", None)
    else:
        return
    if told:
        with open(os.environ["GUARDED"], "a") as file:
            file.write(f"{event} {place}\\n")
sys.addaudithook(guard)
"""
NASTY = (
    "../../../{}", "/tmp/{}", "..\\{}", "$(touch {})", "`touch {}`", "; touch {}", "<script>{}</script>",
    '"><img src=x onerror={}>', "=cmd|'/c {}'!A1", "{{{{{}}}}}", "CON {}", "${{oc.env:HOME}} {}", "-rf {}", "%2e%2f{}",
)  # fmt: skip


def in_no_network() -> list[str]:
    """The words that run a command in a network of its own, with nothing in it; none where that isn't allowed."""
    for words in (["unshare", "--net"], ["unshare", "--user", "--map-root-user", "--net"]):
        asked = [*words, "true"]
        if shutil.which("unshare") and subprocess.run(asked, capture_output=True, check=False).returncode == 0:
            return words
    return []  # the guard alone then


def test_an_offline_sweep_asks_nobody_and_stays_in_its_folder(tmp_path: Path) -> None:
    """Nasty words, a nasty model name and no network: the sweep is whole, and nothing is anywhere else."""
    home = tmp_path / "home" / "in" / "here"
    home.mkdir(parents=True)
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD)
    twos = list(zip(NASTY, reversed(NASTY), strict=True))
    pairs = [f"{left.format(i)}\t{right.format(i + 100)}\n" for i in range(3) for left, right in twos]
    (home / "words.tsv").write_text("".join(pairs))
    kept = {key: os.environ[key] for key in ("PATH", "LANG", "OMP_NUM_THREADS") if key in os.environ}
    environment = kept | {
        "PYTHONPATH": f"{tmp_path / 'guard'}:{ROOT}", "GUARDED": str(tmp_path / "guarded"), "HOME": str(home / "user"),
        "TMPDIR": str(tmp_path / "temporary"), "MPLCONFIGDIR": str(tmp_path / "temporary"),
    }  # fmt: skip
    (tmp_path / "temporary").mkdir()

    def call(module: str, *words: str) -> str:
        done = subprocess.run(
            [*in_no_network(), sys.executable, "-m", module, *words],
            cwd=home, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    check = "import socket\ntry: socket.create_connection(('192.0.2.1', 9), 0.1)\nexcept OSError: pass"
    subprocess.run([sys.executable, "-c", check], env=environment, check=True)
    assert "socket.connect ('192.0.2.1', 9)\n" in (tmp_path / "guarded").read_text()  # the guard sees what it should
    (tmp_path / "guarded").unlink()

    own = ["dataset=file", "dataset.path=words.tsv", "dataset.limit=null", "dataset.control_size=10"]
    own += ["model.name='../../x','<script>y'", f"tracking.uri=sqlite:///{home}/mlruns/mlflow.db"]
    own += ["tracking.experiment='.. a:b*?'"]
    call("src.run", "-m", *SMALL, *own)
    call("src.report")
    assert not (tmp_path / "guarded").exists(), (tmp_path / "guarded").read_text()

    assert {path.name for path in tmp_path.iterdir()} == {"home", "guard", "temporary"}
    assert {path.name for path in home.iterdir()} == {"words.tsv", "multirun", "mlruns", "user"}
    (swept,) = home.glob("multirun/*/*")
    assert {path.name for path in swept.iterdir()} == {
        "0", "1", "multirun.yaml", "sweep.json", "overview", "report.html"
    }  # fmt: skip
    assert {path.name for path in (home / "mlruns").iterdir()} <= {"mlflow.db", "mlflow.db.lock", "artifacts"}
    assert [path.name for path in (home / "mlruns" / "artifacts").iterdir()] == [".._a_b__"]
    page = (swept / "report.html").read_text()
    assert "<script>0" not in page and "<script>y" not in page and "<img src=x" not in page
    for file in (file for file in home.rglob("*") if file.is_file()):
        assert not is_pickle(file.read_bytes()), file


def is_pickle(content: bytes) -> bool:
    return content[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or b"/data.pkl" in content


def test_pickles_are_known() -> None:
    assert is_pickle(pickle.dumps({1: "a"})) and not is_pickle(b'{"a": 1}')
