"""What training and calibration make of data: latents, noise, timesteps, targets, and what else the network is told."""

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from support.pipeline_parts import TEXT, calls_of, load_tiny_teacher, named, tensors, training_batch
from support.pipelines import FACTOR, LATENT, tiny_pipeline
from torch import Tensor

from datamodules.seeding import torch_rng
from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone

PIXELS = LATENT * FACTOR


def clean_and_noise(backbone: DiffusionBackbone, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What was noised, and with what, solved for from the network's input and target."""
    schedule, sample, target = backbone.noise_scheduler, inputs["sample"].double(), inputs["target"].double()
    if isinstance(schedule, FlowMatchEulerDiscreteScheduler):  # x_s = (1 - s) x + s e, target e - x
        sigma = (inputs["timestep"].double() / 1000).view(-1, 1, 1, 1)
        return sample - sigma * target, sample + (1 - sigma) * target
    kept = schedule.alphas_cumprod[inputs["timestep"]].double().sqrt().view(-1, 1, 1, 1)
    added = (1 - kept.square()).sqrt()
    if schedule.config.prediction_type == "v_prediction":  # x_t = a x + b e, target a e - b x
        return kept * sample - added * target, added * sample + kept * target
    return (sample - added * target) / kept, target


@pytest.mark.parametrize(
    ("kind", "shift", "scale"),
    [
        ("sd", 0, 0.18215),
        ("sd_v", 0, 0.18215),
        ("sdxl", 0, 0.13025),
        ("dit", 0, 0.18215),
        ("pixart", 0, 0.18215),
        ("sd3", 0.0609, 1.5305),
        ("flux", 0.1159, 0.3611),
    ],
)
def test_calibration_noises_scaled_draws_of_the_posterior(kind, shift, scale, tmp_path):
    backbone, numbers = load_tiny_teacher(tiny_pipeline(kind, tmp_path)), [2, 0, 1]
    batch = training_batch(backbone, numbers)
    inputs = backbone.calibration_inputs(batch, seed=7)
    with torch.no_grad():
        posterior = DiffusionPipeline.from_pretrained(tmp_path).vae.encode(batch["image"]).latent_dist
    drawn = torch.stack(
        [torch.randn(4, LATENT, LATENT, generator=torch_rng(7, "calibration", "latent", k)) for k in numbers]
    )
    clean, noise = clean_and_noise(backbone, inputs)
    tolerance = {"rtol": 0, "atol": 2e-4 if kind in ("sd", "sdxl", "dit", "pixart") else 1e-5}  # divided by sqrt(abar)
    expected = (posterior.mean + posterior.std * drawn - shift) * scale
    torch.testing.assert_close(clean, expected.double(), **tolerance)
    expected = torch.stack([torch.randn(4, LATENT, LATENT, generator=torch_rng(7, "calibration", k)) for k in numbers])
    torch.testing.assert_close(noise, expected.double(), **tolerance)


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_calibration_is_a_function_of_seed_and_sample_number(kind, tmp_path):
    backbone = load_tiny_teacher(tiny_pipeline(kind, tmp_path))

    def inputs(numbers: list[int], seed: int = 0) -> dict[str, Tensor]:
        found = backbone.calibration_inputs(training_batch(backbone, numbers), seed)
        return tensors(found)

    whole, parts = inputs([0, 1, 2]), [inputs([2]), inputs([0, 1])]
    assert set(whole) >= {"sample", "timestep", "target", "conditions/encoder_hidden_states"}
    for key, value in whole.items():
        apart = torch.cat([parts[1][key], parts[0][key]])
        torch.testing.assert_close(value, apart, rtol=0, atol=2e-6, msg=named(key))
    other = inputs([0, 1, 2], seed=1)
    assert not (other["sample"] == whole["sample"]).any() and not (other["timestep"] == whole["timestep"]).any()


@pytest.mark.parametrize("kind", ["sd", "sd_v", "sdxl", "dit", "pixart", "sd3", "flux"])
def test_inputs_of_stored_draws_are_functions_of_their_seeds(kind, tmp_path):
    """Latent, timestep and noise, and which labels are dropped; the global generator has no part in them."""
    backbone = load_tiny_teacher(tiny_pipeline(kind, tmp_path))

    def inputs(numbers: list[int], seeds: list[int], state: int) -> dict[str, Tensor]:
        torch.manual_seed(state)
        batch = training_batch(backbone, numbers) | {"draw_seed": torch.tensor(seeds)}
        return tensors(backbone.training_inputs(batch))

    whole = inputs([0, 1, 2], [5, 6, 7], state=0)
    parts = [inputs([2], [7], state=1), inputs([0, 1], [5, 6], state=2)]
    for key, value in whole.items():
        apart = value if key.endswith("txt_ids") else torch.cat([parts[1][key], parts[0][key]])
        torch.testing.assert_close(value, apart, rtol=0, atol=2e-6, msg=named(key))
    other = inputs([0, 1, 2], [8, 9, 10], state=0)
    assert not (other["sample"] == whole["sample"]).any() and not (other["timestep"] == whole["timestep"]).any()


def test_labels_of_stored_draws_are_dropped_as_often_as_others(tmp_path):
    backbone, count = load_tiny_teacher(tiny_pipeline("dit", tmp_path)), 2000
    batch = {"label": torch.ones(count, dtype=torch.long), "draw_seed": torch.arange(count)}
    batch |= {"latent_mean": torch.zeros(count, 4, LATENT, LATENT), "latent_std": torch.ones(count, 4, LATENT, LATENT)}
    labels = backbone.training_inputs(batch)["conditions"]["class_labels"]
    assert set(labels.tolist()) == {1, backbone.null_class}
    share = float((labels == backbone.null_class).float().mean())
    assert share == pytest.approx(backbone.LABEL_DROPOUT, abs=0.03)  # four standard deviations


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_flow_matching_takes_the_schedulers_timesteps(kind, tmp_path):
    backbone = load_tiny_teacher(tiny_pipeline(kind, tmp_path))
    schedule = backbone.noise_scheduler
    for inputs in (
        backbone.calibration_inputs(training_batch(backbone, [0, 1, 2]), 0),
        backbone.training_inputs(training_batch(backbone, [0, 1, 2])),
    ):
        assert torch.isin(inputs["timestep"], schedule.timesteps).all()
        with torch.no_grad(), calls_of(backbone.network) as calls:
            assert backbone.predict(inputs).shape == inputs["target"].shape
        assert torch.equal(calls[0]["timestep"], inputs["timestep"] / (1000 if kind == "flux" else 1))
    timesteps = backbone.calibration_inputs(training_batch(backbone, [0, 1, 2]), 0)["timestep"].tolist()
    places = [schedule.timesteps.tolist().index(timestep) for timestep in timesteps]
    assert [place * 3 // 1000 for place in places] == [0, 1, 2]  # stratified


@pytest.mark.parametrize("kind", TEXT)
def test_training_and_calibration_give_the_encodings_of_the_captions(kind, tmp_path):
    backbone, pipeline = load_tiny_teacher(tiny_pipeline(kind, tmp_path)), DiffusionPipeline.from_pretrained(tmp_path)
    batch = training_batch(backbone, [0, 1, 2])
    prompts = {"prompt": batch["caption"]} | ({"prompt_2": None} if kind in ("sd3", "flux") else {})
    prompts |= {"prompt_3": None} if kind == "sd3" else {}
    if kind == "sd":
        prompts |= {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with torch.no_grad():
        encoded = pipeline.encode_prompt(**prompts)
    for inputs in (backbone.calibration_inputs(batch, 0), backbone.training_inputs(batch)):
        given = tensors(inputs["conditions"])
        assert torch.equal(given["encoder_hidden_states"], encoded[0])
        if kind == "pixart":
            assert torch.equal(given["encoder_attention_mask"], encoded[1])
        if kind in ("sdxl", "sd3"):
            assert torch.equal(
                given["added_cond_kwargs/text_embeds" if kind == "sdxl" else "pooled_projections"], encoded[2]
            )
        if kind == "flux":
            assert torch.equal(given["pooled_projections"], encoded[1])
            assert torch.equal(given["guidance"], torch.full((3,), 3.5))


def test_sdxl_is_told_the_original_size_and_the_crop(tmp_path):
    backbone = load_tiny_teacher(tiny_pipeline("sdxl", tmp_path))
    batch = training_batch(backbone, [0, 2])
    expected = [[30, 40, 0, 5, PIXELS, PIXELS], [32, 42, 2, 7, PIXELS, PIXELS]]
    for inputs in (backbone.calibration_inputs(batch, 0), backbone.training_inputs(batch)):
        assert inputs["conditions"]["added_cond_kwargs"]["time_ids"].tolist() == expected
    del batch["original_size"], batch["crop"]  # data that do not know: a picture of the target size, not cropped
    inputs = backbone.calibration_inputs(batch, 0)
    assert (
        inputs["conditions"]["added_cond_kwargs"]["time_ids"].tolist() == [[PIXELS, PIXELS, 0, 0, PIXELS, PIXELS]] * 2
    )


def test_training_draws_from_the_global_generator(tmp_path):
    backbone = load_tiny_teacher(tiny_pipeline("sd", tmp_path))

    def inputs(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return tensors(backbone.training_inputs(training_batch(backbone, [0, 1, 2])))

    first, again, other = inputs(0), inputs(0), inputs(1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not (first["sample"] == other["sample"]).any() and not torch.equal(first["timestep"], other["timestep"])


# What is refused


@pytest.mark.parametrize("kind", TEXT)
def test_data_without_captions_are_refused(kind, tmp_path):
    backbone = load_tiny_teacher(tiny_pipeline(kind, tmp_path))
    batch = training_batch(backbone, [0])
    del batch["caption"]
    for make in (backbone.training_inputs, lambda batch: backbone.calibration_inputs(batch, 0)):
        with pytest.raises(
            ValueError, match=r"the teacher takes text, but the data have no captions; choose data with"
        ):
            make(batch)


@pytest.mark.parametrize(("label", "said"), [(None, "none"), (-1, "none"), (1001, "1001")])
def test_data_without_fitting_labels_are_refused(label, said, tmp_path):
    backbone = load_tiny_teacher(tiny_pipeline("dit", tmp_path))
    batch = training_batch(backbone, [0])
    batch.pop("label") if label is None else batch["label"].fill_(label)
    with pytest.raises(
        ValueError, match=rf"class labels from 0 to 999, and the data give {said}; choose labelled data"
    ):
        backbone.calibration_inputs(batch, 0)
