"""How fast against what a user would write? `make bench`, or python -m bench.speed [--repeats 5] [--only train].

Prints medians and ratios, each measured side by side: peers and TLI Lab take turns within one process, on the same
words (SmolLM2-135M, float32). The loaded machine slows all of them, so read the ratios.
"""

# ruff: noqa: E402 (what is set here must be set before torch is imported)

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest.mock import patch

from src.process import wait_briefly

wait_briefly()
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from bench import peers
from bench.peers import Task
from bench.scale import cache_with_models
from src import below, study
from src.config import Config, read_config, register
from src.layers import Layer, blocks, encode, tokenize, tree_size
from src.linear import library, product
from src.machine import machine
from src.models import LoadedModel, _held, adapter, load_model
from src.packaged import packaged_folder
from src.pairs import read_words

ROOT = Path(__file__).parent.parent
Measured = dict[str, list[float]]
multiply = product if library() == "oneDNN" else torch.nn.functional.linear


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each (default 5)")
    parts = {"train": training, "encode": encoding, "rate": arithmetic, "sweep": sweep, "across": across}
    parts |= {"start": start, "nf4": nf4}
    parser.add_argument("--only", choices=parts, action="append", help="this part alone; may be repeated")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    threads = f"{torch.get_num_threads()} threads, GOMP_SPINCOUNT={os.environ.get('GOMP_SPINCOUNT', 'its own')}"
    libraries = f"torch {torch.__version__}, products by {library()}"
    print(f"{machine('cpu')['cpu']}, {threads}, {libraries}, medians of {arguments.repeats}", flush=True)
    for name, part in parts.items():
        if not arguments.only or name in arguments.only:
            print(f"\n## {name}\n", flush=True)
            part(arguments.repeats)


def take_turns(contenders: dict[str, Callable[[], Any]], repeats: int) -> Measured:
    """Seconds of each contender, `repeats` times, one after the other, after one call each that isn't timed."""
    seconds: Measured = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, contender in contenders.items():
            began = time.perf_counter()
            contender()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def table(seconds: Measured, ours: str) -> None:
    """Median, spread and, turn by turn, how many times as long as ours it took."""
    print("| | median, s | least … most | × ours |\n|---|---|---|---|")
    for name, values in seconds.items():
        ratio = median(value / own for value, own in zip(values, seconds[ours], strict=True))
        print(f"| {name} | {median(values):.2f} | {min(values):.2f} … {max(values):.2f} | {ratio:.2f} |", flush=True)


def setting(*overrides: str) -> Config:
    """The config of a run, composed as Hydra composes it."""
    from hydra import compose, initialize_config_dir

    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return read_config(compose("config", list(overrides)))


def prepared(config: Config) -> study.Study:
    return study.prepare(config, *read_words(config.dataset), load_model(config.model, config.quant))


def silent(items: Sequence[Any], _: str) -> Sequence[Any]:
    return items


# --- training -----------------------------------------------------------------------------------------------

LAYER_2 = Task(layers=(0, 1), read=2, loss="triplet")
LAYER_16 = Task(layers=(15,), read=16, loss="triplet")
OUTPUT = Task(layers=(0, 1, 2, 3), read=-1, loss="infonce", batch_size=64)
_SHARED = ("lora.dropout=0", "train.epochs=1")
AT_LAYER_2 = (*_SHARED, "lora.layers=[1,2]", "objective=triplet")
AT_LAYER_16 = (*_SHARED, "lora.layers=[16]", "objective=triplet")
AT_OUTPUT = (
    *_SHARED, "lora.layers=[1,2,3,4]", "objective=infonce", "objective.layer=final", "train.batch_size=64",
)  # fmt: skip


def training(repeats: int) -> None:
    """An epoch over the train split: triplets at layers 2 and 16, and early adapters with InfoNCE at the output."""
    for title, overrides, task in (
        ("Loss at layer 2, adapters in blocks 1 and 2, triplet, batch 16", AT_LAYER_2, LAYER_2),
        ("Loss at layer 16, adapter in block 16, triplet, batch 16", AT_LAYER_16, LAYER_16),
        ("Loss at the output, adapters in blocks 1 to 4, InfoNCE, batch 64", AT_OUTPUT, OUTPUT),
    ):
        _training(title, setting(*overrides), task, repeats)


def _training(title: str, config: Config, task: Task, repeats: int) -> None:
    folder = packaged_folder(str(config.model.id))
    it = prepared(config)
    pairs = [(pair.source, pair.target) for pair in it.words.train]
    losses: dict[str, list[float]] = {}
    adapted = task.adapted
    read = (task.read,) if task.read > 0 else ("final",)

    def ours(name: str = "TLI Lab") -> None:
        seconds, losses["ours"] = epoch(it, adapted, read)
        spent.setdefault(name, []).append(seconds)

    def ours_alone() -> None:
        below.kept.clear()
        ours()

    def script() -> None:
        model, tokenizer = peers.peft_model(folder, task)
        began = time.perf_counter()
        losses["script"] = peers.train_peft(model, tokenizer, pairs, task)
        spent["(a) PEFT script"].append(time.perf_counter() - began)

    def sentence(cut: Path) -> None:
        model = peers.sentence_transformer(cut, final_norm=task.read < 0)
        began = time.perf_counter()
        peers.train_sentence_transformer(model, pairs, task)
        spent["(b) sentence-transformers"].append(time.perf_counter() - began)

    # Loading the model and attaching the adapter aren't counted, so each takes its own time.
    spent: Measured = {"(a) PEFT script": [], "(b) sentence-transformers": [], "TLI Lab": []}
    tokens = _tokens_of_steps(it.loaded, ours)[-len(losses["ours"]) :]
    step = _products(it.loaded, task, round(mean(tokens)))
    with peers.cut_to(folder, task.read if task.read > 0 else it.loaded.n_layers) as cut:
        calls: dict[str, Callable[[], Any]] = {"a": script, "b": lambda: sentence(cut), "ours": ours_alone}
        if adapted[0] > 1:  # nothing is below block 1
            calls["again"] = lambda: ours("TLI Lab, a sweep's next rank")
        calls["products"] = lambda: [step() for _ in tokens]
        products = take_turns(calls, repeats)["products"]
    print(f"{title}; {len(pairs)} pairs, {sum(tokens)} tokens in {len(tokens)} steps\n")
    table({name: values[-repeats:] for name, values in spent.items()} | {"products alone": products}, "TLI Lab")
    apart = max(abs(a - b) for a, b in zip(losses["script"], losses["ours"], strict=True))
    print(f"\nLargest difference between (a)'s losses and ours over {len(losses['ours'])} steps: {apart:.1e}\n")


def epoch(it: study.Study, adapted: Sequence[int], read: tuple[Layer, ...]) -> tuple[float, list[float]]:
    """(seconds, losses) of our training; loading the model and attaching the adapter aren't counted."""
    words = [word for pair in it.words.train for word in (pair.source, pair.target)]
    with adapter(it.loaded.model, it.config.lora, adapted, seed=0) as model:
        began = time.perf_counter()
        tokenize(words, it.loaded.tokenizer)  # counted, as the peers do it in their loops
        known = study.run_below_adapter(it, adapted)
        losses, _ = study.train_adapter(it, model, read, known, silent)
        return time.perf_counter() - began, losses


def _tokens_of_steps(loaded: LoadedModel, call: Callable[[], Any]) -> list[int]:
    """How many tokens each forward of the call runs."""
    found: list[int] = []
    embeddings: Any = loaded.model.get_input_embeddings()
    hook = embeddings.register_forward_pre_hook(lambda _, args: found.append(args[0].numel()))
    call()
    hook.remove()
    return found


def _products(loaded: LoadedModel, task: Task, tokens: int) -> Callable[[], None]:
    """The matrix products of a training step over so many tokens, and nothing else: the floor.

    Forward from the first adapter to the layer of the loss; back, for activations alone, down to the first adapter.
    """
    stack = [
        [(name, weight.detach()) for name, weight in block.named_parameters() if weight.ndim == 2]
        for block in list(blocks(loaded.model))[task.layers[0] : task.read if task.read > 0 else None]
    ]
    forward = [weight for block in stack for _, weight in block]
    before = ("q_proj.weight", "k_proj.weight", "v_proj.weight")  # the first adapted block's input has no gradient
    first, *others = stack
    back = [weight for block in others for _, weight in block]
    back += [weight for name, weight in first if not name.endswith(before)]
    states = {width: torch.randn(tokens, width) for weight in forward for width in weight.shape}

    def step() -> None:
        for weight in forward:
            multiply(states[weight.shape[1]], weight)
        for weight in back:
            multiply(states[weight.shape[0]], weight.T)

    return step


# --- encoding -----------------------------------------------------------------------------------------------


def encoding(repeats: int) -> None:
    """All 1,372 words: at every layer, against (a)'s loop and against the final layer alone."""
    config = setting()
    it = prepared(config)
    words = [pair.source for pair in it.pairs] + [pair.target for pair in it.pairs]
    folder = packaged_folder(str(config.model.id))
    model, tokenizer = peers.peft_model(folder, LAYER_2)
    with peers.cut_to(folder, it.loaded.n_layers) as whole:
        sentence = peers.sentence_transformer(whole, final_norm=True)

    def ours() -> None:
        encode(it.loaded.model, tokenize(words, it.loaded.tokenizer))

    seconds = take_turns(
        {
            "(a) every layer, batches of 32": lambda: peers.encode_peft(model, tokenizer, words),
            "(c) sentence-transformers, the final layer alone": lambda: sentence.encode(words, batch_size=32),
            "TLI Lab, every layer": ours,
        },
        repeats,
    )
    table(seconds, "TLI Lab, every layer")


def arithmetic(repeats: int) -> None:
    """Encoding's share of the rate at which this machine multiplies matrices of the same shapes."""
    it = prepared(setting())
    distinct = list(dict.fromkeys(it.source + it.target))
    tokens = tree_size(distinct)  # what words share is run once, and padding is no work done
    weights = _matrices(it.loaded)
    work = 2 * sum(weight.numel() for weight in weights)  # operations a token
    inputs = {width: torch.randn(512, width) for width in {weight.shape[1] for weight in weights}}

    def products() -> None:
        for weight in weights:
            multiply(inputs[weight.shape[1]], weight)

    seconds = take_turns({"products alone": products, "encoding": lambda: encode(it.loaded.model, distinct)}, repeats)
    rates = [512 * work / value / 1e9 for value in seconds["products alone"]]
    reached = [tokens * work / value / 1e9 for value in seconds["encoding"]]
    share = median(own / most for own, most in zip(reached, rates, strict=True))
    print(f"{len(distinct)} distinct words, {tokens} tokens to run, {work / 1e6:.0f} million operations a token")
    print(f"matrix products of these shapes: {median(rates):.0f} GFLOP/s; encoding: {median(reached):.0f}; {share:.0%}")


def _matrices(loaded: LoadedModel) -> list[torch.Tensor]:
    return [weight.detach() for weight in blocks(loaded.model).parameters() if weight.ndim == 2]


# --- a sweep ------------------------------------------------------------------------------------------------

SWEPT = ("lora.layers=[1],[2],[1,2],[1,2,3]", "lora.rank=4,8,16")
ACROSS = ("lora.layers=[4],[10],[16],[22]", "lora.rank=4,8,16")
ARITHMETIC = "its training and its encoding"
PROCESSES = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


def sweep(repeats: int) -> None:
    """Twelve jobs of early layers × rank, in this process and in two, against twelve runs of (a)."""
    _swept(repeats, SWEPT, [1, 2], {"TLI Lab, 12 jobs": (), "TLI Lab, in two processes": PROCESSES})


def across(repeats: int) -> None:
    """The same across the model's depth: where do the languages meet?"""
    _swept(repeats, ACROSS, [16], {"TLI Lab, 12 jobs": ()})


def _swept(repeats: int, swept: Sequence[str], adapted: Sequence[int], ours: dict[str, tuple[str, ...]]) -> None:
    """A sweep through the real command, with (a)'s own evaluation of an adapter in the given blocks beside it.

    All begin with a converted model and nothing else in the cache.
    """
    script = [sys.executable, "-m", "bench.script", str(packaged_folder(str(setting().model.id))), *map(str, adapted)]
    seconds: Measured = {"(a) twelve runs (one timed, × 12)": []} | {name: [] for name in ours}
    parts: Measured = {}
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run(script, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        seconds["(a) twelve runs (one timed, × 12)"].append(12 * (time.perf_counter() - began))
        for name, launcher in ours.items():
            with tempfile.TemporaryDirectory() as place:
                began = time.perf_counter()
                _sweep(Path(place), [*swept, *launcher])
                seconds[name].append(time.perf_counter() - began)
                found = {"in two processes": _growth(Path(place))} if launcher else _marginal(Path(place))
                for part, value in found.items():
                    parts.setdefault(part, []).append(value)
    table(seconds, "TLI Lab, 12 jobs")
    print("\nA further job of the sweep in one process, and what one adds to the sweep in two:\n")
    table(parts, ARITHMETIC)


def _sweep(folder: Path, arguments: Sequence[str]) -> None:
    command = [sys.executable, "-m", "src.run", "-m", "eval.probes=false", *arguments]
    command += [f"tracking.uri=sqlite:///{folder}/mlruns/mlflow.db", f"hydra.sweep.dir={folder}/multirun/sweep"]
    environment = os.environ | {"TLI_CACHE": str(cache_with_models(folder))}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def _marginal(folder: Path) -> dict[str, float]:
    """Seconds from one job's results to the next one's, of their parts, and from results to the closed run."""
    jobs = sorted((folder / "multirun").rglob("results.json"), key=lambda file: file.stat().st_mtime)
    ends = [file.stat().st_mtime for file in jobs]
    found = [json.loads(file.read_text(encoding="utf-8")) for file in jobs]
    with closing(sqlite3.connect(folder / "mlruns" / "mlflow.db")) as database:
        closed = dict(database.execute("SELECT run_uuid, end_time / 1000.0 FROM runs"))
    whole = [after - before for before, after in itertools.pairwise(ends)]
    arithmetic = [job["time/train_s"] + job["time/encode_s"] for job in found[1:]]
    measuring = [job["time/measure_s"] for job in found[1:]]
    return {
        "a further job": median(whole),
        ARITHMETIC: median(arithmetic),
        "its measuring": median(measuring),
        "the rest": median(job - own - extra for job, own, extra in zip(whole, arithmetic, measuring, strict=True)),
        "of it MLflow": median(closed[job["mlflow_run_id"]] - end for job, end in zip(found, ends, strict=True)),
    }


def _growth(folder: Path) -> float:
    """Seconds by which each job beyond the first two, one a process, has made the sweep longer."""
    ends = sorted(file.stat().st_mtime for file in (folder / "multirun").rglob("results.json"))
    return (ends[-1] - ends[1]) / (len(ends) - 2)


def start(repeats: int) -> None:
    """What a user waits for before anything happens."""
    for flags in (("--help",), ("--cfg", "job")):
        command = [sys.executable, "-m", "src.run", *flags]
        values = take_turns(
            {"": lambda command=command: subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)},
            repeats,
        )[""]
        print(f"python -m src.run {' '.join(flags)}: {median(values):.2f} s")


QUANTS = {
    "none": ("quant=none",),
    "nf4": ("quant=nf4",),
    "nf4 in float32": ("quant=nf4", "quant.compute_dtype=float32"),
}


def nf4(repeats: int) -> None:
    """What 4-bit weights cost on a CPU: an epoch over 128 pairs, and the encoding of 256 words."""
    contenders: dict[str, Callable[[], Any]] = {}
    few = ("train.epochs=1", "dataset.limit=150", "dataset.control_size=22")
    reads: tuple[tuple[Layer, ...], ...] = ((2,), ("final",))
    for name, quant in QUANTS.items():
        it = prepared(setting(*quant, *few))
        for read in reads:
            contenders[f"train at {read[0]}, {name}"] = lambda it=it, read=read: epoch(it, [1, 2], read)
            if name != "none":
                each_time = f"train at {read[0]}, {name}, unpacked at each product"
                contenders[each_time] = lambda it=it, read=read: _epoch_of_packed(it, read)
        contenders[f"encode, {name}"] = lambda it=it: encode(it.loaded.model, [*it.source[:128], *it.target[:128]])
        _held.clear()  # the next model must not push this one out: both take turns
    seconds = take_turns(contenders, repeats)
    for part in ("train at 2", "train at final", "encode"):
        table({name: values for name, values in seconds.items() if name.startswith(part)}, f"{part}, none")
        print()


def _epoch_of_packed(it: study.Study, read: tuple[Layer, ...]) -> None:
    with patch.object(study, "unpacked", lambda *_: nullcontext()):
        epoch(it, [1, 2], read)


if __name__ == "__main__":
    main()
