"""How close are the two languages at one layer? Cosines and retrieval over unit vectors; memory never grows with n²."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from src.config import MEASURES

with suppress(ModuleNotFoundError):  # shapes are checked in tests; a bare GPU machine need not have jaxtyping
    from jaxtyping import Bool, Float, Int

BLOCK = 2**24  # similarities held at once: 64 MiB of float32
SCRATCH = 2**20  # numbers compared or multiplied at once: what a cache holds
GROUP = 64  # columns per group in _mean_of_largest


def measure(
    source: Float[Tensor, "n d"],
    target: Float[Tensor, "n d"],
    relevant: Int[Tensor, "n k"],
    *,
    names: Sequence[str] = MEASURES,
    fitted_on: tuple[Float[Tensor, "m d"], Float[Tensor, "m d"]] | None = None,
) -> dict[str, float]:
    """Computes the named measures of n pairs of unit vectors; row i of `source` and `target` is pair i.

    Row i of `relevant` holds the columns that count as right for source i, i among them, padded with -1.
    Cosines and `mexa` are means over pairs. Retrieval (`nn_p_at_1`, `csls_p_at_1`, `csls_p_at_5`, `mrr`,
    `procrustes_p_at_1`) is a mean over source words, P@1 as in MUSE and VecMap: see `source_words`. A wrong target
    takes a rank for each pair that lists it, which `csls_p_at_5` and `mrr` see. The mismatched cosine averages all
    i ≠ j. These include a word's other listed translations, a few of n².
    `procrustes_p_at_1` is left out unless `fitted_on` gives the (source, target) to fit the rotation on.
    One pair alone has no mismatches: its margin is 0 and its retrieval measures are 1.
    Raises ValueError for no pairs, an unknown name, or a vector that isn't finite.
    """
    if unknown := set(names) - set(MEASURES):
        raise ValueError(f"unknown measure {sorted(unknown)[0]!r}: choose from {', '.join(MEASURES)}")
    wanted = [name for name in names if name != "procrustes_p_at_1" or fitted_on is not None]
    _check(source, target)
    found: dict[str, float] = {}
    if {"pair_cosine", "mismatched_cosine", "margin"} & set(wanted):
        found |= _margin(source, target)
    if "centred_cosine" in wanted:
        found["centred_cosine"] = pair_cosines(_recentred(source), _recentred(target)).mean().item()
    if asked := set(wanted) & {"nn_p_at_1", "csls_p_at_1", "csls_p_at_5", "mrr", "mexa"}:
        found |= _retrieval(source, target, relevant, asked)
    if "procrustes_p_at_1" in wanted and fitted_on is not None:
        rotated = _rotated(source, *fitted_on)
        found["procrustes_p_at_1"] = _share(csls_ranks(rotated, target, relevant)[_first_pairs(source, relevant)] == 1)
    return {name: found[name] for name in wanted}


def bytes_held(n: int, d: int) -> int:
    """The most bytes that `measure` of n pairs holds: blocks of similarities, vectors in several forms, a rotation."""
    return 4 * (3 * min(n * n, BLOCK) + 16 * n * d + 8 * min(n, d) ** 2)


def pair_cosines(source: Float[Tensor, "n d"], target: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """The cosine of each pair of unit vectors, in float64: at an attention sink, gains lie in the sixth digit."""
    rows = max(1, SCRATCH // (4 * source.shape[1]))
    blocks = zip(source.split(rows), target.split(rows), strict=True)
    return torch.cat([torch.linalg.vecdot(a.double(), b.double()) for a, b in blocks])


def source_words(source: Float[Tensor, "n d"], relevant: Int[Tensor, "n k"]) -> Int[Tensor, " n"]:
    """Numbers the source word of each pair, from 0: pairs of one word have the same vector and listed translations."""
    listed = relevant.cpu().sort(dim=1).values.numpy()
    first_of: dict[bytes, list[int]] = {}
    firsts = list(range(len(source)))
    for i in np.flatnonzero((listed >= 0).sum(axis=1) > 1).tolist():  # all others stand alone
        alike = first_of.setdefault(listed[i].tobytes(), [])
        firsts[i] = next((first for first in alike if torch.equal(source[first], source[i])), i)
        if firsts[i] == i:
            alike.append(i)
    return torch.tensor(firsts).unique(return_inverse=True)[1]


def _first_pairs(source: Float[Tensor, "n d"], relevant: Int[Tensor, "n k"]) -> Int[Tensor, " words"]:
    """The first pair of each source word; all of a word's pairs have the same rank."""
    words = source_words(source, relevant)
    first = torch.full((int(words.max()) + 1,), len(words))
    return first.scatter_reduce(0, words, torch.arange(len(words)), "amin").to(source.device)


def retrieval_ranks(
    source: Float[Tensor, "n d"], target: Float[Tensor, "n d"], relevant: Int[Tensor, "n k"]
) -> Int[Tensor, " n"]:
    """Rank (from 1) of each source's best listed translation among all targets, by cosine; ties count against it."""
    _check(source, target)
    return _compare(source, target, relevant, csls=False, mexa=False).plain


def csls_ranks(
    source: Float[Tensor, "n d"], target: Float[Tensor, "n d"], relevant: Int[Tensor, "n k"], neighbours: int = 10
) -> Int[Tensor, " n"]:
    """The same ranks by CSLS (Conneau et al. 2018), which discounts targets that lie near everything.

    With fewer than `neighbours` words, all of them are neighbours.
    """
    _check(source, target)
    return _compare(source, target, relevant, csls=True, mexa=False, neighbours=neighbours).csls


def _check(source: Float[Tensor, "n d"], target: Float[Tensor, "n d"]) -> None:
    if len(source) == 0:
        raise ValueError("no pairs to measure")
    # NaN is both the lowest and the highest; `isfinite` of every number would take ten times as long
    if not all(extreme.isfinite() for vectors in (source, target) for extreme in vectors.aminmax()):
        raise ValueError("a vector isn't finite: NaN would compare as the best match")


def _margin(source: Float[Tensor, "n d"], target: Float[Tensor, "n d"]) -> dict[str, float]:
    """Mean cosine of pairs and, without ever forming the n² others, of mismatches: (Σa·Σb − Σ a_i·b_i) / n(n−1)."""
    n = len(source)
    diagonal = pair_cosines(source, target).sum().item()
    everything = (source.sum(0, dtype=torch.float64) @ target.sum(0, dtype=torch.float64)).item()
    pair = diagonal / n
    mismatched = (everything - diagonal) / (n * (n - 1)) if n > 1 else pair
    return {"pair_cosine": pair, "mismatched_cosine": mismatched, "margin": pair - mismatched}


def _recentred(vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Unit vectors again, after taking away their mean; one that equals the mean becomes zero, not noise."""
    centred = vectors.float() - vectors.mean(0, dtype=torch.float64).float()
    norms = centred.norm(dim=1, keepdim=True)
    return centred.div_(norms.where(norms > 1e-6, torch.inf))


def _rotated(
    vectors: Float[Tensor, "n d"], source: Float[Tensor, "m d"], target: Float[Tensor, "m d"]
) -> Float[Tensor, "n d"]:
    """Unit vectors after the orthogonal map that brings `source` nearest to `target` (Schönemann 1966).

    Fewer pairs than dimensions say nothing of what is orthogonal to all of them: that part of a vector is left out,
    where a whole map would turn it at random, at a cost that grows with d³. In float64: beside the one direction that
    all vectors share at an attention sink, float32 would turn the others as its rounding has it.
    """
    _check(source, target)
    source, target, vectors = source.double(), target.double(), vectors.double()
    if len(source) >= source.shape[1]:
        left, _, right = torch.linalg.svd(source.T @ target)
        # few vectors: each first, not d³ for the whole map
        return torch.linalg.multi_dot([vectors, left, right]).float()
    basis, seen = torch.linalg.qr(source.T)
    other_basis, other_seen = torch.linalg.qr(target.T)
    left, _, right = torch.linalg.svd(seen @ other_seen.T)
    return functional.normalize(vectors @ basis @ (left @ right) @ other_basis.T).float()


def _retrieval(
    source: Float[Tensor, "n d"], target: Float[Tensor, "n d"], relevant: Int[Tensor, "n k"], asked: set[str]
) -> dict[str, float]:
    csls = bool(asked & {"csls_p_at_1", "csls_p_at_5"})
    seen = _compare(source, target, relevant, csls=csls, mexa="mexa" in asked)
    words = _first_pairs(source, relevant)
    plain, by_csls = seen.plain[words], seen.csls[words]
    return {
        "nn_p_at_1": _share(plain == 1),
        "mrr": plain.double().reciprocal().mean().item(),
        "csls_p_at_1": _share(by_csls == 1),
        "csls_p_at_5": _share(by_csls <= 5),
        "mexa": _share(seen.mexa),
    }


def _share(hits: Bool[Tensor, " n"]) -> float:
    return hits.double().mean().item()


class _Compared(NamedTuple):
    """What one comparison of all sources with all targets yields; parts nobody asked for are left at zero."""

    plain: Int[Tensor, " n"]
    csls: Int[Tensor, " n"]
    mexa: Bool[Tensor, " n"]


def _compare(
    source: Float[Tensor, "n d"],
    target: Float[Tensor, "n d"],
    relevant: Int[Tensor, "n k"],
    *,
    csls: bool,
    mexa: bool,
    neighbours: int = 10,
) -> _Compared:
    """Ranks and MEXA in one pass over the rows of S, and one over its columns where CSLS or MEXA need them."""
    n = len(source)
    own = torch.arange(n, device=source.device)
    words = _first_pairs(source, relevant)  # a word counts once among a target's neighbours, as in MUSE
    relevant = relevant.to(source.device, torch.int64)
    relevant = relevant.where(relevant >= 0, own[:, None])  # the padding repeats the row's own column, always right
    a, b, tie = _spread_out(source, target)
    plain, by_csls, unique = own.new_zeros(n), own.new_zeros(n), own.new_zeros(n, dtype=torch.bool)
    whole = torch.mm(a, b.T) if n * n <= BLOCK else None
    crowding = column_best = None
    if csls or mexa:
        blocks = _blocks(b, a[words]) if whole is None else [(slice(0, n), whole[words].T.contiguous())]
        crowding, column_best = _columns(blocks, relevant[words], n, neighbours if csls else 0, mexa)
    for rows, block in _blocks(a, b) if whole is None else [(slice(0, n), whole)]:
        columns = relevant[rows]
        right = block.gather(1, columns)
        diagonal = block.gather(1, own[rows, None])[:, 0]
        block.scatter_(1, columns, -torch.inf)  # from here on a row holds only what counts as wrong
        if column_best is not None:
            unique[rows] = diagonal > torch.maximum(block.amax(1), column_best[rows]) + tie
        plain[rows] = 1 + _reach(block, right.amax(1) - tie)
        if crowding is not None:
            block.sub_(crowding)
            by_csls[rows] = 1 + _reach(block, (right - crowding[columns]).amax(1) - tie)
    return _Compared(plain, by_csls, unique)


def _spread_out(
    source: Float[Tensor, "n d"], target: Float[Tensor, "n d"]
) -> tuple[Float[Tensor, "n d2"], Float[Tensor, "n d2"], float]:
    """Vectors whose products are the cosines less one constant, and the difference below which two of them tie.

    Where all cosines are 0.9999, float32 would round the differences between them away. With any fixed m,
    a·b = (a−m)·(b−m) + (a−m)·m + (b−m)·m + m·m; the last is dropped and the middle two ride in extra columns.
    """
    middle = ((source.sum(0, dtype=torch.float64) + target.sum(0, dtype=torch.float64)) / (2 * len(source))).float()
    width = source.shape[1]
    a, b = (torch.empty(len(source), width + 2, device=source.device) for _ in range(2))
    norm = 1.0
    for whole, vectors, first, second in ((a, source, width, width + 1), (b, target, width + 1, width)):
        centred = whole[:, :width].copy_(vectors).sub_(middle)
        whole[:, first] = centred @ middle
        whole[:, second] = 1
        norm *= centred.norm(dim=1).max().item()
    return a, b, 4 * torch.finfo(torch.float32).eps * norm + 1e-9


def _blocks(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Iterator[tuple[slice, Float[Tensor, "rows n"]]]:
    """Rows of a @ b.T, a block at a time, in one buffer that the caller may write to."""
    rows = max(1, min(len(a), BLOCK // len(b)))
    buffer = torch.empty(rows, len(b), device=a.device)
    for start in range(0, len(a), rows):
        part = slice(start, min(start + rows, len(a)))
        yield part, torch.mm(a[part], b.T, out=buffer[: part.stop - start])


def _columns(
    blocks: Iterable[tuple[slice, Tensor]], relevant: Int[Tensor, "words k"], n: int, neighbours: int, mexa: bool
) -> tuple[Float[Tensor, " n"] | None, Float[Tensor, " n"] | None]:
    """For each of n targets: half its mean cosine to its nearest sources, and its highest cosine to a wrong source.

    `relevant` holds the right columns of each source word.
    """
    crowding = torch.empty(n, device=relevant.device) if neighbours else None
    best = torch.empty(n, device=relevant.device) if mexa else None
    columns, order = relevant.flatten().sort()
    sources = order // relevant.shape[1]
    for part, block in blocks:
        if crowding is not None:
            crowding[part] = _mean_of_largest(block, min(neighbours, len(relevant))) / 2
        if best is not None:
            low, high = torch.searchsorted(columns, columns.new_tensor([part.start, part.stop])).tolist()
            block[columns[low:high] - part.start, sources[low:high]] = -torch.inf
            best[part] = block.amax(1)
    return crowding, best


def _mean_of_largest(block: Float[Tensor, "rows n"], k: int) -> Float[Tensor, " rows"]:
    """Mean of each row's k largest entries; they lie in the k groups of columns with the largest maxima."""
    n = block.shape[1]
    if n < 4 * k * GROUP:
        return block.topk(k, dim=1, sorted=False).values.mean(1)
    whole = n // GROUP * GROUP
    groups = block[:, :whole].unflatten(1, (-1, GROUP))
    chosen = groups.amax(2).topk(k, dim=1, sorted=False).indices
    kept = groups.gather(1, chosen[:, :, None].expand(-1, -1, GROUP)).flatten(1)
    return torch.cat([kept, block[:, whole:]], dim=1).topk(k, dim=1, sorted=False).values.mean(1)


def _reach(block: Float[Tensor, "rows n"], threshold: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """How many entries of each row reach its threshold."""
    counts = block.new_empty(len(block))
    for part in range(0, len(block), rows := max(1, SCRATCH // block.shape[1])):
        some = block[part : part + rows]
        # ones and zeros in float32 add up four times as fast as booleans do, and exactly up to 2**24
        counts[part : part + rows] = torch.ge(
            some, threshold[part : part + rows, None], out=torch.empty_like(some)
        ).sum(1)
    return counts.long()
