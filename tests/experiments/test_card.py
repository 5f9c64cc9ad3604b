"""Model cards: the teacher they name, the licence they claim, and the figures they list."""

from types import SimpleNamespace
from typing import Any

from huggingface_hub import ModelCard
from support.language import tiny_language
from support.networks import tiny_backbone

from experiments.reporting.card import compose_model_card

PLAN = {"teacher": "f" * 64, "predicted_harm": 0.5, "changes": [{"unit": "mid_block.resnets.0", "kind": "bypass"}]}
BARE: Any = tiny_backbone("UNet2DModel")
SCORES = {"mid_block.resnets.0": {"score": 0.5}}


def test_a_card_names_the_chosen_teacher_and_its_licence(configure):
    card = compose_model_card(configure("teacher=sd15"), PLAN, SCORES, {"eval/output_loss": 0.25}, BARE)
    assert "license: creativeml-openrail-m" in card
    assert "huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5" in card
    assert "bypass: `mid_block.resnets.0`, score 0.5" in card and "| eval/output_loss | 0.25 |" in card


def test_the_metadata_of_a_card_has_the_measured_figures(configure):
    metrics = {
        "eval/output_loss": 0.25,
        "eval/params": 12,
        "student/params": 12,
        "eval/weights": "ema",
        "teacher/fid": 3,
    }
    card = ModelCard(compose_model_card(configure("teacher=sd15", "task=t2i"), PLAN, SCORES, metrics, BARE))
    assert card.data.base_model == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert (card.data.library_name, card.data.tags) == ("diffusers", ["pruned"])
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.task_type) == ("output_loss", 0.25, "t2i")
    assert result.dataset_name == "cifar10_captions"
    assert card.text.lstrip().startswith("# sd15, pruned")
    plain = ModelCard(compose_model_card(configure(), PLAN, SCORES, {}, BARE))
    assert plain.data.eval_results is None and plain.data.base_model is None


def test_a_card_claims_no_licence_for_weights_from_another_path(configure, tmp_path):
    for path in (str(tmp_path / "mine"), "someone/model"):
        card = compose_model_card(configure(f"teacher.path={path}"), PLAN, SCORES, {}, BARE)
        assert "license: unknown" in card and "apache" not in card and "ddpm_cifar10" not in card
        assert str(tmp_path) not in card


def test_a_card_without_scores_names_no_criterion(configure):
    plan = {**PLAN, "predicted_harm": 0.0, "changes": [{"kind": "restage", "variant": "tiny"}]}
    card = compose_model_card(configure("selection=bk_sdm", "selection.variant=tiny"), plan, {}, {}, BARE)
    assert "restage: `tiny`" in card and "Criterion" not in card


def test_a_card_says_how_to_use_stored_text_states(configure):
    parts, captions = ["text_encoder", "tokenizer"], ["", "a photo of a ship"]
    around = SimpleNamespace(absent_parts=lambda: parts, table=captions)
    network = tiny_backbone("UNet2DModel")
    network.pipeline_parts = around
    card = compose_model_card(configure("task=t2i"), PLAN, {}, {}, network)
    assert "from_pretrained(folder, trust_remote_code=True, text_encoder=None, tokenizer=None)" in card
    assert "negative_prompt_embeds=states[:1]" in card
    assert "- 0: (no caption)" in card and "- 1: a photo of a ship" in card
    assert "text_encoder" not in compose_model_card(configure(), PLAN, {}, {}, BARE)


def test_a_card_of_a_language_model_shows_transformers(configure):
    card = compose_model_card(configure(), PLAN, SCORES, {}, tiny_language())
    assert "library_name: transformers" in card and "AutoModelForCausalLM.from_pretrained(folder)" in card
    assert "DiffusionPipeline" not in card


def test_a_card_names_a_repair(configure):
    trainings = [("normalized", 150), ("lcm", 20)]
    card = compose_model_card(configure("repair=least_squares"), PLAN, SCORES, {}, BARE, trainings)
    trained = "distillation `normalized` (150 steps), then `lcm` (20 steps), seed 0"
    assert f"Selection `knapsack`, repair `least_squares`, {trained}" in card
    assert "repair" not in compose_model_card(configure(), PLAN, SCORES, {}, BARE)


def test_a_card_says_how_an_onnx_export_is_opened(configure):
    card = compose_model_card(configure(), PLAN, SCORES, {}, BARE, onnx_usage="How to open it.\n")
    assert card.index("trust_remote_code") < card.index("How to open it.") < card.index("Criterion `output_loss`")
