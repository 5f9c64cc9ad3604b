"""Language models: their layers as units, renumbered students, and what criteria measure of them."""

import copy
import functools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.criteria import close
from support.language import VOCABULARY, tiny_language, tiny_llama, tiny_tokens
from support.networks import bypasses, same_tensors
from transformers import (
    AutoModelForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from criteria.scores.block_influence import BlockInfluence
from criteria.scores.flap import Flap
from criteria.scores.output_loss import OutputLoss
from criteria.scores.perplexity import Perplexity
from criteria.scores.task_loss import TaskLoss
from criteria.scores.taylor import Taylor
from criteria.scores.wanda import Wanda
from criteria.selection.base import Pool
from criteria.selection.in_order import Ranked
from lightning_modules.backbones.language.backbone import LanguageBackbone, generate_greedily
from lightning_modules.backbones.language.load import check_shorter
from lightning_modules.export.export import export
from lightning_modules.export.verify import ExportMismatch, verify

LAYERS = [f"model.layers.{i}" for i in range(4)]
INPUTS = {"sample": tiny_tokens()["tokens"]}


def sliding() -> LanguageBackbone:
    """A Qwen of five layers whose last three look at a window only, which its configuration lists layer by layer."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=3,
        max_window_layers=2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LanguageBackbone(Qwen2ForCausalLM(config).eval())


FAMILIES = {"llama": tiny_language, "qwen2": sliding}
each_family = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)


@each_family
def test_units_are_the_layers_and_free_what_a_student_lacks(make):
    backbone = make()
    units = backbone.units()
    assert [unit.name for unit in units] == [f"model.layers.{i}" for i in range(len(units))]
    for unit in units:
        student = backbone.pruned(bypasses([unit.name]))
        assert backbone.params() - student.params() == unit.params
        assert backbone.macs().linear - student.macs().linear == unit.macs


@pytest.mark.parametrize("level", ["operator", "width"])
def test_an_unknown_level_is_an_error(level):
    with pytest.raises(ValueError, match=f"criterion.level='{level}'"):
        tiny_language().units(level)


@functools.cache
def shared() -> LanguageBackbone:
    return tiny_language()


@settings(max_examples=12, deadline=None)
@given(st.sets(st.sampled_from(LAYERS), min_size=1, max_size=3))
@torch.no_grad()
def test_masking_layers_equals_removing_them_bit_for_bit(names):
    backbone = shared()
    before = copy.deepcopy(backbone.state_dict())
    with backbone.without(names):
        expected = backbone.predict(INPUTS)
    student = backbone.pruned(bypasses(names))
    assert torch.equal(student.predict(INPUTS), expected)
    assert same_tensors(backbone.state_dict(), before)
    zeroed = copy.deepcopy(backbone)  # a layer whose last projections are zero adds nothing
    for name in names:
        layer = zeroed.network.get_submodule(name)
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.zeros_(part.weight)
    assert torch.equal(zeroed.predict(INPUTS), expected)


@each_family
@torch.no_grad()
def test_a_student_is_renumbered_and_reloads_as_the_stock_class(make, tmp_path):
    backbone = make()
    gone = ["model.layers.0", "model.layers.2"]
    student = backbone.pruned(bypasses(gone))
    count = len(backbone.units()) - 2
    assert student.moved == {
        name: f"model.layers.{i}" for i, name in enumerate(u.name for u in backbone.units() if u.name not in gone)
    }
    assert student.kept() == list(student.moved)
    assert [part.layer_idx for part in student.network.modules() if hasattr(part, "layer_idx")] == list(range(count))
    assert student.network.config.num_hidden_layers == len(student.network.model.layers) == count
    assert not {id(p) for p in student.network.parameters()} & {id(p) for p in backbone.network.parameters()}
    student.save(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(stock) is type(backbone.network)
    assert torch.equal(stock(INPUTS["sample"]).logits, student.predict(INPUTS))
    written = generate_greedily(stock, INPUTS["sample"], 8)
    assert torch.equal(written, generate_greedily(student.network, INPUTS["sample"], 8))
    for end in range(12, written.shape[1]):  # with the key-value cache as without
        logits = student.predict({"sample": written[:, :end]})[:, -1]
        assert torch.equal(logits.argmax(-1), written[:, end])


def test_lists_with_an_entry_per_layer_are_shortened():
    backbone = sliding()
    assert backbone.network.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 3
    student = backbone.pruned(bypasses(["model.layers.1", "model.layers.4"]))
    assert student.network.config.layer_types == ["full_attention"] + ["sliding_attention"] * 2
    assert backbone.network.config.num_hidden_layers == 5  # the teacher's own is as it was


def test_networks_whose_layers_depend_on_their_index_are_refused():
    config = Qwen2MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        mlp_only_layers=[0],
    )
    with pytest.raises(ValueError, match=r"teacher\.path=/moe: .* without model\.layers\.0 is no stock network"):
        check_shorter(LanguageBackbone(Qwen2MoeForCausalLM(config)), "/moe")
    check_shorter(sliding(), "/qwen2")


def test_a_plan_of_all_layers_or_of_another_kind_is_an_error():
    with pytest.raises(ValueError, match="at least one stays"):
        shared().pruned(bypasses(LAYERS))
    with pytest.raises(ValueError, match=r"'model\.layers\.9' is not a unit"):
        shared().pruned(bypasses(["model.layers.9"]))
    with pytest.raises(ValueError, match="replace"):
        shared().pruned([{"unit": LAYERS[0], "kind": "replace"}])


# Losses


def test_losses_are_those_of_the_next_tokens():
    logits = torch.randn(4, 12, VOCABULARY, generator=torch.Generator().manual_seed(0))
    tokens, p = INPUTS["sample"], logits.double().softmax(-1)
    expected = [np.mean([-np.log(float(p[n, i, tokens[n, i + 1]])) for i in range(11)]) for n in range(4)]
    np.testing.assert_allclose(shared().losses(logits, INPUTS), expected, rtol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_losses_of_a_large_vocabulary_are_exact(masked):
    rng = torch.Generator().manual_seed(0)
    logits, tokens = 3 * torch.randn(2, 4, 2**17, generator=rng), torch.randint(0, 2**17, (2, 4), generator=rng)
    inputs = {"sample": tokens} | ({"mask": torch.ones(2, 4, dtype=torch.bool)} if masked else {})
    expected = F.cross_entropy(logits.double()[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    difference = shared().losses(logits, inputs) - expected.view(2, 3).mean(1)
    assert difference.abs().max() < 3e-5  # 2e-4 where the vocabulary is not the last dimension


def test_tokens_outside_the_mask_are_no_targets():
    logits = torch.randn(4, 12, VOCABULARY, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12) < torch.tensor([12, 7, 2, 1])[:, None]
    losses = shared().losses(logits, INPUTS | {"mask": mask})
    for n, length in enumerate([12, 7, 2]):
        alone = shared().losses(logits[n : n + 1, :length], {"sample": INPUTS["sample"][n : n + 1, :length]})
        torch.testing.assert_close(losses[n : n + 1], alone, rtol=1e-6, atol=0)
    assert losses[3] == 0  # nothing to predict


@torch.no_grad()
def test_tokens_that_do_not_count_change_no_output():
    mask = torch.arange(12) < torch.tensor([12, 7, 2, 1])[:, None]
    outputs = shared().predict(INPUTS | {"mask": mask})
    other = shared().predict({"sample": torch.where(mask, INPUTS["sample"], 0), "mask": mask})
    torch.testing.assert_close(outputs, other, rtol=1e-5, atol=1e-5)
    dense = shared().predict(INPUTS)
    for n, length in enumerate([12, 7, 2, 1]):
        assert torch.equal(outputs[n, : length - 1], dense[n, : length - 1]) and not outputs[n, length - 1 :].any()


@torch.no_grad()
def test_padding_behind_a_sample_changes_no_prediction():
    tokens = INPUTS["sample"].clone()
    before = shared().predict({"sample": tokens})
    tokens[:, 8:] = 0
    torch.testing.assert_close(shared().predict({"sample": tokens})[:, :8], before[:, :8], rtol=1e-5, atol=1e-5)


def test_the_distance_of_outputs_is_their_divergence():
    a, b = torch.randn(2, 3, 5, VOCABULARY, generator=torch.Generator().manual_seed(0)).unbind()
    p, q = b.double().softmax(-1), a.double().softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(shared().distance(a, b, {}).double(), expected, rtol=1e-6, atol=0)
    assert shared().distance(b, b, {}) == 0
    mask = torch.tensor([[False, True, True, False, False], [True, False, False, False, True], [False] * 5])
    each = (p * (p.log() - q.log())).sum(-1)
    distance = shared().distance(a, b, {"mask": mask}).double()  # of the predictions of tokens 1 and 2, and of 4
    torch.testing.assert_close(distance, ((each[0, 0] + each[0, 1]) / 2 + each[1, 3]) / 3, rtol=1e-6, atol=0)


# Criteria


def scored(criterion, of=None):
    backbone = shared()
    criterion.start(backbone, backbone.units(), 0)
    with torch.no_grad():
        for batch in of or [tiny_tokens()]:
            criterion.update(batch)
    return criterion.finish()


@torch.no_grad()
def test_perplexity_is_that_of_the_network_without_the_layer():
    scores = scored(Perplexity())
    for name in LAYERS:
        with shared().without([name]):
            losses = shared().losses(shared().predict(INPUTS), INPUTS).double()
        np.testing.assert_allclose(scores[name]["score"], np.exp(losses.mean()), rtol=1e-12)
        error = np.exp(losses.mean()) * losses.std() / 2
        np.testing.assert_allclose(scores[name]["standard_error"], error, rtol=1e-6)


def test_perplexity_orders_layers_as_the_task_loss_does():
    scores, other = scored(Perplexity()), scored(TaskLoss())
    dense = float(shared().losses(shared().predict(INPUTS), INPUTS).detach().double().mean())
    for name in LAYERS:
        np.testing.assert_allclose(np.log(scores[name]["score"]), other[name]["score"] + dense, rtol=1e-6)


@pytest.mark.parametrize("make", [Perplexity, OutputLoss, BlockInfluence, TaskLoss, Taylor, Wanda, Flap])
def test_padding_changes_no_score(make):
    mask = torch.arange(12) < torch.tensor([12, 7, 3, 2])[:, None]
    units = shared().units("channel" if make in (Wanda, Flap) else "depth")
    scores = []
    for fill in (0, 5):
        criterion = make()
        criterion.start(shared(), units, 0)
        with torch.no_grad():
            tokens = torch.where(mask, INPUTS["sample"], fill)
            criterion.update(tiny_tokens() | {"tokens": tokens, "mask": mask})
        scores.append([entry["score"] for entry in criterion.finish().values()])
    np.testing.assert_allclose(*scores, rtol=1e-3)


@pytest.mark.parametrize("masked", [False, True])
def test_scores_do_not_depend_on_the_size_of_batches(masked):
    mask = torch.arange(12) < torch.tensor([12, 7, 3, 2])[:, None]
    whole = tiny_tokens() | ({"mask": mask} if masked else {})
    halves = [{key: value[i : i + 2] for key, value in whole.items()} for i in (0, 2)]
    for make in (Perplexity, OutputLoss, BlockInfluence):
        close(scored(make(), [whole]), scored(make(), halves), rtol=1e-5)


def test_taylor_sums_over_samples_before_the_absolute_value():
    whole = tiny_tokens()
    halves = [{key: value[i : i + 2] for key, value in whole.items()} for i in (0, 2)]
    scores = scored(Taylor(), halves)
    backbone = tiny_language()
    backbone.loss(INPUTS).backward()
    for name in LAYERS:
        layer = backbone.network.get_submodule(name)
        expected = sum(float((p.grad * p).detach().abs().sum()) for p in layer.parameters())
        np.testing.assert_allclose(scores[name]["score"], expected, rtol=1e-4)


@torch.no_grad()
def test_block_influence_compares_hidden_states_token_by_token():
    states = shared().network(INPUTS["sample"], output_hidden_states=True).hidden_states
    scores = scored(BlockInfluence())
    for i, name in enumerate(LAYERS[:-1]):  # the last state given there is behind the final norm
        cosine = F.cosine_similarity(states[i].double(), states[i + 1].double(), dim=-1)
        np.testing.assert_allclose(scores[name]["score"], 1 - float(cosine.mean()), rtol=1e-9)


def test_prefix_reuse_computes_earlier_layers_once():
    backbone, computed = tiny_language(layers=6), []
    for name, layer in backbone.layers().items():  # a hook of the layer itself also sees calls that are read back
        layer.self_attn.q_proj.register_forward_hook(lambda *_, name=name: computed.append(name))
    names = [unit.name for unit in backbone.units()]
    with torch.no_grad():
        outputs = dict(backbone.predict_without_each(INPUTS, names))
        assert len(computed) == 6 + sum(range(6))  # the plain loop computes 6 + 6 * 5
        for name in names:
            with backbone.without([name]):
                assert torch.equal(outputs[name], backbone.predict(INPUTS))


def test_the_plus_rule_keeps_the_first_four_and_the_last_two():
    backbone = tiny_language(layers=9)
    units = backbone.units()
    pool = Pool(units, {"params": backbone.params()})
    scores = {unit.name: float(i) for i, unit in enumerate(units)}  # the first are the least harmful
    ratio = 2 * units[0].params / backbone.params()
    plus = Ranked(ratio=ratio, tolerance=0.01, protected=[":4", "-2:"])
    assert plus.select(pool, scores) == ["model.layers.4", "model.layers.5"]
    assert plus.protected_units(units) == [f"model.layers.{i}" for i in (0, 1, 2, 3, 7, 8)]
    assert Ranked(ratio=ratio, tolerance=0.01).select(pool, scores) == ["model.layers.0", "model.layers.1"]


# Exports


@pytest.mark.slow
def test_an_export_reloads_elsewhere_and_writes_the_same_tokens(tmp_path):
    student = tiny_language().pruned(bypasses(LAYERS[2:3]))
    export(student, tmp_path, "card")
    assert verify(student, tmp_path) <= 1e-5
    assert {p.name for p in tmp_path.iterdir()} >= {"config.json", "model.safetensors", "README.md"}
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 3
    with pytest.raises(ExportMismatch):
        verify(LanguageBackbone(tiny_llama(layers=3), length=12), tmp_path)
