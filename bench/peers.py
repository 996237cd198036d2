"""What a competent user would write without this project: a plain PEFT script, and sentence-transformers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Task:
    """The same training for every peer: AdamW with a linear warm-up over a tenth of the steps, then to 0."""

    layers: tuple[int, ...]  # adapted, by PEFT's count from 0
    read: int  # index into the model's hidden_states
    loss: Literal["triplet", "infonce"]
    batch_size: int = 16
    epochs: int = 1
    rank: int = 16
    learning_rate: float = 2e-4
    margin: float = 0.3
    temperature: float = 0.05

    @property
    def adapted(self) -> list[int]:
        """The adapted blocks by the project's count, from 1."""
        return [index + 1 for index in self.layers]


# --- (a) a PEFT script --------------------------------------------------------------------------------------


def peft_model(folder: Path, task: Task) -> tuple[Any, Any]:
    """(model with its adapter, tokenizer), as the documentation of PEFT has it."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    return get_peft_model(model, _adapter(task, "CAUSAL_LM")), tokenizer


def _adapter(task: Task, task_type: str) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type=task_type,
        r=task.rank,
        lora_alpha=32,
        lora_dropout=0.0,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=list(task.layers),
        layers_pattern="layers",  # a bare decoder's names, which PEFT doesn't find by itself
    )


def embed(model: Any, tokenizer: Any, words: Sequence[str], layer: int) -> Tensor:
    """Mean of one layer's hidden states over a word's tokens, as unit vectors: [words, d]."""
    batch = tokenizer(list(words), padding=True, return_tensors="pt").to(model.device)
    hidden = model(**batch, output_hidden_states=True).hidden_states[layer]
    mask = batch["attention_mask"].unsqueeze(-1)
    return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def train_peft(model: Any, tokenizer: Any, pairs: Pairs, task: Task) -> list[float]:
    """Three forwards a step for the triplet loss, two for InfoNCE; the loss of every step."""
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], task.learning_rate, weight_decay=0
    )
    steps = -(-len(pairs) // task.batch_size) * task.epochs
    warmup = -(-steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (step + 1) / warmup if step < warmup else (steps - step) / max(1, steps - warmup)
    )
    losses = []
    model.train()
    for _ in range(task.epochs):
        order = rng.permutation(len(pairs))
        for start in range(0, len(pairs), task.batch_size):
            chosen = order[start : start + task.batch_size]
            anchor = embed(model, tokenizer, [pairs[i][0] for i in chosen], task.read)
            positive = embed(model, tokenizer, [pairs[i][1] for i in chosen], task.read)
            if task.loss == "triplet":
                drawn = rng.integers(len(pairs), size=len(chosen))
                while (same := drawn == chosen).any():
                    drawn[same] = rng.integers(len(pairs), size=int(same.sum()))
                negative = embed(model, tokenizer, [pairs[i][1] for i in drawn], task.read)
                loss = functional.relu(task.margin + (anchor * negative - anchor * positive).sum(1)).mean()
            else:
                scores, own = anchor @ positive.T / task.temperature, torch.arange(len(chosen), device=anchor.device)
                loss = (functional.cross_entropy(scores, own) + functional.cross_entropy(scores.T, own)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def encode_peft(model: Any, tokenizer: Any, words: Sequence[str], batch_size: int = 32) -> Tensor:
    """All layers of all words: [layers, words, d]."""
    parts = []
    for start in range(0, len(words), batch_size):
        batch = tokenizer(list(words[start : start + batch_size]), padding=True, return_tensors="pt").to(model.device)
        hidden = torch.stack(model(**batch, output_hidden_states=True).hidden_states)
        mask = batch["attention_mask"].unsqueeze(-1)
        parts.append(functional.normalize((hidden * mask).sum(2) / mask.sum(1), dim=-1))
    return torch.cat(parts, dim=1)


# --- (b), (c) sentence-transformers -------------------------------------------------------------------------


@contextmanager
def cut_to(folder: Path, blocks: int) -> Iterator[Path]:
    """A copy of the model that ends after its first blocks, and has no chat template around every word."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        model = AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=blocks, dtype=torch.float32)
        model.save_pretrained(temporary)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = None  # sentence-transformers would put its 25 tokens around each word
        tokenizer.save_pretrained(temporary)
        yield Path(temporary)


def sentence_transformer(folder: Path, *, final_norm: bool) -> Any:
    """Mean pooling over the last hidden state, normalised; without the final norm for a model that was cut."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    transformer: Any = Transformer(str(folder))
    if transformer.tokenizer.pad_token is None:
        transformer.tokenizer.pad_token = transformer.tokenizer.eos_token
    transformer.tokenizer.padding_side = "right"
    if not final_norm:
        transformer.auto_model.norm = torch.nn.Identity()
    width = transformer.auto_model.config.hidden_size
    return SentenceTransformer(modules=[transformer, Pooling(width, "mean"), Normalize()], device="cpu")


def train_sentence_transformer(model: Any, pairs: Pairs, task: Task) -> None:
    """Its own trainer, with its own loss: TripletLoss, or MultipleNegativesRankingLoss, which is InfoNCE."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer import losses

    model.add_adapter(_adapter(task, "FEATURE_EXTRACTION"))
    columns = {"anchor": [source for source, _ in pairs], "positive": [target for _, target in pairs]}
    if task.loss == "triplet":
        columns["negative"] = columns["positive"][1:] + columns["positive"][:1]
        distance = losses.TripletDistanceMetric.COSINE
        loss: Any = losses.TripletLoss(model, distance_metric=distance, triplet_margin=task.margin)
    else:
        loss = losses.MultipleNegativesRankingLoss(model, scale=1 / task.temperature)
    folder = tempfile.mkdtemp()
    arguments = SentenceTransformerTrainingArguments(
        output_dir=folder,
        num_train_epochs=task.epochs,
        per_device_train_batch_size=task.batch_size,
        learning_rate=task.learning_rate,
        warmup_ratio=0.1,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    try:
        SentenceTransformerTrainer(model, arguments, train_dataset=Dataset.from_dict(columns), loss=loss).train()
    finally:
        shutil.rmtree(folder)
