"""Numbers that aren't finite end a job, with their likely cause: none of them may come to be a result."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from src.errors import NumbersError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_sound: WeakSet[nn.Module] = WeakSet()


def check_weights(model: nn.Module) -> None:
    """Raises NumbersError naming a weight that holds a NaN or an infinity; each model is looked through once."""
    if model in _sound:
        return
    if name := _damaged(model):
        raise NumbersError(f"the weight {name} holds numbers that aren't finite: {_anew(model)}")
    _sound.add(model)


def likely_cause(model: nn.Module) -> str:
    """What to do about a model whose output isn't finite; an adapter that is attached is taken for the cause."""
    if name := _damaged(model):
        return f"the weight {name} isn't finite either: {_anew(model)}"
    half = _dtype(model) == torch.float16
    narrow = "model.dtype=float16 ends at 65504: set bfloat16 or float32" if half else ""
    if any("lora_" in name for name, _ in model.named_parameters()):
        return f"lower train.learning_rate{f'; or {narrow}' if narrow else ''}"
    return narrow or f"the weights make numbers too large for float32, or all zero: {_anew(model)}"


def _anew(model: nn.Module) -> str:
    if _dtype(model) == torch.float16:
        return "the model's files are damaged (get them anew), or set model.dtype=bfloat16: float16 ends at 65504"
    return "the model's files are damaged, get them anew"


def _damaged(model: nn.Module) -> str | None:
    """The first weight of the model itself, adapters aside, that isn't finite."""
    for name, numbers in _weights(model):
        smallest, largest = torch.aminmax(numbers)  # one pass, no copy; a NaN passes through
        if not (smallest.isfinite() & largest.isfinite()):
            return name.replace("base_model.model.", "").replace(".base_layer", "")
    return None


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and numbers of the model's weights; of packed ones the scales, which aren't finite where a weight isn't."""
    for name, weight in chain(model.named_parameters(), model.named_buffers()):
        packed: Any = weight
        state = getattr(packed, "quant_state", None)
        scales = [getattr(packed, "SCB", None), getattr(state, "absmax", None), getattr(state, "offset", None)]
        scales.append(getattr(getattr(state, "state2", None), "absmax", None))
        for numbers in [weight.detach(), *scales]:
            if numbers is None or numbers.dtype not in _FLOATS or numbers.is_meta or not numbers.numel():
                continue
            if "lora_" not in name:
                yield name, numbers
    for name, module in model.named_modules():  # 8-bit scales leave their weight for this state at the first forward
        scales = getattr(getattr(module, "state", None), "SCB", None)
        if isinstance(scales, Tensor) and scales.numel():
            yield f"{name}.weight", scales


def _dtype(model: nn.Module) -> torch.dtype:
    return next((numbers.dtype for name, numbers in _weights(model) if "norm" not in name), torch.float32)
