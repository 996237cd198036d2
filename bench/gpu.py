"""An 8B model on a GPU: python -m bench.gpu, with torch, transformers and peft installed, bitsandbytes for NF4.

Builds a Llama-3-8B-shaped model with random weights and times what a run does, with CUDA events: encoding 1,372 words
at all layers, an epoch over 623 pairs with the loss at layers 2 and 16, both beside the plain PEFT script of
bench/peers.py, and peak memory. `--shape tiny` runs the same on a CPU, to test the script.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any, Literal

import numpy as np
import torch

from bench import peers
from bench.peers import Task
from src.layers import Prompt, blocks, encode, peft_indices, tree_size
from src.training import Objective, Schedule, train

SHAPES = {  # vocabulary, width, width inside the MLP, blocks, heads, heads of keys and values
    "8b": (128_256, 4096, 14_336, 32, 32, 8),
    "tiny": (1000, 64, 128, 16, 4, 2),
}
PAIRS, TRAINED = 686, 623


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, numbers mean nothing"
    print(f"{name}; torch {torch.__version__}; shape {arguments.shape}; medians of {arguments.repeats}\n")
    for weights in ("bf16", "nf4"):
        try:
            report(arguments.shape, weights, device, arguments.repeats)
        except ImportError as error:
            print(f"{weights}: left out ({error})")


def report(shape: str, weights: Literal["bf16", "nf4"], device: torch.device, repeats: int) -> None:
    """The table of one kind of weights."""
    model = build(shape, device)
    if weights == "nf4":
        model = in_4_bit(model, device)
    prompts = some_prompts(2 * PAIRS, model.config.vocab_size)
    source, target = prompts[:TRAINED], prompts[PAIRS : PAIRS + TRAINED]
    tokens = tree_size(prompts)
    matrices = SHAPES[shape]
    work = 2 * tokens * (blocks_weights(matrices))
    rate = product_rate(matrices, device, repeats)
    print(f"### {weights}\n\n| | median, s | peak memory, GiB | PEFT script / ours |\n|---|---|---|---|")
    ours, peak = timed(lambda: encode(model, prompts), device, repeats)
    theirs, _ = timed(lambda: peers.encode_peft(model, tokenizer, words(prompts)), device, repeats)
    print(
        f"| encode {len(prompts)} words, {tokens} tokens, all layers | {ours:.3f} | {peak:.1f} | {theirs / ours:.1f} |"
    )
    seconds = [2 * ours]
    for read in (2, min(16, matrices[3])):
        ours, theirs, peak = training(model, source, target, read, device, repeats)
        print(
            f"| an epoch over {TRAINED} pairs, loss at layer {read} | {ours:.3f} | {peak:.1f} | {theirs / ours:.1f} |"
        )
        seconds.append(3 * ours)
    print(f"\nMatrix products of these shapes in bf16: {rate / 1e12:.3g} TFLOP/s; ", end="")
    print(f"encoding: {2 * work / seconds[0] / 1e12:.3g} ({2 * work / seconds[0] / rate:.0%})")
    print(f"Two encodings and three epochs at layer 2: {seconds[0] + seconds[1]:.1f} s\n", flush=True)


def training(
    model: Any, source: list[Prompt], target: list[Prompt], read: int, device: torch.device, repeats: int
) -> tuple[float, float, float]:
    """(our seconds, the script's, our peak GiB) of an epoch with adapters in blocks 1 and 2."""
    from peft import LoraConfig, get_peft_model

    task = Task(layers=(0, 1), read=read, loss="triplet")
    modules = ["q_proj", "v_proj"]
    config = LoraConfig(r=16, lora_alpha=32, target_modules=modules, layers_to_transform=peft_indices([1, 2]))
    adapted: Any = get_peft_model(model, config)
    pairs = list(zip(words(source), words(target), strict=True))
    own = np.arange(len(source))[:, None]
    objective, schedule = Objective("triplet", (read,)), Schedule(1, task.batch_size, task.learning_rate)
    ours, peak = timed(lambda: train(adapted, source, target, own, objective, schedule), device, repeats)
    theirs, _ = timed(lambda: peers.train_peft(adapted, tokenizer, pairs, task), device, repeats)
    adapted.base_model.unload()
    return ours, theirs, peak


def build(shape: str, device: torch.device) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, width, inside, depth, heads, shared = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inside,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def in_4_bit(model: Any, device: torch.device) -> Any:
    """The same weights as NF4, one matrix after the other, so that both never stand in memory whole."""
    from bitsandbytes.nn.modules import Linear4bit

    for block in blocks(model):
        for name, module in list(block.named_modules()):
            if isinstance(module, torch.nn.Linear):
                packed = Linear4bit(
                    module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                packed.load_state_dict(module.cpu().state_dict())
                packed.support_avx512bf16_for_cpu = False  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
                parent, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(parent), leaf, packed.to(device).requires_grad_(False))
    return model


def some_prompts(count: int, vocabulary: int) -> list[Prompt]:
    """Words of 2 to 6 tokens behind a BOS, as Llama's tokenizer cuts Swahili and English words."""
    rng = np.random.default_rng(0)
    lengths = rng.choice([2, 3, 4, 5, 6], size=count, p=[0.35, 0.3, 0.2, 0.1, 0.05])
    draws = [rng.integers(1, vocabulary, size=length) for length in lengths]
    return [Prompt((0, *map(int, ids)), 1, len(ids) + 1) for ids in draws]


def words(prompts: list[Prompt]) -> list[str]:
    """Prompts as text that `tokenizer` below turns into the same ids."""
    return [" ".join(map(str, prompt.ids)) for prompt in prompts]


def tokenizer(texts: list[str], padding: bool, return_tensors: str) -> Any:  # noqa: ARG001 (the library's signature)
    """Padded batches, as a tokenizer of the library makes them."""
    from transformers import BatchEncoding

    ids = [torch.tensor([int(token) for token in text.split()]) for text in texts]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
    return BatchEncoding({"input_ids": padded, "attention_mask": mask})


def blocks_weights(shape: tuple[int, ...]) -> int:
    """Weights of all blocks' matrices."""
    _, width, inside, depth, heads, shared = shape
    return depth * (2 * width * width + 2 * width * (width // heads * shared) + 3 * width * inside)


def product_rate(shape: tuple[int, ...], device: torch.device, repeats: int) -> float:
    """Operations a second of one block's largest product at 8,192 tokens."""
    left = torch.randn(8192, shape[1], device=device, dtype=torch.bfloat16)
    right = torch.randn(shape[1], shape[2], device=device, dtype=torch.bfloat16)
    seconds, _ = timed(lambda: [left @ right for _ in range(10)], device, repeats)
    return 10 * 2 * 8192 * shape[1] * shape[2] / seconds


def timed(call: Callable[[], Any], device: torch.device, repeats: int) -> tuple[float, float]:
    """(median seconds, peak GiB) of a call, after one that isn't timed."""
    call()
    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        if device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            call()
            ended.record()
            torch.cuda.synchronize()
            seconds.append(began.elapsed_time(ended) / 1000)
        else:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return median(seconds), peak


if __name__ == "__main__":
    main()
