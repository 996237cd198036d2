"""How often does the verdict fool itself? `python -m bench.calibration [runs]`, 1,000 by default.

Simulates whole runs: the vectors and spellings of a train and a control split, before and after (bench/nulls.py), go
through gather_evidence and judge, as a run's do.
"""

from __future__ import annotations

import multiprocessing
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import stats

import src.paired
from bench.nulls import (
    SINK,
    Change,
    Simulated,
    Split,
    by_spelling,
    hubs,
    moved,
    nuisance_shrinks,
    planted,
    spelt,
    to_class_means,
    unit,
)
from src.evidence import gather_evidence, judge
from src.spelling import LOOK_ALIKE, word_similarity

LABELS = ("aligned", "drawn together", "memorised", "inflated", "harmed", "none")
PAIRS = (200, 63)  # trained, control


@dataclass(frozen=True)
class Scenario:
    """What training does to the control words, and to the trained ones where that is something else."""

    name: str
    control: Split
    train: Split | None = None
    pairs: tuple[int, int] = PAIRS


@dataclass(frozen=True)
class Outcome:
    label: str
    train_t: float  # the paper's test
    control_t: float
    mcnemar: float


def scenarios() -> list[Scenario]:
    """Nothing happened to translations; something did to a few; something did to all."""
    real = Change(concept=planted(0.5, Change()))
    real_at_sink = replace(SINK, concept=planted(0.5, SINK))
    weak = moved(Change(concept=planted(0.2, Change())))
    return [
        Scenario("all cosines rise alike", moved(Change(lift=0.3))),
        Scenario("the same, uneven moves", moved(Change(lift=0.3, uneven=True))),
        Scenario("random moves", moved(Change())),
        Scenario("random moves, uneven", moved(Change(uneven=True))),
        Scenario("random linear map", moved(Change(moved=0, map=0.3))),
        Scenario("train pairs memorised", moved(Change()), moved(Change(concept=0.15))),
        Scenario("all cosines spread out", moved(Change(common=(2, 1)))),
        Scenario("all cosines squeezed", moved(Change(common=(1, 2)))),
        Scenario("sink (cosines 0.999): all rise", moved(replace(SINK, common=(30, 40)))),
        Scenario("sink: all spread out", moved(replace(SINK, common=(30, 24)))),
        Scenario("sink: random moves", moved(SINK)),
        Scenario("sink: train memorised", moved(SINK), moved(replace(SINK, concept=0.15))),
        # several translations a word
        Scenario("all rise, words shared", moved(Change(lift=0.3, clusters=True))),
        Scenario("random moves, 3 translations a word", moved(Change(translations=3)), pairs=(600, 400)),
        Scenario("all rise, 3 translations a word", moved(Change(lift=0.3, translations=3)), pairs=(600, 400)),
        # what near words have in common
        Scenario("to the means of classes of 5", to_class_means(5, step=0.2, visible=0.4)),
        Scenario("the same, classes hidden before", to_class_means(5, step=0.5, visible=0.0)),
        Scenario("to the means of classes of n/4", to_class_means(0.25, step=0.2, visible=0.4)),
        Scenario("the same, classes hidden before", to_class_means(0.25, step=0.5, visible=0.0)),
        Scenario("10 % become hubs", hubs(0.1, step=0.5)),
        Scenario("10 % become strong hubs", hubs(0.1, step=2.0)),
        Scenario("a nuisance that pairs share shrinks", nuisance_shrinks(shared=True)),
        Scenario("to the spelling, no look-alikes", by_spelling(0.3, alike=0.0)),
        Scenario("to the spelling, a third look-alikes", by_spelling(0.3, alike=1 / 3), pairs=(200, 150)),
        # a few words alone
        Scenario("3 of 63 pairs aligned", moved(Change(concept=0.4, only=3))),
        Scenario("6 of 63 pairs aligned", moved(Change(concept=0.4, only=6))),
        # sizes
        *(Scenario(f"random moves, {n} control pairs", moved(Change()), pairs=(200, n)) for n in (10, 20, 40)),
        Scenario("the same weak effect, 623 and 63 pairs", weak, pairs=(623, 63)),
        Scenario("the same weak effect, 63 and 400 pairs", weak, pairs=(63, 400)),
        # translations did move
        Scenario("true effect, d_z = 0.5", moved(real)),
        Scenario("the same, a third look-alikes", spelt(moved(real), 1 / 3), pairs=(200, 95)),
        *(Scenario(f"the same, {n} control pairs", moved(real), pairs=(200, n)) for n in (10, 20, 40, 126)),
        Scenario("true effect, d_z = 0.8", moved(Change(concept=planted(0.8, Change())))),
        Scenario("sink: true effect, d_z = 0.5", moved(real_at_sink)),
        Scenario("each word's own nuisance shrinks", nuisance_shrinks(shared=False)),
    ]


def simulate(
    scenario: Scenario, seed: int, *, pairs: tuple[int, int] | None = None, permutations: int = 1_000
) -> Outcome:
    """One run of a scenario."""
    rng = np.random.default_rng(seed)
    n_train, n_control = pairs or scenario.pairs
    trained, unseen = (scenario.train or scenario.control)(rng, n_train), scenario.control(rng, n_control)
    how: dict[str, Any] = {"permutations": permutations, "seed": int(rng.integers(2**31))}
    untouched: dict[str, Any] = {"spellings": unseen.spellings, "best_layer": _another_layer(rng, unseen)}
    # no claim rests on the near words of trained pairs, and their spelling takes half of the time
    train, _ = gather_evidence(*trained.vectors, trained.relevant, **how)
    control, _ = gather_evidence(*unseen.vectors, unseen.relevant, **how, **untouched)
    alike = word_similarity(unseen.spellings) >= LOOK_ALIKE
    unalike = control
    if alike.any():
        unalike, _ = gather_evidence(*unseen.vectors, unseen.relevant, **how, **untouched, among=~alike)
    verdict = judge(train, control, perplexity_increase=None, max_perplexity_increase=0.1, unalike=unalike)
    return Outcome(verdict.label, train.t_pvalue, control.t_pvalue, control.mcnemar_pvalue)


def _another_layer(rng: np.random.Generator, split: Simulated) -> tuple[torch.Tensor, torch.Tensor]:
    """What another layer of the untouched model makes of the words: much the same."""
    source, target = (
        torch.from_numpy(unit(side.numpy() + 0.5 * unit(rng.normal(size=side.shape))).astype(np.float32))
        for side in split.vectors[:2]
    )
    return source, target


def prepare_worker() -> None:
    torch.set_num_threads(1)  # one process per core is faster
    src.paired.RESAMPLES = 100  # no verdict reads the bootstrap interval, and it takes most of the time


def interval(count: int, runs: int) -> str:
    found = stats.binomtest(count, runs).proportion_ci()
    return f"{count / runs:.1%} ({found.low:.1%} to {found.high:.1%})"


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000
    print(
        f"{runs} runs each, {PAIRS[0]} train and {PAIRS[1]} control pairs unless said otherwise, 1,000 permutations\n"
    )
    tests = ("train t-test p < 1e-50", "control t-test p < 0.05", "McNemar p < 0.05")
    print(f"| scenario | {' | '.join((*LABELS, *tests))} |")
    print("|---|" + "---|" * (len(LABELS) + len(tests)))
    with multiprocessing.get_context("spawn").Pool(2, prepare_worker) as pool:
        for number, scenario in enumerate(scenarios()):
            found = pool.map(partial(_numbered, number), range(runs), chunksize=10)
            labels = [outcome.label for outcome in found]
            cells = [interval(labels.count("aligned"), runs)]
            cells += [f"{labels.count(label) / runs:.1%}" for label in LABELS[1:]]
            cells += [f"{np.mean([outcome.train_t < 1e-50 for outcome in found]):.1%}"]
            cells += [f"{np.mean([outcome.control_t < 0.05 for outcome in found]):.1%}"]
            cells += [f"{np.mean([outcome.mcnemar < 0.05 for outcome in found]):.1%}"]
            print(f"| {scenario.name} | {' | '.join(cells)} |", flush=True)


def _numbered(number: int, seed: int) -> Outcome:
    """A scenario by its number: what it is made of can't be sent to another process."""
    return simulate(scenarios()[number], seed)


if __name__ == "__main__":
    main()
