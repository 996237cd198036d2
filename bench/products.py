"""Which library multiplies a model's matrices faster: python -m bench.products [--repeats 25].

The shapes of SmolLM2-135M, float32: forward (states @ weight.T) and back (gradients @ weight), by torch's own choice
and by oneDNN (`src/linear.py`), in turns.
"""

from __future__ import annotations

import argparse
from statistics import median

import torch

from bench.speed import take_turns
from src.linear import product

SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536))  # weights: (out, in)
TOKENS = (100, 200, 400, 800, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.products", description=__doc__)
    parser.add_argument("--repeats", type=int, default=25)
    repeats = parser.parse_args().repeats
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, medians of {repeats}, GFLOP/s\n")
    print("| tokens | weight | torch | oneDNN | × | torch, back | oneDNN, back | × |\n" + "|---" * 8 + "|")
    for tokens in TOKENS:
        for shape in SHAPES:
            print(
                f"| {tokens} | {shape[0]} × {shape[1]} | {' | '.join(compared(tokens, shape, repeats))} |", flush=True
            )


def compared(tokens: int, shape: tuple[int, int], repeats: int) -> list[str]:
    """The rates and their ratio, forward and back."""
    weight = torch.randn(shape)
    states, gradients = torch.randn(tokens, shape[1]), torch.randn(tokens, shape[0])
    calls = {
        "torch": lambda: torch.nn.functional.linear(states, weight),
        "oneDNN": lambda: product(states, weight),
        "torch, back": lambda: gradients @ weight,
        "oneDNN, back": lambda: product(gradients, weight.T),
    }
    with torch.inference_mode():
        rates = [2e-9 * tokens * weight.numel() / median(times) for times in take_turns(calls, repeats).values()]
    return [
        f"{value:{form}}" for a, b in (rates[:2], rates[2:]) for value, form in ((a, ".0f"), (b, ".0f"), (b / a, ".2f"))
    ]


if __name__ == "__main__":
    main()
