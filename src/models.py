"""Loads a model and its tokenizer, quantises them, and attaches and detaches LoRA adapters."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import re
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial, wraps
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from torch import Tensor, finfo, nn
from torch.nn import functional

from src import console
from src.config import LoraConfig, ModelConfig, QuantConfig, own_folder
from src.errors import UserError
from src.files import (
    cache_dir,
    digest,
    file_digest,
    filled_atomically,
    folder_contents,
    folder_state,
    made_once,
    room_for,
)
from src.layers import (
    Below,
    Layer,
    Prompt,
    all_layers,
    blocks,
    depth,
    evaluating,
    forward,
    peft_indices,
    read_states,
    stacked,
    trial_prompts,
    width,
)
from src.linear import library, multiply_by_onednn
from src.machine import lacks_bfloat16
from src.memory import ran_out
from src.packaged import packaged_folder
from src.process import importing

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
UNPACKED_BYTES = 2 * 2**30
NETWORK_SECONDS = 5  # what an unreachable hub may cost before the user is told


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model ready to encode, and the digest of all that its hidden states depend on."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: str
    revision: str
    contents: str | None  # the digest of a folder of the user's own; elsewhere the revision names them

    @property
    def n_layers(self) -> int:
        return depth(self.model)


def load_model(model: ModelConfig, quant: QuantConfig) -> LoadedModel:
    """The model that the config names, in evaluation mode; kept until another is asked for.

    Raises UserError naming the key for an absent model or package, an absent GPU, weights that aren't safetensors, a
    model that isn't a causal decoder.
    """
    folder = own_folder(model)
    key = json.dumps([asdict(model), asdict(quant), folder_state(folder) if folder else None])
    if key not in _held:
        _held.clear()  # first, so that a sweep over models never holds two of them
        if _alive:  # a cycle keeps the one before; perhaps one that was taken as there to stay
            gc.unfreeze()
            gc.collect()
        with importing():  # what transformers needs for this architecture
            _held[key] = _load(model, quant, key)
        _alive.add(_held[key].model)
    return _held[key]


_held: dict[str, LoadedModel] = {}  # the model in use, by what was asked for
_alive: WeakSet[PreTrainedModel] = WeakSet()  # all that are still in memory


def _load(config: ModelConfig, quant: QuantConfig, key: str) -> LoadedModel:
    import torch
    from huggingface_hub import constants
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # ours say what takes long
    log.info("loading %s in process %d with %d threads", config.name, os.getpid(), torch.get_num_threads())
    device = _device(config)
    if quant.name == "nf4" and quant.compute_dtype == "bfloat16" and device == "cpu" and lacks_bfloat16():
        console.say("this processor has no instructions for bfloat16: quant.compute_dtype=float32 is quicker here")
    cache = Path(constants.HF_HUB_CACHE) if config.source == "hub" else cache_dir() / "models"
    with room_for(cache, "HF_HUB_CACHE" if config.source == "hub" else "TLI_CACHE"):
        folder, revision = _locate(config)
    model, tokenizer = _from_folder(folder, config, quant, device)
    model.eval().requires_grad_(False)
    if library() == "oneDNN":
        multiply_by_onednn(model)
    _keep_4bit_weights(model)
    if config.n_layers is not None and depth(model) != config.n_layers:
        raise UserError(f"model.n_layers={config.n_layers}, but {config.name} has {depth(model)} blocks: mend the key")
    check_decoder(model, config)
    contents = folder_contents(folder) if own_folder(config) else None
    return LoadedModel(model, tokenizer, _identity(model, tokenizer, key, revision), revision, contents)


def _identity(model: PreTrainedModel, tokenizer: Any, key: str, revision: str) -> str:
    """Names the weights and the arithmetic, so that a cached encoding is used for these alone."""
    versions = [version(name) for name in ("torch", "transformers", "bitsandbytes", "accelerate")]
    return digest(key, revision, *versions, library(), model.device.type, str(len(tokenizer)))


def check_decoder(model: PreTrainedModel, config: ModelConfig) -> None:
    """Refuses a model whose layers can't be read, or where a later token changes what an earlier one's hold.

    Two forwards of a few tokens show it, whose first rows end differently: an architecture's name doesn't.
    """
    import torch

    name = f"model.id={config.id}: {type(model).__name__}"
    first, second, *_ = trial_prompts(model)
    changed = replace(first, ids=(*first.ids[:-1], second.ids[-1]))
    devices = list(range(torch.cuda.device_count())) if model.device.type == "cuda" else []
    try:
        with evaluating(model), torch.random.fork_rng(devices=devices):
            before, inputs = _all_states(model, [first, second])
            after, _ = _all_states(model, [changed, second])
    except UserError:
        raise
    except Exception as error:
        if ran_out(error):
            raise
        raise UserError(f"{name} can't run a few tokens ({_first_line(error)}): give another model") from error
    expected = (2, len(first.ids), width(model))
    for layer, states in zip(all_layers(depth(model)), before, strict=True):
        if states.shape != expected:
            sizes = f"{tuple(states.shape)} at layer {layer}, not {expected}"
            raise UserError(f"{name} has hidden states of shape {sizes}: give another model")
    if any(_moved(given, left).max() > 0.5 for given, left in zip(inputs, before, strict=False)):
        raise UserError(
            f"{name} has blocks that don't pass their outputs on in order: its layers can't be read, choose another"
        )
    if _looks_ahead(before, after, exact=not getattr(model, "is_quantized", False)):
        advice = "give a causal decoder, or set is_decoder=true in its config.json if it was trained as one"
        raise UserError(f"{name} looks ahead (a later token changes the vectors of earlier ones): {advice}")


def _all_states(model: PreTrainedModel, prompts: Sequence[Prompt]) -> tuple[list[Tensor], list[Tensor]]:
    """(hidden states of prompts of the same length at all layers, what each block is given)."""
    states: dict[Layer, Tensor] = {}
    inputs: list[Tensor] = []

    def given(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    handles = [block.register_forward_pre_hook(given, with_kwargs=True) for block in blocks(model)]
    try:
        with read_states(model, all_layers(depth(model)), states.__setitem__):
            states["final"] = forward(model, stacked(prompts))
    finally:
        for handle in handles:
            handle.remove()
    return [states[layer] for layer in all_layers(depth(model))], inputs


def _moved(some: Tensor, others: Tensor) -> Tensor:
    """How far apart each token's unit vectors are."""
    one, other = (functional.normalize(states.float().cpu(), dim=-1) for states in (some, others))
    return (one - other).norm(dim=-1)


def _looks_ahead(before: Sequence[Tensor], after: Sequence[Tensor], *, exact: bool) -> bool:
    """Whether another last token in the first row moves the row's earlier tokens by more than rounding.

    Experts and 8-bit products take tokens together, so that it can move any token by rounding, those of the second row
    too. Rounding grows with depth: the first layer that moves decides.
    """
    for one, other in zip(before, after, strict=True):
        moved = _moved(one, other)
        if (earlier := moved[0, :-1].max()) > 0:
            rounding = 8 * finfo(one.dtype).eps if exact else 1.0
            return bool(earlier > min(0.02, rounding) + 4 * moved[1].max())
    return False


def import_peft() -> None:
    """Imports PEFT, and by it bitsandbytes, which hands some functions to torch's compiler as it is imported.

    Here that waits for their first call, which hardly any job makes: importing the compiler takes a second.
    """
    import torch

    compile_now = torch.compile

    def compile_later(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled = cache(lambda: compile_now(function, **options))
        return wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = compile_later
    try:
        import peft  # noqa: F401
    finally:
        torch.compile = compile_now


# --- where the weights come from ----------------------------------------------------------------------------


def _device(config: ModelConfig) -> str:
    import torch

    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", config.device):
        raise UserError(f"model.device={config.device}: must be auto, cpu, cuda or cuda:<number>")
    if config.device != "cpu" and int(config.device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise UserError(f"model.device={config.device}: torch sees no such GPU here; set model.device=auto or cpu")
    return config.device


def _locate(config: ModelConfig) -> tuple[Path, str]:
    """(folder of the model, its revision)."""
    if config.source == "tiny":
        name = f"tiny-{config.n_layers}-{file_digest(Path(__file__))[:16]}"
        return made_once(cache_dir() / "models" / name, lambda folder: _save_tiny(config.n_layers or 4, folder)), name
    assert config.id
    if config.source == "packaged":
        folder = packaged_folder(config.id)
        return folder, (folder / "source.sha256").read_text()
    if folder := own_folder(config):
        if not (folder / "config.json").is_file():
            raise UserError(f"model.id={config.id}: this folder holds no model (no config.json)")
        return folder, folder_state(folder)
    if Path(config.id).is_absolute() or config.id.startswith((".", "~")):
        raise UserError(f"model.id={config.id}: there is no such folder")
    return _from_hub(config)


def _from_hub(config: ModelConfig) -> tuple[Path, str]:
    """Downloads the revision unless the hub's cache has it. An unreachable hub is told within seconds."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    assert config.id
    files = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    if not config.safetensors_only:
        files.append("*.bin")
    if config.trust_remote_code:
        files.append("*.py")
    try:
        folder = Path(
            snapshot_download(config.id, revision=config.revision, allow_patterns=files, local_files_only=True)
        )
        if any(folder.glob("*.safetensors")) or not config.safetensors_only:
            return folder, folder.name
    except (LocalEntryNotFoundError, ValueError):
        pass
    absent = f"model.id={config.id} is not in this machine's cache"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{absent} and HF_HUB_OFFLINE is set: unset it, or give a local folder as model.id")
    try:
        info = HfApi().model_info(config.id, revision=config.revision, timeout=NETWORK_SECONDS)
    except RepositoryNotFoundError as error:
        raise UserError(
            f"model.id={config.id}: no such model on the hub, or a gated one (then set HF_TOKEN)"
        ) from error
    except HfHubHTTPError as error:
        raise UserError(
            f"{absent}, and the hub refused it ({error.response.status_code}): check model.revision"
        ) from error
    except Exception as error:
        raise UserError(
            f"{absent} and the hub can't be reached: connect, or give a local folder as model.id"
        ) from error
    return Path(snapshot_download(config.id, revision=info.sha, allow_patterns=files)), str(info.sha)


def _from_folder(
    folder: Path, config: ModelConfig, quant: QuantConfig, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if config.safetensors_only and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"model.id={config.id}: holds no safetensors, and other weights can run code when loaded; "
            "convert them, or set model.safetensors_only=false"
        )
    _refuse_foreign_weights(folder, config)
    common: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **common)
        load = partial(
            AutoModelForCausalLM.from_pretrained,
            folder,
            output_loading_info=True,
            dtype=getattr(torch, config.dtype),
            use_safetensors=config.safetensors_only or None,
            quantization_config=_quantization(quant),
            device_map=config.device_map or device,
            **common,
        )
        try:
            loaded: Any = load(attn_implementation=config.attention)
        except ValueError as error:
            if config.attention != "sdpa" or "scaled_dot_product_attention" not in str(error):
                raise
            log.info("this architecture has no sdpa: model.attention=eager is used for %s", config.name)
            loaded = load(attn_implementation="eager")
    except UnpicklingError as error:  # torch says how to run it all the same; we don't
        raise UserError(f"model.id={config.id}: its weights are a pickle that wants to run code: not loaded") from error
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        if ran_out(error):
            raise
        raise UserError(f"model.id={config.id}: can't be loaded: {_first_line(error)}") from error
    model, told = loaded
    if missing := sorted(told["missing_keys"]):  # tied ones are none; transformers has filled these with random numbers
        more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(f"model.id={config.id}: {folder} lacks the weights {missing[0]}{more}; get the model anew")
    return model, tokenizer


def _refuse_foreign_weights(folder: Path, config: ModelConfig) -> None:
    """A folder's weights are its own safetensors, not an adapter's base elsewhere nor what an index points to."""
    if (folder / "adapter_config.json").exists():  # transformers would load the base that it names, wherever that is
        raise UserError(f"model.id={config.id}: holds an adapter; merge it into its base, or give the base model")
    index = folder / "model.safetensors.index.json"
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.exists() else []
        strange = [name for name in names if not re.fullmatch(r"[^/\\]+\.safetensors", name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model.id={config.id}: its {index.name} can't be read; get the model anew") from error
    if strange:
        raise UserError(f"model.id={config.id}: its {index.name} names {strange[0]!r}, no safetensors of this folder")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _quantization(quant: QuantConfig) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    match quant.name:
        case "nf4":
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=getattr(torch, quant.compute_dtype),
                bnb_4bit_use_double_quant=quant.double_quant,
            )
        case "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
    return None


def _keep_4bit_weights(model: PreTrainedModel) -> None:
    """Stops bitsandbytes from repacking 4-bit weights at the first evaluation on a CPU with AVX-512 BF16.

    Repacked weights pass no gradient on (only a warning says so): an adapter below them would silently learn nothing.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


@contextmanager
def unpacked(model: nn.Module, read: Sequence[Layer], below: Below | None = None) -> Iterator[None]:
    """Keeps the 4-bit weights of blocks that a loss at `read` runs, from `below` on, unpacked meanwhile, on a CPU.

    bitsandbytes unpacks them at every forward and again at every backward; the numbers are the same to the bit. Where
    they would take more than UNPACKED_BYTES, or on a GPU, nothing happens.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit

    deepest = depth(model) if "final" in read else max(layer for layer in read if layer != "final")
    stack = blocks(model)
    packed: list[Any] = [  # none where the model isn't quantised
        module
        for index in peft_indices(range(below.block if below else 1, deepest + 1))
        for module in stack[index].modules()
        if isinstance(module, Linear4bit) and module.weight.device.type == "cpu"
    ]
    sizes = [module.compute_dtype.itemsize * math.prod(module.weight.quant_state.shape) for module in packed]
    if sum(sizes) > UNPACKED_BYTES:
        packed = []
    try:
        for module in packed:
            weight = dequantize_4bit(module.weight.data.view(-1, 1), module.weight.quant_state).to(module.compute_dtype)
            module.forward = partial(_linear, weight, module.bias)
        yield
    finally:
        for module in packed:
            module.__dict__.pop("forward", None)  # absent where memory ran out before


def _linear(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    bias = None if bias is None else bias.to(weight.dtype)
    return functional.linear(inputs.to(weight.dtype), weight, bias).to(inputs.dtype)


def _save_tiny(n_layers: int, folder: Path) -> None:
    """Makes a random Llama of width 64 whose tokens are single characters; the same on every machine."""
    import torch
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = [*string.printable, *(chr(code) for code in range(0xC0, 0x250))]
    vocabulary = {token: number for number, token in enumerate(["<unk>", *characters])}
    characterwise = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    characterwise.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characterwise, unk_token="<unk>", pad_token="<unk>")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # wide enough that attention has something to say
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --- adapters -----------------------------------------------------------------------------------------------


@contextmanager
def adapter(model: PreTrainedModel, lora: LoraConfig, layers: Sequence[int], *, seed: int) -> Iterator[PeftModel]:
    """Attaches a LoRA adapter to the blocks that produce `layers`; leaves the model bit-identical to what it was.

    Raises UserError where a block lacks one of the target modules.
    """
    import torch
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    expected = _target_names(model, lora, layers)
    modules: dict[str, Any] = dict(model.named_modules())
    edited = lora.init in ("pissa", "olora")  # these two take the adapter out of the base weights
    kept = {name: modules[name].weight.detach().clone() for name in expected} if edited else {}
    config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        layers_to_transform=peft_indices(layers),
        layers_pattern=_blocks_name(model),
        init_lora_weights=True if lora.init == "default" else lora.init,  # pyright: ignore[reportArgumentType]
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    except BaseException:
        _held.clear()  # half of the adapter may be in: the next job must load the model anew
        raise
    try:
        found = {name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")}
        assert found == expected, f"adapted {sorted(found ^ expected)} by mistake"
        yield adapted  # pyright: ignore[reportReturnType]
    finally:
        adapted.base_model.unload()  # pyright: ignore
        for name, weight in kept.items():
            model.get_submodule(name).weight.data.copy_(weight)  # pyright: ignore


def _blocks_name(model: PreTrainedModel) -> str:
    stack = blocks(model)
    return next(name for name, module in model.named_modules() if module is stack).rpartition(".")[2]


def _target_names(model: PreTrainedModel, lora: LoraConfig, layers: Sequence[int]) -> set[str]:
    """Full names of the modules to adapt: those with a matrix as weight, which is packed where it is quantised."""
    stack = blocks(model)
    prefix = next(name for name, module in model.named_modules() if module is stack)
    names = set()
    for index in peft_indices(layers):
        inside = {name for name, module in stack[index].named_modules() if _is_matrix(module)}
        for target in lora.target_modules:
            matching = {name for name in inside if name == target or name.endswith(f".{target}")}
            if not matching:
                known = sorted({name.rpartition(".")[2] for name in inside})
                raise UserError(
                    f"lora.target_modules: this model's blocks have no {target}; they have {', '.join(known)}"
                )
            names |= {f"{prefix}.{index}.{name}" for name in matching}
    return names


def _is_matrix(module: Any) -> bool:
    return isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim == 2


def save_adapter(adapted: PeftModel, folder: Path) -> None:
    """Writes the adapter so that `PeftModel.from_pretrained(base, folder)` gives this model again.

    The folder is written whole or not at all. Raises DiskError.
    """
    for config in adapted.peft_config.values():
        settings: Any = config
        settings.target_modules = sorted(settings.target_modules)  # else a set, and each process writes another order
    with filled_atomically(folder) as work:
        adapted.save_pretrained(str(work), save_embedding_layers=False)  # pyright: ignore[reportArgumentType]
