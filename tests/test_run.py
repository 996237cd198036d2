"""The command: one whole run on the tiny model, read back from the folder and from MLflow; bad input; real models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from src.results import read_table
from tests.conftest import ROOT

SMALL = ["model=tiny", "dataset.limit=60", "dataset.control_size=15", "train.epochs=1", "eval.permutations=99"]
INFONCE = ["objective=infonce", "objective.layer=final"]


def job_folder(root: Path) -> Path:
    (results,) = root.glob("multirun/*/*/*/results.json")
    return results.parent


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run of the tiny model through the real command line, tracked in a store of its own."""
    root = tmp_path_factory.mktemp("run")
    store = f"sqlite:///{root}/mlruns/mlflow.db"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TLI_CACHE": str(root / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "src.run", *SMALL, *INFONCE, f"tracking.uri={store}"],
        cwd=root, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return job_folder(root), store, done


def test_a_run_prints_its_result_and_nothing_on_stderr(whole_run):
    folder, _, done = whole_run
    assert done.stderr == ""
    for line in (
        "pair cosine",
        "retrieval (CSLS P@1)",
        "verdict:",
        "perplexity, swahili",
        str(folder),
        "python -m src.ui",
    ):
        assert line in done.stdout


def test_the_job_folder_is_whole(whole_run):
    folder, _, _ = whole_run
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}
    assert files >= {
        "run.log", "results.json", "layers.csv", "pairs.csv", "training.csv", ".hydra/config.yaml",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
        "plots/similarity.png", "plots/retrieval.png", "plots/scatter.png", "plots/specificity.png",
    }  # fmt: skip
    results = json.loads((folder / "results.json").read_text())
    for split in ("train", "control"):
        for name in (
            "pair_cosine_before", "pair_cosine_after", "pair_cosine_gain", "pair_cosine_gain_pct", "margin_before",
            "margin_after", "margin_gain", "csls_p_at_1_before", "csls_p_at_1_after", "t_pvalue", "wilcoxon_pvalue",
            "cohens_dz", "gain_ci_low", "gain_ci_high", "mcnemar_pvalue", "specificity_gain", "specificity_pvalue",
        ):  # fmt: skip
            assert isinstance(results[f"{split}/{name}"], float)
    for name in ("load", "encode", "train", "total"):
        assert results[f"time/{name}_s"] > 0
    assert results["verdict"] in ("aligned", "memorised", "inflated", "harmed", "none")
    assert results["versions"]["torch"] == torch.__version__.split("+")[0] or results["versions"]["torch"]
    assert len(results["config_hash"]) == 16


def test_every_layer_stage_split_and_measure_is_there_and_the_scalars_agree(whole_run):
    folder, _, _ = whole_run
    rows = read_table(folder / "layers.csv")
    assert {row["layer"] for row in rows} == {"0", "1", "2", "3", "4", "final"}
    per_layer = {
        ("pilot", "all"): 9,
        ("before", "train"): 9,
        ("before", "control"): 10,
        ("after", "train"): 9,
        ("after", "control"): 10,
    }
    for (stage, split), count in per_layer.items():
        assert sum(row["stage"] == stage and row["split"] == split for row in rows) == 6 * count
    results = json.loads((folder / "results.json").read_text())
    for stage in ("before", "after"):
        (value,) = [
            float(row["value"]) for row in rows
            if (row["layer"], row["stage"], row["split"], row["measure"]) == ("final", stage, "control", "pair_cosine")
        ]  # fmt: skip
        assert value == pytest.approx(results[f"control/pair_cosine_{stage}"])
    pairs = read_table(folder / "pairs.csv")
    assert len(pairs) == 60
    control = [float(row["cosine_after"]) for row in pairs if row["split"] == "control"]
    assert sum(control) / len(control) == pytest.approx(results["control/pair_cosine_after"])
    assert all(1 <= int(row["rank_before"]) <= 45 for row in pairs)


def test_mlflow_holds_it_all(whole_run):
    from mlflow import MlflowClient

    folder, store, _ = whole_run
    results = json.loads((folder / "results.json").read_text())
    client = MlflowClient(store)
    run = client.get_run(results["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["lora.rank"] == "16"
    assert run.data.params["lora.n_layers"] == "2"
    assert run.data.tags["verdict"] == results["verdict"]
    assert run.data.tags["config_hash"] == results["config_hash"]
    for key, value in results.items():
        if "/" in key and isinstance(value, float):
            assert run.data.metrics[key] == pytest.approx(value), key
    history = client.get_metric_history(run.info.run_id, "after_control/pair_cosine")
    assert [point.step for point in history] == [0, 1, 2, 3, 4, 5]
    assert history[-1].value == pytest.approx(results["control/pair_cosine_after"])
    losses = [float(row["loss"]) for row in read_table(folder / "training.csv")]
    assert [point.value for point in client.get_metric_history(run.info.run_id, "train/loss")] == pytest.approx(losses)
    assert run.inputs
    assert run.inputs.dataset_inputs[0].dataset.digest
    assert {"plots", "adapter", "layers.csv", "results.json"} <= {
        file.path for file in client.list_artifacts(run.info.run_id)
    }


BARE_SCRIPT = """
import csv, sys, torch
from peft import PeftModel
from torch.nn.functional import normalize
sys.path.insert(0, sys.argv[2])
from tests.conftest import model_config, quant_config
from src.models import load_model
base = load_model(model_config(), quant_config())
model = PeftModel.from_pretrained(base.model, sys.argv[1] + "/adapter").eval()
def vector(word):
    ids = torch.tensor([base.tokenizer(word)["input_ids"]])
    return normalize(model(ids, output_hidden_states=True).hidden_states[-1][0].mean(0), dim=0)
for row in csv.DictReader(open(sys.argv[1] + "/pairs.csv")):
    print(float(row["cosine_after"]) - (vector(row["source"]) @ vector(row["target"])).item())
"""


def test_a_bare_peft_script_reproduces_the_after_numbers(whole_run):
    folder, _, _ = whole_run
    done = subprocess.run(
        [sys.executable, "-c", BARE_SCRIPT, str(folder), str(ROOT)], capture_output=True, text=True, check=True
    )
    differences = [abs(float(line)) for line in done.stdout.split()]
    assert len(differences) == 60
    assert max(differences) < 1e-5


def numbers(results: dict) -> dict:
    return {key: value for key, value in results.items() if "/" in key and not key.startswith("time/")}


def test_the_same_seed_gives_the_same_numbers_bit_for_bit(cli, tmp_path, whole_run):
    folder, _, _ = whole_run
    status, _, _ = cli(*SMALL, *INFONCE, "tracking=off")
    assert status == 0
    again = json.loads((job_folder(tmp_path) / "results.json").read_text())
    assert numbers(again) == numbers(json.loads((folder / "results.json").read_text()))
    assert (job_folder(tmp_path) / "pairs.csv").read_text() == (folder / "pairs.csv").read_text()
    assert (job_folder(tmp_path) / "training.csv").read_text() == (folder / "training.csv").read_text()


def test_train_none_is_the_pilot_alone(cli, tmp_path):
    status, out, _ = cli(*SMALL[:3], "train=none", "tracking=off", "eval.probes=false")
    assert status == 0
    folder = job_folder(tmp_path)
    assert {row["stage"] for row in read_table(folder / "layers.csv")} == {"pilot"}
    results = json.loads((folder / "results.json").read_text())
    assert results["verdict"] == "none"
    assert "control/csls_p_at_1_before" in results
    assert "control/t_pvalue" not in results
    assert not (folder / "adapter").exists()
    assert "before" in out
    assert "after" not in out


def test_auto_layers_are_chosen_on_the_train_split_and_recorded(cli, tmp_path):
    status, _, _ = cli(*SMALL, "lora.layers=auto", "objective.layer=auto", "tracking=off", "eval.probes=false")
    assert status == 0
    results = json.loads((job_folder(tmp_path) / "results.json").read_text())
    (chosen,) = json.loads(results["objective_layers_used"])
    assert json.loads(results["lora_layers_used"]) == list(range(1, chosen + 1))
    assert results["params"]["lora.n_layers"] == str(chosen)
    assert results["layers_chosen_because"].startswith(f"layer {chosen} has the train split's best CSLS P@1")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.rnk=4"], "lora.rnk"),
        (["modle=tiny"], "modle"),
        (["model=nosuch"], "nosuch"),
        (["experiment=nosuch"], "nosuch"),
        (["lora.rank=many"], "many"),
        (["lora.layers=[1,99]"], "99"),
        (["lora.layers=[4]", "objective.layer=2"], "no gradient"),
        (["dataset.control_size=99"], "dataset.control_size=99"),
        (["model=hub", "model.id=/no/such/model"], "/no/such/model: there is no such folder"),
        (["model=hub", "model.id=nobody/nothing"], "HF_HUB_OFFLINE"),
        (["lora.target_modules=[c_attn]"], "no c_attn; they have"),
        (["tracking=server", "tracking.uri=http://127.0.0.1:9"], "tracking.uri=http://127.0.0.1:9"),
        (["dataset=file", "dataset.path=none.tsv"], "none.tsv"),
        (["dataset=file", "dataset.path=binary.tsv"], "binary.tsv"),
        (["dataset=file", "dataset.path=empty.tsv"], "empty.tsv"),
        (["dataset=file", "dataset.path=latin1.tsv"], "latin1.tsv, line 2"),
        (["dataset=file", "dataset.path=half.tsv"], "half.tsv, line 3"),
        (["dataset=freedict", "dataset.pair=abc-xyz"], "apt-get install dict-freedict-abc-xyz"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing_half_written(cli, tmp_path, overrides, message):
    (tmp_path / "binary.tsv").write_bytes(b"source\ttarget\na\x00b\tc\n")
    (tmp_path / "empty.tsv").write_bytes(b"")
    (tmp_path / "latin1.tsv").write_bytes("source\ttarget\nfenêtre\twindow\n".encode("latin-1"))
    (tmp_path / "half.tsv").write_text("source\ttarget\nmaji\twater\nmoto\t \n")
    off = [] if any("tracking" in override for override in overrides) else ["tracking=off"]
    status, out, err = cli(*SMALL, *off, *overrides)
    assert status == 2, err
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("results.json")) + list(tmp_path.rglob("layers.csv")) + list(tmp_path.rglob("*.tmp"))


def test_paths_begin_where_the_command_was_given(cli, tmp_path):
    (tmp_path / "words.tsv").write_text("source\ttarget\n" + "".join(f"neno{i}\tword{i}\n" for i in range(60)))
    status, out, err = cli(
        *SMALL, "dataset=file", "dataset.path=words.tsv", "hydra.job.chdir=true", "train=none", "eval.probes=false"
    )
    assert (status, err) == (0, "") and "pair cosine" in out


def test_a_failed_job_is_told_with_its_log_and_exit_status_1(cli, tmp_path):
    status, _, err = cli(*SMALL, *INFONCE, "tracking=off", "objective.temperature=1e-42", "eval.probes=false")
    assert status == 1
    assert "not a finite number at step" in err
    assert "run.log" in err
    (log,) = tmp_path.rglob("run.log")
    assert "Traceback" in log.read_text()
    assert not list(tmp_path.rglob("results.json"))


def test_help_and_cfg_import_nothing_heavy():
    code = (
        "import sys; sys.argv = ['src.run', '--cfg', 'job']; from src.run import main; status = main();"
        "heavy = {'torch', 'transformers', 'mlflow', 'peft', 'scipy', 'matplotlib'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "rank: 16" in done.stdout


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_the_real_model_learns_on_the_built_in_pairs(tmp_path, quant):
    """SmolLM2 and a few steps on real pairs: the trained pairs draw together, and the pilot shows the paper's trap."""
    store = f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    few = ["dataset.limit=60", "dataset.control_size=20", "eval.permutations=999", "eval.probes=false"]
    few += ["lora.layers=[1,2,3,4]", "objective=infonce", "objective.layer=final"]
    few += ["train.epochs=8", "train.batch_size=20", "train.learning_rate=2e-3"]
    done = subprocess.run(
        [sys.executable, "-m", "src.run", f"quant={quant}", *few, f"tracking.uri={store}"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    from mlflow import MlflowClient

    results = json.loads((job_folder(tmp_path) / "results.json").read_text())
    run = MlflowClient(store).get_run(results["mlflow_run_id"])
    pilot = {
        (row["layer"], row["measure"]): float(row["value"])
        for row in read_table(job_folder(tmp_path) / "layers.csv")
        if row["stage"] == "pilot"
    }
    assert {layer for layer, _ in pilot} == {*map(str, range(31)), "final"}
    peak = max((str(layer) for layer in range(31)), key=lambda layer: pilot[layer, "pair_cosine"])
    assert pilot[peak, "pair_cosine"] > 0.99
    assert pilot[peak, "mismatched_cosine"] > 0.99  # wrong translations are as close: the cosine alone says nothing
    losses = [point.value for point in MlflowClient(store).get_metric_history(run.info.run_id, "train/loss")]
    assert sum(losses[-2:]) < 0.95 * sum(losses[:2])  # the last epoch's against the first's
    assert results["train/margin_gain"] > 0
    assert run.data.metrics["train/specificity_pvalue"] <= 1
    assert run.data.tags["verdict"] == results["verdict"]
