"""What a search is asked for: its settings, and its space in Hydra's words (choice, range, interval, tag, int).

Everything is checked here before the first trial.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from src.config import Config
from src.errors import UserError
from src.plan import bare_key

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig


@dataclass
class Settings:
    """The keys of conf/hydra/sweeper/optuna.yaml, which explains them."""

    n_trials: int
    metric: str
    direction: str
    seed: int
    n_jobs: int
    pruning: bool
    warmup_trials: int
    warmup_epochs: int


LEAST = {"n_trials": 1, "n_jobs": 1, "seed": 0, "warmup_trials": 1, "warmup_epochs": 0}


def read_settings(sweeper: DictConfig) -> Settings:
    """The sweeper's settings. Raises UserError naming the key."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    values = {field.name: sweeper[field.name] for field in fields(Settings)}
    try:
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), values))
    except OmegaConfBaseException as error:
        raise UserError(f"hydra.sweeper.{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(settings, Settings)
    for key, least in LEAST.items():
        if (value := getattr(settings, key)) < least:
            raise UserError(f"hydra.sweeper.{key}={value}: must be at least {least}")
    if settings.direction not in ("maximize", "minimize"):
        raise UserError(f"hydra.sweeper.direction={settings.direction}: must be maximize or minimize")
    return settings


def refuse_metric(metric: str, config: Config) -> None:
    """Raises UserError for a metric that no such job measures."""
    from src.evidence import SplitEvidence

    names = [field.name for field in fields(SplitEvidence)]
    if config.train.epochs == 0:
        names = ["pair_cosine_before", "margin_before", "csls_p_at_1_before"]
    kinds = ["time/", *(("lm/perplexity_", "translation/accuracy_") if config.eval.probes else ())]
    split, _, name = metric.partition("/")
    if not (split in ("train", "control") and name in names) and not metric.startswith(tuple(kinds)):
        raise UserError(
            f"hydra.sweeper.metric={metric}: no such number in these jobs' results.json; there are {', '.join(kinds)} "
            f"and, of control or train, {', '.join(names)}"
        )


# --- the space ----------------------------------------------------------------------------------------------


def distribution(key: str, override: Override, config: DictConfig) -> BaseDistribution:
    """Where a swept key's values come from; `config` tells whether it is a whole number. Raises UserError."""
    said: Any = override.value()
    tags = getattr(said, "tags", set())
    if tags - {"log"} or (tags and not override.is_interval_sweep()):
        raise UserError(f"{override.input_line}: the one tag is log, as in {key}=tag(log,interval(1e-5,1e-3))")
    if override.is_interval_sweep():
        return _interval(key, said.start, said.end, bool(tags), config)
    if override.is_range_sweep() and all(isinstance(end, int) for end in (said.start, said.stop, said.step)):
        if numbers := sorted(said.range()):
            return IntDistribution(numbers[0], numbers[-1], step=abs(said.step))
    elif choices := list(dict.fromkeys(override.sweep_string_iterator())):
        return CategoricalDistribution(choices)
    raise UserError(f"{override.input_line}: has no values")


def _interval(key: str, low: float, high: float, log: bool, config: DictConfig) -> BaseDistribution:
    from omegaconf import OmegaConf

    whole = isinstance(low, int) and isinstance(high, int)
    if not low < high or (log and low <= 0):
        raise UserError(f"{key}: interval({low:g},{high:g}) must rise{', from above 0' if log else ''}")
    if not whole and type(OmegaConf.select(config, bare_key(key))) is int:
        raise UserError(f"{key} is a whole number: write int(interval({low:g},{high:g})), or choice(…)")
    return IntDistribution(int(low), int(high), log=log) if whole else FloatDistribution(low, high, log=log)


def ends(distribution: BaseDistribution) -> list[Any]:
    """All choices, or both ends."""
    match distribution:
        case CategoricalDistribution(choices=choices):
            return list(choices)
        case IntDistribution() | FloatDistribution():
            return [distribution.low, distribution.high]
    raise TypeError(distribution)


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """Values as Hydra takes them, with four digits: what a job is called by is what it runs with."""
    return [f"{key}={float(f'{one:.4g}') if isinstance(one, float) else one}" for key, one in values.items()]


def as_text(distribution: BaseDistribution) -> str:
    """For a person: "4, 16" or "1e-05 … 0.001, log"."""
    match distribution:
        case CategoricalDistribution(choices=choices):
            return ", ".join(map(str, choices))
        case IntDistribution() | FloatDistribution():
            step = f", step {distribution.step}" if distribution.step not in (None, 1) else ""
            return f"{distribution.low:g} … {distribution.high:g}{step}{', log' if distribution.log else ''}"
    raise TypeError(distribution)
