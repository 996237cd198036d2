"""Loading, quantising, and adapters that come and go without a trace."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn import functional
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    XLMConfig,
    XLMWithLMHeadModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

from src import console, machine, models
from src.config import ModelConfig
from src.errors import UserError
from src.layers import Prompt, encode, tokenize
from src.models import LoadedModel, adapter, check_decoder, load_model, save_adapter, unpacked
from tests.conftest import model_config, quant_config
from tests.test_tracking import run_python
from tests.test_training import LORA


@pytest.fixture
def own(tiny, tmp_path):
    """The tiny model as a user's own, in tmp_path."""
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    return model_config(source="hub", id=str(tmp_path))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "changes", [{}, {"init": "pissa"}, {"init": "olora"}, {"init": "gaussian"}, {"use_dora": True}]
)
def test_detaching_leaves_the_model_bit_identical_even_after_an_error(tiny, changes):
    before, modules = state(tiny.model), [name for name, _ in tiny.model.named_modules()]
    with (
        pytest.raises(RuntimeError, match=r"on purpose"),
        adapter(tiny.model, replace(LORA, **changes), [1, 3], seed=0) as model,
    ):
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data.add_(0.3)
        raise RuntimeError("on purpose")
    after = state(tiny.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert modules == [name for name, _ in tiny.model.named_modules()]
    assert not hasattr(tiny.model, "peft_config")


def test_the_blocks_that_produce_the_layers_are_adapted_and_no_others(tiny):
    with adapter(tiny.model, LORA, [1, 3], seed=0) as model:
        trained = {name.split(".layers.")[1].split(".")[0] for name, w in model.named_parameters() if w.requires_grad}
        assert trained == {"0", "2"}
        assert vars(model.peft_config["default"])["layers_to_transform"] == [0, 2]


@pytest.mark.parametrize(
    "changes", [{}, {"init": "pissa"}, {"init": "olora"}, {"use_dora": True}, {"use_rslora": True}]
)
def test_a_saved_adapter_gives_the_same_vectors_when_peft_loads_it(tiny, tmp_path, changes):
    prompts = tokenize(["maji", "nyumba", "water"], tiny.tokenizer)
    untouched = encode(tiny.model, prompts)
    with adapter(tiny.model, replace(LORA, **changes), [1, 2], seed=0) as model:
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data.add_(0.05 * torch.randn_like(weight))
        save_adapter(model, tmp_path / "adapter")
        adapted = encode(model, prompts)
    assert (adapted - untouched).abs().max() > 1e-3
    again = PeftModel.from_pretrained(copy.deepcopy(tiny.model), str(tmp_path / "adapter"))
    torch.testing.assert_close(encode(again, prompts), adapted, atol=1e-5, rtol=0)


def test_a_failed_attach_does_not_spoil_the_next_job(tiny):
    broken = replace(LORA, target_modules=["q_proj", "v_proj"], rank=-1)  # what PEFT refuses
    with pytest.raises(ValueError, match=r"rank|`r`"), adapter(tiny.model, broken, [1, 2], seed=0):
        pass
    again = load_model(model_config(), quant_config())
    with adapter(again.model, LORA, [1, 2], seed=0):
        pass


def test_missing_target_modules_are_named(tiny):
    with (
        pytest.raises(UserError, match=r"no nope; they have down_proj, .*q_proj"),
        adapter(tiny.model, replace(LORA, target_modules=["q_proj", "nope"]), [1], seed=0),
    ):
        pass


def test_a_folder_that_has_changed_is_loaded_anew(tiny, tmp_path):
    changed = copy.deepcopy(tiny.model)
    changed.get_input_embeddings().weight.data.mul_(2)
    ours = model_config(source="hub", id=str(tmp_path))
    tiny.tokenizer.save_pretrained(tmp_path)
    found = []
    for model in (tiny.model, changed):
        model.save_pretrained(tmp_path)
        found.append(load_model(ours, quant_config()))
        assert load_model(ours, quant_config()) is found[-1]
    first, second = (loaded.model.get_input_embeddings().weight for loaded in found)
    assert torch.equal(2 * first, second)
    assert len({loaded.identity for loaded in found}) == len({loaded.contents for loaded in found}) == 2


def test_a_model_is_loaded_once(tiny):
    assert load_model(model_config(), quant_config()).model is tiny.model
    assert load_model(model_config(n_layers=3), quant_config()).model is not tiny.model
    assert load_model(model_config(n_layers=3), quant_config()).identity != tiny.identity


class TestRefused:
    def test_an_absent_model_at_once(self):
        with pytest.raises(
            UserError, match=r"model.id=nobody/nothing is not in this machine's cache and HF_HUB_OFFLINE"
        ):
            load_model(model_config(source="hub", id="nobody/nothing", n_layers=None), quant_config())

    def test_a_folder_that_is_not_there(self):
        with pytest.raises(UserError, match=r"there is no such folder"):
            load_model(model_config(source="hub", id="/no/such/folder", n_layers=None), quant_config())

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(UserError, match=r"holds no model"):
            load_model(model_config(source="hub", id=str(tmp_path), n_layers=None), quant_config())

    def test_pickled_weights(self, tiny, tmp_path):
        tiny.model.config.save_pretrained(tmp_path)
        tiny.tokenizer.save_pretrained(tmp_path)
        torch.save(tiny.model.state_dict(), tmp_path / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"holds no safetensors"):
            load_model(model_config(source="hub", id=str(tmp_path), n_layers=None), quant_config())

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_gpu_that_is_not_there(self):
        with pytest.raises(UserError, match=r"model.device=cuda: torch sees no such GPU"):
            load_model(model_config(device="cuda"), quant_config())

    @pytest.mark.parametrize("device", ["mps", "meta", "cuda:x", "gpu"])
    def test_a_device_that_is_none(self, device):
        with pytest.raises(UserError, match=f"model.device={device}: must be auto, cpu, cuda"):
            load_model(model_config(device=device), quant_config())

    def test_damaged_weights(self, own, tmp_path):
        whole = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match="can't be loaded"):
            load_model(own, quant_config())

    def test_an_unknown_package(self):
        with pytest.raises(UserError, match=r"packaged models are smollm2_135m, gemma3_270m"):
            load_model(model_config(source="packaged", id="gpt5"), quant_config())

    def test_a_depth_that_is_not_the_models(self, own):
        with pytest.raises(UserError, match=r"n_layers=7, but .* has 4 blocks"):
            load_model(replace(own, n_layers=7), quant_config())


def saved(model: Any, tiny: LoadedModel, folder: Path) -> ModelConfig:
    """A model as a user's own, with the tiny one's tokenizer."""
    model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return model_config(source="hub", id=str(folder), n_layers=None)


SIZES: dict[str, Any] = {"vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def bert(**values: Any) -> BertLMHeadModel:
    return BertLMHeadModel(BertConfig(**SIZES, intermediate_size=48, initializer_range=0.2, **values))


class TestDecoders:
    @pytest.mark.filterwarnings("ignore:If you want to use `BertLMHeadModel`")
    def test_a_model_that_looks_ahead_is_refused(self, tiny, tmp_path):
        message = r"^model.id=.*: BertLMHeadModel looks ahead .*: give .* set is_decoder=true"
        with pytest.raises(UserError, match=message) as refused:
            load_model(saved(bert(is_decoder=False), tiny, tmp_path), quant_config())
        assert "\n" not in str(refused.value)
        assert load_model(saved(bert(is_decoder=True), tiny, tmp_path), quant_config()).n_layers == 2

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_experts_that_take_tokens_together_do_not_look_ahead(self, tiny, tmp_path, dtype):
        config = MixtralConfig(**SIZES, num_key_value_heads=2, intermediate_size=48, initializer_range=0.2)
        ours = saved(MixtralForCausalLM(config), tiny, tmp_path)
        assert load_model(replace(ours, dtype=dtype), quant_config()).n_layers == 2

    def test_llama_4_is_read(self, tiny, tmp_path):
        config = Llama4TextConfig(
            **SIZES, num_key_value_heads=2, head_dim=8, intermediate_size=16, intermediate_size_mlp=48,
            num_local_experts=4,
        )  # fmt: skip
        model = load_model(saved(Llama4ForCausalLM(config), tiny, tmp_path), quant_config()).model
        prompt = Prompt((5, 6, 7), 0, 3)
        plain = model(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states
        expected = functional.normalize(torch.stack([states[0].mean(0) for states in plain]), dim=-1)
        torch.testing.assert_close(encode(model, [prompt], layers=[0, 1, "final"])[:, 0], expected, atol=1e-5, rtol=0)

    def test_a_model_whose_blocks_are_no_chain_is_refused(self, tiny, tmp_path):
        config = XLMConfig(vocab_size=600, emb_dim=32, n_layers=2, n_heads=4, causal=True, embed_init_std=0.2)
        with pytest.raises(UserError, match=r"XLM.* has blocks that don't pass their outputs on in order"):
            load_model(saved(XLMWithLMHeadModel(config), tiny, tmp_path), quant_config())

    def test_hidden_states_that_are_no_matrix_are_refused(self, tiny, tmp_path):
        config = XLNetConfig(vocab_size=600, d_model=32, n_layer=2, n_head=4, d_inner=48, attn_type="uni", mem_len=0)
        with pytest.raises(UserError, match=r"XLNet.* has hidden states of shape \(4, 2, 32\) at layer 0, not"):
            load_model(saved(XLNetLMHeadModel(config), tiny, tmp_path), quant_config())

    def test_an_architecture_without_sdpa_is_loaded_with_eager_and_the_log_says_so(self, tiny, tmp_path, caplog):
        config = GPTNeoConfig(
            vocab_size=600, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
        )
        ours = saved(GPTNeoForCausalLM(config), tiny, tmp_path)
        assert ours.attention == "sdpa"
        with caplog.at_level("INFO", logger="src.models"):
            model = load_model(ours, quant_config()).model
        assert model.config._attn_implementation == "eager"
        assert any("model.attention=eager is used" in message for message in caplog.messages)

    @pytest.mark.parametrize("quant", ["none", "int8", "nf4"])
    def test_looking_changes_nothing(self, own, quant):
        loaded = load_model(own, quant_config(quant))
        before, generator = state(loaded.model), torch.random.get_rng_state()
        hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in loaded.model.modules()]
        check_decoder(loaded.model, own)
        assert torch.equal(torch.random.get_rng_state(), generator)
        after = state(loaded.model)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in loaded.model.modules()]


@pytest.mark.parametrize(("double", "computing"), [(False, "bfloat16"), (True, "bfloat16"), (False, "float32")])
def test_nf4_on_the_cpu_stays_close_and_trains(own, tiny, double, computing):
    from src.training import Objective, Schedule, train
    from tests.test_training import OWN, SOURCE, TARGET

    quant = quant_config("nf4", double_quant=double, compute_dtype=computing)
    loaded = load_model(own, quant)
    assert any("Linear4bit" in type(module).__name__ for module in loaded.model.modules())
    prompts = tokenize(SOURCE, loaded.tokenizer)
    close = (encode(loaded.model, prompts) * encode(tiny.model, prompts)).sum(-1)
    assert close.min() > 0.7  # random weights of width 64: 4 bits are coarse
    with adapter(loaded.model, LORA, [1, 2], seed=1) as model:
        targets = tokenize(TARGET, loaded.tokenizer)
        losses = train(model, prompts, targets, OWN, Objective("triplet", (2,)), Schedule(20, 9, 1e-2))
    assert losses[-1] < 0.7 * losses[0]
    with adapter(loaded.model, LORA, [1, 2], seed=1) as model, unpacked(model, (2,)):
        assert losses == train(model, prompts, targets, OWN, Objective("triplet", (2,)), Schedule(20, 9, 1e-2))


def test_4_bit_weights_are_unpacked_up_to_the_loss_and_within_bounds(own, monkeypatch):
    model = load_model(own, quant_config("nf4")).model

    def held() -> list[str]:
        return [name for name, module in model.named_modules() if "forward" in vars(module)]

    with unpacked(model, (2,)):
        assert len(held()) == 14  # seven matrices in each of two blocks
        assert not any(".2." in name or ".3." in name for name in held())
    assert not held()
    monkeypatch.setattr(models, "UNPACKED_BYTES", 1000)
    with unpacked(model, ("final",)):
        assert not held()


def test_nf4_computes_in_what_is_asked(own):
    """With float32 a 4-bit matrix gives the product with its own unpacked numbers, with bfloat16 a rounded one."""
    from bitsandbytes.functional import dequantize_4bit

    states, errors = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)), {}
    for computing in ("bfloat16", "float32"):
        loaded = load_model(own, quant_config("nf4", compute_dtype=computing))
        module: Any = next(each for each in loaded.model.modules() if "Linear4bit" in type(each).__name__)
        exact = states @ dequantize_4bit(module.weight.data.view(-1, 1), module.weight.quant_state).float().T
        errors[computing] = float((module(states) - exact).abs().max())
    assert errors["float32"] < 1e-5 < 1e-3 < errors["bfloat16"]


@pytest.mark.parametrize(
    ("listed", "lacks"),
    [
        ("flags : fma avx512f avx512_bf16", False),
        ("Features : fp asimd bf16", False),
        ("flags : fma", True),
        ("", False),
    ],
)
def test_who_computes_in_4_bits_hears_that_the_processor_lacks_bfloat16(own, monkeypatch, listed, lacks):
    key, _, value = listed.partition(" : ")
    monkeypatch.setattr(machine, "_cpuinfo", lambda asked: value if asked == key else "")
    said: list[str] = []
    monkeypatch.setattr(console, "say", said.append)
    for computing in ("float32", "bfloat16"):
        load_model(own, quant_config("nf4", compute_dtype=computing))
    assert len(said) == lacks
    assert all("quant.compute_dtype=float32" in line for line in said)


def test_int8(own, tiny):
    loaded = load_model(own, quant_config("int8"))
    prompts = tokenize(["maji", "nyumba"], loaded.tokenizer)
    assert (encode(loaded.model, prompts) * encode(tiny.model, prompts)).sum(-1).min() > 0.9


COMPILED = """
import torch
compiled = []
torch.compile = compile = lambda function, **options: compiled.append((function.__name__, options)) or function
from src.models import import_peft
import_peft()
assert torch.compile is compile and not compiled
from bitsandbytes.backends.default.ops import _dequantize_blockwise_compute as unpack
for _ in range(2):
    codes = torch.tensor([1, 0, 1], dtype=torch.uint8)
    print(unpack(codes, torch.tensor([3.0]), torch.tensor([0.0, 2.0]), 4, torch.float32).tolist())
print(compiled)
"""


def test_what_bitsandbytes_has_compiled_is_compiled_once_it_is_called() -> None:
    done = run_python(COMPILED)
    compiled = [("_dequantize_blockwise_compute", {"dynamic": False})]
    assert done.stdout == f"[6.0, 0.0, 6.0]\n[6.0, 0.0, 6.0]\n{compiled}\n", done.stderr
