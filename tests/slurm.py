"""A real Slurm of one node for tests: munge, slurmctld and slurmd on loopback, in their own folder, ended by pid."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={control}
SlurmdPort={node}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why Slurm can't be started here; None where it can."""
    if absent := [program for program in PROGRAMS if not _program(program)]:
        return f"no {', '.join(absent)}: apt-get install munge slurmctld slurmd slurm-client (tests/debian.sh)"
    return "slurmctld and slurmd want to be root" if os.getuid() else None


@contextmanager
def slurm() -> Iterator[dict[str, str]]:
    """Yields the environment that makes sbatch and its like use this Slurm."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munge wants all to reach its socket
    for name in ("state", "spool"):
        (folder / name).mkdir()
    control, node = _free_ports(2)
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=host, control=control, node=node))
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    paths = {"socket": "munge.socket", "key-file": key.name, "pid-file": "munge.pid", "seed-file": "munge.seed",
             "log-file": "munge.log"}  # fmt: skip
    munge = ["--foreground", "--force", "--num-threads=2", *(f"--{key}={folder / name}" for key, name in paths.items())]
    try:
        with ExitStack() as daemons:
            for program, arguments in (("munged", munge), ("slurmctld", ["-D", "-i"]), ("slurmd", ["-D", "-N", host])):
                daemons.enter_context(_daemon(program, arguments, folder, environment))
            _wait_for("idle", ["sinfo", "-h", "-o", "%T"], environment, folder)
            try:
                yield environment
            finally:  # a job that outlived the daemons would stay for ever
                subprocess.run(["scancel", "--me"], env=environment, check=False)
                _wait_for("", ["squeue", "-h"], environment, folder)
    finally:
        shutil.rmtree(folder)


@contextmanager
def _daemon(program: str, arguments: list[str], folder: Path, environment: dict[str, str]) -> Iterator[None]:
    path = _program(program)
    assert path
    with (folder / f"{program}.out").open("wb") as log:
        process = subprocess.Popen([path, *arguments], env=environment, cwd=folder, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(wanted: str, command: list[str], environment: dict[str, str], folder: Path) -> None:
    limit = time.monotonic() + 60
    while True:
        asked = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if asked.returncode == 0 and asked.stdout.strip() == wanted:
            return
        if time.monotonic() > limit:
            logs = "\n".join(file.read_text(errors="replace")[-3000:] for file in folder.glob("*.out"))
            raise AssertionError(f"{command} says {asked.stdout} {asked.stderr} for a minute\n{logs}")
        time.sleep(0.2)


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")  # Debian's users lack it in their path


def _free_ports(count: int) -> list[int]:
    with ExitStack() as sockets:
        opened = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for one in opened:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in opened]
