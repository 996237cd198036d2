"""How a pilot grows with the word list: python -m bench.scale [1000 10000 100000] (the last takes half an hour).

Made-up words of syllables and affixes, SmolLM2-135M, every layer, the measures whose cost is linear in the words, and
with --retrieval all of them. The rest is above all pairs.csv: each pair's rank among all, at one layer. Memory is
the command's peak above that of a pilot over 20 pairs, which is the model's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from src.files import cache_dir

ROOT = Path(__file__).parent.parent
LINEAR = "eval.measures=[pair_cosine,mismatched_cosine,margin,centred_cosine]"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("sizes", nargs="*", type=int, default=[1_000, 10_000, 100_000], help="pairs")
    parser.add_argument("--retrieval", action="store_true", help="all measures, whose cost is quadratic in the words")
    arguments = parser.parse_args()
    measures = [] if arguments.retrieval else [LINEAR]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        cache_with_models(folder)
        _, floor = pilot(folder, 20, measures)
        print("| pairs | encode, s | measure, s | the rest, s | peak memory above the model's, MiB | vectors, MiB |")
        print("|---|---|---|---|---|---|")
        for size in arguments.sizes:
            results, peak = pilot(folder, size, measures)
            encode, measure = results["time/encode_s"], results["time/measure_s"]
            rest = results["time/total_s"] - encode - measure - results["time/load_s"]
            disk = sum(file.stat().st_size for file in (folder / "cache").rglob("*.f32")) >> 20
            print(f"| {size:,} | {encode:.1f} | {measure:.1f} | {rest:.1f} | {peak - floor} | {disk} |", flush=True)
            for file in (folder / "cache" / "encodings").iterdir():
                file.unlink()


def pilot(folder: Path, pairs: int, arguments: Sequence[str]) -> tuple[dict[str, float], int]:
    """(results of a pilot, the command's peak memory in MiB)."""
    words = folder / f"{pairs}.tsv"
    words.write_text("source\ttarget\n" + "".join(f"{a}\t{b}\n" for a, b in made_up(pairs)), encoding="utf-8")
    job = folder / str(pairs)
    command = [sys.executable, "-m", "src.run", "train=none", "tracking=off", "eval.probes=false", "dataset=file"]
    command += [f"dataset.path={words}", "dataset.control_size=10", f"hydra.run.dir={job}", *arguments]
    environment = os.environ | {"TLI_CACHE": str(folder / "cache")}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    peak, watched = 0, psutil.Process(process.pid)
    while process.poll() is None:
        peak = max(peak, watched.memory_info().rss)
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return json.loads((job / "results.json").read_text(encoding="utf-8")), peak >> 20


def cache_with_models(folder: Path) -> Path:
    """A new cache below the folder that has what was converted already and nothing else: that is not what is timed."""
    models = cache_dir() / "models"
    models.mkdir(parents=True, exist_ok=True)
    cache = folder / "cache"
    cache.mkdir()
    (cache / "models").symlink_to(models)
    return cache


def made_up(count: int) -> list[tuple[str, str]]:
    """Distinct words of two to four syllables, with the affixes of one language on the left and another's right."""
    rng = random.Random(0)
    syllables = [first + last for first, last in itertools.product("bdfgjklmnprstvwz", "aeiou")]
    seen: set[str] = set()
    while len(seen) < 2 * count:
        seen.add("".join(rng.choices(syllables, k=rng.choice((2, 3, 3, 4)))))
    stems = sorted(seen)
    rng.shuffle(stems)
    left, right = ("ku", "m", "wa", "ki", "", ""), ("", "", "s", "ing", "ed", "ly")
    return [(rng.choice(left) + a, b + rng.choice(right)) for a, b in zip(stems[:count], stems[count:], strict=True)]


if __name__ == "__main__":
    main()
