"""The untouched model's encodings, cached on disk under a key of everything that they depend on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from src.files import cache_dir, digest, written_atomically
from src.layers import Progress, Prompt, encode
from src.models import LoadedModel

log = logging.getLogger(__name__)


def baseline_encoding(loaded: LoadedModel, prompts: Sequence[Prompt], progress: Progress | None = None) -> Tensor:
    """Unit vectors of the prompts at all layers, Float[Tensor, "layers prompts d"], read from the cache or made.

    An entry that is damaged (its digest differs) is named in the log and made again.
    """
    key = digest(loaded.identity, repr([(prompt.ids, prompt.start, prompt.stop) for prompt in prompts]))
    file = cache_dir() / "encodings" / f"{key}.safetensors"
    if file.exists():
        try:
            with safe_open(file, framework="pt") as entry:
                vectors = entry.get_tensor("vectors")
                if entry.metadata()["sha256"] == _digest(vectors):
                    return vectors
            log.warning("%s is damaged (its digest differs): made again", file)
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            log.warning("%s is damaged (%s): made again", file, error)
    vectors = encode(loaded.model, prompts, progress=progress)
    with written_atomically(file) as temporary:
        save_file({"vectors": vectors}, temporary, metadata={"sha256": _digest(vectors)})
    return vectors


def _digest(vectors: Tensor) -> str:
    return hashlib.sha256(vectors.numpy().data).hexdigest()
