"""Whatever a later step reads is written under a temporary name, flushed and renamed: watched in a sweep at work.

Watched are the renames and what stands there at the end, so that files that a library writes are seen as well.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from src import models, report
from tests.conftest import run_command

SWEEP = (
    "-m", "model=tiny", "dataset.limit=40", "dataset.control_size=10", "train.epochs=1", "eval.permutations=99",
    "tracking=off", "eval.probes=false", "eval.measures=[pair_cosine,mismatched_cosine,margin,csls_p_at_1]",
    "train.learning_rate=1e-4,3e38",  # the second fails, and says so in its folder
)  # fmt: skip
# Written in place, and why that does no harm.
IN_PLACE = {
    "run.log": "a log grows line by line; nobody's numbers come from it",
    "config.yaml": "Hydra's, before the job begins; src.sync names one that was cut off",
    "hydra.yaml": "Hydra's",
    "overrides.yaml": "Hydra's",
    "multirun.yaml": "Hydra's",
    ".upload.lock": "empty",
}

State = tuple[int, int, int]


def state(file: Path) -> State:
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def files_in(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


class Watch:
    """Notes each flush and each rename of the process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flushed: set[Path] = set()
        self.renamed: dict[Path, State] = {}
        self.hasty: list[Path] = []  # renamed without a flush
        self._fsync, self._replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "replace", self.replace)

    def fsync(self, handle: int) -> None:
        self.flushed.add(Path(f"/proc/self/fd/{handle}").readlink())
        self._fsync(handle)

    def replace(self, source: Path, target: Path) -> None:
        found = files_in(Path(source)) if Path(target).suffix != ".pyc" else []  # Python's own
        self.hasty += [file for file in found if file.resolve() not in self.flushed]
        self._replace(source, target)
        self.renamed |= {file: state(file) for file in files_in(Path(target))}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files are Linux's")
def test_everything_that_is_read_later_was_renamed_into_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_held", {})  # or the model would not be made in this cache
    watch = Watch(monkeypatch)
    assert run_command(monkeypatch, *SWEEP, f"hydra.sweep.dir={tmp_path}/sweep") == 1
    assert report.main([str(tmp_path / "sweep")]) == 0
    capsys.readouterr()

    found = files_in(tmp_path / "sweep") + files_in(tmp_path / "cache")
    written = [file for file in found if file.name not in IN_PLACE and file.suffix != ".lock"]
    names = {file.name for file in written}
    assert names >= {
        "sweep.json", "results.json", "failed.json", "layers.csv", "pairs.csv", "training.csv", "scatter.png",
        "layers.png", "adapter_config.json", "adapter_model.safetensors", "model.safetensors", "tokenizer.json",
        "report.html",
    }  # fmt: skip
    assert {file.suffix for file in written} >= {".f32", ".sha256", ".json"}
    assert [file for file in written if watch.renamed.get(file) != state(file)] == []
    assert not [file for file in written if file.name.endswith(".tmp")]
    assert watch.hasty == []
