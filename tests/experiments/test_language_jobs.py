"""Whole jobs on language models: depth and width, adapters that resume, calibration on another text."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.language import letters, tiny_llama
from support.networks import same_tensors
from support.process import train
from support.results import the_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from conf.schema import ConfigError
from datamodules.readers.base import MissingData
from datamodules.texts.tokens import find_text
from experiments.engine.artefacts import read_json
from experiments.engine.pipeline import run_pipeline
from experiments.reporting.set_page import report_set
from experiments.studies.shortened_llama.__main__ import format_perplexities, read_results
from experiments.tools.precompute import load_backbone

TRAIN = "the cat sat on the mat, and the dog sat on the cat. " * 20
HOLDOUT = "a dog and a cat sat on a mat: it was a big mat! " * 10


@pytest.fixture(scope="session")
def language_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of four layers and a tokenizer of letters, saved as transformers saves them."""
    folder = tmp_path_factory.mktemp("language_teacher")
    tiny_llama().save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


@pytest.fixture
def words(overrides: list[str], language_teacher: Path, tmp_path: Path) -> list[str]:
    """A job of seconds: a fifth of a tiny Llama, a text of its own, its perplexity on another."""
    for name, text in {"train": TRAIN, "holdout": HOLDOUT}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    taken = ("data=", "evaluation=", "teacher.path=", "selection.tolerance=")
    return [
        *(override for override in overrides if not override.startswith(taken)),
        "task=language",
        f"teacher.path={language_teacher}",
        f"teacher.tokenizer={language_teacher}",
        "+teacher.length=12",
        *(f"data.{name}={tmp_path}/{name}.txt" for name in ("train", "holdout")),
        "data.length=12",
        f"evaluation.metrics.perplexity_stories.text={tmp_path}/holdout.txt",
        "evaluation.metrics.perplexity_stories.length=12",
        "evaluation.tokens=4",
        "distillation.lora.rank=2",
        "optimizer.lr=0.01",
    ]


@pytest.mark.slow
def test_a_job_exports_a_stock_network_with_its_tokenizer(configure, words):
    cfg = configure(*words, 'selection.protected=[":1"]')
    run_pipeline(cfg)
    run = the_run(Path(cfg.paths.runs))
    metrics, plan = (read_json(run / name) for name in ("metrics.json", "plan.json"))
    assert plan["protected"] == ["model.layers.0"]
    (change,) = plan["changes"]
    assert change["kind"] == "bypass" and change["unit"] != "model.layers.0"
    scores = read_json(run / "scores.json")["scores"]
    assert list(scores) == [f"model.layers.{i}" for i in range(4)]
    assert change["unit"] == min(list(scores)[1:], key=lambda name: scores[name]["score"])
    assert metrics["eval/weights"] == "last" and metrics["distilled/output_loss"] != metrics["pruned/output_loss"]
    for name in ("teacher", "pruned", "distilled"):
        assert metrics[f"{name}/perplexity_stories"] > 1
    texts = read_json(run / "samples" / "distilled" / "texts.json")
    assert len(texts["texts"]) == len(texts["prompts"]) == 4
    stock = AutoModelForCausalLM.from_pretrained(run / "export")
    assert stock.config.num_hidden_layers == 3
    assert same_tensors(
        dict(stock.state_dict()), dict(stock.state_dict()) | load_file(run / "export/model.safetensors")
    )
    assert AutoTokenizer.from_pretrained(run / "export")("a cat")["input_ids"] == letters()("a cat")["input_ids"]
    assert "library_name: transformers" in (run / "export" / "README.md").read_text()
    assert "model.layers.0" in (run / "report.html").read_text()


@pytest.mark.usefixtures("unverified")
@pytest.mark.slow
def test_adapters_resume_in_the_same_bits(configure, words, capsys):
    cfg = configure(*words, "trainer.steps=4", "trainer.checkpoint_every=2", "distillation.lora.dropout=0.3")
    run_pipeline(cfg)
    run = the_run(Path(cfg.paths.runs))
    whole = load_file(run / "networks" / "distilled" / "model.safetensors")
    for name in ("networks/distilled", "export"):
        shutil.rmtree(run / name)
    for name in ("finished.json", "metrics.json"):
        (run / name).unlink()
    (last,) = (run / "checkpoints" / "distil").glob("step=0000004.ckpt")
    last.unlink()
    capsys.readouterr()
    run_pipeline(cfg)
    assert "resuming from step 2 of 4" in capsys.readouterr().out
    assert same_tensors(load_file(run / "networks" / "distilled" / "model.safetensors"), whole)
    assert not any("lora" in name for name in whole)


@pytest.mark.usefixtures("quick_end")
def test_texts_and_perplexity_are_evaluated_while_training(configure, words):
    cfg = configure(*words, "evaluation.every_n_steps=2", "evaluation.training_samples=3")
    run_pipeline(cfg)
    run = the_run(Path(cfg.paths.runs))
    metrics = read_json(run / "metrics.json")
    names = ("perplexity_stories", "teacher_perplexity_stories")
    with open(run / "history" / "distil.csv", newline="") as file:
        rows = {(row["step"], row["name"]): float(row["value"]) for row in csv.DictReader(file)}
    final = [rows["3", f"train/eval/{name}"] for name in names]
    # With the adapters beside the weights, not merged into them.
    assert final[0] == pytest.approx(metrics["distilled/perplexity_stories"], rel=1e-5)
    assert final[1] == metrics["teacher/perplexity_stories"]
    texts = read_json(run / "previews" / "distil" / "step=0000004.json")
    assert list(texts) == ["prompt", "teacher", "step 4"] and texts["prompt"] == list(cfg.evaluation.prompts[:3])
    assert texts["teacher"] == read_json(run / "samples" / "teacher" / "texts.json")["texts"][:3]


@pytest.mark.usefixtures("quick_end")
@pytest.mark.parametrize("distillation", ["task_only", "language"])
def test_all_weights_are_retrained_and_distilled(configure, words, distillation):
    cfg = configure(*(w for w in words if "lora" not in w), f"distillation={distillation}")
    run_pipeline(cfg)
    run = the_run(Path(cfg.paths.runs))
    before, after = (load_file(run / "networks" / name / "model.safetensors") for name in ("pruned", "distilled"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    history = (run / "history" / "distil.csv").read_text()
    assert ("train/weighted_feature/model_layers" in history) == (distillation == "language")


@pytest.mark.usefixtures("quick_end")
@pytest.mark.parametrize("criterion", ["taylor criterion.level=channel", "wanda", "flap"])
def test_narrower_layers_are_distilled_layer_by_layer(configure, words, criterion):
    given = [word for word in words if "lora" not in word]
    cfg = configure(
        *given, *f"criterion={criterion}".split(), "selection=uniform", "distillation=language", "selection.ratio=0.17"
    )
    run_pipeline(cfg)
    run = the_run(Path(cfg.paths.runs))
    config = read_json(run / "networks" / "distilled" / "config.json")
    assert (config["num_hidden_layers"] == 4 and config["num_key_value_heads"] < 2) or config["intermediate_size"] < 24
    achieved = read_json(run / "metrics.json")["plan/achieved_ratio"]
    assert achieved == pytest.approx(0.1736, abs=1e-4)


@pytest.mark.usefixtures("quick_end")
def test_calibration_can_use_another_text(configure, words, tmp_path):
    (tmp_path / "other.txt").write_text("zebras and xylophones: quite puzzling! " * 20)
    cfgs = [
        configure(*(w for w in words if "lora" not in w), "distillation=none", *more)
        for more in (
            [],
            [
                "+data@calibration.data=wikitext2",
                "calibration.data.length=12",
                f"calibration.data.train={tmp_path}/other.txt",
                f"calibration.data.holdout={tmp_path}/holdout.txt",
            ],
        )
    ]
    for cfg in cfgs:
        run_pipeline(cfg)
    runs = sorted({path.parent for path in tmp_path.rglob("finished.json")})
    first, second = (read_json(run / "scores.json") for run in runs)
    assert first["key"] != second["key"] and first["scores"] != second["scores"]


SMALL = ["data.length=12", "data.batch_size=4", "trainer.steps=2", "trainer.accumulate_grad_batches=1"]


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("recipe", ["shortened_llama", "shortened_llama_stories15m"])
def test_a_recipe_runs_on_a_tiny_network_and_texts(configure, words, tmp_path, recipe):
    given = [word for word in words if word not in ("debug=tiny", "task=language")]
    given += ["calibration.samples=4", "evaluation.loss_samples=4", "logger.wandb=false"]
    if recipe == "shortened_llama":
        text = f"evaluation.metrics.perplexity.text={tmp_path}/holdout.txt"
        given += [text, "evaluation.metrics.perplexity.length=12", "evaluation.metrics.perplexity.tokens=null"]
    cfg = configure(f"experiment={recipe}", *given, *SMALL, "selection.ratio=0.2", "selection.tolerance=0.1")
    run_pipeline(cfg)
    metrics = read_json(the_run(Path(cfg.paths.runs)) / "metrics.json")
    assert metrics["plan/removed_units"] == 1 and metrics["distilled/perplexity_stories"] > 1
    if recipe == "shortened_llama":
        assert metrics["pruned/perplexity"] == metrics["pruned/perplexity_stories"]  # of the same text here


@pytest.mark.usefixtures("unverified")
def test_the_paper_recipe_calibrates_on_books_trains_on_instructions(configure, words, tmp_path):
    rows = [{"instruction": f"say {i}", "input": "" if i % 2 else "now", "output": f"a cat, {i}"} for i in range(30)]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    for name in ("books", "other"):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{name} {i}: " + TRAIN[:80] for i in range(30)))
    given = [word for word in words if not word.startswith(("data.", "task=", "debug="))]
    data = [f"data.path={tmp_path}/alpaca.json", "data.holdout_rows=10", "data.prompt='say {instruction} {input}'"]
    data += ["data.short_prompt='say {instruction}'", "data.length=30", "data.batch_size=4"]
    books = ["hub=null", f"train={tmp_path}/books.txt", f"holdout={tmp_path}/other.txt", "length=12", "documents=10"]
    books = [f"calibration.data.{word}" for word in [*books, "separator='\n\n'"]]
    cfg = configure(
        "experiment=shortened_llama_7b",
        *given,
        *data,
        *books,
        *("evaluation=perplexity_stories", "evaluation.loss_samples=4", "logger.wandb=false"),
        *("trainer.steps=2", "trainer.accumulate_grad_batches=2", "lr_scheduler.num_warmup_steps=1"),
        *("selection.ratio=0.2", "selection.tolerance=0.1", 'selection.protected=[":1","-2:"]'),
    )
    run_pipeline(cfg)
    run = the_run(Path(cfg.paths.runs))
    assert [change["unit"] for change in read_json(run / "plan.json")["changes"]] == ["model.layers.1"]
    metrics = read_json(run / "metrics.json")
    assert metrics["distilled/task_loss"] != metrics["pruned/task_loss"]


def test_measuring_on_a_calibration_text_is_refused(configure, words, tmp_path):
    given = ["+data@calibration.data=wikitext2", "calibration.data.length=12"]
    given += [f"calibration.data.train={tmp_path}/holdout.txt", f"calibration.data.holdout={tmp_path}/train.txt"]
    with pytest.raises(ValueError, match=r"evaluation\.metrics\.perplexity_stories: .*also trained or calibrated on"):
        run_pipeline(configure(*words, *given))


@pytest.mark.usefixtures("quick_end")
def test_another_text_under_the_same_name_is_another_run(configure, words, tmp_path):
    cfg = configure(*(w for w in words if "lora" not in w), "distillation=none")
    run_pipeline(cfg)
    (tmp_path / "train.txt").write_text(TRAIN[::-1])
    run_pipeline(cfg)
    assert len(list(tmp_path.rglob("finished.json"))) == 2


@pytest.mark.usefixtures("unverified")
@pytest.mark.slow
def test_the_study_tells_its_runs_apart(configure, words, tmp_path):
    small = [word for word in words if word not in ("debug=tiny", "task=language") and "lora" not in word]
    small += ["selection.ratio=0.2", "selection.tolerance=0.1", "calibration.samples=4", "evaluation.loss_samples=4"]
    small += [f"evaluation.metrics.perplexity.text={tmp_path}/holdout.txt", "evaluation.metrics.perplexity.length=16"]
    small += ["logger.wandb=false", "experiment=shortened_llama", "evaluation.metrics.perplexity.tokens=null", *SMALL]
    for given in (
        ["distillation=none"],
        ["distillation=task_only"],
        ["distillation=none", 'selection.protected=[":2"]'],
    ):
        run_pipeline(configure(*small, *given))
    root = tmp_path / "runs" / "shortened_llama"
    table, unpruned = read_results(root)
    assert list(zip(table["criterion"], table["retraining"], strict=True)) == [
        ("perplexity", "none"),
        ("perplexity+", "none"),
        ("perplexity", "task_only"),
    ] or list(table["criterion"]) == ["perplexity+", "perplexity", "perplexity"]
    runs = [read_json(path.parent / "metrics.json") for path in root.rglob("finished.json")]
    assert unpruned == {name: runs[0][f"teacher/{name}"] for name in ("perplexity", "perplexity_stories")}
    trained = next(run for run in runs if "distilled/perplexity" in run)
    last = table.iloc[-1]
    assert (last["perplexity"], last["perplexity_stories"]) == (
        trained["distilled/perplexity"],
        trained["distilled/perplexity_stories"],
    )
    assert re.search(r"^\| perplexity\+ +\| 1 +\|", format_perplexities(table), re.MULTILINE)
    run_pipeline(configure(*small, "distillation=task_only", "seed=1"))
    with pytest.raises(ValueError, match="several runs of"):
        read_results(root)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["data=tiny"], "data=tiny: Images has no tokens"),
        (["data.length=65"], "data.length=65 is more than the 64 tokens"),
        (["distillation.lora.targets=[qproj]"], "'qproj' is no linear layer"),
        (["noise_scheduler=linear"], "noise_scheduler=linear: this teacher has none"),
        (["export.dense_twin=true"], "of a diffusion network"),
        (["export.onnx=true"], "a LlamaForCausalLM cannot be written as ONNX"),
        (["selection=bk_sdm", "~selection.ratio", "~selection.tolerance"], "selection.name='bk_sdm' is for the U-Nets"),
        (["evaluation=frechet_resnet20"], "measures generated samples"),
        (["criterion=clip_score", "criterion.path=/nowhere"], "it generates nothing"),
        (["criterion.level=operator", "criterion=magnitude"], "choose criterion.level=depth or channel"),
    ],
)
def test_settings_unfit_for_a_language_model_are_refused_before_scoring(configure, words, given, message):
    group = given[0].partition("=")[0] if given[0].startswith(("data=", "evaluation=")) else None
    kept = [word for word in words if not word.startswith(f"{group}.")]
    cfg = configure(*kept, *given)
    with pytest.raises(ValueError, match=message):
        run_pipeline(cfg)
    assert not list(Path(cfg.paths.runs).rglob("scores.json"))


def test_a_data_set_is_no_value_of_calibration_data(configure):
    with pytest.raises(ConfigError, match=r"choose one with \+data@calibration\.data=wikitext2"):
        configure("task=language", "calibration.data=wikitext2")


def test_a_language_model_has_no_latents_to_store(configure, words):
    with pytest.raises(ConfigError, match="has no latents"):
        load_backbone(configure(*words))


@pytest.mark.data
@pytest.mark.slow
def test_stories15m_recovers_from_the_loss_of_two_layers(tmp_path):
    try:
        find_text("stories15M.bin")
    except MissingData:
        pytest.skip("$SECATEUR_DATA has no stories15M.bin")
    train("experiment=shortened_llama_stories15m", f"paths.runs={tmp_path}", "trainer=cpu", "logger.wandb=false")
    (finished,) = tmp_path.rglob("finished.json")
    run = finished.parent
    metrics = read_json(run / "metrics.json")
    assert metrics["teacher/params"] == 15_191_712 and metrics["student/params"] == 13_199_904
    scores = read_json(run / "scores.json")["scores"]
    assert len(scores) == 6 and min(entry["score"] for entry in scores.values()) > metrics["teacher/perplexity_stories"]
    teacher, pruned, retrained = (metrics[f"{name}/perplexity_stories"] for name in ("teacher", "pruned", "distilled"))
    assert teacher < 6 and pruned > 5 * teacher and retrained < 0.4 * pruned
    assert read_json(run / "measured.json")["export_max_difference"] < 1e-4
    assert "perplexity_stories" in report_set(tmp_path).read_text()
