"""Samples of an embedded teacher that come with the repository: where they are used, and which ones they are."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.results import the_run

from conf.schema import build
from experiments.engine import samples
from experiments.engine.inputs import build_teacher
from experiments.engine.job import TEACHER, Job
from experiments.engine.pipeline import identify_teacher, run_pipeline
from lightning_modules.modules.sampling import Generation, seed_batches


@pytest.mark.usefixtures("quick_end")
@pytest.mark.slow
def test_shipped_samples_are_measured_and_not_generated(configure, sampling, tmp_path, monkeypatch):
    made: list[str] = []
    generate = samples.SampleEvaluation.make_generation

    def make(self, network, *others):
        made.append(network)
        return generate(self, network, *others)

    monkeypatch.setattr(samples.SampleEvaluation, "make_generation", make)
    run_pipeline(configure(*sampling))
    first = the_run(tmp_path / "runs")
    assert len(made) == 3  # teacher, pruned, distilled
    monkeypatch.setattr(samples, "SHIPPED", tmp_path / "runs" / ".cache" / "samples")
    made.clear()
    run_pipeline(configure(*sampling, f"paths.runs={tmp_path}/again"))
    second = the_run(tmp_path / "again")
    assert len(made) == 2
    for name in ("samples/teacher/images.npy", "metrics.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_default_job_uses_the_samples_of_the_repository(configure, tmp_path):
    cfg = configure(f"paths.cache={tmp_path}")
    run, device = SimpleNamespace(cache=tmp_path), torch.device("cpu")
    job = Job(cfg, run, device, None, None, build(cfg.data), identify_teacher(cfg), {TEACHER: build_teacher(cfg)})
    folder = samples.SHIPPED / samples.SampleEvaluation(job, {}).hash_protocol(cfg.sampler.steps)
    images = np.load(folder / "images.npy")
    assert [path.name for path in samples.SHIPPED.iterdir()] == [folder.name]
    assert images.shape == (256, 32, 32, 3) and images.dtype == np.uint8


@pytest.mark.slow
def test_the_samples_of_the_repository_are_those_of_the_teacher(configure):
    cfg = configure("evaluation.batch_size=8")
    teacher = build_teacher(cfg).eval()
    generation = Generation(teacher, build(cfg.sampler.scheduler), cfg.sampler.steps, cfg.sampler.guidance)
    with torch.no_grad():
        batch = next(iter(seed_batches(cfg.evaluation.seed, cfg.evaluation.samples, 8, None)))
        found = generation.generate_images(batch)
    (folder,) = samples.SHIPPED.iterdir()
    shipped = np.load(folder / "images.npy")[:8]
    assert np.abs(found.astype(int) - shipped).max() <= 2  # other processors round differently
    assert shipped.std() > 30
