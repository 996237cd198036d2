"""The loop: losses and gradients of a full forward, reproducible, never a listed translation as negative."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from src.config import LoraConfig
from src.errors import NumbersError, UserError
from src.layers import encode, tokenize
from src.models import adapter
from src.training import Objective, Schedule, batch_loss, train

SOURCE = ["maji", "moto", "nyumba", "mti", "samaki", "ndege", "jua", "mwezi", "nyota"]
TARGET = ["water", "fire", "house", "tree", "fish", "bird", "sun", "moon", "star"]
OWN = np.arange(9)[:, None]  # each pair's only right translation is its own
LORA = LoraConfig(
    layers=[1, 2], rank=4, alpha=8.0, dropout=0.0, target_modules=["q_proj", "v_proj"], init="default",
    use_dora=False, use_rslora=False,
)  # fmt: skip
TRIPLET = Objective("triplet", (2,))
PLAN = Schedule(epochs=3, batch_size=4, learning_rate=1e-2)


def words(loaded):
    return tokenize(SOURCE, loaded.tokenizer), tokenize(TARGET, loaded.tokenizer)


def plain_loss(model, source, target, pairs, negatives, layer_index):
    """Three full forwards with output_hidden_states, one word at a time: what a script would do."""

    def vectors(prompts):
        states = [model(torch.tensor([p.ids]), output_hidden_states=True).hidden_states[layer_index] for p in prompts]
        return functional.normalize(torch.stack([state[0].mean(0) for state in states]), dim=-1)

    anchor, positive = vectors([source[i] for i in pairs]), vectors([target[i] for i in pairs])
    negative = vectors([target[i] for i in negatives])
    return functional.relu(0.3 - (anchor * positive).sum(-1) + (anchor * negative).sum(-1)).mean()


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize(("layer", "index"), [(2, 2), ("final", 4)])
def test_losses_and_gradients_equal_the_full_forwards(tiny, layer, index, joint):
    source, target = words(tiny)
    pairs, negatives = np.array([0, 3, 5, 7]), np.array([2, 0, 1, 8])
    with adapter(tiny.model, LORA, [1, 2], seed=1) as model:
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        with torch.no_grad():
            for weight in weights:
                weight.add_(0.1 * torch.randn_like(weight))  # LoRA's B starts at 0, where A has no gradient
        mask = np.eye(4, dtype=bool)
        ours = batch_loss(model, source, target, pairs, negatives, mask, Objective("triplet", (layer,)), joint=joint)
        plain = plain_loss(model, source, target, pairs, negatives, index)
        ours_gradients = torch.autograd.grad(ours, weights)
        plain_gradients = torch.autograd.grad(plain, weights)
    assert ours.item() == pytest.approx(plain.item(), abs=1e-6)
    for mine, theirs in zip(ours_gradients, plain_gradients, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_losses_of_several_layers_add_up(tiny):
    source, target = words(tiny)
    pairs, negatives, mask = np.arange(4), np.array([4, 5, 6, 7]), np.eye(4, dtype=bool)

    def loss(*layers):
        return batch_loss(tiny.model, source, target, pairs, negatives, mask, Objective("triplet", layers)).item()

    assert loss(2, "final") == pytest.approx(loss(2) + loss("final"), abs=1e-6)


@pytest.mark.parametrize("negatives", ["random", "batch", "baseline"])
def test_training_lowers_the_triplet_loss_and_repeats_bit_for_bit(tiny, negatives):
    def once():
        with adapter(tiny.model, LORA, [1, 2], seed=1) as model:
            plan = Schedule(epochs=20, batch_size=4, learning_rate=1e-2)
            return train(model, *words(tiny), OWN, Objective("triplet", (2,), negatives=negatives), plan)

    losses = once()
    assert len(losses) == 20 * 2  # nine pairs in batches of 4: the last pair joins the second batch
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])
    assert losses == once()


def test_training_lowers_the_infonce_loss(tiny):
    with adapter(tiny.model, LORA, [1, 2], seed=1) as model:
        losses = train(model, *words(tiny), OWN, Objective("infonce", ("final",)), Schedule(20, 9, 1e-2))
    assert losses[-1] < 0.7 * losses[0]


def test_a_listed_translation_is_never_a_negative(tiny, monkeypatch):
    import src.training

    relevant = np.array([[i, (i + 1) % 9, (i + 2) % 9] for i in range(9)])
    used = []
    plain = src.training.batch_loss

    def spy(model, source, target, pairs, negatives, mask, objective, **kwargs):
        used.extend(zip(pairs, negatives, strict=True))
        return plain(model, source, target, pairs, negatives, mask, objective, **kwargs)

    monkeypatch.setattr(src.training, "batch_loss", spy)
    for kind in ("random", "baseline"):
        with adapter(tiny.model, LORA, [1, 2], seed=1) as model:
            train(model, *words(tiny), relevant, Objective("triplet", (2,), negatives=kind), Schedule(10, 4, 1e-3))
    assert len(used) == 2 * 10 * 9
    assert all(negative not in relevant[pair] for pair, negative in used)


def test_a_word_that_everything_translates_is_refused(tiny):
    everything = np.tile(np.arange(9), (9, 1))
    with adapter(tiny.model, LORA, [1, 2], seed=1) as model, pytest.raises(UserError, match="every target"):
        train(model, *words(tiny), everything, TRIPLET, PLAN)


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(tiny):
    with adapter(tiny.model, LORA, [1, 2], seed=1) as model:
        next(weight for weight in model.parameters() if weight.requires_grad).data.fill_(torch.nan)
        # torch's attention without a mask makes zeros of a query's NaN: then the loss is finite, and its gradient isn't
        with pytest.raises(NumbersError, match=r"the (loss|gradient) is not a finite number at step 1 of 6: .*train.p"):
            train(model, *words(tiny), OWN, TRIPLET, PLAN)


def test_bfloat16_training_follows_float32(tiny):
    def losses(precision):
        with adapter(tiny.model, LORA, [1, 2], seed=1) as model:
            return train(model, *words(tiny), OWN, TRIPLET, Schedule(3, 4, 1e-3, precision=precision))

    np.testing.assert_allclose(losses("bfloat16"), losses("float32"), atol=0.05)


def test_encoding_after_each_epoch_changes_no_number(tiny):
    lora = replace(LORA, dropout=0.3)
    source, target = words(tiny)

    def once(after_epoch):
        with adapter(tiny.model, lora, [1, 2], seed=1) as model:

            def encoded(epoch):
                epochs.append(epoch)
                encode(model, source, layers=["final"])

            losses = train(model, source, target, OWN, TRIPLET, PLAN, after_epoch=encoded if after_epoch else None)
            return losses, [weight.clone() for weight in model.parameters() if weight.requires_grad]

    epochs = []
    plain, weights = once(False)
    same, others = once(True)
    assert epochs == [1, 2, 3] and plain == same
    assert all(torch.equal(one, other) for one, other in zip(weights, others, strict=True))
