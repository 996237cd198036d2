"""How often does the verdict fool itself? PYTHONPATH=. python bench/calibration.py [runs] (1,000 take some 10 minutes).

Simulates whole runs: the vectors of 623 train and 63 control pairs, before and after, go through gather_evidence and
judge. A word's vector is its pair's concept, a part of its own (at right angles, so that moving it leaves the expected
cosines exactly alone) and a direction common to all words, normalised.
"""

from __future__ import annotations

import multiprocessing
import sys
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import torch
from scipy import stats

import src.evidence
from src.evidence import SplitEvidence, Verdict, gather_evidence, judge

WIDTH = 64  # of the concept, and of the own part
CONCEPT = 0.4  # share of a word's squared length that it has in common with its translation
LABELS = ("aligned", "memorised", "inflated", "harmed", "none")


@dataclass(frozen=True)
class Change:
    """What training does to the words of one split; the defaults move their own parts at random and nothing else."""

    moved: float = 0.3  # share of a word's own part that is drawn anew
    uneven: bool = False  # a few pairs move much, both words alike, and most hardly
    concept: float = 0.0  # squared length that goes from the own part to the concept: real alignment
    lift: float = 0.0  # squared length that goes from the own part to one common direction: all cosines rise by it
    common: tuple[float, float] = (0.0, 0.0)  # strength of the common direction before, after, in inner lengths
    length: float = 0.0  # by how much that strength varies among pairs, as an attention sink's does with word length
    clusters: bool = (
        False  # half of the pairs come in threes that share the source word and have near-synonyms as targets
    )
    map: float = 0.0  # size of a random linear map that moves all vectors


@dataclass(frozen=True)
class Scenario:
    name: str
    control: Change
    train: Change | None = None  # None: the same as control


@dataclass(frozen=True)
class Outcome:
    label: str
    train_t: float  # the paper's test
    control_t: float
    bare_p: float  # permutation of the bare mean gain


SINK = Change(common=(30, 30), length=0.5, uneven=True)


def scenarios() -> list[Scenario]:
    real = Change(concept=planted(0.5, Change()))
    real_at_sink = replace(SINK, concept=planted(0.5, SINK))
    return [
        Scenario("all cosines rise alike", Change(lift=0.3)),
        Scenario("the same, uneven moves", Change(lift=0.3, uneven=True)),
        Scenario("random moves", Change()),
        Scenario("random moves, uneven", Change(uneven=True)),
        Scenario("train pairs memorised", Change(), Change(concept=0.15)),
        Scenario("all cosines spread out", Change(common=(2, 1))),
        Scenario("all cosines squeezed", Change(common=(1, 2))),
        Scenario("all rise, words shared", Change(lift=0.3, clusters=True)),
        Scenario("sink (cosines 0.999): all rise", replace(SINK, common=(30, 40))),
        Scenario("sink: all spread out", replace(SINK, common=(30, 24))),
        Scenario("sink: random moves", SINK),
        Scenario("sink: train memorised", SINK, replace(SINK, concept=0.15)),
        Scenario("true effect, d_z = 0.5", real),
        Scenario("sink: true effect, d_z = 0.5", real_at_sink),
        Scenario("random linear map", Change(moved=0, map=0.3)),
    ]


def vectors(
    rng: np.random.Generator, n: int, change: Change, linear: np.ndarray
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Source and target before, source and target after, and the relevance matrix of one split."""
    group = np.arange(n)
    if change.clusters:
        group[: n // 2] = np.arange(n // 2) // 3
    concept, own_source, noise_source = (units(rng, n)[group] for _ in range(3))
    own_target, noise_target = (units(rng, n), units(rng, n))
    if change.clusters:
        own_target, noise_target = (unit(2 * units(rng, n)[group] + each) for each in (own_target, noise_target))
    moved = np.full((n, 1), change.moved)
    if change.uneven:
        moved = np.clip(0.05 * np.exp(1.5 * rng.normal(size=(n, 1))), 0, 0.9)
    length = np.exp(change.length * rng.normal(size=(n, 1)))
    before, after = [], []
    for own, noise in ((own_source, noise_source), (own_target, noise_target)):
        lengths = length * np.exp(change.length / 2 * rng.normal(size=(n, 1)))
        parts = [np.sqrt(CONCEPT) * concept, np.sqrt(1 - CONCEPT) * own, 0 * length, change.common[0] * lengths]
        before.append(unit(np.hstack(parts)))
        if change.map:
            after.append(unit(before[-1] + change.map * before[-1] @ linear))
            continue
        own = unit(np.sqrt(1 - moved) * own + np.sqrt(moved) * noise)
        rest = 1 - CONCEPT - change.concept - change.lift
        parts = [np.sqrt(CONCEPT + change.concept) * concept, np.sqrt(rest) * own]
        after.append(unit(np.hstack([*parts, np.sqrt(change.lift) + 0 * length, change.common[1] * lengths])))
    mates = range(-2, 3) if change.clusters else [0]  # members of a group stand side by side
    relevant = np.stack([np.arange(n) + step for step in mates], axis=1)
    within = (relevant >= 0) & (relevant < n)
    relevant[~within | (group[relevant.clip(0, n - 1)] != group[:, None])] = -1
    return [torch.from_numpy(each.astype(np.float32)) for each in before + after], torch.from_numpy(relevant)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def units(rng: np.random.Generator, n: int) -> np.ndarray:
    return unit(rng.normal(size=(n, WIDTH)))


@cache
def planted(effect: float, change: Change) -> float:
    """The squared length to move into the concept so that the specific gain has this Cohen's d_z, by bisection."""
    low, high = 0.0, 0.3
    for _ in range(12):
        middle = (low + high) / 2
        sides, _ = vectors(np.random.default_rng(1), 5_000, replace(change, concept=middle), np.zeros(0))
        a, b, c, d = (side.double().numpy() for side in sides)
        gains = specific(c, d) - specific(a, b)
        low, high = (middle, high) if gains.mean() / gains.std() < effect else (low, middle)
    return low


def specific(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Each pair's cosine less its words' mean cosines with all others: the diagonal of S, double-centred."""
    return np.einsum("ij,ij->i", source - source.mean(0), target - target.mean(0))


def simulate(
    scenario: Scenario, seed: int, *, pairs: tuple[int, int] = (623, 63), permutations: int = 1_000
) -> Outcome:
    """One run of a scenario."""
    rng = np.random.default_rng(seed)
    linear = rng.normal(size=(2 * WIDTH + 2, 2 * WIDTH + 2)) / np.sqrt(2 * WIDTH)
    train, _ = evidence(rng, pairs[0], scenario.train or scenario.control, linear, permutations)
    control, bare_p = evidence(rng, pairs[1], scenario.control, linear, permutations)
    verdict: Verdict = judge(train, control, perplexity_increase=None, max_perplexity_increase=0.1)
    return Outcome(verdict.label, train.t_pvalue, control.t_pvalue, bare_p)


def evidence(
    rng: np.random.Generator, n: int, change: Change, linear: np.ndarray, permutations: int
) -> tuple[SplitEvidence, float]:
    sides, relevant = vectors(rng, n, change, linear)
    seed = int(rng.integers(2**31))
    a, b, c, d = sides
    found, result = gather_evidence(a, b, c, d, relevant, permutations=permutations, seed=seed)
    return found, (1 + int((result.null >= result.gain).sum())) / (1 + permutations)


def prepare_worker() -> None:
    torch.set_num_threads(1)  # one process per core is faster
    src.evidence.RESAMPLES = 100  # no verdict reads the bootstrap interval, and it takes a third of the time


def interval(count: int, runs: int) -> str:
    found = stats.binomtest(count, runs).proportion_ci()
    return f"{count / runs:.1%} ({found.low:.1%} to {found.high:.1%})"


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000
    print(f"{runs} runs each, 623 train and 63 control pairs, 1,000 permutations; 95 % intervals\n")
    print(
        "| scenario | aligned | "
        + " | ".join(LABELS[1:])
        + " | train t-test p < 1e-50 | control t-test p < 0.05 | control, bare permutation p < 0.05 |"
    )
    print("|---|" + "---|" * (len(LABELS) + 3))
    with multiprocessing.get_context("spawn").Pool(2, prepare_worker) as pool:
        for scenario in scenarios():
            found = pool.map(partial(simulate, scenario), range(runs), chunksize=10)
            labels = [outcome.label for outcome in found]
            cells = [interval(labels.count("aligned"), runs)] + [
                f"{labels.count(label) / runs:.1%}" for label in LABELS[1:]
            ]
            cells += [f"{np.mean([outcome.train_t < 1e-50 for outcome in found]):.1%}"]
            cells += [f"{np.mean([outcome.control_t < 0.05 for outcome in found]):.1%}"]
            cells += [f"{np.mean([outcome.bare_p < 0.05 for outcome in found]):.1%}"]
            print(f"| {scenario.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
