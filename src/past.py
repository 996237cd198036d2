"""A past job's settings as the config of a new run.

python -m src.run --config-dir multirun/<date>/<time>/<job>/.hydra --config-name config
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from src.config import ROOT
from src.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

NAME = "past_job"  # of the config that Hydra finds in its store


def past_job(words: Sequence[str]) -> tuple[str, list[str]]:
    """(name of the config to run, words left) for a command line; where it names no past job, as it is.

    Hydra alone would look into conf/ first, find conf/config.yaml there, and run that instead.
    Raises UserError where the job's settings can't be read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--config-name", "-cn")
    given, rest = parser.parse_known_args(words)
    if not given.config_dir or given.config_name not in ("config", "config.yaml"):
        return "config", list(words)
    folder = Path(given.config_dir)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"--config-dir {folder}: holds no config.yaml; give the folder .hydra of a job")
    _store(_settings(folder), rest)
    return NAME, rest


def _settings(folder: Path) -> DictConfig:
    """What config.yaml says; files that the job knew by a relative path are found from elsewhere, too."""
    from omegaconf import DictConfig, OmegaConf
    from yaml import YAMLError

    try:
        values = OmegaConf.load(folder / "config.yaml")
        if not isinstance(values, DictConfig) or "model" not in values:
            raise ValueError("it holds no job's settings")
    except (OSError, ValueError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder / 'config.yaml'} can't be read ({reason}); give another job's folder") from error
    with suppress(OSError, ValueError, YAMLError, AttributeError):
        start = Path(OmegaConf.load(folder / "hydra.yaml").hydra.runtime.cwd)
        for group, key in (("dataset", "path"), ("model", "id"), *(("eval.text", key) for key in values.eval.text)):
            path = OmegaConf.select(values, f"{group}.{key}")
            if path and not Path(path).exists() and (start / path).exists():
                OmegaConf.update(values, f"{group}.{key}", str(start / path))
    return values


def _store(values: DictConfig, words: Sequence[str]) -> None:
    """Gives Hydra conf/config.yaml with the job's values in it, but for groups that are chosen anew."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    groups = {folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir()}
    for name in ({word.partition("=")[0] for word in words} & groups) | {"sweep"}:
        values.pop(name, None)
    ConfigStore.instance().store(name=NAME, node=OmegaConf.merge(OmegaConf.load(ROOT / "conf/config.yaml"), values))
