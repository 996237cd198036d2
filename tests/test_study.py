"""Layers are measured side by side, with the numbers that they have one after the other."""

import threading
from typing import Any

import pytest
import torch

from bench.speed import prepared, setting, silent
from src import measures, study
from src.study import Encoding, Study
from src.vectors import encode_words


@pytest.fixture(scope="module")
def encoded() -> tuple[Study, Encoding]:
    it = prepared(setting("model=tiny", "dataset.limit=80", "dataset.control_size=20"))
    return it, Encoding(encode_words(it.loaded.model, it.source + it.target), it)


@pytest.fixture
def measuring(monkeypatch):
    """Threads that measure from now on, and how many torch has for each."""
    seen: dict[int, int] = {}

    def measure(*arguments, **options):
        seen[threading.get_ident()] = torch.get_num_threads()
        return measures.measure(*arguments, **options)

    monkeypatch.setattr(study, "measure", measure)
    return seen


@pytest.fixture(autouse=True)
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    assert torch.get_num_threads() == 4
    torch.set_num_threads(before)


def test_layers_side_by_side_measure_as_one_after_the_other(encoded, measuring, monkeypatch):
    it, encoding = encoded
    together = study._measure_layers(it, encoding, "before", study.SPLITS, silent)
    assert set(measuring.values()) == {1}
    assert 1 < len(measuring) <= 4
    measuring.clear()
    monkeypatch.setattr(study, "MEASURING", 0)
    in_turn = study._measure_layers(it, encoding, "before", study.SPLITS, silent)
    assert list(measuring.values()) == [4]
    assert [row[:4] for row in together] == [row[:4] for row in in_turn]
    assert [row[4] for row in together] == pytest.approx([row[4] for row in in_turn], abs=1e-6)
    layers = list(dict.fromkeys(row[0] for row in together))
    assert layers == it.layers
    assert study._measure_layers(it, encoding, "before", study.SPLITS, silent, 2) == [
        row for row in together if row[0] in layers[2:]
    ]


def test_no_more_layers_at_once_than_there_is_room_for(encoded, measuring, monkeypatch):
    it, encoding = encoded
    monkeypatch.setattr(study, "MEASURING", int(2.5 * measures.bytes_held(len(it.pairs), 64)))
    study._measure_layers(it, encoding, "before", study.SPLITS, silent)
    assert len(measuring) <= 2
    assert set(measuring.values()) == {2}


def test_what_one_layer_raises_ends_the_others(encoded, monkeypatch):
    it, encoding = encoded
    calls = []

    def fail(*_arguments, **_options):
        calls.append(1)
        raise MemoryError

    monkeypatch.setattr(study, "MEASURING", 0)
    monkeypatch.setattr(study, "measure", fail)
    with pytest.raises(MemoryError):
        study._measure_layers(it, encoding, "before", study.SPLITS, silent)
    assert len(calls) < len(it.layers)
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("block", [measures.BLOCK, 2**16])
@pytest.mark.parametrize(("n", "d"), [(10, 64), (40, 64), (300, 64), (1500, 8), (100, 101)])
def test_measuring_takes_no_more_memory_than_is_said(monkeypatch, n, d, block):
    """Nor much less; counted by torch's own allocator, from which LAPACK has its memory, too."""
    monkeypatch.setattr(measures, "BLOCK", block)
    draw = torch.Generator().manual_seed(n)
    source, target = (torch.nn.functional.normalize(torch.randn(n, d, generator=draw), dim=1) for _ in range(2))
    with torch.profiler.profile(profile_memory=True) as profiler:
        measures.measure(source, target, torch.arange(n)[:, None], fitted_on=(source, target))
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    held = peak = 0
    events: list[Any] = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0.3 * measures.bytes_held(n, d) < peak + source.nbytes + target.nbytes <= measures.bytes_held(n, d)
