"""A model's linear layers multiply by oneDNN where that is right, and by torch's own product elsewhere."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from src import linear, models
from src.layers import packs
from src.linear import has_onednn, library, multiply_by_onednn
from src.models import LoadedModel, adapter, load_model
from src.training import Objective, Schedule, train
from tests.conftest import ROOT, model_config, quant_config
from tests.test_training import LORA, OWN, words


class Operators(TorchDispatchMode):
    """The names of all that torch computes in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def layer(*, bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    """(one that torch multiplies, the same for oneDNN)."""
    torch.manual_seed(0)
    plain = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    ours = copy.deepcopy(plain)
    multiply_by_onednn(ours)
    return plain, ours


def by_onednn(call) -> bool:
    with Operators() as seen:
        call()
    return any("linear_pointwise" in name for name in seen.names)


def states(*shape: int) -> Tensor:
    return torch.randn(*shape, 24, generator=torch.Generator().manual_seed(1))


def test_torch_here_has_onednn():
    """Where a new torch has lost the operator, all is slower and nothing else would say so."""
    assert has_onednn()


@pytest.mark.parametrize(("vendor", "takes"), [("AuthenticAMD", "oneDNN"), ("GenuineIntel", "torch"), ("", "torch")])
def test_where_it_is_the_faster_one(monkeypatch, vendor, takes):
    monkeypatch.setattr(linear, "cpu_vendor", lambda: vendor)
    assert library() == takes


@pytest.mark.parametrize("kind", ["v", "d"])
def test_not_where_addresses_are_limited(kind):
    code = 'import src.linear as it; it.cpu_vendor = lambda: "AuthenticAMD"; print(it.library())'
    command = f"ulimit -{kind} 50000000 && exec {sys.executable} -c '{code}'"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "torch\n"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("given", [states(7), states(3, 5), states(5, 3).transpose(0, 1), states(1).expand(6, -1)])
def test_products_and_gradients_are_torchs_own(given, bias):
    plain, ours = layer(bias=bias)
    with torch.no_grad():
        assert by_onednn(lambda: torch.testing.assert_close(ours(given), plain(given)))
    gradients = []
    for module in (plain, ours):
        inputs = given.clone().requires_grad_()
        module(inputs)[..., :9].transpose(0, -1).sum(dim=0).pow(2).sum().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(*gradients)


def test_a_gradient_that_is_one_number_for_all_arrives():
    _, ours = layer()
    inputs = states(4).requires_grad_()
    ours(inputs).sum().backward()  # the gradient of a sum takes no memory: its strides are 0
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad, ours.weight.sum(dim=0).expand(4, -1))


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_weights_that_train_have_their_gradient(trained):
    plain, ours = layer()
    for module in (plain, ours):
        getattr(module, trained).requires_grad_()
        module(states(7)).pow(2).sum().backward()
    assert not by_onednn(lambda: ours(states(7)))
    torch.testing.assert_close(getattr(ours, trained).grad, getattr(plain, trained).grad)


def test_autocast_and_other_types_are_torchs():
    plain, ours = layer()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(states(7)).dtype is torch.bfloat16
        assert torch.equal(ours(states(7)), plain(states(7)))
    half = states(7).bfloat16()
    with torch.no_grad():
        assert torch.equal(ours.bfloat16()(half), plain.bfloat16()(half))


def test_a_compiler_sees_torchs_product():
    """torch's own compiler refuses the operator where it hasn't put it itself."""
    plain, ours = layer()
    seen: list[str] = []

    def compiler(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        seen.append(graph.code)
        return graph

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(ours, backend=compiler)(states(7)), plain(states(7)))
    assert len(seen) == 1 and "linear_pointwise" not in seen[0]


def test_only_plain_linear_layers_change():
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return functional.linear(input, self.weight) + 1

    model = nn.Sequential(Own(24, 24), nn.Linear(24, 24), nn.LayerNorm(24))
    kept = [type(model[0]), type(model[2])]
    multiply_by_onednn(model)
    assert [type(model[0]), type(model[2])] == kept
    assert type(model[1]) is not nn.Linear


def loaded(monkeypatch, library: str) -> LoadedModel:
    """The tiny model as a machine loads it where this is the faster library."""
    monkeypatch.setattr(models, "library", lambda: library)
    monkeypatch.setattr(models, "_held", {})
    return load_model(model_config(), quant_config())


def test_a_models_frozen_layers_use_it_forward_and_back(monkeypatch):
    """Four blocks of seven matrices, all forward. Back, the first block's input has no gradient."""
    tiny = loaded(monkeypatch, "oneDNN")
    source, target = words(tiny)
    packs(tiny.model, source)  # tries the model, once
    schedule = Schedule(epochs=1, batch_size=len(source), learning_rate=1e-3)
    with adapter(tiny.model, LORA, [1], seed=0) as adapted, Operators() as seen:
        train(adapted, source, target, OWN, Objective("triplet", (4,)), schedule)
    assert sum("linear_pointwise" in name for name in seen.names) == 4 * 7 + 3 * 7 + 4


def test_a_model_loaded_elsewhere_is_torchs(monkeypatch):
    tiny = loaded(monkeypatch, "torch")
    source, _ = words(tiny)
    assert not by_onednn(lambda: packs(tiny.model, source))
