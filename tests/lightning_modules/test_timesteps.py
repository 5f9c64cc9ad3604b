"""Timesteps: their distributions, and the weights of the samples' losses."""

import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from support.classification import tiny_classifier
from support.config import composed
from support.distillation import REMOVED, distillation, losses_of
from support.networks import bypasses, tiny_backbone, tiny_batch
from torch import Tensor

from conf.schema import ROOT, ConfigError, build
from experiments.engine.identity import UNIFORM, drop_modules, get_effective_settings
from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone
from lightning_modules.losses import timesteps
from lightning_modules.losses.timesteps import Timesteps
from lightning_modules.modules.distillation import Distillation
from lightning_modules.training.ranks import DrawsForGlobalBatch

CHOICES = sorted(path.stem for path in (ROOT / "conf" / "timesteps").glob("*.yaml"))
SCHEDULES: dict[str, Any] = {
    "epsilon": DDPMScheduler(),
    "v_prediction": DDPMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
    "sample": DDPMScheduler(prediction_type="sample"),
    "flow_prediction": FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def backbone_with(schedule: Any) -> DiffusionBackbone:
    backbone = tiny_backbone("UNet2DModel")
    backbone.noise_scheduler = schedule
    return backbone


def chosen(configure: Any, name: str) -> Timesteps:
    return build(configure(f"timesteps={name}").timesteps)


def levels(schedule: Any, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of signal and noise in the noised samples of some steps, (N,1,1,1)."""
    if "alphas_cumprod" in vars(schedule):
        kept = schedule.alphas_cumprod[steps].double()
        return kept.sqrt().view(-1, 1, 1, 1), (1 - kept).sqrt().view(-1, 1, 1, 1)
    sigmas = schedule.sigmas[steps].double().view(-1, 1, 1, 1)
    return 1 - sigmas, sigmas


# Weights


@pytest.mark.parametrize("predicted", SCHEDULES)
@pytest.mark.parametrize("weight", [timesteps.clean_sample, timesteps.velocity, timesteps.min_snr, timesteps.p2])
@pytest.mark.parametrize("distribution", [None, partial(timesteps.logit_normal, mean=0.5)])
def test_the_mean_weight_is_one_over_the_distribution(predicted, weight, distribution):
    choice, backbone = Timesteps(weight, distribution, clip=50.0), backbone_with(SCHEDULES[predicted])
    probabilities, weights = choice.compute_probabilities(backbone), choice.compute_weights(backbone)
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-12)
    assert float((probabilities * weights).sum()) == pytest.approx(1, abs=1e-12)
    assert float(weights.min()) >= 0


def clean_sample_of(predicted: str, prediction: Tensor, noisy: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """Return the clean sample that a prediction for a noised sample implies."""
    formulas = {
        "epsilon": lambda: (noisy - noise * prediction) / signal,
        "v_prediction": lambda: signal * noisy - noise * prediction,
        "sample": lambda: prediction,
        "flow_prediction": lambda: noisy - noise * prediction,
    }
    return formulas[predicted]()


@pytest.mark.parametrize("predicted", SCHEDULES)
@pytest.mark.parametrize("choice", ["x0", "v"])
def test_weighted_losses_are_the_errors_of_the_clean_sample_or_the_velocity(configure, predicted, choice):
    """They are proportional to them: divided by the mean weight, which is the same for all samples."""
    schedule, batch = SCHEDULES[predicted], tiny_batch(tiny_backbone("UNet2DModel"))
    backbone, made = backbone_with(schedule), chosen(configure, choice)
    steps = torch.tensor([10, 400, 700, 990])
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = made.training_inputs(backbone, batch | {"noise_step": steps})  # the noise of this is not used
    inputs |= backbone.noise_batch(batch, batch["image"], noise, steps)
    prediction = inputs["target"] + torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    signal, amount = levels(schedule, steps)
    noisy = signal * batch["image"] + amount * noise
    clean = clean_sample_of(predicted, prediction.double(), noisy, signal, amount)
    errors = (clean - batch["image"]).square().mean((1, 2, 3))
    if choice == "v":  # of the process that preserves the variance, (SNR + 1) times as large
        errors = errors * (signal.square() / amount.square() + 1).flatten()
    ratios = backbone.losses(prediction, inputs).double() / errors
    torch.testing.assert_close(ratios, ratios[:1].expand(4), rtol=2e-3, atol=0)
    torch.testing.assert_close(
        backbone.distance(prediction, inputs["target"], inputs), backbone.losses(prediction, inputs).mean()
    )


def test_min_snr_and_p2_are_their_papers_formulas(configure):
    snr = SCHEDULES["epsilon"].alphas_cumprod.double() / (1 - SCHEDULES["epsilon"].alphas_cumprod.double())
    expected = {"min_snr": snr.clamp(max=5) / snr, "p2": 1 / (1 + snr)}
    for name, weights in expected.items():
        found = chosen(configure, name).compute_weights(backbone_with(SCHEDULES["epsilon"]))
        torch.testing.assert_close(found, weights / weights.mean(), rtol=1e-12, atol=0)
    schedule = SCHEDULES["v_prediction"]
    snr = schedule.alphas_cumprod.double() / (1 - schedule.alphas_cumprod.double())
    weights = snr.clamp(max=5) / (snr + 1)
    found = chosen(configure, "min_snr").compute_weights(backbone_with(schedule))
    torch.testing.assert_close(found, weights / weights.mean(), rtol=1e-12, atol=0)


def test_clip_bounds_the_weights_before_they_are_divided_by_their_mean():
    backbone = backbone_with(SCHEDULES["epsilon"])
    free, clipped = (Timesteps(timesteps.clean_sample, clip=clip).compute_weights(backbone) for clip in (None, 10.0))
    snr = timesteps.signal_to_noise(backbone.noise_scheduler)
    torch.testing.assert_close(free, 1 / snr / (1 / snr).mean())
    bounded = (1 / snr).clamp(max=10)
    torch.testing.assert_close(clipped, bounded / bounded.mean())
    assert (bounded == 10).any() and (bounded < 10).any()


def test_weights_multiply_task_and_output_terms_and_no_feature_terms():
    teacher = tiny_backbone("UNet2DModel")
    student, batch = teacher.pruned(bypasses(REMOVED)), tiny_batch(teacher)
    choice = Timesteps(timesteps.min_snr)
    weighted = losses_of(distillation(student, teacher, timesteps=choice), batch)
    plain = losses_of(distillation(student, teacher), batch)
    torch.manual_seed(3)
    inputs = choice.training_inputs(student, batch)
    weights = choice.compute_weights(student)[inputs["timestep"]].float()
    assert torch.equal(inputs["weight"], weights) and float(weights.std()) > 0
    with torch.no_grad():
        found, reference = student.predict(inputs), teacher.predict(inputs)
    task, output = ((found - other).square().mean((1, 2, 3)) for other in (inputs["target"], reference))
    torch.testing.assert_close(weighted["task"].detach(), (weights * task).mean())
    torch.testing.assert_close(weighted["output"].detach(), (weights * output).mean())
    names = [name for name in plain if "feature" in name]
    assert names and all(torch.equal(weighted[name], plain[name]) for name in names)


# Distributions


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_logit_normal_has_the_shift_of_a_flows_schedule(configure, shift):
    """The noise level is at most sigma with the probability Phi(logit(sigma) - log(shift))."""
    backbone = backbone_with(FlowMatchEulerDiscreteScheduler(shift=shift))
    probabilities = chosen(configure, "logit_normal").compute_probabilities(backbone)
    sigmas = backbone.noise_scheduler.sigmas.double()
    at_most = probabilities.flip(0).cumsum(0).flip(0)  # the first step has the most noise
    torch.testing.assert_close(
        at_most, torch.special.ndtr(sigmas.logit(eps=1e-12) - math.log(shift)), rtol=0, atol=1e-6
    )


def test_logit_normal_has_the_shift_for_the_size_of_samples():
    backbone = tiny_backbone("flux")
    schedule = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    backbone.noise_scheduler = schedule
    mu = backbone.step_options(schedule, 1)["mu"]
    assert mu != 0 and timesteps.shift_for_size(backbone) == mu
    shifted = Timesteps(distribution=timesteps.logit_normal).compute_probabilities(backbone)
    backbone.noise_scheduler = FlowMatchEulerDiscreteScheduler()
    equal = Timesteps(distribution=partial(timesteps.logit_normal, mean=mu)).compute_probabilities(backbone)
    assert torch.equal(shifted, equal)
    backbone.noise_scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    assert timesteps.shift_for_size(backbone) == math.log(mu)


def test_a_beta_schedule_ends_with_the_most_noise():
    late = Timesteps(distribution=partial(timesteps.logit_normal, mean=2.0))
    for predicted, order in (("epsilon", 1), ("flow_prediction", -1)):
        probabilities = late.compute_probabilities(backbone_with(SCHEDULES[predicted]))
        halves = probabilities.view(2, -1).sum(1).tolist()[::order]
        assert halves[1] == pytest.approx(float(torch.special.ndtr(torch.tensor(2.0))), abs=1e-6)


@pytest.mark.parametrize("predicted", ["epsilon", "flow_prediction"])
def test_drawn_steps_follow_the_probabilities(predicted):
    choice, backbone = Timesteps(distribution=timesteps.logit_normal), backbone_with(SCHEDULES[predicted])
    torch.manual_seed(0)
    steps = choice.draw(backbone, 20_000)
    shares = torch.bincount(steps, minlength=1000).view(10, -1).sum(1) / 20_000
    expected = choice.compute_probabilities(backbone).view(10, -1).sum(1)
    torch.testing.assert_close(shares.double(), expected, rtol=0, atol=0.015)
    torch.manual_seed(1)
    inputs = choice.training_inputs(backbone, tiny_batch(backbone))
    torch.manual_seed(1)
    drawn = choice.draw(backbone, 4)
    assert torch.equal(timesteps.find_steps(backbone.noise_scheduler, inputs["timestep"]), drawn)


def test_uniform_draws_the_numbers_that_were_drawn_before():
    backbone = tiny_backbone("UNet2DModel")
    batch = tiny_batch(backbone)
    torch.manual_seed(2)
    inputs = Timesteps().training_inputs(backbone, batch)
    torch.manual_seed(2)
    drawn = torch.randint(0, 1000, (4,))
    expected = backbone.noise_batch(batch, batch["image"], torch.randn(4, 3, 8, 8), drawn)
    assert torch.equal(inputs["timestep"], drawn) and torch.equal(inputs["sample"], expected["sample"])
    assert "weight" not in inputs


def test_two_ranks_draw_the_timesteps_that_one_process_draws():
    choice, backbone = Timesteps(distribution=timesteps.logit_normal), tiny_backbone("UNet2DModel")

    def draw(count: int) -> Tensor:
        torch.manual_seed(4)
        return choice.draw(backbone, count)

    of_ranks = []
    for rank in range(2):
        with DrawsForGlobalBatch(3, rank, 2):
            of_ranks.append(draw(3))
    assert torch.equal(torch.stack(of_ranks, dim=1).flatten(), draw(6))


# Configuration


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_trains(configure, name):
    teacher = tiny_backbone("UNet2DModel")
    cfg = configure(f"timesteps={name}")
    Distillation.check_settings(cfg.distillation, teacher, narrower=False)
    student = teacher.pruned(bypasses(REMOVED))
    module = distillation(student, teacher, timesteps=build(cfg.distillation.timesteps))
    losses_of(module, tiny_batch(teacher))["loss"].backward()
    assert float(student.network.conv_in.weight.grad.abs().sum()) > 0
    assert cfg.timesteps.name == name


def test_a_choice_is_part_of_a_runs_identity_unless_it_is_uniform(configure):
    settings = {name: get_effective_settings(configure(f"timesteps={name}")) for name in CHOICES}
    assert drop_modules(dict(configure().timesteps)) == UNIFORM
    assert "timesteps" not in settings["uniform"]["distillation"]
    assert settings["min_snr"]["distillation"]["timesteps"]["weight"]["gamma"] == 5
    assert all("timesteps" not in fields for fields in settings.values())
    pretraining = get_effective_settings(configure("experiment=pretrain_cifar10", "timesteps=p2"))["pretrain"]
    assert pretraining["timesteps"]["name"] == "p2"


def test_flow_teachers_are_trained_at_logit_normal_timesteps():
    for name in ("sd3_medium", "flux_dev"):
        assert composed(f"teacher={name}").timesteps.name == "logit_normal"
        assert composed(f"teacher={name}", "timesteps=uniform").timesteps.name == "uniform"
    assert composed("teacher=sd15").timesteps.name == "uniform"


@pytest.mark.parametrize("choice", [Timesteps(timesteps.p2), Timesteps(distribution=timesteps.logit_normal)])
def test_networks_without_timesteps_take_only_the_uniform_choice(choice):
    classifier = tiny_classifier()
    with pytest.raises(ValueError, match=r"^timesteps: a \w+ has no timesteps to draw or weigh; choose timesteps=unif"):
        choice.check(classifier)
    Timesteps().check(classifier)


def test_settings_are_checked_with_the_teacher(configure):
    settings = configure("timesteps=p2").distillation
    with pytest.raises(ValueError, match=r"^timesteps: a LlamaForCausalLM has no timesteps"):
        Distillation.check_settings(settings, tiny_backbone("llama"), narrower=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 3.0}, "timesteps.clip=3.0: there are no weights to clip; choose null"),
        ({"weight": timesteps.p2, "clip": 0.0}, "timesteps.clip=0.0: choose more than 0, or null"),
    ],
)
def test_a_clip_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Timesteps(**options)


def test_weights_that_are_not_finite_are_refused():
    schedule = DDPMScheduler()
    schedule.alphas_cumprod[-1] = 0
    with pytest.raises(ValueError, match=r"^timesteps\.weight is not finite at every step .* predicts 'epsilon'"):
        Timesteps(timesteps.clean_sample).check(backbone_with(schedule))
    Timesteps(timesteps.clean_sample, clip=100.0).check(backbone_with(schedule))


def test_stored_outputs_are_those_at_uniform_timesteps(configure):
    stored = ["distillation=output_only", "distillation.teacher_outputs=stored", "latents=/somewhere"]
    with pytest.raises(ConfigError, match=r"^timesteps=logit_normal: the outputs .*'stored' are those at uniform"):
        configure(*stored, "timesteps=logit_normal")
    configure(*stored, "timesteps=min_snr")


@pytest.mark.parametrize("job", [["distillation=own"], ["experiment=pretrain_cifar10_vae"]])
def test_a_module_that_does_not_take_the_choice_is_refused(configure, data_folder, job):
    (data_folder / "distillation").mkdir(exist_ok=True)
    target = "lightning_modules.modules.distillation.Distillation"
    (data_folder / "distillation" / "own.yaml").write_text(f"name: own\n_target_: {target}\n_partial_: true\n")
    with pytest.raises(ConfigError, match=r"^timesteps=p2: lightning_modules\.\S+ does not take timesteps; choose ti"):
        configure(*job, "timesteps=p2")
    configure(*job, "timesteps=uniform")
    configure("distillation=none", "timesteps=p2")  # nothing is trained
