"""How language models are measured: perplexity and tasks against sums by hand, texts side by side, reports."""

import importlib.util
import json
import math
import re

import pytest
import torch
from omegaconf import OmegaConf
from support.language import LETTERS, VOCABULARY, letters, tiny_llama
from support.results import read_markdown

import lightning_modules.modules.joint_loss as evaluation_module
from conf.schema import build
from datamodules.readers.base import MissingData
from datamodules.texts.corpus import Corpus
from datamodules.texts.tokens import Tokenizer as Encoder
from experiments.engine.artefacts import write_json
from experiments.engine.clock import Clock
from experiments.engine.evaluation import Evaluator
from experiments.engine.job import Job
from experiments.engine.measures import check_network_measures, list_columns
from experiments.engine.run import Run
from experiments.reporting.figures import spans_more_than
from experiments.reporting.run_page import format_value, report_run
from experiments.reporting.set_page import report_set
from lightning_modules.backbones.language.backbone import LanguageBackbone
from lightning_modules.metrics.perplexity import Perplexity
from lightning_modules.metrics.zero_shot import ZeroShot
from lightning_modules.modules.joint_loss import sum_square_errors

CPU = torch.device("cpu")
TEXT = "Once upon a time, there was a cat. It sat on a mat, and it was a black cat: a cat of cats!"


def reader(bos: str | None = "<s>") -> LanguageBackbone:
    return LanguageBackbone(tiny_llama(), letters(bos), length=12)


@pytest.fixture
def text(tmp_path, monkeypatch):
    """$SECATEUR_DATA with some.txt in shared/text, and train.txt beside it."""
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    folder = tmp_path / "shared" / "text"
    folder.mkdir(parents=True)
    (folder / "some.txt").write_text(TEXT)
    (folder / "train.txt").write_text(TEXT[::-1])
    return folder


@torch.no_grad()
def by_hand(backbone: LanguageBackbone, rows: list[list[int]]) -> float:
    """exp of the mean over every token but the first of each row, a row and a token at a time."""
    surprises = []
    for row in rows:
        logits = backbone.network(torch.tensor([row])).logits[0].double()
        surprises += [-float(logits[k].log_softmax(0)[token]) for k, token in enumerate(row[1:])]
    return math.exp(sum(surprises) / len(surprises))


IDS = [3 + LETTERS.index(letter) for letter in TEXT]


@pytest.mark.parametrize(
    ("bos", "rows", "predicted"),
    [
        ("start", [([0, *IDS])[k : k + 16] for k in range(0, 80, 16)], 15),
        ("each", [[0, *IDS[k : k + 16]] for k in range(0, 80, 16)], 16),
        ("none", [IDS[k : k + 16] for k in range(0, 80, 16)], 15),
    ],
)
def test_perplexity_equals_the_sum_by_hand_over_full_segments(text, bos, rows, predicted):
    assert 80 < len(IDS) < 95
    backbone = reader()
    assert [len(row) - 1 for row in rows] == [predicted] * 5
    found = [Perplexity("some.txt", 16, bos, batch_size)(backbone, CPU) for batch_size in (1, 2, 5, 8)]
    assert Perplexity("some.txt", 16, bos).segments(backbone).tolist() == rows
    assert found == pytest.approx([by_hand(backbone, rows)] * 4, rel=1e-6)


def test_the_first_tokens_of_a_text_can_be_measured_alone(text):
    (text / "short.txt").write_text(TEXT[:40])
    backbone = reader()
    assert Perplexity("some.txt", 8, tokens=40)(backbone, CPU) == Perplexity("short.txt", 8)(backbone, CPU)


@pytest.mark.parametrize("bos", ["start", "each", "none"])
def test_the_full_segment_length_is_that_of_the_network(text, bos):
    segments = Perplexity("some.txt", None, bos).segments(reader())
    assert segments.shape == (1, 64)
    assert segments[0, 0] == (IDS[0] if bos == "none" else 0)


def test_files_and_parts_of_files_are_joined_by_an_empty_line(text):
    (text / "more").mkdir()
    (text / "more" / "b.txt").write_text(" b c \n\nd\n")
    (text / "more" / "a.txt").write_text("a")
    assert Perplexity("more", 2).text == "a\n\n b c \n\nd\n"
    assert Perplexity("more", 2, separator="\n").text == "a\n\nb c\n\nd"


def test_penn_treebank_from_its_file_equals_that_of_the_hub(text, configure, tmp_path, monkeypatch):
    sentences = ["a cat sat", "on a mat"]
    (text / "ptb.valid.txt").write_text("".join(f" {sentence} \n" for sentence in sentences))
    given = ["evaluation.metrics.ptb.hub=null", "evaluation.metrics.ptb.text=ptb.valid.txt"]
    file = build(configure("evaluation=ptb", *given).evaluation.metrics.ptb)
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_dict({"sentence": sentences}).to_parquet(tmp_path / "hub" / "validation.parquet")
    given = [f"evaluation.metrics.ptb.hub={tmp_path}/hub", "evaluation.metrics.ptb.revision=null"]
    hub = build(configure("evaluation=ptb", *given).evaluation.metrics.ptb)
    assert file.text == hub.text == "a cat sat\n\non a mat"
    assert file.name == "ptb.valid.txt" and hub.name == "hub (validation)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bos": "both"}, "bos='both' is unknown; choose one of: start, each, none"),
        ({"length": 1}, "length=1 is out of range; choose a whole number of 2 or more"),
        ({"batch_size": 0}, "batch_size=0 is out of range"),
    ],
)
def test_options_out_of_range_are_refused(text, options, message):
    with pytest.raises(ValueError, match=message):
        Perplexity("some.txt", **options)


def test_texts_that_cannot_be_measured_are_refused_at_once(text):
    cases = [
        (LanguageBackbone(tiny_llama()), {}, "choose a teacher that has one"),
        (reader(), {"length": 65}, "segments of 65 tokens are more than the 64"),
        (reader(), {"length": 64, "bos": "each"}, "segments of 65 tokens are more than the 64"),
        (reader(None), {"length": 16}, "bos='start': the tokenizer has no token for a beginning; choose bos=none"),
        (reader(), {"length": 16, "tokens": 9}, "text='some.txt' has 10 tokens; choose a length of that or less"),
    ]
    for backbone, options, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            Perplexity("some.txt", **options).check(backbone, None)
    Perplexity("some.txt", 64).check(reader(), None)
    Perplexity("some.txt", 16, "none").check(reader(None), None)
    with pytest.raises(MissingData, match=r"none\.txt does not exist"):
        Perplexity("none.txt")


def corpus(train: str = "train.txt", holdout: str = "some.txt") -> Corpus:
    tokenizer = letters()
    encoder = Encoder(lambda text: tokenizer.encode(text, add_special_tokens=False), VOCABULARY, 0, 1)
    return Corpus(train, holdout, encoder, length=12, batch_size=2)


def test_measuring_on_a_training_text_is_refused(text):
    Perplexity("some.txt", 16).check(reader(), corpus())
    (text / "copy.txt").write_bytes((text / "train.txt").read_bytes())
    for name in ("train.txt", "copy.txt"):
        with pytest.raises(ValueError, match=rf"{name} is trained or calibrated on, too; choose another text"):
            Perplexity(name, 16).check(reader(), corpus())


# Tasks


QUESTIONS = [
    {"question": "a cat sat on a", "choices": ["mat", "tree of cats"], "answer": 0},
    {"question": "it was", "choices": ["black", "no", "a mat"], "answer": 2},
    {"question": "once upon", "choices": ["a time", "it"], "answer": 1},
]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with the task `cats` as lm-eval describes tasks, its data beside it; caches are below tmp_path."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "cats.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    content = {
        "task": "cats",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "cats.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in METRICS],
    }
    OmegaConf.save(OmegaConf.create(content), folder / "cats.yaml")
    return folder


METRICS = ("acc", "acc_norm")


@torch.no_grad()
def answered(backbone: LanguageBackbone, each: dict, normalised: bool) -> bool:
    """Is the right choice the likeliest continuation, of all or per character?"""
    given = letters().encode(each["question"], add_special_tokens=False)
    scores = []
    for choice in each["choices"]:
        asked = letters().encode(" " + choice, add_special_tokens=False)
        logits = backbone.network(torch.tensor([given + asked])).logits[0].double().log_softmax(-1)
        score = sum(float(logits[len(given) - 1 + k, token]) for k, token in enumerate(asked))
        scores.append(score / len(choice) if normalised else score)
    return scores.index(max(scores)) == each["answer"]


def test_own_tasks_are_scored_offline_as_by_hand(tasks):
    backbone = reader()
    found = {}
    state = torch.random.get_rng_state()
    for metric in METRICS:
        measure = ZeroShot({"cats": metric}, include_path=str(tasks))
        measure.check(backbone, None)
        found[metric] = measure(backbone, CPU)["cats"]
        rights = [answered(backbone, each, metric == "acc_norm") for each in QUESTIONS]
        assert found[metric] == pytest.approx(sum(rights) / 3)
    first = ZeroShot({"cats": "acc"}, limit=1, include_path=str(tasks))
    assert first(backbone, CPU)["cats"] == float(answered(backbone, QUESTIONS[0], False))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert backbone.tokenizer.pad_token is None
    protocol = first.protocol()
    assert protocol["tasks"] == "cats:acc" and protocol["limit"] == 1 and len(protocol["content"]) == 8
    with pytest.raises(ValueError, match=r"tasks\.cats='f1' is unknown; choose one of: acc, acc_norm"):
        ZeroShot({"cats": "f1"}, include_path=str(tasks)).check(backbone, None)
    with pytest.raises(ValueError, match="choose a teacher that has one"):
        first.check(LanguageBackbone(tiny_llama()), None)
    (tasks / "cats.jsonl").unlink()
    with pytest.raises(MissingData, match="the data of cats could be read neither from the hub nor from its cache"):
        ZeroShot({"cats": "acc"}, include_path=str(tasks)).check(backbone, None)


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else real(name))
    with pytest.raises(MissingData, match=re.escape("pip install -e '.[zeroshot]'")):
        ZeroShot({"boolq": "acc"})


# The stage


class Counted:
    """A measure of the network of two parts; counts its calls."""

    of, better, parts = "network", "higher", ("left", "right")
    calls = 0

    def check(self, backbone, data) -> None: ...

    def protocol(self) -> dict:
        return {"unit": "layers"}

    def __call__(self, backbone, device) -> dict[str, float]:
        Counted.calls += 1
        return {"left": float(len(backbone.survivors())), "right": 0.0}


EVALUATION = f"""name: words
metrics:
  perplexity: {{_target_: lightning_modules.metrics.perplexity.Perplexity, text: some.txt, length: 16}}
  counted: {{_target_: {__name__}.Counted}}
prompts: [Once upon, A cat]
tokens: 5
"""


@pytest.fixture
def job(configure, data_folder, overrides, text, tmp_path):
    """make(*overrides) -> the evaluator of a run and its folder, of a tiny language model with a tokenizer."""
    (data_folder / "evaluation").mkdir(exist_ok=True)
    (data_folder / "evaluation" / "words.yaml").write_text(EVALUATION)
    kept = [override for override in overrides if not override.startswith("evaluation=")]

    def make(*given: str) -> tuple[Evaluator, Run]:
        cfg = configure(*kept, "evaluation=words", *given)
        run = Run(cfg, "teacher")
        run.folder.mkdir(parents=True)
        OmegaConf.save(cfg, run / "config.yaml")
        job = Job(cfg, run, CPU, Clock(cfg, CPU), None, corpus(), "teacher", {"teacher": reader()})
        return Evaluator(job), run

    return make


def plan_of(*names: str) -> dict:
    return {"changes": [{"unit": name, "kind": "bypass"} for name in names], "predicted_harm": 1.0}


def measured_run(job, *given: str) -> tuple[dict, Run]:
    """The metrics of a run that loses a layer and distils nothing, and the files that a report reads."""
    evaluator, run = job("distillation=none", *given)
    plan = plan_of("model.layers.1")
    pruned = evaluator.teacher.pruned(plan["changes"])
    networks = {"teacher": evaluator.teacher, "pruned": pruned}
    metrics = {
        **{"run_id": run.id, "networks": list(networks), "plan/requested_ratio": None, "plan/budget": "params"},
        **{"plan/removed_units": 1, "plan/achieved_ratio": 0.1},
        **evaluator.measure(networks),
    }
    write_json(run / "metrics.json", metrics)
    write_json(run / "plan.json", plan | {"teacher": "aaaa", "protected": [f"model.layers.{i}" for i in (0, 2, 3, 4)]})
    units = {unit.name: {"score": 1.0} for unit in evaluator.teacher.units()}
    write_json(run / "scores.json", {"scores": units, "criterion": "perplexity"})
    write_json(
        run / "measured.json", evaluator.measure_latencies(pruned, None) | {"peak_memory_bytes": 1, "seconds": {}}
    )
    write_json(run / "finished.json", {})
    return metrics, run


def test_the_teacher_is_measured_once_for_all_runs(job):
    Counted.calls = 0
    metrics, run = measured_run(job)
    teacher = reader()
    expected = {"teacher": teacher, "pruned": teacher.pruned(plan_of("model.layers.1")["changes"])}
    for name, network in expected.items():
        assert metrics[f"{name}/perplexity"] == Perplexity("some.txt", 16)(network, CPU)
        layers = len(network.survivors())
        found = [metrics[f"{name}/{key}"] for key in ("counted", "counted_left", "counted_right")]
        assert found == [layers / 2, layers, 0]
    assert metrics["eval/perplexity"] == metrics["pruned/perplexity"] != metrics["teacher/perplexity"]
    protocol = metrics["protocol"]
    assert list(protocol) == ["precision", "measures"] and list(protocol["measures"]) == ["perplexity", "counted"]
    assert protocol["measures"]["counted"] == {
        **{"better": "higher", "of": "network", "unit": "layers"},
        "parts": ["left", "right"],
    }
    assert list_columns(protocol["measures"]) == ["perplexity", "counted", "counted_left", "counted_right"]
    assert Counted.calls == 2
    other, second = measured_run(job, "seed=1")
    assert second.folder != run.folder and Counted.calls == 3  # the teacher's values come from the first run
    assert {key: value for key, value in other.items() if key != "run_id"} == {
        key: value for key, value in metrics.items() if key != "run_id"
    }
    measured_run(job, "evaluation.metrics.perplexity.length=12")
    assert Counted.calls == 4  # of a measure that has not changed, too
    measured_run(job, "evaluation.precision=bf16-mixed")
    assert Counted.calls == 6


@torch.no_grad()
def test_held_out_losses_are_those_of_the_network(job):
    metrics, _ = measured_run(job)
    tokens = torch.from_numpy(corpus().source("holdout").blocks)
    assert len(tokens) >= 4
    batch = next(iter(corpus().subset("holdout", 4, 0, 4)))
    teacher = reader()
    pruned = teacher.pruned(plan_of("model.layers.1")["changes"])
    inputs = {"sample": batch["tokens"]}
    outputs = [network.predict(inputs) for network in (teacher, pruned)]
    assert metrics["teacher/task_loss"] == pytest.approx(float(teacher.losses(outputs[0], inputs).mean()), rel=1e-6)
    assert metrics["pruned/task_loss"] == pytest.approx(float(teacher.losses(outputs[1], inputs).mean()), rel=1e-6)
    expected = float((outputs[0] - outputs[1]).double().square().mean())
    assert metrics["pruned/output_loss"] == pytest.approx(expected, rel=1e-6)


def test_squared_errors_are_summed_in_parts_without_changing_outputs(monkeypatch):
    outputs = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = outputs.clone()
    expected = float((outputs[0] - outputs[1]).square().mean()) * 5
    assert sum_square_errors(*outputs) == expected
    for most in (1, 24, 36):  # one, two and three samples at once
        monkeypatch.setattr(evaluation_module, "FLOAT64_VALUES", most)
        assert sum_square_errors(*outputs) == pytest.approx(expected, rel=1e-12)
    assert torch.equal(outputs, before)


def test_continuations_are_shown_side_by_side_and_repeatable(job):
    (_, run), (_, second) = measured_run(job), measured_run(job, "seed=1")
    teacher = json.loads((run / "samples" / "teacher" / "texts.json").read_text())
    assert teacher["prompts"] == ["Once upon", "A cat"] and teacher["tokens"] == 5
    assert teacher["texts"] == reader().write(["Once upon", "A cat"], 5, CPU)
    for name in ("teacher", "pruned"):
        path = f"samples/{name}/texts.json"
        assert (run / path).read_bytes() == (second / path).read_bytes()
    report_run(run.folder)
    page = (run / "report.html").read_text()
    assert "Continuations of the same prompts" in page and "<td>Once upon</td>" in page
    evaluator, without = job("seed=2", "evaluation.prompts=null")
    evaluator.measure({"teacher": evaluator.teacher, "pruned": evaluator.teacher})
    assert not (without / "samples").exists()


def test_a_report_shows_the_protocol_and_the_protected_units(job, tmp_path):
    metrics, run = measured_run(job)
    summary = report_run(run.folder)
    value = format_value(metrics["pruned/perplexity"])
    assert re.search(
        rf"perplexity: +{value} pruned, [\d.]+ teacher \(text some\.txt, content \w{{8}}, length 16, bos start\)",
        summary,
    )
    assert re.search(r"protected: +4 units \(model\.layers\.0, model\.layers\.2, model\.layers\.3, \.\.\.\)", summary)
    assert re.search(r"MACs, conv \+ linear: +[\d.]+ M -> [\d.]+ M \(12 tokens\)", summary)
    page = (run / "report.html").read_text()
    assert "Protected, whatever their scores: model.layers.0, model.layers.2, model.layers.3, model.layers.4." in page
    assert page.count("<td>protected</td>") == 3  # of the four units that there are
    assert "precision 32-true; perplexity: better lower, of network, text some.txt" in page
    index = report_set(run.folder.parent).read_text()
    assert "quality = perplexity, lower is better" in index
    heads = list(read_markdown(run.folder.parent / "report" / "table.md"))
    first = heads.index("perplexity, pruned")
    assert heads[first : first + 5] == [
        *("perplexity, pruned", "perplexity", "counted", "counted_left", "counted_right")
    ]


@pytest.mark.parametrize(
    ("values", "answer"),
    [([1, 21, None], True), ([1, 20], False), ([0, 50], False), ([float("nan"), 1, 30], True), ([None], False)],
)
def test_an_axis_with_values_of_several_magnitudes_is_logarithmic(values, answer):
    assert spans_more_than(values, 20) is answer


def test_measures_that_cannot_be_taken_are_refused(job, configure):
    frechet = "evaluation=frechet_resnet20"
    with pytest.raises(ValueError, match=r"evaluation\.metrics\.frechet_resnet20 measures generated samples, and this"):
        job(frechet)
    with pytest.raises(ValueError, match=r"evaluation\.metrics\.perplexity: length=99, bos='start': segments of 99"):
        job("evaluation.metrics.perplexity.length=99")
    for name, taken in (("a", ["a", "a_left"]), ("latency", [])):
        measure = Counted()
        measure.parts = ("left", "ms")
        with pytest.raises(ValueError, match=rf"evaluation\.metrics\.{name}: its part .* which is taken"):
            check_network_measures({name: measure}, taken, None, None)


def test_choices_of_measures_for_language_models_are_joined(configure):
    cfg = configure("evaluation=[perplexity,perplexity_full,ptb,zero_shot]")
    assert list(cfg.evaluation.metrics) == ["perplexity", "perplexity_full", "ptb", "zero_shot"]
    assert len(cfg.evaluation.metrics.zero_shot.tasks) == 7 and len(cfg.evaluation.prompts) == 4
