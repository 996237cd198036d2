"""The steps of a run: words become prompts, prompts vectors, vectors measures, evidence and a verdict."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from src import console
from src.baseline import baseline_encoding, baseline_values, encoding_key
from src.below import run_below
from src.config import Config, config_hash, inputs_digest, params, resolve_layers, run_name
from src.errors import NumbersError, UserError
from src.finite import check_weights, likely_cause
from src.layers import Below, Layer, Progress, Prompt, all_layers, encode, tokenize, width
from src.leakage import find_leakage, warnings
from src.machine import git_changes, git_commit, machine, versions
from src.measures import bytes_held, measure, pair_cosines, retrieval_ranks
from src.memory import halved
from src.models import LoadedModel, unpacked
from src.pairs import Lexicon, Pair, Split, relevant
from src.probes import (
    FEWEST_TOKENS,
    perplexity_change,
    perplexity_of,
    token_log_probabilities,
    translation_accuracy,
)
from src.results import RESULTS_VERSION
from src.tracking import public_uri
from src.training import Objective, Schedule, train
from src.vectors import Vectors, encode_words

Stage = Literal["pilot", "before", "after"]
SplitName = Literal["all", "train", "control"]
SPLITS: tuple[SplitName, ...] = ("train", "control")
LayerRow = tuple[Layer, Stage, SplitName, str, float]

log = logging.getLogger(__name__)
TEXTS = Path(__file__).parent.parent / "data" / "text"
MEASURING = 2**30  # bytes that layers measured side by side may take beyond the vectors
EXAMPLES = 5  # solved translations in the prompt of the word translation probe


@dataclass(frozen=True)
class Study:
    """What a run works on: a model, and pairs as its prompts, the train split's first."""

    config: Config
    loaded: LoadedModel
    lexicon: Lexicon
    words: Split
    source: list[Prompt]
    target: list[Prompt]

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return self.words.train + self.words.control

    @property
    def layers(self) -> list[Layer]:
        return all_layers(self.loaded.n_layers)

    @property
    def eval_index(self) -> int:
        return self.layers.index(self.config.eval.layer)

    def rows(self, split: SplitName) -> slice:
        n_train = len(self.words.train)
        return {"all": slice(None), "train": slice(n_train), "control": slice(n_train, None)}[split]

    def relevant(self, split: SplitName) -> Tensor:
        return torch.from_numpy(relevant(self.pairs[self.rows(split)], self.lexicon.pairs))


@dataclass(frozen=True)
class Encoding:
    """Unit vectors of all pairs at all layers: the sources', then the targets'."""

    vectors: Vectors
    study: Study

    def at(self, layer_index: int, rows: slice) -> tuple[Tensor, Tensor]:
        """(source, target) of some of the pairs at one layer."""
        n = len(self.study.pairs)
        start, stop, _ = rows.indices(n)
        source, target = (self.vectors.at(layer_index, slice(start + at, stop + at)) for at in (0, n))
        return source, target


def prepare(config: Config, lexicon: Lexicon, words: Split, loaded: LoadedModel) -> Study:
    """Tokenizes the pairs and checks the layers against the model. Raises UserError for what doesn't fit it."""
    if "auto" not in (config.lora.layers, config.objective.layer):
        resolve_layers(config, loaded.n_layers)
    how: dict[str, Any] = {
        "template": config.eval.template,
        "pooling": config.eval.pooling,
        "exclude_bos": config.eval.exclude_bos,
    }
    pairs = words.train + words.control
    source = tokenize([pair.source for pair in pairs], loaded.tokenizer, **how)
    target = tokenize([pair.target for pair in pairs], loaded.tokenizer, **how)
    return Study(config, loaded, lexicon, words, source, target)


def describe(study: Study) -> dict[str, Any]:
    """What names a run and its input, ahead of any number."""
    config, lexicon = study.config, study.lexicon
    return {
        "name": run_name(config),
        "results_version": RESULTS_VERSION,
        "config_hash": config_hash(config),
        "inputs_digest": inputs_digest(config),
        "params": _params(study),
        "model_revision": study.loaded.revision,
        "model_digest": study.loaded.contents,
        "dataset": {
            "name": config.dataset.pair or Path(lexicon.origin).stem,
            "digest": lexicon.digest,
            "source": lexicon.origin,
            "languages": f"{lexicon.source_language}-{lexicon.target_language}",
            "train": str(len(study.words.train)),
            "control": str(len(study.words.control)),
        },
        "versions": versions(),
        "git_commit": git_commit(),
        "git_changes": git_changes(),
        "machine": machine(str(study.loaded.model.device)),
    }


def report_leakage(study: Study, *, aloud: bool) -> dict[str, int]:
    """Counts what the split can't keep apart; the log says it in words, and so does the terminal if asked."""
    leakage = find_leakage(study.words.train, study.words.control)
    for line in warnings(leakage):
        log.warning("%s", line)
        if aloud:
            console.warn(line)
    return {f"leakage/{kind}": count for kind, count in leakage.counts().items()}


def _params(study: Study) -> dict[str, str]:
    return {key: public_uri(value) for key, value in params(study.config, study.loaded.n_layers).items()}


# --- measuring ----------------------------------------------------------------------------------------------


def encode_before(study: Study, progress: Progress) -> Encoding:
    """The untouched model's vectors, from the cache where an earlier run made them, once its weights are sound."""
    check_weights(study.loaded.model)
    return Encoding(baseline_encoding(study.loaded, study.source + study.target, progress), study)


def encode_after(study: Study, model: nn.Module, before: Encoding, below: Below | None, progress: Progress) -> Encoding:
    """The adapted model's vectors; those of the layers up to `below`'s are what they were before."""
    known = (below, before.vectors) if below else None
    return Encoding(encode_words(model, study.source + study.target, known=known, progress=progress), study)


def measure_before(study: Study, before: Encoding, progress: Progress) -> list[LayerRow]:
    """The untouched model's measures at every layer, from the cache where an earlier run made them.

    Of all pairs, as the pilot; and of each split, where something is to be trained.
    """
    config = study.config
    inputs = (encoding_key(study.loaded, study.source + study.target), study.lexicon.digest, config.dataset.seed)
    sizes = (len(study.words.train), len(study.words.control), config.train.epochs > 0, config.eval.measures)

    def make() -> list[LayerRow]:
        pilot = _measure_layers(study, before, "pilot", ["all"], progress)
        return pilot + (_measure_layers(study, before, "before", SPLITS, progress) if config.train.epochs else [])

    return [tuple(row) for row in baseline_values("measures", study.loaded, repr(inputs + sizes), make)]


def measure_after(
    study: Study, before: Sequence[LayerRow], after: Encoding, blocks: Sequence[int], progress: Progress
) -> list[LayerRow]:
    """The adapted model's measures of each split; below the first adapted block they are what they were before."""
    first = min(blocks)
    same: list[LayerRow] = [
        (layer, "after", split, name, value)
        for layer, stage, split, name, value in before
        if stage == "before" and layer in range(first)
    ]
    return same + _measure_layers(study, after, "after", SPLITS, progress, first)


def _measure_layers(
    study: Study, encoding: Encoding, stage: Stage, splits: Sequence[SplitName], progress: Progress, first: int = 0
) -> list[LayerRow]:
    """All measures at the layers from `first` on, for the splits. A rotation is fitted on train, judged on control.

    Layers are measured side by side, where there is room: most of what a measure does has work for one thread alone.
    """
    listed = {split: study.relevant(split) for split in splits}
    layers = list(enumerate(study.layers))[first:]

    def measured(index: int, layer: Layer) -> list[LayerRow]:
        rows: list[LayerRow] = []
        vectors: dict[SplitName, tuple[Tensor, Tensor]]
        vectors = {split: encoding.at(index, study.rows(split)) for split in splits}
        for split, (source, target) in vectors.items():
            fitted_on = vectors["train"] if split == "control" else None
            found = measure(source, target, listed[split], names=study.config.eval.measures, fitted_on=fitted_on)
            rows.extend((layer, stage, split, name, value) for name, value in found.items())
        return rows

    threads = torch.get_num_threads()
    at_once = max(1, min(threads, len(layers), MEASURING // bytes_held(len(study.pairs), width(study.loaded.model))))
    pool = ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(threads // at_once,))
    rows: list[LayerRow] = []
    try:
        by_layer = pool.map(measured, *zip(*layers, strict=True))
        for _, found in zip(progress(layers, f"Measuring {stage}"), by_layer, strict=True):
            rows.extend(found)
        return rows
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # of the threads that are yet to come; this one's never changed


@dataclass(frozen=True)
class Probed:
    """What the model's output can do: scalars for results.json, and each text's log-probabilities, token by token."""

    scalars: dict[str, float]
    texts: dict[str, list[float]]  # by language, in nats


def probe_before(study: Study, progress: Progress) -> Probed:
    """What the untouched model can do with its output, from the cache where an earlier run measured it."""
    lexicon = study.lexicon
    config = study.config
    inputs = (study.words, lexicon.digest, _texts(study), config.dataset.seed, config.eval.probes, EXAMPLES)
    languages = (lexicon.source_language, lexicon.target_language)

    def make() -> list[Any]:
        found = _probe(study, study.loaded.model, "before", progress)
        return [found.scalars, found.texts]

    return Probed(*baseline_values("probes", study.loaded, repr(inputs + languages), make))


def probe_after(study: Study, model: nn.Module, before: Probed, progress: Progress) -> dict[str, float]:
    """What the adapted model can do, and each perplexity's relative change with its 95 % interval."""
    found = _probe(study, model, "after", progress)
    changes: dict[str, float] = {}
    for language, tokens in found.texts.items():
        change, low, high = perplexity_change(before.texts[language], tokens)
        name = f"lm/perplexity_{language}"
        changes |= {f"{name}_change": change, f"{name}_change_low": low, f"{name}_change_high": high}
    return found.scalars | changes


def _probe(study: Study, model: nn.Module, when: Literal["before", "after"], progress: Progress) -> Probed:
    """Log-probabilities of each language's text, and word translation by the model's output; empty if not asked."""
    if not study.config.eval.probes:
        return Probed({}, {})
    tokenizer, lexicon = study.loaded.tokenizer, study.lexicon
    texts = {
        language: token_log_probabilities(model, tokenizer, text)
        for language, text in progress(list(_texts(study).items()), f"Reading texts {when}")
    }
    scalars: dict[str, float] = {}
    for language, tokens in texts.items():
        if len(tokens) < FEWEST_TOKENS:
            raise UserError(
                f"eval.text.{language}: has {len(tokens)} tokens to score, too few to tell what training costs; "
                f"give at least {FEWEST_TOKENS}"
            )
        scalars |= {f"lm/perplexity_{language}_{when}": perplexity_of(tokens)}
        if when == "before":
            scalars[f"lm/tokens_{language}"] = len(tokens)
    for key, value in scalars.items():
        if not math.isfinite(value):
            raise NumbersError(f"{key} is {value}: {likely_cause(model)}")
    accuracy = translation_accuracy(
        model,
        tokenizer,
        examples=study.words.train[:EXAMPLES],
        queries=study.words.control,
        listed=lexicon.pairs,
        source_language=lexicon.source_language,
        target_language=lexicon.target_language,
        seed=study.config.dataset.seed,
        progress=progress,
    )
    return Probed(scalars | {f"translation/accuracy_{when}": accuracy}, texts)


def _texts(study: Study) -> dict[str, str]:
    """The text of each language: the user's own, else the one in data/text, else none."""
    languages = (study.lexicon.source_language, study.lexicon.target_language)
    own = {language.lower(): Path(path) for language, path in study.config.eval.text.items()}
    packaged = {language.lower(): TEXTS / f"{language.lower()}.txt" for language in languages}
    found = {}
    for language, file in (packaged | own).items():
        if file.is_file():
            try:
                found[language] = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"eval.text.{language}={file}: is not UTF-8 text (byte {error.start})") from error
    return found


# --- training -----------------------------------------------------------------------------------------------


def choose_layers(study: Study, before: Encoding) -> tuple[list[int], tuple[Layer, ...], str | None]:
    """(adapted blocks, layers of the loss, why where `auto` chose them).

    `auto` takes the layer where the train split's retrieval (CSLS P@1) is best, ties by the margin. Neither the raw
    cosine, which an attention sink lifts for wrong pairs too, nor the control split has a say.
    """
    config = study.config
    if "auto" not in (config.lora.layers, config.objective.layer):
        return *resolve_layers(config, study.loaded.n_layers), None
    listed = study.relevant("train")
    scores = {}
    for index, layer in enumerate(study.layers):
        if isinstance(layer, int) and layer > 0:
            found = measure(*before.at(index, study.rows("train")), listed, names=("csls_p_at_1", "margin"))
            scores[layer] = (found["csls_p_at_1"], found["margin"])
    best = max(scores, key=lambda layer: scores[layer])
    why = f"layer {best} has the train split's best CSLS P@1 ({scores[best][0]:.3f}, margin {scores[best][1]:.4f})"
    return *resolve_layers(config, study.loaded.n_layers, auto=best), why


def describe_layers(study: Study, blocks: list[int], read: tuple[Layer, ...], why: str | None) -> dict[str, Any]:
    """What results.json and MLflow say of the layers in use, `auto` or not."""
    used = {"lora_layers_used": str(blocks), "objective_layers_used": str(list(read)), "layers_chosen_because": why}
    return used | {"params": _params(study) | {"lora.n_layers": str(len(blocks))}}


def run_below_adapter(study: Study, blocks: Sequence[int]) -> Below | None:
    """The hidden states of all pairs that the first adapted block is given: training doesn't change them."""
    return run_below(study.loaded.model, study.source + study.target, min(blocks))


def train_adapter(
    study: Study,
    model: nn.Module,
    read: tuple[Layer, ...],
    below: Below | None,
    progress: Progress,
    after_epoch: Callable[[int], None] | None = None,
) -> tuple[list[float], dict[str, Any]]:
    """Trains the attached adapter on the train split; (the loss of every step, what results.json says of the batch).

    Where memory runs out, the same adapter is trained from its beginning in batches of half the size.
    """
    rows, objective, schedule = study.rows("train"), study.config.objective, study.config.train
    asked = Objective(
        objective.name,  # pyright: ignore[reportArgumentType]
        read,
        margin=objective.margin,
        negatives=objective.negatives,  # pyright: ignore[reportArgumentType]
        temperature=objective.temperature,
        one_way=objective.one_way,
    )
    words = (study.source[rows], study.target[rows], study.relevant("train").numpy())
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    beginning = [weight.detach().clone() for weight in weights]

    def attempt(batch_size: int) -> list[float]:
        for weight, first in zip(weights, beginning, strict=True):
            weight.data.copy_(first)
        how = replace(Schedule(**asdict(schedule)), batch_size=batch_size)
        known = below if how.precision == "float32" else None  # autocast would have run the blocks below in bfloat16
        with unpacked(model, read, known):
            return train(model, *words, asked, how, below=known, progress=progress, after_epoch=after_epoch)

    losses, used = halved("training", "train.batch_size", schedule.batch_size, attempt, least=2)
    return losses, {"train_batch_size_used": used}


def control_margin(study: Study, model: nn.Module, below: Below | None) -> float:
    """The adapted model's margin of the control split at the evaluation layer, and nothing else: quick."""
    rows = study.rows("control")
    prompts = study.source[rows] + study.target[rows]
    source, target = encode(model, prompts, layers=[study.config.eval.layer], below=below)[0].chunk(2)
    return measure(source, target, study.relevant("control"), names=("margin",))["margin"]


# --- the pairs one by one -----------------------------------------------------------------------------------


def pair_rows(study: Study, before: Encoding, after: Encoding | None) -> list[tuple[Any, ...]]:
    """The rows of pairs.csv: cosine and rank of every pair at the evaluation layer; empty cells where not measured."""
    columns: dict[str, list[float | int | str]] = {}
    for when, encoding in (("before", before), ("after", after)):
        cosines: list[float | int | str] = []
        ranks: list[float | int | str] = []
        for split in ("train", "control"):
            if encoding is None:
                cosines += [""] * len(study.pairs[study.rows(split)])
                ranks = cosines
                continue
            vectors = encoding.at(study.eval_index, study.rows(split))
            cosines += pair_cosines(*vectors).tolist()
            ranks += retrieval_ranks(*vectors, study.relevant(split)).tolist()
        columns |= {f"cosine_{when}": cosines, f"rank_{when}": ranks}
    names = ["train"] * len(study.words.train) + ["control"] * len(study.words.control)
    return [
        (pair.source, pair.target, split, *numbers)
        for pair, split, *numbers in zip(
            study.pairs,
            names,
            columns["cosine_before"],
            columns["cosine_after"],
            columns["rank_before"],
            columns["rank_after"],
            strict=True,
        )
    ]
