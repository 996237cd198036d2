"""Frozen linear layers on an AMD CPU, multiplied by oneDNN where torch itself takes the slower of its two libraries."""

from __future__ import annotations

import resource
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from src.machine import cpu_vendor


def library() -> str:
    """What multiplies a model's frozen float32 weights on this machine: "oneDNN", or what "torch" takes itself.

    torch takes MKL, which prefers Intel's processors: oneDNN has 1.05 to 1.2 times its rate on an AMD EPYC, and 0.73 to
    1.03 times on an Intel Xeon (`python -m bench.products`). Not where addresses are limited (`ulimit -v`, as some
    clusters have it): short of room for its code, oneDNN crashes.
    """
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    wanted = cpu_vendor() == "AuthenticAMD" and limits == [resource.RLIM_INFINITY] * 2
    return "oneDNN" if wanted and has_onednn() else "torch"


def has_onednn() -> bool:
    """Whether torch has the operator by which torch.compile multiplies on a CPU."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def multiply_by_onednn(model: nn.Module) -> None:
    """Has the model's linear layers multiply frozen float32 weights by oneDNN, on a CPU.

    Results differ from torch's in the last bits, as they do between numbers of threads.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = _Linear


def product(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """states @ weight.T + bias by oneDNN, float32, the weight in any layout. Passes no gradient on."""
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if (
            input.dtype is not torch.float32
            or weight.dtype is not torch.float32
            or weight.device.type != "cpu"
            or (torch.is_grad_enabled() and any(own.requires_grad for own in self.parameters(recurse=False)))
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()  # the compiler has ways of its own to multiply
        ):
            return functional.linear(input, weight, bias)
        return _Product.apply(input, weight, bias)


class _Product(torch.autograd.Function):
    """The product with a frozen weight: only what is multiplied has a gradient."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(states, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        return product(gradients[0], weight.T), None, None
