"""A pipeline with consistency distillation: its networks are sampled in other ways, side by side in one report."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from omegaconf import OmegaConf
from support.results import files, the_run

from conf.schema import ConfigError
from experiments.engine.artefacts import read_array, read_json
from experiments.engine.identity import get_effective_settings
from experiments.engine.pipeline import apply_settings, make_stages, run_pipeline
from experiments.engine.stages.distil import Distil
from experiments.reporting.run_files import list_samplings
from experiments.reporting.run_page import describe_conditions, tabulate_quality

SETTINGS = "pipeline.stages.consistency.settings"
FEW = ["consistent", "consistent-1-step", "consistent-2-step", "consistent-8-step"]


@pytest.mark.slow
@pytest.mark.usefixtures("unverified")
def test_one_report_shows_the_student_in_few_steps_beside_the_teacher(configure, sampling, tmp_path):
    run_pipeline(configure(*sampling, "pipeline=few_steps", "sampler=ddim", "sampler.steps=5", "evaluation.samples=4"))
    run = the_run(tmp_path / "runs")
    metrics = read_json(run / "metrics.json")
    assert metrics["networks"] == ["teacher", "pruned", "distilled", "consistent"]
    names = [*metrics["networks"], *FEW[1:]]
    assert list_samplings(metrics) == names
    assert {path.name for path in (run / "samples").iterdir()} == set(names)
    images = {name: read_array(run / "samples" / name / "images.npy") for name in names}
    assert len({image.tobytes() for image in images.values()}) == len(names)

    protocol = metrics["protocol"]
    assert (protocol["sampler"], protocol["steps"]) == ("ddim", 5)
    assert protocol["samplers"] == {
        name: {"sampler": "few_steps", "steps": steps, "guidance": 1.0}
        for name, steps in zip(FEW, (4, 1, 2, 8), strict=True)
    }
    quality = tabulate_quality(metrics, names)
    assert set(quality) == {"brightness", "frechet_channels", "output_loss", "task_loss"}
    assert None not in quality["brightness"] and len(set(quality["brightness"])) == len(names)
    assert quality["output_loss"][4:] == [None] * 3  # a loss has no number of steps
    assert metrics["eval/brightness"] == metrics["consistent/brightness"]
    text = describe_conditions(protocol, protocol["measures"]["brightness"])
    assert text.startswith("4 samples, ddim, 5 steps; consistent: few_steps, 4 steps; consistent-1-step: few_steps, 1")
    page = (run / "report.html").read_text()
    assert all(f"<th>{name}</th>" in page for name in names)

    # Both trainings are stages with checkpoints, losses and results of their own.
    assert files(run / "history") == {"distil.csv", "consistency.csv"}
    assert "consistency/loss" in (run / "history" / "consistency.csv").read_text()
    card = (run / "export" / "README.md").read_text()
    assert "distillation `normalized` (4 steps), then `lcm` (4 steps)" in card
    # The export samples in a few steps, too.
    scheduler = json.loads((run / "export" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["original_inference_steps"]) == ("LCMScheduler", 50)
    pipeline = DiffusionPipeline.from_pretrained(run / "export", trust_remote_code=True)
    assert isinstance(pipeline.scheduler, LCMScheduler)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert picture.shape[0] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("quick_end")
def test_further_numbers_of_steps_are_measured_of_all_networks(configure, sampling, tmp_path):
    job = [*sampling, "evaluation.samples=4", "distillation=none", "sampler=ddim"]
    run_pipeline(configure(*job, "sampler.steps=3", "sampler.also_steps=[2]"))
    run = the_run(tmp_path / "runs")
    both = {"teacher", "teacher-2-step", "pruned", "pruned-2-step"}
    assert {path.name for path in (run / "samples").iterdir()} == both
    assert sum(path.is_dir() for path in (tmp_path / "runs" / ".cache" / "samples").iterdir()) == 2
    # They are the samples of a job that has them as its steps, and the teacher's are shared with it.
    run_pipeline(
        configure(*job, "sampler.steps=2", f"paths.runs={tmp_path}/other", f"paths.cache={tmp_path}/runs/.cache")
    )
    other = the_run(tmp_path / "other")
    for name in ("teacher", "pruned"):
        found, expected = (
            read_array(folder / "images.npy") for folder in (run / f"samples/{name}-2-step", other / f"samples/{name}")
        )
        assert (found == expected).all()
    assert sum(path.is_dir() for path in (tmp_path / "runs" / ".cache" / "samples").iterdir()) == 2


def test_the_consistency_stage_has_its_own_distillation_and_sampler(configure):
    cfg = configure("pipeline=few_steps", "debug=tiny", f"{SETTINGS}.distillation.ddim_steps=20")
    stages = make_stages(cfg)
    (stage,) = (stage for stage in stages if stage.name == "consistency")
    assert isinstance(stage, Distil) and [each.name for each in stages][4:6] == ["distil", "consistency"]
    of_stage = apply_settings(cfg, stage)
    assert of_stage.distillation.name == "lcm" and cfg.distillation.name == "normalized"
    # Nothing of dpm_solver's scheduler is left, and training and sampling have the same time steps.
    assert OmegaConf.to_container(of_stage.sampler.scheduler) == {
        "_target_": "diffusers.LCMScheduler.from_config",
        "_partial_": True,
        "original_inference_steps": 20,
    }
    chosen = configure("pipeline=few_steps", f"sampler@{SETTINGS}.sampler=lcm")
    assert chosen.pipeline.stages.consistency.settings.sampler.guidance == 8.0


@pytest.mark.parametrize("steps", ["[0]", "[3,3]", "[12]"])
def test_further_numbers_of_steps_have_to_be_different_numbers(configure, steps):
    with pytest.raises(ConfigError, match=r"sampler\.also_steps=\[.*\] with sampler\.steps=12; choose different whole"):
        configure(f"sampler.also_steps={steps}")


@pytest.mark.usefixtures("quick_end")
def test_more_steps_than_the_student_was_trained_for_are_refused_before_scoring(configure, sampling, tmp_path):
    more = f"{SETTINGS}.sampler.also_steps=[60]"
    with pytest.raises(ConfigError, match=r"sampler cannot be made as configured: .*60"):
        run_pipeline(configure(*sampling, "pipeline=few_steps", more))
    assert not list((tmp_path / "runs").glob("*/*/scores.json"))


@pytest.mark.slow
@pytest.mark.usefixtures("unverified")
def test_a_student_that_embeds_the_scale_is_trained_sampled_and_exported(configure, text_job, tmp_path):
    embedding = [f"{SETTINGS}.distillation.{field}" for field in ("guidance_max=9", "guidance_embedding=16")]
    few = [f"sampler@{SETTINGS}.sampler=lcm", "pipeline=few_steps", *embedding]
    run_pipeline(configure(*text_job, *few))
    run = the_run(tmp_path / "runs")
    assert read_json(run / "networks" / "consistent" / "config.json")["time_cond_proj_dim"] == 16
    assert read_json(run / "networks" / "distilled" / "config.json").get("time_cond_proj_dim") is None
    pipeline = DiffusionPipeline.from_pretrained(run / "export", trust_remote_code=True)
    assert pipeline.unet.config.time_cond_proj_dim == 16 and isinstance(pipeline.scheduler, LCMScheduler)


@pytest.mark.usefixtures("quick_end")
def test_a_range_of_scales_is_refused_before_scoring(configure, overrides, tmp_path):
    with pytest.raises(ValueError, match="guidance_max=9: this UNet2DModel does not take the guidance scale"):
        run_pipeline(configure(*overrides, "pipeline=few_steps", f"{SETTINGS}.distillation.guidance_max=9"))
    assert not list((tmp_path / "runs").glob("*/*/scores.json"))


def test_a_job_without_further_steps_has_the_identity_of_before_there_were_any(configure):
    assert "also_steps" not in get_effective_settings(configure())["sampler"]
    assert get_effective_settings(configure("sampler.also_steps=[2]"))["sampler"]["also_steps"] == [2]
