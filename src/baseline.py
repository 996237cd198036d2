"""What is measured on the untouched model, cached on disk under a key of everything that it depends on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from src import layers, probes
from src.files import cache_dir, digest, file_digest, write_text, written_atomically
from src.layers import Progress, Prompt, encode
from src.models import LoadedModel

log = logging.getLogger(__name__)

# A change of the code that measures makes a new key, as a change of the model does.
_ENCODING_CODE, _PROBE_CODE = file_digest(Path(layers.__file__)), file_digest(Path(probes.__file__))


def baseline_encoding(loaded: LoadedModel, prompts: Sequence[Prompt], progress: Progress | None = None) -> Tensor:
    """Unit vectors of the prompts at all layers, Float[Tensor, "layers prompts d"], read from the cache or made.

    An entry that is damaged (its digest differs) is named in the log and made again.
    """
    key = digest(loaded.identity, _ENCODING_CODE, repr([(prompt.ids, prompt.start, prompt.stop) for prompt in prompts]))
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


def baseline_probes(loaded: LoadedModel, inputs: str, make: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """The probes of the untouched model, read from the cache or made; `inputs` names all that they read.

    An entry that is damaged is named in the log and made again.
    """
    file = cache_dir() / "probes" / f"{digest(loaded.identity, _PROBE_CODE, inputs)}.json"
    if file.exists():
        try:
            entry = json.loads(file.read_text(encoding="utf-8"))
            if entry["sha256"] == digest(json.dumps(entry["values"])):
                return entry["values"]
            log.warning("%s is damaged (its digest differs): made again", file)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged (%s): made again", file, error)
    values = dict(make())
    write_text(file, json.dumps({"values": values, "sha256": digest(json.dumps(values))}))
    return values
