"""A sweep as its folder tells it: the jobs, ranked, with p-values corrected for the number of tries."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.errors import UserError
from src.results import (
    FAILED,
    DamageError,
    claimed_split,
    read_document,
    read_results,
    read_table,
    specificity_pvalue,
)
from src.summary import SEEDS, counted_by
from src.tracking import public_uri

ROOT = Path(__file__).resolve().parents[1]
ALPHA = 0.05
MEASURES = {"csls_p_at_1": "retrieval (CSLS P@1)", "margin": "margin over mismatched pairs"}  # what runs are ranked by
CLAIMS = ("aligned", "drawn together")
FOR_ALIGNED = ("near", "left_out_specificity", "left_out_near")  # beyond specificity
Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Job:
    """One job of a sweep; `results` is empty and `problem` says why where it has none."""

    number: int
    folder: Path
    overrides: tuple[str, ...]
    status: str
    results: Mapping[str, Any] = field(default_factory=dict)
    layers: Rows = field(default_factory=list)
    problem: str = ""
    levels: Mapping[str, str] = field(default_factory=dict)  # of the swept parameters
    label: str = ""
    holm: float | None = None  # its control p-value among those of the sweep
    aligned_holm: float | None = None  # the same of what `aligned` asks beyond that

    @property
    def verdict(self) -> str:
        return self.results.get("verdict", "")

    @property
    def holds_as(self) -> Literal["aligned", "drawn together", ""]:
        """What the verdict claims once the sweep's other tries are allowed for; "" where it claims nothing."""
        if self.verdict not in CLAIMS or self.holm is None or self.holm >= ALPHA:
            return ""
        near = self.aligned_holm is not None and self.aligned_holm < ALPHA
        return "aligned" if self.verdict == "aligned" and near else "drawn together"

    @property
    def holds(self) -> bool:
        """Aligned or drawn together, and still so when the sweep's other tries are allowed for."""
        return self.holds_as != ""

    @property
    def by_pair(self) -> bool:
        """Whether an earlier version counted its pairs; now words are counted."""
        return counted_by(self.results) == "pair"

    @property
    def claimed(self) -> str:
        """The part of the control words that the verdict reads, as results.json names it."""
        return claimed_split(self.results, "control")

    def number_at(self, key: str) -> float | None:
        value = self.results.get(key)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    def gain(self, measure: str) -> float | None:
        """After less before, on the words never trained on."""
        before, after = (self.number_at(f"control/{measure}_{when}") for when in ("before", "after"))
        return None if before is None or after is None else after - before

    @property
    def pvalue(self) -> float | None:
        """Control's specificity."""
        return specificity_pvalue(self.results, "control")

    @property
    def aligned_pvalue(self) -> float | None:
        """The largest of the p-values that `aligned` rests on; of an earlier version's results, specificity's."""
        rest = (self.number_at(f"{self.claimed}/{name}_pvalue") for name in FOR_ALIGNED)
        return max((p for p in (self.pvalue, *rest) if p is not None), default=None)


@dataclass(frozen=True)
class Sweep:
    """A sweep: `ranked` are the jobs with results, best first; `notes` say what couldn't be read."""

    id: str
    folder: Path
    facts: dict[str, str]
    swept: tuple[str, ...]
    ranked: list[Job]
    others: list[Job]
    notes: list[str]

    @property
    def trained(self) -> list[Job]:
        return [job for job in self.ranked if job.holm is not None]

    @property
    def comparable(self) -> list[Job]:
        """The jobs that one table or figure may compare: all, or without those that an earlier version counted."""
        by_word = [job for job in self.ranked if not job.by_pair]
        return by_word or self.ranked

    @property
    def older(self) -> list[Job]:
        """The jobs that an earlier version counted, beside others that it didn't."""
        return [job for job in self.ranked if job.by_pair and self.unit == "word"]

    @property
    def unit(self) -> Literal["word", "pair"]:
        """What the retrieval of the comparable jobs counts."""
        return "pair" if self.comparable[0].by_pair else "word"

    @property
    def measures(self) -> dict[str, str]:
        """What the measures that runs are ranked by are called here."""
        return MEASURES | {"csls_p_at_1": f"retrieval (CSLS P@1 by {self.unit})"}

    @property
    def tries(self) -> int:
        """How many settings had their chance: those trained to the end, and those that a search has pruned."""
        return len(self.trained) + _pruned(self.others)


def find(wanted: str | None, root: Path) -> Path:
    """The folder of a sweep or a run: a path, an id below `root`, or the latest sweep. Raises UserError."""
    found = sorted({file.parent for pattern in ("*", "*/*") for file in root.glob(f"{pattern}/sweep.json")})
    if wanted is None:
        found = found or sorted({file.parent.parent for file in root.glob("*/*/*/results.json")})
        if not found:
            raise UserError(f"{root}: no sweeps yet; `python -m src.run -m lora.rank=4,16` makes one")
        return found[-1]
    for folder in (Path(wanted), root / wanted):
        if wanted and folder.is_dir():
            return folder
    latest = ", ".join(folder.relative_to(root).as_posix() for folder in found[:-4:-1])
    raise UserError(f"{wanted}: no such sweep or folder; {f'the latest are {latest}' if latest else 'there are none'}")


def read_sweep(folder: Path) -> Sweep:
    """Reads a sweep's folder, or a single run's as a sweep of one. Raises UserError where there is nothing to show."""
    notes: list[str] = []
    listed = _listed(folder, notes)
    entries = listed["jobs"] if listed else _entries(folder)
    jobs = [_read_job(folder, entry) for entry in entries]
    notes += [f"job {job.number}: {job.problem}" for job in jobs if job.problem and job.status in ("done", "damaged")]
    if not any(job.results for job in jobs):
        what = f"none of its {len(jobs)} jobs has results" if jobs else "holds no run and no sweep's jobs"
        raise UserError(f"{folder}: {what}" + next((f"; job {j.number}: {j.problem}" for j in jobs if j.problem), ""))
    listed_overrides = [entry.get("overrides") or () for entry in entries]
    settings = [_assigned((*job.overrides, *more)) for job, more in zip(jobs, listed_overrides, strict=True)]
    swept = _varied(jobs, settings, list((listed or {}).get("swept") or ()))
    jobs = [_named(job, setting, swept) for job, setting in zip(jobs, settings, strict=True)]
    others = [job for job in jobs if not job.results]
    parts = folder.resolve().parts
    below = parts[parts.index("multirun") + 1 :] if "multirun" in parts else parts[-1:]
    return Sweep(
        id=str((listed or {}).get("id") or "/".join(below)),
        folder=folder,
        facts=_facts(listed or {}, jobs),
        swept=swept,
        ranked=_ranked([job for job in jobs if job.results], _pruned(others)),
        others=others,
        notes=notes,
    )


def _listed(folder: Path, notes: list[str]) -> dict[str, Any] | None:
    try:
        return read_document(folder)
    except FileNotFoundError:
        return None
    except (OSError, DamageError) as error:
        notes.append(f"{error}: jobs were found by their folders")
        return None


def _entries(folder: Path) -> list[dict[str, Any]]:
    """The jobs of a folder without a list of them."""
    if (folder / "results.json").exists() or (folder / ".hydra").is_dir():
        return [{"number": 0, "folder": str(folder.resolve())}]
    names = (path.name for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())
    return [{"number": int(name), "folder": name} for name in sorted(names, key=int)]


def _read_job(sweep: Path, entry: Mapping[str, Any]) -> Job:
    number, named = entry["number"], str(entry.get("folder") or entry["number"])
    # The last is for a sweep that was copied here from another machine.
    places = [sweep / named, ROOT / named, sweep / str(number)]
    folder = next((place for place in places if place.is_dir()), places[0])
    job = Job(number, folder, _overrides(folder) or tuple(map(str, entry.get("overrides") or ())), "done")
    file = folder / "results.json"
    if not file.exists():
        status, error = str(entry.get("status") or "unfinished"), entry.get("error") or _failure(folder)
        return replace(job, status=status, problem=str(error or f"no results.json in {folder}"))
    try:
        results = _results(file, entry.get("config_hash"))
    except DamageError as error:
        return replace(job, status="damaged", problem=f"{folder}/{error}; run the job again")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        return replace(job, status="damaged", problem=f"{file} is damaged ({reason}); run the job again")
    try:
        return replace(job, results=results, layers=_layers(folder / "layers.csv"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return replace(job, results=results, problem=f"{folder / 'layers.csv'} is damaged ({error}): it has no curves")


def _results(file: Path, expected: str | None) -> dict[str, Any]:
    found = read_results(file.parent)
    if not isinstance(found["verdict"], str):
        raise ValueError("its verdict is no word")
    if not all(isinstance(found.get(key) or {}, dict) for key in ("params", "dataset")):
        raise ValueError("its params or dataset hold no keys")
    if expected not in (None, found.get("config_hash")):
        raise ValueError("it belongs to other settings than sweep.json says")
    return found


def _failure(folder: Path) -> str:
    """What ended a job, as it left it in its folder; a killed sweep never put it into sweep.json."""
    try:
        return str(json.loads((folder / FAILED).read_text(encoding="utf-8"))["error"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _layers(file: Path) -> Rows:
    """The rows of layers.csv that hold a number. Raises ValueError or KeyError for what isn't such a table."""
    rows = read_table(file)
    for row in rows:
        if row["layer"] != "final":
            int(row["layer"])
    return [row for row in rows if row["value"] and math.isfinite(float(row["value"]))]


def _overrides(folder: Path) -> tuple[str, ...]:
    try:
        found = OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "overrides.yaml"))
    except (OSError, ValueError, OmegaConfBaseException):
        return ()
    return tuple(map(str, found)) if isinstance(found, list) else ()


def _assigned(overrides: Iterable[str]) -> dict[str, str]:
    pairs = (override.lstrip("+").split("=", 1) for override in overrides if "=" in override)
    return dict(pairs)


def _varied(jobs: Sequence[Job], settings: Sequence[Mapping[str, str]], listed: Sequence[str]) -> tuple[str, ...]:
    """The parameters that the jobs don't agree on, seeds last: of those listed as swept or, without a list, of all."""
    keys = sorted(listed or dict.fromkeys(key for setting in settings for key in setting), key=SEEDS.__contains__)
    pairs = list(zip(jobs, settings, strict=True))
    return tuple(key for key in keys if len({_level(key, *pair) for pair in pairs}) > 1)


def _level(key: str, job: Job, setting: Mapping[str, str]) -> str:
    params = job.results.get("params") or {}
    return public_uri(setting.get(key) or str(params.get(key, "default")).replace(", ", ","))


def _named(job: Job, setting: Mapping[str, str], swept: Sequence[str]) -> Job:
    """The job with its levels of the swept parameters, and a name made of them."""
    levels = {key: _level(key, job, setting) for key in swept}
    label = named(levels, swept) or str(job.results.get("name", f"job {job.number}"))
    return replace(job, levels=levels, label=label)


def named(levels: Mapping[str, str], swept: Sequence[str]) -> str:
    """The levels with the last part of their keys, where that tells the swept parameters apart."""
    last = [key.rpartition(".")[2] for key in swept]
    short = {key: name if last.count(name) == 1 else key for key, name in zip(swept, last, strict=True)}
    return ", ".join(f"{short[key]} {level}" for key, level in levels.items())


def _pruned(others: Sequence[Job]) -> int:
    return sum(job.status == "pruned" for job in others)


def _ranked(jobs: Sequence[Job], pruned: int) -> list[Job]:
    """The jobs with Holm's p-values, best first: what holds, other claims, then by gains; the harmed last.

    A pruned job was given up for its control margin: a try like the others, with a p-value of 1. Jobs that an earlier
    version counted by pair come after all others.
    """
    from src.verdict import holm  # it imports torch, which --help needn't

    def adjusted(pvalues: Sequence[float | None]) -> list[float | None]:
        known = iter(holm([*(p for p in pvalues if p is not None), *[1.0] * pruned]))
        return [None if p is None else next(known) for p in pvalues]

    def place(job: Job) -> tuple[Any, ...]:
        gains = (job.gain(measure) for measure in MEASURES)
        losses = (math.inf if gain is None else -round(gain, 9) for gain in gains)
        holds = (*CLAIMS, "").index(job.holds_as)
        return job.by_pair, holds, ranks.get(job.verdict, 2), *losses, job.number

    ranks = {"aligned": 0, "drawn together": 1, "harmed": 3}
    found = zip(
        jobs, adjusted([job.pvalue for job in jobs]), adjusted([job.aligned_pvalue for job in jobs]), strict=True
    )
    return sorted((replace(job, holm=one, aligned_holm=other) for job, one, other in found), key=place)


def _facts(listed: Mapping[str, Any], jobs: Sequence[Job]) -> dict[str, str]:
    """What a reader must know of how the numbers were made; several values where the jobs differ."""
    done = [job.results for job in jobs if job.results]
    params = [found.get("params") or {} for found in done]
    words = [found.get("dataset") or {} for found in done]
    commits = (str(found.get("git_commit", "")) for found in done)
    facts = {
        "model": _joined(found.get("model.id") or found.get("model.name", "") for found in params),
        "words": _joined(
            f"{found.get('name')}, {found.get('languages')}: "
            f"{found.get('train')} train and {found.get('control')} control pairs"
            for found in words
            if found
        ),
        "measured at layer": _joined(found.get("eval.layer", "") for found in params),
        "started": str(listed.get("started") or "")[:16].replace("T", " "),
        "ended": str(listed.get("ended") or "")[:16].replace("T", " "),
        "code": _joined(commit[:12] + ("+changes" if commit.endswith("+changes") else "") for commit in commits),
        "command": public_uri(str(listed.get("command") or "")),
    }
    return {name: fact for name, fact in facts.items() if fact}


def _joined(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(str(value) for value in values if value and value != "null"))
