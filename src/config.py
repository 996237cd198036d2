"""The schema of conf/, and the checks that refuse a bad combination before anything is loaded.

The values stand in conf/*.yaml; the dataclasses give their types. Importing this imports nothing heavy.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from src.errors import UserError
from src.files import digest, file_digest, folder_state
from src.results import RESULTS_VERSION

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from src.layers import Layer

ROOT = Path(__file__).parent.parent
MEASURES = (  # that src/measures.py has
    "pair_cosine",
    "mismatched_cosine",
    "margin",
    "centred_cosine",
    "nn_p_at_1",
    "csls_p_at_1",
    "csls_p_at_5",
    "mrr",
    "mexa",
    "procrustes_p_at_1",
)
LONGEST_NAME = 200  # of an MLflow experiment, whose artifacts lie in a folder of that name


@dataclass
class ModelConfig:
    name: str
    source: str  # packaged, hub, tiny
    id: str | None
    revision: str | None
    n_layers: int | None  # known ahead for a packaged model, so that bad layers are refused before loading
    device: str
    dtype: str
    attention: str
    device_map: str | None
    trust_remote_code: bool
    safetensors_only: bool


@dataclass
class QuantConfig:
    name: str
    double_quant: bool
    compute_dtype: str


@dataclass
class LoraConfig:
    layers: Any  # a list of layers, all, auto
    rank: int
    alpha: float
    dropout: float
    target_modules: list[str]
    init: str
    use_dora: bool
    use_rslora: bool


@dataclass
class DatasetConfig:
    source: str  # builtin, freedict, file
    path: str | None
    pair: str | None
    source_column: str | None
    target_column: str | None
    source_language: str | None
    target_language: str | None
    control_size: int
    seed: int
    limit: int | None


@dataclass
class ObjectiveConfig:
    name: str
    layer: Any  # a layer, final, a list of them, auto; null is the deepest adapted layer
    margin: float
    negatives: str
    temperature: float
    one_way: bool


@dataclass
class TrainConfig:
    epochs: int  # 0 is the pilot alone
    batch_size: int
    learning_rate: float
    warmup: float
    precision: str
    seed: int


@dataclass
class EvalConfig:
    layer: Any  # a layer or final
    pooling: str
    exclude_bos: bool
    template: str
    measures: list[str]
    permutations: int
    probes: bool
    text: dict[str, str]
    max_perplexity_increase: float


@dataclass
class TrackingConfig:
    backend: str  # local, server, off
    uri: str | None
    experiment: str


@dataclass
class SweepConfig:
    force: bool
    dry_run: bool


@dataclass
class Config:
    model: ModelConfig
    quant: QuantConfig
    lora: LoraConfig
    dataset: DatasetConfig
    objective: ObjectiveConfig
    train: TrainConfig
    eval: EvalConfig
    tracking: TrackingConfig
    sweep: SweepConfig


CHOICES: dict[str, tuple[str, ...]] = {
    "model.source": ("packaged", "hub", "tiny"),
    "model.dtype": ("float32", "bfloat16", "float16"),
    "model.attention": ("sdpa", "eager", "flash_attention_2"),
    "quant.name": ("none", "nf4", "int8"),
    "quant.compute_dtype": ("bfloat16", "float32"),
    "lora.init": ("default", "gaussian", "pissa", "olora"),
    "dataset.source": ("builtin", "freedict", "file"),
    "objective.name": ("triplet", "infonce"),
    "objective.negatives": ("random", "batch", "baseline"),
    "train.precision": ("float32", "bfloat16"),
    "eval.pooling": ("mean", "last"),
    "tracking.backend": ("local", "server", "off"),
}

# key: (least, most, whether the least itself is allowed); infinity itself is never allowed
RANGES: dict[str, tuple[float, float, bool]] = {
    "model.n_layers": (1, 10_000, True),
    "lora.rank": (1, 4096, True),
    "lora.alpha": (0, math.inf, False),
    "lora.dropout": (0, 0.99, True),
    "dataset.control_size": (2, math.inf, True),
    "dataset.seed": (0, 2**32 - 1, True),
    "dataset.limit": (4, math.inf, True),
    "objective.margin": (0, 2, False),
    "objective.temperature": (0, math.inf, False),
    "train.epochs": (0, 1_000_000, True),
    "train.batch_size": (2, 1_000_000, True),
    "train.learning_rate": (0, math.inf, False),
    "train.warmup": (0, 1, True),
    "train.seed": (0, 2**32 - 1, True),
    "eval.permutations": (99, 10_000_000, True),
    "eval.max_perplexity_increase": (0, math.inf, True),
}

# key: the one choice of its group with which it is read
READ_WITH = {
    "objective.margin": "triplet",
    "objective.negatives": "triplet",
    "objective.temperature": "infonce",
    "objective.one_way": "infonce",
    "quant.double_quant": "nf4",
    "quant.compute_dtype": "nf4",
}


def register() -> None:
    """Makes the schema known to Hydra, under the name that conf/config.yaml starts from.

    Takes out what launchers' plug-ins put under the names of conf/hydra/launcher/*.yaml: Hydra would merge the two,
    deprecates that in a warning, and can't do it where a file sets more than the launcher.
    """
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    Plugins.instance()  # finds them, once
    launchers = ConfigStore.instance().repo["hydra"]["launcher"]
    for file in (ROOT / "conf/hydra/launcher").glob("*.yaml"):
        launchers.pop(file.name, None)

    ConfigStore.instance().store(name="schema", node=Config)


def help_quickly() -> None:
    """Has Hydra not copy all that it knows with each look at a group: it does so a hundred times to print --help.

    The copies are for workers, whose plug-ins add to the store; what the store hands out is copied anyway.
    """
    from hydra.core.config_store import ConfigStore

    ConfigStore.__deepcopy__ = lambda self, _memo: self  # pyright: ignore[reportAttributeAccessIssue]


def refuse_odd_options(words: Sequence[str]) -> None:
    """Refuses `lora=4` and `model=[a,b]` on the command line, at which Hydra breaks off without naming the key.

    Raises UserError naming the key. What Hydra itself refuses well, or what is no override, is left to it.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    groups = {folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir()}
    for word in words:
        try:
            (override,) = OverridesParser.create().parse_overrides([word])
            value = override.value()
        except (HydraException, ValueError):
            continue
        key = override.key_or_group
        if not key:
            raise UserError(f"{word}: names no key; write key=value")
        several = key == "experiment" and isinstance(value, list) and all(isinstance(each, str) for each in value)
        fitting = isinstance(value, str) or several or override.is_delete() or override.is_sweep_override()
        if key in groups and not fitting:
            raise UserError(f"{word}: {key} is a group; choose {_options(key)}")


def _options(group: str) -> str:
    options = sorted(file.stem for file in (ROOT / "conf" / group).glob("*.yaml"))
    return f"one of {', '.join(options)}" if options else f"single keys, as {group}.key=value"


def read_config(composed: DictConfig) -> Config:
    """The validated config of one job, out of what Hydra composed. Raises UserError naming the key."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _refuse_unknown(OmegaConf.to_container(composed), Config)
    try:
        missing = OmegaConf.missing_keys(composed)
        if missing:
            raise UserError(f"{min(missing)} has no value: give one, as {min(missing)}=…")
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:  # an interpolation; its message alone doesn't say whose
        reason = str(error).partition("\n")[0]
        raise UserError(f"{error.full_key}: {reason}; write the value itself, or mend what it refers to") from error
    assert isinstance(config, Config)
    validate(config)
    return config


def _refuse_unknown(values: Any, schema: type, prefix: str = "") -> None:
    """Hydra lets `+lora.new=4` and `[[a]]` for a list of texts through in spite of the schema."""
    types = get_type_hints(schema)
    for key, value in values.items():
        if key not in types:
            raise UserError(f"{prefix}{key} is no key of this project: known are {', '.join(sorted(types))}")
        if is_dataclass(types[key]) and isinstance(types[key], type):
            if not isinstance(value, dict):  # `~lora`, or a reference
                raise UserError(f"{prefix}{key}={value}: {key} is a group; choose {_options(key)}")
            _refuse_unknown(value, types[key], f"{prefix}{key}.")
        names = value if types[key] == list[str] and isinstance(value, list) else []
        if wrong := [name for name in names if not isinstance(name, str) or not name.strip()]:
            raise UserError(f"{prefix}{key}={value}: {wrong[0]!r} is no name; give a flat list of names, as [a,b]")


def validate(config: Config) -> None:
    """Refuses values out of range and combinations that cannot work. Raises UserError naming the key."""
    for key, choices in CHOICES.items():
        if (value := _get(config, key)) not in choices:
            raise UserError(f"{key}={value}: must be one of {', '.join(choices)}")
    for key, (least, most, inclusive) in RANGES.items():
        value = _get(config, key)
        if value == math.inf:
            raise UserError(f"{key}=inf: must be finite")
        if value is not None and not (least <= value <= most if inclusive else least < value <= most):
            raise UserError(f"{key}={value}: must be {'at least' if inclusive else 'above'} {least:g}{_up_to(most)}")
    _check_texts(asdict(config))
    for key in ("lora.target_modules", "eval.measures"):
        if len(set(names := _get(config, key))) != len(names):
            raise UserError(f"{key}={names}: holds a name twice")
    _check_eval(config.eval)
    _check_sources(config)
    _check_layers(config, known_depth(config.model))


def _up_to(most: float) -> str:
    return "" if math.isinf(most) else f" and at most {most:.10g}"


def _get(config: Config, key: str) -> Any:
    group, name = key.split(".")
    return getattr(getattr(config, group), name)


def _check_texts(values: Mapping[str, Any], prefix: str = "") -> None:
    """A command line may hold bytes that no text has; results.json couldn't be written with them."""
    for key, value in values.items():
        if isinstance(value, dict):
            _check_texts(value, f"{prefix}{key}.")
        elif isinstance(value, str) and re.search(r"[\0\ud800-\udfff]", value):
            raise UserError(f"{prefix}{key}={value!a}: holds a character that no text has; give it in UTF-8")


def _check_language(key: str, name: str | None) -> None:
    """A language's name becomes part of a metric's and of a file's."""
    if name is not None and not re.fullmatch(r"[^\W_][\w -]*", name):
        raise UserError(f"{key}: {name!r} can't name a language; give letters, digits, spaces and hyphens alone")


def _check_eval(config: EvalConfig) -> None:
    if config.template.count("{word}") != 1:
        raise UserError(f"eval.template={config.template!r}: must hold {{word}} once, as in 'The word {{word}}'")
    unknown = sorted(set(config.measures) - set(MEASURES))
    if unknown:
        raise UserError(f"eval.measures: {unknown[0]} is none of {', '.join(MEASURES)}")
    for language, path in config.text.items():
        _check_language(f"eval.text.{language}", language)
        try:
            there = Path(path).is_file()
        except OSError:  # too long a name, for one
            there = False
        if not there:
            raise UserError(f"eval.text.{language}={path}: there is no such file")


def _refuse_unused(dataset: DatasetConfig) -> None:
    """Raises UserError for a key that names pairs which the chosen source doesn't read."""
    read = {"builtin": (), "freedict": ("pair", "path"), "file": ("path", "source_column", "target_column")}
    for key in ("path", "pair", "source_column", "target_column"):
        if key not in read[dataset.source] and (value := getattr(dataset, key)) is not None:
            other = "freedict" if key == "pair" else "file"
            where = f"dataset.{key}={value} isn't read with dataset.source={dataset.source}"
            raise UserError(f"{where}: add dataset={other}, or leave it out")


def _check_sources(config: Config) -> None:
    model, lora = config.model, config.lora
    for key in ("dataset.source_language", "dataset.target_language"):
        _check_language(key, _get(config, key))
    try:
        Path(model.id or "").is_dir()
    except OSError as error:  # too long a name, for one
        raise UserError(f"model.id={str(model.id)[:80]}…: can't be a folder or a hub id ({error.strerror})") from error
    if model.source == "hub" and not model.id:
        raise UserError("model.id has no value: give a hub id or a local folder, as model.id=Qwen/Qwen3-0.6B")
    if config.dataset.source == "file" and not config.dataset.path:
        raise UserError("dataset.path has no value: give a pair file, as dataset.path=words.tsv")
    if config.dataset.source == "freedict" and not (config.dataset.pair or config.dataset.path):
        raise UserError("dataset.pair has no value: give a dictionary, as dataset.pair=fra-eng")
    _refuse_unused(config.dataset)
    if not lora.target_modules:
        raise UserError("lora.target_modules is empty: name the modules to adapt, as [q_proj,v_proj]")
    if lora.init in ("pissa", "olora") and config.quant.name != "none":
        raise UserError(
            f"lora.init={lora.init} edits base weights, which quant={config.quant.name} forbids: use default"
        )
    if config.tracking.backend == "server" and not config.tracking.uri:
        raise UserError("tracking.uri has no value: give the server's address, as tracking.uri=http://127.0.0.1:5000")
    name = config.tracking.experiment.strip().strip("/")
    if name in ("", ".", "..") or "/" in name or not name.isprintable() or len(name) > LONGEST_NAME:
        shown = config.tracking.experiment[:80]
        raise UserError(f"tracking.experiment={shown!r}: must be a plain name of up to {LONGEST_NAME} characters")


# --- layers, by the convention of src/layers.py -------------------------------------------------------------


def _check_layers(config: Config, n_layers: int | None) -> None:
    adapted = _layer_list("lora.layers", config.lora.layers, n_layers, words=("all", "auto"), lowest=1)
    if config.lora.layers == "all" and n_layers:
        adapted = list(range(1, n_layers + 1))
    read = _layer_list("objective.layer", config.objective.layer, n_layers, words=("final", "auto"), lowest=1)
    _layer_list("eval.layer", config.eval.layer, n_layers, words=("final",), lowest=0, one=True)
    _refuse_dead_adapters(_numbers(adapted), read)
    if config.lora.layers == "auto" and read and "final" not in read:
        raise UserError(
            f"lora.layers=auto with objective.layer={config.objective.layer}: the choice could lie above the loss; "
            "set objective.layer to auto, null or final"
        )


def _refuse_dead_adapters(adapted: Sequence[int], read: Sequence[Layer]) -> None:
    if "final" in read or not read:
        return
    deepest = max(_numbers(read))
    if dead := [layer for layer in adapted if layer > deepest]:
        raise UserError(
            f"lora.layers={list(adapted)}: the loss at objective.layer={deepest} gives no gradient to blocks "
            f"above it ({', '.join(map(str, dead))}): raise objective.layer or drop those blocks"
        )


def _layer_list(
    key: str, value: Any, n_layers: int | None, *, words: Sequence[str], lowest: int, one: bool = False
) -> list[Layer]:
    """The layers named one by one; empty for null and for words that stand for a later choice."""
    if value is None and key == "objective.layer":
        return []
    if value in words and value != "final":
        return []
    given: list[Any] = value if isinstance(value, list) else [value]
    allowed = f"{'a layer' if one else 'a list of layers'} from {lowest} to {n_layers or 'N'} or {' or '.join(words)}"
    wrong = [layer for layer in given if not _is_layer(layer, n_layers, words, lowest)]
    if wrong or not given or (one and isinstance(value, list)):
        what = f"{wrong[0]} is not possible" if wrong else f"must name {'one' if one else 'a'} layer"
        raise UserError(f"{key}={value}: {what}; give {allowed}")
    if len(set(given)) != len(given):
        raise UserError(f"{key}={value}: names a layer twice")
    return given


def _is_layer(layer: Any, n_layers: int | None, words: Sequence[str], lowest: int) -> bool:
    if layer == "final":
        return "final" in words
    is_number = isinstance(layer, int) and not isinstance(layer, bool)
    return is_number and lowest <= layer <= (n_layers or math.inf)


def _numbers(layers: Sequence[Layer]) -> list[int]:
    return [layer for layer in layers if layer != "final"]


def resolve_layers(config: Config, n_layers: int, auto: int | None = None) -> tuple[list[int], tuple[Layer, ...]]:
    """(adapted blocks, layers of the loss) for a model of N blocks; `auto` is the pilot's choice, where it was asked.

    Raises UserError where they don't fit the model.
    """
    _check_layers(config, n_layers)
    match config.lora.layers:
        case "all":
            adapted = list(range(1, n_layers + 1))
        case "auto":
            assert auto is not None
            adapted = list(range(1, auto + 1))
        case layers:
            adapted = sorted(layers if isinstance(layers, list) else [layers])
    match config.objective.layer:
        case None:
            read: list[Layer] = [max(adapted)]
        case "auto":
            assert auto is not None
            read = [max(auto, *adapted)]
        case layers:
            named = layers if isinstance(layers, list) else [layers]
            read = sorted(named, key=lambda layer: math.inf if layer == "final" else layer)
    _refuse_dead_adapters(adapted, read)
    return adapted, tuple(read)


def known_depth(model: ModelConfig) -> int | None:
    """N where it is known without loading: from conf/model, or from a local folder's config.json."""
    if model.n_layers is None and model.id and (config := Path(model.id) / "config.json").is_file():
        try:
            values = json.loads(config.read_text(encoding="utf-8"))
            values = values.get("text_config", values)
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"model.id={model.id}: its config.json can't be read ({error})") from error
        return values.get("num_hidden_layers") or values.get("n_layer")
    return model.n_layers


def unread(config: Config, key: str) -> str | None:
    """What to tell of a key that changes nothing in this setting; None for one that is read."""
    group = key.partition(".")[0]
    if group in ("lora", "objective") and config.train.epochs == 0:
        return f"{key} isn't read with train.epochs=0: leave it out"
    if key in READ_WITH and (chosen := _get(config, f"{group}.name")) != READ_WITH[key]:
        return f"{key} isn't read with {group}={chosen}: add {group}={READ_WITH[key]}, or leave it out"
    return None


def config_hash(config: Config) -> str:
    """Names a setting, whatever the files it points to hold. Tracking and sweep keys don't count.

    RESULTS_VERSION is part of it, so jobs that count differently never share a sweep's table.
    """
    read = {name: value for name, value in asdict(config).items() if name not in ("tracking", "sweep")}
    values = read | {"results_version": RESULTS_VERSION}
    return digest(json.dumps(values, sort_keys=True))[:16]


def inputs_digest(config: Config) -> str:
    """Names what the files hold that a setting points to: texts, a local model; the pairs have their own digest."""
    texts = [f"{language} {file_digest(Path(path))}" for language, path in sorted(config.eval.text.items())]
    model = own_folder(config.model)
    return digest(*texts, folder_state(model) if model else "")[:16]


def own_folder(model: ModelConfig) -> Path | None:
    """The user's own folder that a model is loaded from; None where it comes from elsewhere."""
    folder = Path(model.id or "")
    return folder if model.source == "hub" and model.id and folder.is_dir() else None


def run_name(config: Config) -> str:
    """A short name that tells a sweep's jobs apart: "r16 L1,2 infonce"; "pilot" where nothing is trained."""
    if config.train.epochs == 0:
        return f"pilot {config.model.name}"
    layers = config.lora.layers
    blocks = ",".join(map(str, layers)) if isinstance(layers, list) else str(layers)
    read = config.objective.layer
    at = "" if read is None else f"@{','.join(map(str, read)) if isinstance(read, list) else read}"
    return f"r{config.lora.rank} L{blocks} {config.objective.name}{at}"


def params(config: Config, n_layers: int) -> dict[str, str]:
    """The resolved config, flattened to `group.key`, with the number of adapted blocks as `lora.n_layers`.

    That number is left out where `auto` has yet to choose.
    """
    auto = "auto" in (config.lora.layers, config.objective.layer)
    values = {} if auto else {"lora.n_layers": str(n_adapted(config, n_layers))}
    for group, keys in asdict(config).items():
        values |= {
            f"{group}.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in keys.items()
        }
    return values


def n_adapted(config: Config, n_layers: int) -> int:
    """How many blocks are adapted; 0 where nothing is trained."""
    return len(resolve_layers(config, n_layers)[0]) if config.train.epochs else 0
