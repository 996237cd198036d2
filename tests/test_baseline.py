"""What the untouched model gave is read back whole, made again where it is damaged, and streams to disk where large."""

from __future__ import annotations

import errno
import logging
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from filelock import FileLock

from src import baseline, vectors, workers
from src.baseline import baseline_encoding, baseline_values
from src.layers import encode, tokenize
from src.models import LoadedModel
from src.vectors import Vectors, encode_words
from tests.test_damage import cut, flip

WORDS = ["maji", "nyumba", "mti", "maji", "mwanamke"]


def whole(found: Vectors, n: int) -> torch.Tensor:
    return torch.stack([found.at(layer, slice(n)) for layer in range(len(found.array))])


def entry(folder: Path) -> Path:
    (file,) = (folder / "encodings").glob("*.f32")
    return file


def test_the_vectors_are_encodes_own_made_once_and_read_back(tiny: LoadedModel, own_cache: Path) -> None:
    prompts = tokenize(WORDS, tiny.tokenizer)
    expected = encode(tiny.model, prompts)
    for _ in range(2):
        assert torch.equal(whole(baseline_encoding(tiny, prompts), len(prompts)), expected)
    assert entry(own_cache).stat().st_size == expected[:, 1:].numel() * 4  # maji is stored once
    assert torch.equal(baseline_encoding(tiny, prompts).at(2, slice(1, 3)), expected[2, 1:3])


@pytest.mark.parametrize("damage", ["flip", "cut", "no digest"])
def test_a_damaged_entry_is_named_and_made_again(
    tiny: LoadedModel, own_cache: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    prompts = tokenize(WORDS, tiny.tokenizer)
    expected = whole(baseline_encoding(tiny, prompts), len(prompts))
    file = entry(own_cache)
    match damage:
        case "flip":
            data = bytearray(file.read_bytes())
            data[100] ^= 1
            file.write_bytes(data)
        case "cut":
            os.truncate(file, 1000)
        case "no digest":
            file.with_suffix(".sha256").unlink()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(whole(baseline_encoding(tiny, prompts), len(prompts)), expected)
    assert f"{file} is damaged" in caplog.text
    caplog.clear()
    baseline_encoding(tiny, prompts)
    assert not caplog.text


def test_any_flipped_bit_and_any_cut_is_noticed_and_made_again(
    tiny: LoadedModel, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts, chance = tokenize(WORDS, tiny.tokenizer), random.Random(0)
    expected = whole(baseline_encoding(tiny, prompts), len(prompts))
    file = entry(own_cache)
    for target in (file, file.with_suffix(".sha256")):
        content = target.read_bytes()
        for harm in (flip, cut) * 10:
            harm(target, chance)
            caplog.clear()
            assert torch.equal(whole(baseline_encoding(tiny, prompts), len(prompts)), expected)
            assert f"{file} is damaged (its digest differs): made again" in caplog.text
            assert target.read_bytes() == content

    made: list[int] = []
    values = [[1, "final", 0.1 + 0.2], [2, "größe", None]]

    def ask() -> object:
        return baseline_values("measures", tiny, "a", lambda: made.append(1) or values)

    assert ask() == values
    (file,) = (own_cache / "measures").glob("*.json")
    content = file.read_bytes()
    for harm in (flip, cut) * 100:
        file.write_bytes(content)
        harm(file, chance)
        caplog.clear()
        made.clear()
        assert ask() == values
        assert made == [1] * (f"{file} is damaged (" in caplog.text)  # else the change says the same, as 0.30 does
        assert made or harm is flip


def test_processes_that_ask_at_once_do_the_work_once(
    tiny: LoadedModel, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(
        baseline, "encode_words", lambda *args, **kwargs: made.append(1) or encode_words(*args, **kwargs)
    )
    prompts = tokenize(WORDS, tiny.tokenizer)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: whole(baseline_encoding(tiny, prompts), len(prompts)), range(4)))
    assert len(made) == 1
    assert all(torch.equal(other, found[0]) for other in found)
    assert {file.suffix for file in (own_cache / "encodings").iterdir()} == {".f32", ".sha256", ".lock"}

    def measured(_: int) -> object:
        return baseline_values("measures", tiny, "a", lambda: time.sleep(0.1) or made.append(1) or [1])

    made.clear()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(measured, range(4))) == [[1]] * 4
    assert made == [1]


def test_what_others_wait_for_has_their_threads(
    tiny: LoadedModel, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_cores", lambda: 8)
    threads = torch.get_num_threads()
    try:
        for own, others, all_of_them in ((1, "2", 2), (3, "2", 6), (3, "4", 8), (9, "2", 9), (2, None, 2)):
            monkeypatch.setenv(workers.WORKERS, others) if others else monkeypatch.delenv(workers.WORKERS, False)
            torch.set_num_threads(own)
            inputs = f"{own} {others}"
            assert baseline_values("measures", tiny, inputs, torch.get_num_threads) == all_of_them
            assert torch.get_num_threads() == own
            with FileLock(own_cache / ".threads.lock"):  # others wait for another
                assert baseline_values("measures", tiny, f"{inputs} again", torch.get_num_threads) == own
            if others == "2":  # a cache that can't be written keeps nobody waiting
                (own_cache / "probes").write_text("in the folder's place")
                assert baseline_values("probes", tiny, inputs, torch.get_num_threads) == own
    finally:
        torch.set_num_threads(threads)


def test_a_full_disk_costs_the_cache_and_not_the_run(
    tiny: LoadedModel, own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    prompts = tokenize(WORDS, tiny.tokenizer)
    assert torch.equal(whole(baseline_encoding(tiny, prompts), len(prompts)), encode(tiny.model, prompts))
    assert "its disk is full): not kept" in caplog.text
    assert not list((own_cache / "encodings").glob("*.tmp"))


def test_many_words_stream_through_a_file_and_not_through_memory(
    tiny: LoadedModel, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"{i:x}" for i in range(40_000)]
    prompts = tokenize(words, tiny.tokenizer)
    size = 6 * len(words) * 64 * 4  # 61 MB
    monkeypatch.setattr(vectors, "IN_MEMORY", size - 1)
    encode(tiny.model, prompts[:8000])  # whole batches, whose memory the allocator keeps
    before = psutil.Process().memory_info().rss
    found = encode_words(tiny.model, prompts)
    one = found.at(3, slice(None))
    assert psutil.Process().memory_info().rss - before < size * 0.7
    assert not list(own_cache.iterdir())  # the file has no name
    torch.testing.assert_close(one[777:779], encode(tiny.model, prompts[777:779], layers=[3])[0], atol=1e-5, rtol=0)


def test_values_are_kept_as_json_under_their_inputs(tiny: LoadedModel, own_cache: Path) -> None:
    made: list[str] = []

    def make(inputs: str) -> list[list[object]]:
        return baseline_values("measures", tiny, inputs, lambda: made.append(inputs) or [[1, "final", 0.1 + 0.2]])

    assert make("a") == make("a") == make("b") == [[1, "final", 0.1 + 0.2]]
    assert made == ["a", "b"]
    file = next((own_cache / "measures").glob("*.json"))
    file.write_text(file.read_text().replace("0.3", "0.4"))
    assert make("a") == make("b")
    assert len(made) == 3
