"""The layer convention, the forward that stops at a layer, and the encoding of words at every layer.

Layers are numbered by hidden state: 0 is the input embeddings, k (1…N) the residual stream after block k,
"final" what follows the model's final norm. This file alone turns them into indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from src.errors import NumbersError, UserError
from src.finite import likely_cause
from src.memory import halved, ran_out

with suppress(ModuleNotFoundError):  # shapes are checked in tests; a bare GPU machine need not have jaxtyping
    from jaxtyping import Bool, Float, Int

Layer = int | Literal["final"]
Pooling = Literal["mean", "last"]
Progress = Callable[[Sequence[Any], str], Iterable[Any]]

# Tokens a batch of encoding may hold. Each weight is fetched once a batch: 4096 take 0.9 of the time of 512 on a CPU.
TOKEN_BUDGET = 4096


# --- the convention -----------------------------------------------------------------------------------------


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder's blocks, block 1 first. Raises UserError where the architecture has no such list."""
    count = depth(model)
    for module in _decoder(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(
        f"model.id: {type(model).__name__} is no decoder with a list of {count} blocks, so it has no layers"
    )


def depth(model: nn.Module) -> int:
    """N, the number of blocks."""
    return text_config(model).num_hidden_layers


def width(model: nn.Module) -> int:
    """d, the width of a hidden state."""
    return text_config(model).hidden_size


def all_layers(n_layers: int) -> list[Layer]:
    """0, 1, …, N, "final"."""
    return [*range(n_layers + 1), "final"]


def step(layer: Layer, n_layers: int) -> int:
    """Where a layer stands on a plot's or MLflow's axis: its number, and N+1 for "final"."""
    return n_layers + 1 if layer == "final" else layer


def peft_indices(layers: Sequence[int]) -> list[int]:
    """PEFT's 0-based `layers_to_transform` for the blocks that produce these layers."""
    return [layer - 1 for layer in layers]


# --- from words to token ids --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """Token ids of one word in its template; positions start…stop-1 are pooled."""

    ids: tuple[int, ...]
    start: int
    stop: int


def distinct_prompts(prompts: Sequence[Prompt], *, as_batched: bool = False) -> tuple[list[Prompt], list[int]]:
    """(distinct prompts, where each of the prompts stands among them).

    `as_batched` has those that begin alike stand together: batch after batch then fills a file from its beginning on.
    """
    alike = sorted(set(prompts), key=lambda prompt: (prompt.ids, prompt.start, prompt.stop)) if as_batched else prompts
    row_of = {prompt: row for row, prompt in enumerate(dict.fromkeys(alike))}
    return list(row_of), [row_of[prompt] for prompt in prompts]


def tokenize(
    words: Sequence[str],
    tokenizer: Any,
    *,
    template: str = "{word}",
    pooling: Pooling = "mean",
    exclude_bos: bool = True,
) -> list[Prompt]:
    """Tokenizes each word in the template and marks the tokens to pool.

    "mean" pools all tokens of a bare word (the paper, section 3), or, in a longer template, the tokens that
    overlap the word. "last" reads the prompt's last token (PromptEOL, Jiang et al. 2023).

    `exclude_bos` leaves out the special tokens that the tokenizer adds before and after a prompt: a BOS, a prefix of
    several, an EOS. They are the same for every word, and the first is an attention sink. "last" then reads the last
    token before those at the end. In a longer template the mean never counts them.

    Raises UserError for a word that yields no token.
    """
    if not words:
        return []
    before = template.index("{word}")
    bare = template == "{word}"
    texts = [template.replace("{word}", word) for word in words]
    encoded = tokenizer(texts, return_offsets_mapping=not bare, return_special_tokens_mask=True)
    added = _added(texts, encoded, tokenizer)
    prompts = []
    for i, (word, ids, (leading, trailing)) in enumerate(zip(words, encoded["input_ids"], added, strict=True)):
        left_out = exclude_bos or (pooling == "mean" and not bare)
        first, end = (leading, len(ids) - trailing) if left_out else (0, len(ids))
        if pooling == "last":
            start, stop = end - 1, end
        elif bare:
            start, stop = first, end
        else:
            start, stop = _overlap(encoded["offset_mapping"][i], before, before + len(word), range(first, end))
        if not first <= start < stop:
            raise UserError(f"the word {word!r} yields no token of this model's vocabulary: take it out of the pairs")
        prompts.append(Prompt(tuple(ids), start, stop))
    return prompts


def _added(texts: Sequence[str], encoded: Mapping[str, Any], tokenizer: Any) -> list[tuple[int, int]]:
    """How many special tokens the tokenizer adds (before, after) each text.

    Of those that its mask marks at either end, as many as the text has more than without special tokens: some mask
    the text's own, where it spells one or is unknown.
    """
    masks = encoded["special_tokens_mask"]
    if not any(map(any, masks)):
        if tokenizer(texts[:1], add_special_tokens=False)["input_ids"][0] == encoded["input_ids"][0]:
            return [(0, 0)] * len(texts)
        masks = [[1] * len(ids) for ids in encoded["input_ids"]]  # a tokenizer that adds tokens and marks none
    bare = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [_around(*text) for text in zip(encoded["input_ids"], bare, masks, strict=True)]


def _around(ids: Sequence[int], own: Sequence[int], mask: Sequence[int]) -> tuple[int, int]:
    """(before, after) of one text, from its ids with special tokens, its own ids and the mask of special ones."""
    more = max(0, len(ids) - len(own))
    leading, trailing = (mask.index(0), mask[::-1].index(0)) if 0 in mask else (len(mask), len(mask))
    for first in range(min(more, leading), -1, -1):
        if more - first <= trailing and list(ids[first : first + len(own)]) == list(own):
            return first, more - first
    first = min(more, leading)
    return first, min(more - first, trailing)


def _overlap(offsets: Sequence[tuple[int, int]], start: int, stop: int, among: range) -> tuple[int, int]:
    inside = [i for i in among if offsets[i][0] < stop and offsets[i][1] > start]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


# --- the forward --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Below:
    """Hidden states of tokens that a block is given: a forward can begin there, and those below needn't run.

    `rows` finds a token's row among them by that of the token before it (-1 for none) and its own id.
    """

    block: int
    rows: Mapping[tuple[int, int], int]
    states: Float[Tensor, "tokens d"]

    @property
    def layer(self) -> int:
        """Whose hidden states they are."""
        return self.block - 1


@dataclass(frozen=True)
class Batch:
    """Token ids, the matrix that pools each row's prompts out of the row's tokens, and where each prompt then stands.

    `position_ids` and `sees`, which token attends to which, belong to a packed batch; a stacked one needs neither.
    `below` is what is known of the batch's hidden states, `tokens` each token's row of it, -1 where a row is padded.
    """

    input_ids: Int[Tensor, "rows length"]
    pool: Float[Tensor, "rows most length"]
    places: Int[Tensor, " prompts"]  # among the rows × most that pooling gives
    position_ids: Int[Tensor, "rows length"] | None = None
    sees: Bool[Tensor, "rows 1 length length"] | None = None
    tokens: Int[Tensor, "rows length"] | None = None
    below: Below | None = None


def stacked(prompts: Sequence[Prompt]) -> Batch:
    """A batch of prompts with the same number of tokens, one a row: nothing is padded, on any architecture."""
    input_ids = torch.tensor([prompt.ids for prompt in prompts])
    pool = torch.zeros(len(prompts), 1, input_ids.shape[1])
    for row, prompt in enumerate(prompts):
        pool[row, 0, prompt.start : prompt.stop] = 1 / (prompt.stop - prompt.start)
    return Batch(input_ids, pool, torch.arange(len(prompts)))


def packed(prompts: Sequence[Prompt], below: Below | None = None) -> Batch:
    """A batch whose rows are trees of the prompts' tokens, where what several begin with stands once.

    A token sees its own beginning alone, so its hidden state is the one that its prompt by itself would give it; a
    BOS, a template and the first syllables that words share are run once. `packs` checks that the model keeps to it.
    `below` knows all of the prompts' tokens.
    """
    return _in_rows(prompts, _rows(prompts), below)


def _in_rows(prompts: Sequence[Prompt], members: Sequence[Sequence[int]], below: Below | None = None) -> Batch:
    """The batch whose rows are the trees of these members, places among the prompts."""
    trees = [Tree([prompts[place] for place in row]) for row in members]
    length, most = max(len(tree.tokens) for tree in trees), max(len(row) for row in members)
    # Filled as NumPy's, whose single elements are ten times as fast to set as a tensor's: this is done at each step.
    input_ids = np.zeros((len(trees), length), np.int64)
    position_ids = np.zeros_like(input_ids)
    sees = np.tile(np.eye(length, dtype=bool), (len(trees), 1, 1, 1))  # what pads a row sees itself
    pool = np.zeros((len(trees), most, length), np.float32)
    places = np.empty(len(prompts), np.int64)
    for row, tree in enumerate(trees):
        n = len(tree.tokens)
        input_ids[row, :n] = tree.tokens
        position_ids[row, :n] = tree.depths
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                sees[row, 0, node] |= sees[row, 0, parent]
        for at, (place, path) in enumerate(zip(members[row], tree.paths, strict=True)):
            prompt = prompts[place]
            pool[row, at, path[prompt.start : prompt.stop]] = 1 / (prompt.stop - prompt.start)
            places[place] = row * most + at
    tokens = None
    if below:
        rows = [tree.rows_of(below) for tree in trees]
        tokens = torch.tensor([row + [-1] * (length - len(row)) for row in rows])
    return Batch(*map(torch.from_numpy, (input_ids, pool, places, position_ids, sees)), tokens=tokens, below=below)


# Tokens. Matrix products don't care how a batch is cut into rows, attention's cost grows with their length.
_ROW = 32  # the shortest that is tried
_AS_MUCH = 2000  # of a row whose attention costs as much again as the products (SmolLM2 on a CPU)


def _rows(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Places of the prompts of each row: cut so that padding, repeated beginnings and attention cost least together."""
    order, lengths, new = _in_order(prompts)
    costs: list[tuple[float, list[int]]] = []
    capacity = max(_ROW, *lengths)
    while not costs or (len(costs[-1][1]) > 1 and capacity <= _longest_row(max(lengths))):
        starts, longest = _cut(lengths, new, capacity)
        costs.append((len(starts) * longest * (1 + longest / _AS_MUCH), starts))
        capacity += capacity // 8
    _, starts = min(costs)
    return _parts(order, starts)


def _longest_row(longest: int) -> int:
    """Tokens of the longest row that is worth trying, where all of a prompt but its last token may be shared.

    With n tokens that aren't shared, a row of r tokens holds r - longest of them, so that all rows cost
    n · r · (1 + r / _AS_MUCH) / (r - longest): this r makes it least.
    """
    return max(_ROW, longest + math.isqrt(longest**2 + _AS_MUCH * longest))


def _in_order(prompts: Sequence[Prompt]) -> tuple[list[int], list[int], list[int]]:
    """(places of the prompts, those that begin alike together; their tokens; those not shared with the one before)."""
    order = sorted(range(len(prompts)), key=lambda place: prompts[place].ids)
    ordered = [prompts[place].ids for place in order]
    new = [len(ids) - _shared(ids, before) for ids, before in zip(ordered, [(), *ordered], strict=False)]
    return order, [len(ids) for ids in ordered], new


def _cut(lengths: Sequence[int], new: Sequence[int], capacity: int) -> tuple[list[int], int]:
    """(where trees of at most so many tokens begin, the largest one's tokens).

    A prompt brings a tree all its tokens if it is the first, and else those that it doesn't share with the one before.
    """
    starts: list[int] = []
    size, longest = capacity, 0
    for place, (length, added) in enumerate(zip(lengths, new, strict=True)):
        size += added
        if size > capacity:
            starts.append(place)
            size = length
        longest = max(longest, size)
    return starts, longest


def _parts(order: Sequence[int], starts: Sequence[int]) -> list[list[int]]:
    return [list(order[start:stop]) for start, stop in pairwise([*starts, len(order)])]


class Tree:
    """The tokens of prompts as nodes, a parent before its children, and each prompt's path of nodes."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self.parents: list[int] = []
        self.paths: list[list[int]] = []
        self.nodes = nodes = dict[tuple[int, int], int]()  # by parent and token
        for prompt in prompts:
            path = [-1]
            for depth, token in enumerate(prompt.ids):
                key = (path[-1], token)
                if key not in nodes:
                    nodes[key] = len(nodes)
                    self.tokens.append(token)
                    self.depths.append(depth)
                    self.parents.append(path[-1])
                path.append(nodes[key])
            self.paths.append(path[1:])

    def rows_of(self, below: Below) -> list[int]:
        """Each node's row among the known hidden states."""
        rows: list[int] = []
        for token, parent in zip(self.tokens, self.parents, strict=True):
            rows.append(below.rows[rows[parent] if parent >= 0 else -1, token])
        return rows


def tree_size(prompts: Sequence[Prompt]) -> int:
    """Tokens of the tree of all of the prompts, where what several begin with counts once."""
    return sum(_in_order(prompts)[2])


def pooled_states(
    model: nn.Module, batch: Batch, layers: Sequence[Layer]
) -> Iterator[tuple[Layer, Float[Tensor, "prompts d"]]]:
    """Unit vectors of a batch's prompts at each of the layers, in order of depth; blocks above the last don't run.

    Nor do those that the batch's `below` spares, where all of the layers are above it. Pooling happens inside the
    forward, so that a layer's hidden states are gone before the next layer's exist.
    """
    read: dict[Layer, Tensor] = {}
    device = _input_device(model)
    matrix, places = batch.pool.to(device), batch.places.to(device)
    with (
        read_states(model, layers, lambda layer, hidden: read.__setitem__(layer, _pool(hidden, matrix, places))),
        _resumed(model, batch, layers),
    ):
        output = forward(model, batch)
        if "final" in layers:
            read["final"] = _pool(output, matrix, places)
    yield from read.items()


def forward(model: nn.Module, batch: Batch) -> Float[Tensor, "rows length d"]:
    """The last hidden states, after the final norm."""
    device = _input_device(model)
    kwargs = {}
    if batch.position_ids is not None and batch.sees is not None:
        kwargs = {"position_ids": batch.position_ids.to(device), "attention_mask": _mask(model, batch.sees.to(device))}
    return _decoder(model)(input_ids=batch.input_ids.to(device), use_cache=False, **kwargs)[0]


def _mask(model: nn.Module, sees: Bool[Tensor, "rows 1 length length"]) -> Tensor:
    """Which token attends to which, as the model's attention takes it: "eager" adds it to the scores."""
    if getattr(model.config, "_attn_implementation", None) != "eager":
        return sees
    dtype = embeddings(model).weight.dtype
    return torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)


@contextmanager
def _resumed(model: nn.Module, batch: Batch, layers: Sequence[Layer]) -> Iterator[None]:
    """Has a forward that reads layers above what the batch knows go on from there: the blocks up to it do nothing.

    The decoder's own code still makes positions and masks, as each architecture wants them.
    """
    below, tokens = batch.below, batch.tokens
    if below is None or tokens is None or not all(layer == "final" or layer > below.layer for layer in layers):
        yield
        return
    states = below.states[tokens]
    stack = blocks(model)

    def give(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        here = states.to(_input_device(model))
        return ((here, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": here})

    handle = stack[below.layer].register_forward_pre_hook(give, with_kwargs=True)
    skipped = list(stack)[: below.layer]
    own = [block.__dict__.get("forward") for block in skipped]  # accelerate puts one there
    try:
        for block in skipped:
            block.forward = _nothing
        yield
    finally:
        handle.remove()
        for block, before in zip(skipped, own, strict=True):
            del block.forward
            if before:
                block.forward = before


def _nothing(hidden_states: Any, *_args: Any, **_kwargs: Any) -> tuple[Any]:
    """In a block's place; a tuple for the decoders that expect one, and most don't look at what is in it."""
    return (hidden_states,)


@contextmanager
def read_states(model: nn.Module, layers: Sequence[Layer], read: Callable[[Layer, Tensor], None]) -> Iterator[None]:
    """Hooks that hand each wanted layer's hidden states to `read`, and end the block's forward at the deepest one.

    A hook on the blocks works for every decoder and leaves the model as it was, unlike cutting its list of blocks.
    """
    numbers = [layer for layer in layers if layer != "final"]
    last = None if "final" in layers else max(numbers)
    stack = blocks(model)

    def before_first(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        read(0, args[0] if args else kwargs["hidden_states"])
        if last == 0:
            raise _Stop

    def after(layer: int) -> Callable[[nn.Module, tuple, Any], None]:
        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            read(layer, output[0] if isinstance(output, (tuple, list)) else output)
            if layer == last:
                raise _Stop

        return hook

    handles = [stack[layer - 1].register_forward_hook(after(layer)) for layer in numbers if layer > 0]
    if 0 in numbers:
        handles.append(stack[0].register_forward_pre_hook(before_first, with_kwargs=True))
    try:
        with suppress(_Stop):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Stop(Exception):  # noqa: N818 (not an error: the forward has gone as deep as it must)
    pass


def packs(model: nn.Module, prompts: Sequence[Prompt]) -> bool:
    """Whether these prompts may be packed: tried on the model, and again where one is longer than any before.

    A row as long as the longest that such prompts can make is run twice, with another token in one of its words. No
    other word's vector may change at any layer: a state, a convolution or a mask of the model's own would carry the
    change over. And the vectors must be those of the words by themselves: a window, positions or a mask that go by the
    place in the row would make others. Both hold to the bit or to the model's rounding, which is measured.

    A model whose trial raises isn't packed. Nor are prompts longer than a window of its attention: the batch says
    itself what each token sees, so the window would be lost.
    """
    longest = max(4, *(len(prompt.ids) for prompt in prompts))
    if any(longest > window for window in _windows(model)):
        return False
    tried = _packing.setdefault(_decoder(model), {})
    if not tried:  # a short row first: one that is longer than a table of positions would end a GPU's process
        tried[0] = _keeps_apart(model, 4, 16)
    for length, apart in tried.items():
        if longest <= length if apart else longest >= length:
            return apart
    tried[longest] = _keeps_apart(model, longest, _longest_row(longest))
    return tried[longest]


_packing: WeakKeyDictionary[nn.Module, dict[int, bool]] = WeakKeyDictionary()  # by the longest prompt's tokens


def _windows(model: nn.Module) -> list[int]:
    """How many tokens the attention of some blocks reaches back, by the names that configurations have for it."""
    names = ("sliding_window", "sliding_window_size", "window_size", "attention_window_size", "attention_chunk_size")
    found = [getattr(text_config(model), name, None) for name in names]
    return [window for window in found if isinstance(window, int) and window > 0]


def _keeps_apart(model: nn.Module, longest: int, row: int) -> bool:
    words, changed, other = _trial_words(model, longest, row)
    rest = [place for place in range(len(words)) if place != changed]
    some = sorted({0, rest[1], *rest[-2:]})
    alone = _parts_of([words[place] for place in some], one_row=False)
    try:
        with evaluating(model):
            apart = _at_all_layers(model, alone)
            with _rounded(model):
                rounded = _at_all_layers(model, alone)
            together = _at_all_layers(model, _parts_of(words, one_row=True))
            beside = _at_all_layers(model, _parts_of([*words[:changed], other, *words[changed + 1 :]], one_row=True))
            rounding = _distance(apart, rounded)
            if (rounding > 0.5).any():  # the trial would take anything for rounding
                return False
            moved = _distance(together[:, rest], beside[:, rest])
            # Experts and 8-bit products take several words together, so that another token rounds them otherwise.
            if moved.any() and ((moved > rounding).any() or _reaches(model, words, changed)):
                return False
    except Exception as error:  # an architecture that takes no such positions or mask
        if ran_out(error):
            raise
        return False
    return bool((_distance(together[:, some], apart) <= 2 * rounding + 1e-6).all())  # which pooling itself rounds


def _trial_words(model: nn.Module, longest: int, row: int) -> tuple[list[tuple[int, ...]], int, tuple[int, ...]]:
    """(words of `longest` tokens whose tree has `row` tokens, or 4 more than one; a place; that word with another end).

    The first, the last and the one at the place, half-way, share all but two tokens. Of the others one shares what
    there is no room for, and the rest nothing.
    """
    config, chance = text_config(model), np.random.default_rng(0)
    special = np.hstack([getattr(config, f"{name}_token_id", None) or 0 for name in ("pad", "bos", "eos")])
    ids = np.setdiff1d(np.arange(min(1000, config.vocab_size)), special)
    full, over = divmod(max(0, row - longest - 4), longest)
    first, *fill = chance.choice(ids, (1 + full + (over > 0), longest)).tolist()
    if over:
        fill[0][:-over] = first[:-over]
    ends = chance.choice(ids, 4, replace=False).tolist()
    one, middle, last = ([*first[:-2], end, end] for end in ends[:3])
    half = len(fill) // 2
    words = [one, *fill[:half], middle, *fill[half:], last]
    return [tuple(word) for word in words], 1 + half, (*middle[:-1], ends[3])


def _reaches(model: nn.Module, words: Sequence[tuple[int, ...]], changed: int) -> bool:
    """Whether the last token of one word has a part in the other words' vectors: else its gradient is 0 to the bit."""
    inputs: list[Tensor] = []

    def watch(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        states = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        inputs.append(states)
        return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

    handle = blocks(model)[0].register_forward_pre_hook(watch, with_kwargs=True)
    try:
        with torch.enable_grad():
            vectors = _at_all_layers(model, _parts_of(words, one_row=True))[-1]
            weights = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0))
            weights[changed] = 0
            (gradient,) = torch.autograd.grad((vectors * weights).sum(), inputs)
    finally:
        handle.remove()
    node = Tree([Prompt(word, 0, 1) for word in words]).paths[changed][-1]
    return bool(gradient[0, node].any())


def _parts_of(words: Sequence[tuple[int, ...]], *, one_row: bool) -> Batch:
    """A batch of words, all in one row or each in its own, that pools two tokens at each one's start, middle, end."""
    starts = (0, len(words[0]) // 2, len(words[0]) - 2)
    if one_row:
        parts = [Prompt(word, start, start + 2) for word in words for start in starts]
        return _in_rows(parts, [range(len(parts))])
    pool = torch.zeros(len(words), len(starts), len(words[0]))
    for part, start in enumerate(starts):
        pool[:, part, start : start + 2] = 0.5
    return Batch(torch.tensor(words), pool, torch.arange(len(words) * len(starts)))


def _at_all_layers(model: nn.Module, batch: Batch) -> Float[Tensor, "layers words parts_d"]:
    states = torch.stack([found.cpu() for _, found in pooled_states(model, batch, all_layers(depth(model)))])
    return states.reshape(len(states), len(batch.places) // 3, -1)


def _distance(some: Float[Tensor, "layers n d"], others: Float[Tensor, "layers n d"]) -> Float[Tensor, " layers"]:
    """The largest at each layer."""
    return (some - others).norm(dim=-1).amax(dim=-1)


@contextmanager
def _rounded(model: nn.Module) -> Iterator[None]:
    """Has what each block is given change by one rounding, up or down at random.

    How far the vectors go shows what rounding alone does to this model: it depends on the type, depth and weights.
    """
    chance = torch.Generator().manual_seed(0)
    quantised = getattr(model, "is_quantized", False)  # products are then rounded to 8 bits, or to bfloat16

    def change(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        states = args[0] if args else kwargs["hidden_states"]
        up = torch.randint(2, states.shape, generator=chance).to(states.device, states.dtype)
        eps = torch.finfo(torch.bfloat16 if quantised else states.dtype).eps
        states = states * (1 + eps * (2 * up - 1))
        return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

    handles = [block.register_forward_pre_hook(change, with_kwargs=True) for block in blocks(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def trial_prompts(model: nn.Module) -> list[Prompt]:
    """Some prompts to see what a model does with: with a common beginning, and without."""
    top = min(1000, text_config(model).vocab_size)
    words = ((1, 2, 3, 4), (1, 2, 5, 6), (1, 7, 8, 9), (10, 2, 3, 4))
    return [Prompt(tuple(31 * token % top for token in word), 0, 4) for word in words]


# --- encoding -----------------------------------------------------------------------------------------------


def encode(
    model: nn.Module,
    prompts: Sequence[Prompt],
    *,
    layers: Sequence[Layer] | None = None,
    below: Below | None = None,
    progress: Progress | None = None,
) -> Float[Tensor, "layers prompts d"]:
    """Unit vectors of prompts at the given layers (all by default), float32 on the CPU, in the prompts' order.

    Each distinct prompt is run once. The result depends neither on the order nor on what else is in the batch, but for
    the last bits.
    """
    layers = all_layers(depth(model)) if layers is None else layers
    distinct, row_of = distinct_prompts(prompts)
    found = torch.empty(len(layers), len(distinct), width(model))
    for rows, vectors in encoded_batches(model, distinct, layers, below, progress):
        found[:, rows] = vectors
    return found[:, row_of] if len(distinct) < len(prompts) else found


def encoded_batches(
    model: nn.Module,
    prompts: Sequence[Prompt],
    layers: Sequence[Layer],
    below: Below | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[list[int], Float[Tensor, "layers rows d"]]]:
    """Yields (places among the prompts, their unit vectors) of one batch after the other.

    Packed where the model allows it; else batches of equal token count, in which nothing is padded either.
    Where memory runs out, that batch and the later ones are run in halves. Raises NumbersError for hidden states
    without a direction, OutOfMemoryError.
    """
    together = packs(model, prompts)
    batches = (similar_batches if together else _equal_length_batches)(prompts, TOKEN_BUDGET)
    form = partial(packed, below=below) if together else stacked
    place = {layer: index for index, layer in enumerate(layers)}

    def read(some: Sequence[Prompt], size: int) -> Float[Tensor, "layers rows d"]:
        vectors = torch.empty(len(layers), len(some), width(model))  # on the CPU: 8B's take a gigabyte a batch
        for part in (slice(start, start + size) for start in range(0, len(some), size)):
            for layer, states in pooled_states(model, form(some[part]), layers):
                vectors[place[layer], part] = states
        return vectors

    whole = True
    with evaluating(model):
        for rows in progress(batches, "Encoding words") if progress else batches:
            attempt = partial(read, [prompts[row] for row in rows])
            size = len(rows) if whole else -(-len(rows) // 2)
            vectors, used = halved("encoding", "prompts a batch", size, attempt, least=1 if whole else size)
            whole = whole and used == size
            if vectors.sum().isnan():
                raise NumbersError(_no_direction(model, layers, vectors))
            yield rows, vectors


def _no_direction(model: nn.Module, layers: Sequence[Layer], vectors: Float[Tensor, "layers rows d"]) -> str:
    layer = layers[int(vectors.isnan().flatten(1).any(dim=1).nonzero()[0])]
    return f"hidden states at layer {layer} are not finite, too large or all zero: {likely_cause(model)}"


def similar_batches(prompts: Sequence[Prompt], budget: int) -> list[list[int]]:
    """Places of prompts, those that begin alike together, whose trees have at most `budget` tokens."""
    order, lengths, new = _in_order(prompts)
    return _parts(order, _cut(lengths, new, budget)[0])


def _shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next(
        (i for i, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other), min(len(ids), len(others))
    )


def _equal_length_batches(prompts: Sequence[Prompt], budget: int) -> list[list[int]]:
    """Places of prompts with the same number of tokens, at most `budget` tokens in all."""
    batches: list[list[int]] = []
    length = 0
    for row in sorted(range(len(prompts)), key=lambda row: len(prompts[row].ids)):
        same = batches and len(prompts[row].ids) == length
        length = len(prompts[row].ids)
        if same and (len(batches[-1]) + 1) * length <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


# --- small parts --------------------------------------------------------------------------------------------


def _pool(
    hidden: Float[Tensor, "rows length d"], matrix: Float[Tensor, "rows most length"], places: Int[Tensor, " prompts"]
) -> Float[Tensor, "prompts d"]:
    """Unit vectors of the mean hidden states; NaN where there is none.

    A norm beyond float32 would make zeros of finite numbers, which look like a result.
    """
    mean = torch.bmm(matrix.to(hidden.device), hidden.float()).flatten(0, 1)[places.to(hidden.device)]
    norm = mean.norm(dim=-1, keepdim=True)
    return mean / norm.where((norm > 0) & (norm < torch.inf), torch.nan)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is put back afterwards.

    no_grad and not inference_mode: a forward may leave tensors in the model that training reads later (bitsandbytes
    keeps what it unpacks).
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _decoder(model: nn.Module) -> nn.Module:
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
    # Of some, get_decoder gives the whole model (Llama 4) or the matrix of the logits (ModernBERT's decoder).
    parts = [base.get_decoder(), base.base_model, getattr(base, "model", None)]
    return next((part for part in parts if part is not base and hasattr(part, "get_input_embeddings")), base)


def text_config(model: nn.Module) -> Any:
    """The configuration of the decoder, also where it is one part of a larger model."""
    config: Any = model.config
    return config.get_text_config(decoder=True)


def _input_device(model: nn.Module) -> torch.device:
    return embeddings(model).weight.device


def embeddings(model: nn.Module) -> Any:
    return _decoder(model).get_input_embeddings()  # pyright: ignore
