"""Training of pruned language models: low-rank adapters, and distillation from the unpruned network."""

import copy
import functools

import pytest
import torch
from support.language import tiny_language, tiny_tokens
from support.networks import bypasses, same_tensors

from lightning_modules.modules.distillation import Distillation
from lightning_modules.modules.lora import Lora

LAYERS = [f"model.layers.{i}" for i in range(4)]
INPUTS = {"sample": tiny_tokens()["tokens"]}


def module_of(student, teacher, tmp_path, **options):
    return Distillation(
        student,
        teacher,
        optimizer=functools.partial(torch.optim.SGD, lr=0.1),
        lr_scheduler=functools.partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0),
        seed=0,
        dump=tmp_path,
        **options,
    )


LORA = Lora(["q_proj", "down_proj"], rank=2, alpha=4)


def test_adapters_alone_are_trained_and_merged(tmp_path):
    backbone = tiny_language()
    student = backbone.pruned(bypasses(LAYERS[1:2]))
    before = copy.deepcopy(student.network.state_dict())
    module = module_of(student, backbone, tmp_path, w_out=0, w_feat=0, lora=LORA)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert len(trained) == 3 * 2 * 2 and all("lora_" in name for name in trained)
    optimizer = module.configure_optimizers()["optimizer"]
    for _ in range(3):
        module.losses(tiny_tokens())["loss"].backward()
        optimizer.step()
    student.network.eval()  # without dropout
    with torch.no_grad():
        expected = student.predict(INPUTS)
        result = module.result()
        torch.testing.assert_close(result.predict(INPUTS), expected, rtol=1e-4, atol=1e-4)
    after = result.network.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert list(after) == list(before)
    assert changed == {f"model.layers.{i}.{p}.weight" for i in range(3) for p in ("self_attn.q_proj", "mlp.down_proj")}


def test_the_same_seed_makes_the_same_adapters(tmp_path):
    adapters = []
    for _ in range(2):
        student = tiny_language()
        torch.rand(3)  # the global generator plays no part
        module = module_of(student, tiny_language(), tmp_path, w_out=0, w_feat=0, lora=LORA)
        adapters.append({name: p.detach() for name, p in module.named_parameters() if p.requires_grad})
    assert same_tensors(*adapters)


def test_adapters_for_missing_layers_are_an_error(tmp_path):
    for targets, message in {("q_proj", "queer"): "'queer' is no linear", ("lm_head",): "shares its weight"}.items():
        with pytest.raises(ValueError, match=message):
            Lora([*targets]).check(tiny_language().network)
    with pytest.raises(ValueError, match=r"targets: 'query' is no linear layer .* nearest are"):
        module_of(tiny_language(), tiny_language(), tmp_path, w_feat=0, lora=Lora(["query"]))


def test_distillation_compares_each_kept_layer_with_the_same_layer(tmp_path):
    backbone = tiny_language()
    student = backbone.pruned(bypasses(LAYERS[1:2]))
    module = module_of(student, backbone, tmp_path)
    assert module.levels == student.moved
    losses = module.losses(tiny_tokens())
    assert losses["feature/model.layers.0"] == 0  # nothing is missing before it
    assert losses["feature/model.layers.2"] > 0
    mask = torch.arange(12) < torch.tensor([12, 7, 3, 2])[:, None]
    padded = [tiny_tokens() | {"tokens": torch.where(mask, INPUTS["sample"], fill), "mask": mask} for fill in (0, 5)]
    first, second = (module.losses(batch) for batch in padded)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        expected = student.distance(student.predict(INPUTS), backbone.predict(INPUTS), INPUTS)
    torch.testing.assert_close(losses["output"].detach(), expected)


def test_initial_error_is_a_mean_over_samples_that_have_tokens(tmp_path):
    backbone, mask = tiny_language(), torch.arange(12) < torch.tensor([12, 4, 0, 3])[:, None]
    student = backbone.pruned(bypasses(LAYERS[1:2]))
    module = module_of(student, backbone, tmp_path, normalization="initial_error")
    losses = module.losses(tiny_tokens() | {"mask": mask})
    for level, name in enumerate(module.levels):
        kept = float(module.weights.energy[level])
        raw, weighted = (float(losses[f"{kind}/{name}"]) for kind in ("feature", "weighted_feature"))
        assert weighted == pytest.approx(raw / kept, rel=1e-5)
        assert kept >= raw * 4 / 3  # terms are means over 4 samples, one of which has no tokens
    later = module.losses(tiny_tokens() | {"mask": mask.flip(0)})
    assert later["loss"] != losses["loss"] and float(module.weights.energy[-1]) == kept


@pytest.mark.parametrize("options", [{"normalization": name} for name in ("teacher_energy", "teacher_norm", "none")])
def test_gradients_of_two_half_batches_average_to_those_of_the_whole(options, tmp_path):
    backbone, mask = tiny_language(), torch.arange(12) < torch.tensor([12, 4, 0, 3])[:, None]
    module = module_of(backbone.pruned(bypasses(LAYERS[1:2])), backbone, tmp_path, **options)
    whole = tiny_tokens() | {"mask": mask}

    def gradients(batch):
        module.zero_grad()
        losses = module.losses(batch)
        losses["loss"].backward()
        return losses, torch.cat([p.grad.flatten() for p in module.student.parameters()])

    (losses, expected), *halves = (
        gradients({key: value[part] for key, value in whole.items()}) for part in (slice(4), slice(2), slice(2, 4))
    )
    torch.testing.assert_close((halves[0][1] + halves[1][1]) / 2, expected, rtol=1e-4, atol=1e-5)
    for name, value in losses.items():
        torch.testing.assert_close((halves[0][0][name] + halves[1][0][name]) / 2, value, rtol=1e-5, atol=1e-6)
