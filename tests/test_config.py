"""Every bad value is refused with one line that names its key, before anything is loaded."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from src.config import Config, config_hash, params, read_config, register, resolve_layers, run_name
from src.errors import UserError
from tests.conftest import ROOT


def composed(*overrides: str) -> DictConfig:
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(overrides))


def config(*overrides: str) -> Config:
    return read_config(composed(*overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+lora.new=4"], "lora.new is no key"),
        (["+nonsense=4"], "nonsense is no key"),
        (["lora.layers=[]"], r"lora.layers=\[\]: must name a layer; give a list of layers from 1 to 30"),
        (["lora.layers=[1,31]"], r"lora.layers=\[1, 31\]: 31 is not possible"),
        (["lora.layers=[0]"], "0 is not possible"),
        (["lora.layers=[1,1]"], "names a layer twice"),
        (["lora.layers=some"], "some is not possible; give a list of layers from 1 to 30 or all or auto"),
        (["lora.layers=[true]"], "True is not possible"),
        (["lora.layers=[1.5]"], "1.5 is not possible"),
        (["lora.layers=[final]"], "final is not possible"),
        (["lora.layers=[1,5]", "objective.layer=2"], r"objective.layer=2 gives no gradient to blocks above it \(5\)"),
        (["lora.layers=all", "objective.layer=2"], "gives no gradient to blocks above it"),
        (["objective.layer=99"], "objective.layer=99: 99 is not possible"),
        (["objective.layer=[2,2]"], "twice"),
        (["eval.layer=31"], "eval.layer=31"),
        (["eval.layer=[1,2]"], "eval.layer"),
        (["eval.layer=[3]"], "must name one layer"),
        (["lora.layers=auto", "objective.layer=2"], "the choice could lie above the loss"),
        (["lora.rank=0"], "lora.rank=0: must be at least 1"),
        (["lora.dropout=1.5"], "lora.dropout=1.5: must be at least 0 and at most 0.99"),
        (["lora.alpha=0"], "lora.alpha=0.0: must be above 0"),
        (["lora.target_modules=[]"], "lora.target_modules is empty"),
        (["lora.init=magic"], "lora.init=magic: must be one of default, gaussian, pissa, olora"),
        (["lora.init=pissa", "quant=nf4"], "quant=nf4 forbids"),
        (["train.learning_rate=-1"], "train.learning_rate=-1.0: must be above 0"),
        (["train.learning_rate=nan"], "train.learning_rate=nan"),
        (["train.batch_size=1"], "train.batch_size=1"),
        (["train.epochs=-1"], "train.epochs=-1"),
        (["train.precision=fp8"], "train.precision=fp8: must be one of"),
        (["objective.temperature=0"], "objective.temperature=0.0: must be above 0"),
        (["eval.template=hello"], "eval.template='hello': must hold {word} once"),
        (["eval.template='{word} {word}'"], "must hold {word} once"),
        (["eval.measures=[speed]"], "eval.measures: speed is none of pair_cosine"),
        (["+eval.text.swahili=/no/such"], "eval.text.swahili=/no/such: there is no such file"),
        (["model=hub"], "model.id has no value"),
        (["model.dtype=int4"], "model.dtype=int4: must be one of"),
        (["dataset=file"], "dataset.path has no value"),
        (["dataset=freedict", "dataset.pair=null"], "dataset.pair has no value"),
        (["dataset.control_size=1"], "dataset.control_size=1: must be at least 2"),
        (["tracking=server", "tracking.uri=null"], "tracking.uri has no value"),
        (["tracking.experiment=''"], "tracking.experiment=''"),
    ],
)
def test_refused_in_one_line(overrides, message):
    with pytest.raises(UserError, match=message) as refusal:
        config(*overrides)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("overrides", "blocks", "read"),
    [
        ([], [1, 2], (2,)),
        (["lora.layers=[3]"], [3], (3,)),
        (["lora.layers=[2,1]", "objective.layer=final"], [1, 2], ("final",)),
        (["lora.layers=all"], list(range(1, 31)), (30,)),
        (["lora.layers=[1]", "objective.layer=[final,12,2]"], [1], (2, 12, "final")),
        (["lora.layers=auto"], [1, 2, 3, 4, 5, 6, 7], (7,)),
        (["lora.layers=[1,2]", "objective.layer=auto"], [1, 2], (7,)),
        (["lora.layers=[9]", "objective.layer=auto"], [9], (9,)),
    ],
)
def test_layers_resolve(overrides, blocks, read):
    assert resolve_layers(config(*overrides), 30, auto=7) == (blocks, read)


def test_every_group_option_and_experiment_composes():
    for group in sorted((ROOT / "conf").iterdir()):
        for file in sorted(group.glob("*.yaml")) if group.is_dir() and group.name != "hydra" else []:
            needs = {"hub": ["model.id=x"], "file": ["dataset.path=x"]}.get(file.stem, [])
            config(f"{group.name}={file.stem}", *needs)


def test_the_hash_names_a_setting_and_not_where_it_is_tracked():
    assert config_hash(config()) == config_hash(config("tracking=off", "sweep.force=true"))
    assert config_hash(config()) != config_hash(config("lora.rank=8"))


def test_names_are_short_and_tell_jobs_apart():
    assert run_name(config("objective=infonce")) == "r16 L1,2 infonce"
    assert run_name(config("lora.layers=[1]", "objective.layer=final", "lora.rank=4")) == "r4 L1 triplet@final"
    assert run_name(config("train=none")) == "pilot smollm2_135m"


def test_params_are_flat():
    flat = params(config(), 30)
    assert flat["lora.rank"] == "16"
    assert flat["lora.layers"] == "[1, 2]"
    assert flat["lora.n_layers"] == "2"
    assert flat["model.revision"] == "null"
