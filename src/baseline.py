"""What is measured on the untouched model, cached on disk under a key of everything that it depends on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from src import console
from src.errors import DiskError
from src.files import cache_dir, digest, file_digest, remove_leftovers, room_for, write_text, written_atomically
from src.layers import Progress, Prompt
from src.memory import ran_out
from src.models import LoadedModel
from src.vectors import Vectors, encode_words, stored
from src.workers import lent_threads

log = logging.getLogger(__name__)

# A change of the code that measures makes a new key, as a change of the model does.
_FILES = {
    "encodings": ("layers", "linear", "models", "vectors"),
    "measures": ("measures", "pairs", "study"),
    "probes": ("probes", "pairs", "study"),
    "training_free": ("conclusion", "measures", "pairs", "study", "training_free"),
}
_CODE = {
    kind: digest(*(file_digest(Path(__file__).with_name(f"{n}.py")) for n in some)) for kind, some in _FILES.items()
}
_warned: set[Path] = set()  # caches of which this process has said that they can't be written


def encoding_key(loaded: LoadedModel, prompts: Sequence[Prompt]) -> str:
    """Names the vectors of these prompts, each once, in this order."""
    asked = repr([(prompt.ids, prompt.start, prompt.stop) for prompt in dict.fromkeys(prompts)])
    return digest(loaded.identity, _CODE["encodings"], asked)


def baseline_encoding(loaded: LoadedModel, prompts: Sequence[Prompt], progress: Progress | None = None) -> Vectors:
    """Unit vectors of the prompts at all layers, read from the cache or made; processes that ask at once make it once.

    An entry that is damaged (its digest differs) is named in the log and made again; where the cache can't be written,
    the vectors are made and not kept.
    """
    file = cache_dir() / "encodings" / f"{encoding_key(loaded, prompts)}.f32"
    try:
        if not _whole(file):
            with room_for(file):
                _encode_into(file, loaded, prompts, progress)
        with file.open("rb") as handle:
            return stored(handle, loaded.model, prompts)
    except OSError as error:
        if ran_out(error):
            raise
        _not_kept(file, error)
        return encode_words(loaded.model, prompts, progress=progress)


@contextmanager
def _alone_at(file: Path) -> Iterator[None]:
    """Around the making of an entry: others that ask for it wait, and lend their threads. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")), lent_threads():
        yield


def _encode_into(file: Path, loaded: LoadedModel, prompts: Sequence[Prompt], progress: Progress | None) -> None:
    with _alone_at(file):
        if _whole(file):  # by now
            return
        if file.exists():
            log.warning("%s is damaged (its digest differs): made again", file)
        remove_leftovers(file)
        with written_atomically(file) as temporary:
            with temporary.open("r+b") as handle:
                encode_words(loaded.model, prompts, file=handle, progress=progress)
            write_text(file.with_suffix(".sha256"), file_digest(temporary))


def _whole(file: Path) -> bool:
    expected = file.with_suffix(".sha256")
    return file.exists() and expected.exists() and expected.read_bytes() == file_digest(file).encode()


def _not_kept(file: Path, error: OSError) -> None:
    """A cache that can't be written costs time alone: the log names each entry, the terminal hears of it once."""
    log.warning("%s can't be written or read (%s): not kept", file, error.strerror or error)
    if cache_dir() not in _warned:
        _warned.add(cache_dir())
        advice = error.advice if isinstance(error, DiskError) else "have TLI_CACHE name another folder"
        console.warn(f"the cache {cache_dir()} keeps nothing of this run: {error.strerror or error}; {advice}")


def baseline_values(kind: str, loaded: LoadedModel, inputs: str, make: Callable[[], Any]) -> Any:
    """What `make` finds of the untouched model, as JSON holds it: read from the cache or made, as encodings are.

    `kind` is a key of _FILES, `inputs` names all that they read.
    """
    file = cache_dir() / kind / f"{digest(loaded.identity, _CODE[kind], inputs)}.json"
    kept, _ = _kept_values(file)
    if kept is not None:
        return kept
    with ExitStack() as locked:
        with suppress(OSError):  # told below
            locked.enter_context(_alone_at(file))
        kept, damage = _kept_values(file)
        if kept is not None:
            return kept
        if damage:
            log.warning("%s is damaged (%s): made again", file, damage)
        values = json.loads(json.dumps(make()))
        try:
            write_text(file, json.dumps({"values": values, "sha256": digest(json.dumps(values))}))
        except OSError as error:
            _not_kept(file, error)
        return values


def _kept_values(file: Path) -> tuple[Any, str]:
    """(the values, None where there are none to use; what is wrong with the file)."""
    try:
        entry = json.loads(file.read_text(encoding="utf-8"))
        whole = entry["sha256"] == digest(json.dumps(entry["values"]))
        return (entry["values"], "") if whole else (None, "its digest differs")
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, str(error)
