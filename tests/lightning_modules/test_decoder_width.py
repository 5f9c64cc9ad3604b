"""Width of language models: heads and channels as units, stock students, uniform plans, criteria of inputs."""

import contextlib
import copy
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.language import VOCABULARY, tiny_llama, tiny_tokens
from support.networks import part, same_tensors, tiny_backbone
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from criteria.base import ChangeKind, Criterion, Level, Unit
from criteria.scores.flap import Flap
from criteria.scores.magnitude import Magnitude
from criteria.scores.random import Random
from criteria.scores.taylor import Taylor
from criteria.scores.wanda import Wanda
from criteria.selection.base import InfeasibleBudget, Pool
from criteria.selection.knapsack import Knapsack
from criteria.selection.uniform import Uniform
from lightning_modules.backbones.language.backbone import LanguageBackbone

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"max_position_embeddings": 64, "initializer_range": 0.2}
GROUPED = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2}
NETWORKS = {
    "tied": lambda: tiny_llama(2),
    "untied": lambda: tiny_llama(2, tie=False),
    "four heads": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4)),
    "biases": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "norms of heads": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8)),
}
TOKENS = 12
WIDTH = (ChangeKind.SLICE, None, Level.CHANNEL)
"""how units of width are removed, inside which unit they are, and their level"""


def make(name: str, block: int = 4) -> LanguageBackbone:
    """A backbone of random weights (biases too), in float64, in which slicing and zeroing hardly differ by rounding."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = NETWORKS[name]().eval()
        for key, parameter in network.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(parameter)
    return LanguageBackbone(network.double(), length=TOKENS, block=block)


def removal(backbone: LanguageBackbone, heads: int, blocks: int) -> list[str]:
    """As many heads and blocks of channels of every layer, others in each layer."""
    names = []
    for layer in range(len(backbone.layers())):
        for part_name, count in (("self_attn", heads), ("mlp", blocks)):
            group = f"model.layers.{layer}.{part_name}"
            size = len(backbone.channels.blocks[group])
            names += [f"{group}:{(layer + i) % size}" for i in range(count)]
    return names


def sliced(backbone: LanguageBackbone, names: list[str]) -> LanguageBackbone:
    return backbone.pruned([{"unit": name, "kind": "slice"} for name in names])


def logits(backbone: LanguageBackbone) -> torch.Tensor:
    with torch.no_grad():
        return backbone.predict({"sample": tiny_tokens()["tokens"]})


def pool_of(backbone: LanguageBackbone) -> Pool:
    totals = {"params": backbone.params(), "macs": backbone.macs().linear}
    return Pool(backbone.units("channel"), totals, cost=backbone.cost)


each_network = pytest.mark.parametrize("name", NETWORKS)


# Units and students


def test_units_are_key_value_heads_and_blocks_of_channels() -> None:
    backbone = LanguageBackbone(tiny_llama(2), length=TOKENS)
    # A head: 8 rows of q, 4 of k, 4 of v, 8 columns of o. A block: 8 rows of two layers, 8 columns of a third.
    head, block = 16 * (8 + 4 + 4 + 8), 16 * (8 + 8 + 8)
    layers = [
        [Unit(f"model.layers.{i}.self_attn:{n}", "head", head, TOKENS * head, *WIDTH) for n in range(2)]
        + [Unit(f"model.layers.{i}.mlp:{n}", "channel", block, TOKENS * block, *WIDTH) for n in range(3)]
        for i in range(2)
    ]
    assert backbone.units("channel") == layers[0] + layers[1]
    assert {name: i.tolist() for name, i in backbone.consumers("model.layers.1.self_attn:1").items()} == {
        "model.layers.1.self_attn.o_proj": list(range(8, 16))
    }
    assert {name: i.tolist() for name, i in backbone.consumers("model.layers.0.mlp:2").items()} == {
        "model.layers.0.mlp.down_proj": list(range(16, 24))
    }


def test_a_block_may_be_a_single_channel() -> None:
    names = [unit.name for unit in make("tied", block=1).units("channel") if unit.kind == "channel"]
    assert names == [f"model.layers.{i}.mlp:{n}" for i in range(2) for n in range(24)]


@each_network
@pytest.mark.parametrize("counts", [(1, 0), (0, 2), (1, 5)])
def test_a_student_is_the_network_with_zeros_where_the_units_were(name: str, counts: tuple[int, int]) -> None:
    backbone = make(name)
    before, dense = copy.deepcopy(backbone.network.state_dict()), logits(backbone)
    names = removal(backbone, *counts)
    student = sliced(backbone, names)
    assert same_tensors(backbone.network.state_dict(), before)
    own = {p.untyped_storage().data_ptr() for p in student.network.parameters()}
    assert own.isdisjoint(p.untyped_storage().data_ptr() for p in backbone.network.parameters())
    with torch.no_grad():
        weights = backbone.weights()
        for unit in names:
            for key, dim, indices in backbone.channels.slices(unit):
                weights[key].index_fill_(dim, indices, 0)
    torch.testing.assert_close(logits(student), logits(backbone), rtol=1e-11, atol=1e-12)
    assert not torch.allclose(logits(student), dense, rtol=1e-3)
    assert not student.network.training and student.network.dtype == torch.float64


@each_network
@pytest.mark.parametrize("counts", [(1, 0), (0, 2), (1, 5)])
def test_units_free_what_the_student_lacks(name: str, counts: tuple[int, int]) -> None:
    backbone = make(name)
    names = removal(backbone, *counts)
    student = sliced(backbone, names)
    units = {unit.name: unit for unit in backbone.units("channel")}
    for budget, lacks in {
        "params": backbone.params() - student.params(),
        "macs": backbone.macs().linear - student.macs().linear,
    }.items():
        assert backbone.cost(names, budget) == lacks == sum(getattr(units[unit], budget) for unit in names)
    assert [sum(w.numel() for w in backbone.freed_weights(units[n], backbone.weights())) for n in names] == [
        units[n].params for n in names
    ]


@each_network
def test_a_student_is_a_stock_network_that_generates_with_a_cache(name: str, tmp_path: Path) -> None:
    backbone = make(name)
    student = sliced(backbone, removal(backbone, 1, 2))
    student.save(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    # Llama's configuration refuses three heads in 16 channels; Mistral's network is the same.
    expected = "MistralForCausalLM" if name == "four heads" else type(backbone.network).__name__
    assert type(reloaded).__name__ == type(student.network).__name__ == expected
    config, of_teacher = reloaded.config, backbone.network.config
    assert config.intermediate_size == 16 and config.hidden_size == 16
    assert config.num_key_value_heads == of_teacher.num_key_value_heads - 1
    assert config.head_dim == backbone.network.model.layers[0].self_attn.head_dim
    assert config.num_attention_heads * 2 == config.num_key_value_heads * (2 if name == "four heads" else 4)
    tokens = tiny_tokens(2, 6)["tokens"]
    with torch.no_grad():
        assert torch.equal(reloaded(tokens).logits, student.network(tokens).logits)
    written = [
        network.generate(tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=cache)
        for network, cache in ((student.network, True), (reloaded, True), (reloaded, False))
    ]
    assert written[0].shape == (2, 14) and torch.equal(written[0], written[1]) and torch.equal(written[0], written[2])


def test_a_llama_stays_a_llama_where_its_configuration_allows_it() -> None:
    backbone = make("four heads")
    assert isinstance(sliced(backbone, removal(backbone, 2, 0)).network, LlamaForCausalLM)


def test_a_width_without_stock_network_is_refused_before_scoring() -> None:
    config = LlamaConfig(**SIZES, num_attention_heads=4, attention_bias=True)  # Mistral's has no biases
    backbone = LanguageBackbone(LlamaForCausalLM(config), length=TOKENS)
    with pytest.raises(ValueError, match="not a multiple of the number of attention heads"):
        backbone.cost(removal(backbone, 1, 0), "params")


def test_a_student_can_be_pruned_again_in_width_and_in_depth() -> None:
    once = sliced(make("four heads"), removal(make("four heads"), 1, 2))
    twice = sliced(once, removal(once, 1, 1))
    assert twice.network.config.num_key_value_heads == 2 and twice.network.config.intermediate_size == 12
    shorter = twice.pruned([{"unit": "model.layers.0", "kind": "bypass"}])
    assert len(shorter.units()) == 1 and torch.isfinite(logits(shorter)).all()


def test_layers_of_different_widths_are_refused() -> None:
    backbone = make("tied")
    for names in (["model.layers.0.mlp:1"], ["model.layers.0.self_attn:0", "model.layers.1.mlp:0"]):
        with pytest.raises(ValueError, match=r"lose 0 to 1 of their units of .*choose selection=uniform"):
            sliced(backbone, names)


def test_a_layer_keeps_some_heads_and_channels() -> None:
    backbone = make("tied")
    with pytest.raises(ValueError, match=r"all 2 blocks of 'model.layers.0.self_attn' would go"):
        sliced(backbone, removal(backbone, 2, 0))
    with pytest.raises(ValueError, match=r"unit 'model.layers.0.mlp:9' is no block of channels"):
        sliced(backbone, ["model.layers.0.mlp:9"])


def test_a_plan_of_layers_and_channels_is_refused() -> None:
    changes = [{"unit": "model.layers.0", "kind": "bypass"}, {"unit": "model.layers.1.mlp:0", "kind": "slice"}]
    with pytest.raises(ValueError, match=r"the plan says \['bypass', 'slice'\]"):
        make("tied").pruned(changes)


def test_an_attention_with_one_key_value_head_has_no_units() -> None:
    config = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=1)
    backbone = LanguageBackbone(LlamaForCausalLM(config), length=TOKENS)
    assert {unit.kind for unit in backbone.units("channel")} == {"channel"}
    assert sliced(backbone, removal_of_channels(backbone)).network.config.intermediate_size == 16


def removal_of_channels(backbone: LanguageBackbone) -> list[str]:
    return [f"{layer}.mlp:0" for layer in backbone.layers()]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Phi3Config(**GROUPED, pad_token_id=0), "its attention's weight 'qkv_proj.weight' has the shape"),
        (Olmo2Config(**GROUPED), "its attention's weight 'q_norm.weight' has the shape"),
        (MixtralConfig(**GROUPED), "choose criterion.level=depth"),
    ],
    ids=["fused", "norms over heads", "experts"],
)
def test_networks_that_are_not_built_like_llama_are_refused(config: Any, reason: str) -> None:
    backbone = LanguageBackbone(AutoModelForCausalLM.from_config(config), length=TOKENS)
    with pytest.raises(ValueError, match=reason):
        backbone.units("channel")


def test_layers_that_differ_already_are_refused() -> None:
    network = tiny_llama(3)
    network.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(8, 16))
    with pytest.raises(ValueError, match=r"'model.layers.0' and 'model.layers.1' have other shapes"):
        LanguageBackbone(network, length=TOKENS).units("channel")


# The uniform selection


def fake_pool(heads: int = 3, blocks: int = 24, total: int = 1000) -> Pool:
    """Two layers of heads that cost 50 each and blocks that cost 7."""
    units = [
        Unit(f"{layer}.{kind}:{i}", kind, cost, 2 * cost, *WIDTH)
        for layer in "ab"
        for kind, count, cost in (("head", heads, 50), ("channel", blocks, 7))
        for i in range(count)
    ]
    costs = {unit.name: {"params": unit.params, "macs": unit.macs} for unit in units}
    totals = {"params": total, "macs": 2 * total}
    return Pool(units, totals, cost=lambda names, budget: sum(costs[name][budget] for name in names))


@pytest.mark.parametrize("heads", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize(("ratio", "tolerance"), [(0.1, 0.02), (0.2, 0.0), (0.3, 0.05), (0.45, 0.02), (0.01, 0.004)])
def test_uniform_takes_the_counts_whose_fractions_are_closest(heads, budget, ratio, tolerance) -> None:
    pool, selection = fake_pool(heads), Uniform(ratio, tolerance, budget)

    def spent(counts: tuple[int, int]) -> int:
        return 2 * (50 * counts[0] + 7 * counts[1])

    every = list(itertools.product(range(heads), range(24)))
    low, high = round(1000 * ratio), round(1000 * (ratio + tolerance))
    met = [c for c in every if low <= spent(c) <= high]
    if not met:
        below = max(spent(c) for c in every if spent(c) < low)
        above = min((spent(c) for c in every if spent(c) > high), default=None)
        near = " and ".join(f"{cost / 1000:.4f}" for cost in (below, above) if cost)
        largest = max(map(spent, every)) / 1000
        with pytest.raises(
            InfeasibleBudget, match=f"the largest achievable ratio is {largest:.3f}, the nearest achievable {near}$"
        ):
            selection.check(pool)
        return
    tight = [(h, min(c for n, c in met if n == h)) for h in {h for h, _ in met}]
    best = min(tight, key=lambda c: (abs(c[0] / heads - c[1] / 24), spent(c)))
    chosen = selection.select(pool, {unit.name: 0.0 for unit in pool.units})
    for layer in "ab":
        counts = [sum(name.startswith(f"{layer}.{kind}:") for name in chosen) for kind in ("head", "channel")]
        assert counts == list(best)


def test_uniform_takes_the_lowest_scores_of_each_group() -> None:
    pool = fake_pool()
    rng = np.random.default_rng(0)
    scores = {unit.name: float(rng.normal()) + (100 if unit.name[0] == "a" else 0) for unit in pool.units}
    chosen = set(Uniform(0.3).select(pool, scores))
    for group in ("a.head", "a.channel", "b.head", "b.channel"):
        names = [name for name in scores if name.startswith(f"{group}:")]
        gone, kept = ([scores[name] for name in names if (name in chosen) == way] for way in (True, False))
        assert gone and kept and max(gone) < min(kept)


def test_protected_units_stay_and_their_groups_lose_other_units() -> None:
    pool = fake_pool()
    scores = {unit.name: float(unit.name.rpartition(":")[2]) for unit in pool.units}
    assert {"a.head:0", "b.head:0", "b.channel:0"} <= set(Uniform(0.3).select(pool, scores))
    selection = Uniform(0.3, protected=["a.head:0", "b.channel:0"])
    chosen = selection.select(pool, scores)
    assert selection.counts(pool) == Uniform(0.3).counts(pool) == (1, 15)
    assert [name for name in chosen if "head" in name] == ["a.head:1", "b.head:0"]
    assert [name for name in chosen if "b.channel" in name] == [f"b.channel:{i}" for i in range(1, 16)]
    with pytest.raises(InfeasibleBudget, match=r"with 24 of \d+ units protected"):
        Uniform(0.45, protected=[f"a.channel:{i}" for i in range(24)]).check(pool)
    with pytest.raises(ValueError, match=r"'a.heads:0' is not a unit of this network; the nearest are: a.head:0"):
        Uniform(0.3, protected=["a.heads:0"]).check(pool)


def test_uniform_is_for_language_models() -> None:
    depth = Pool([Unit("model.layers.0", "layer", 10, 10), Unit("model.layers.1", "layer", 10, 10)], {"params": 30})
    unet = tiny_backbone("UNet2DModel")
    channels = Pool(unet.units("channel"), {"params": unet.params()}, cost=unet.cost)
    for pool in (depth, channels):
        with pytest.raises(ValueError, match="choose threshold for channels of other networks, knapsack for blocks"):
            Uniform(0.3).check(pool)
    with pytest.raises(ValueError, match="selection=uniform for a language model"):
        Knapsack(0.3).check(fake_pool())


@each_network
def test_a_uniform_plan_meets_the_budget_on_the_built_student(name: str) -> None:
    backbone = make(name, block=1)
    pool, criterion = pool_of(backbone), Random(0, level="channel")
    criterion.start(backbone, backbone.units("channel"), 0)
    scores = {unit: entry["score"] for unit, entry in criterion.finish().items()}
    for budget in ("params", "macs"):
        student = backbone.pruned(Uniform(0.2, 0.03, budget).changes(pool, scores))
        one, all_of_it = (
            (student.params(), backbone.params())
            if budget == "params"
            else (student.macs().linear, backbone.macs().linear)
        )
        assert 0.2 <= 1 - one / all_of_it <= 0.23


# Criteria


class ByHand:
    """One layer, y = Wx of two inputs, each a unit; a sample is two tokens."""

    weight = torch.tensor([[1.0, -2.0], [3.0, 0.5]])

    def units(self, level: str) -> list[Unit]:
        return [Unit("a:0", "channel", 2, 2), Unit("a:1", "channel", 2, 2)]

    def weights(self) -> dict[str, torch.Tensor]:
        return {"last.weight": self.weight}

    def consumers(self, name: str) -> dict[str, torch.Tensor]:
        return {"last": torch.tensor([int(name[-1])])}

    @contextlib.contextmanager
    def listening(self, listeners):
        self.heard = listeners
        yield

    def calibration_inputs(self, batch, seed):
        return {"sample": batch["tokens"], "x": torch.tensor([[[1.0, 2.0], [3.0, -2.0]]])}

    def predict(self, inputs):
        for tell in self.heard.values():
            tell(inputs["x"])


@pytest.mark.parametrize(
    ("criterion", "first", "second"),
    # |1| + |3| times the norm of (1, 3), |-2| + |0.5| times that of (2, -2); the variance of (1, 3) is 2, that of
    # (2, -2) is 8, and the squared norms of the columns are 10 and 4.25.
    [(Wanda(), 4 * math.sqrt(10), 2.5 * math.sqrt(8)), (Flap(), 2 * 10, 8 * 4.25)],
    ids=["wanda", "flap"],
)
def test_scores_equal_values_computed_by_hand(criterion: Criterion, first: float, second: float) -> None:
    backbone: Any = ByHand()
    criterion.start(backbone, backbone.units("channel"), 0)
    criterion.update({"tokens": torch.zeros(1, 2)})
    scores = [entry["score"] for entry in criterion.finish().values()]
    np.testing.assert_allclose(scores, [first, second], rtol=1e-12)


def scored(criterion: Criterion, backbone: LanguageBackbone, pieces: list[tuple[int, int]]) -> np.ndarray:
    criterion.start(backbone, backbone.units("channel"), 0)
    whole = tiny_tokens()
    for first, last in pieces:
        with torch.no_grad():
            criterion.update(part(whole, first, last))
    assert list(criterion.finish()) == [unit.name for unit in backbone.units("channel")]
    return np.array([entry["score"] for entry in criterion.finish().values()])


def test_wanda_and_flap_use_the_inputs_of_the_last_layers() -> None:
    """Recomputed for one head and one block from inputs recorded in one pass, with torch's own variance."""
    backbone, seen = make("tied"), {}
    paths = {"self_attn": "model.layers.1.self_attn.o_proj", "mlp": "model.layers.1.mlp.down_proj"}
    for path in paths.values():
        backbone.network.get_submodule(path).register_forward_hook(
            lambda module, args, output, path=path: seen.update({path: args[0].flatten(0, 1)})
        )
    logits(backbone)
    names = [unit.name for unit in backbone.units("channel")]
    for criterion in (Wanda(), Flap()):
        scores = dict(zip(names, scored(criterion, backbone, [(0, 4)]), strict=True))
        for unit, columns in (("self_attn:1", slice(8, 16)), ("mlp:2", slice(8, 12))):
            path = paths[unit.partition(":")[0]]
            x, weight = seen[path][:, columns], backbone.weights()[f"{path}.weight"][:, columns].detach()
            by_hand = (weight.abs() * x.norm(dim=0)) if isinstance(criterion, Wanda) else x.var(0) * weight.square()
            np.testing.assert_allclose(scores[f"model.layers.1.{unit}"], float(by_hand.sum()), rtol=1e-10)


@pytest.mark.parametrize("criterion", [Wanda(), Flap()], ids=["wanda", "flap"])
def test_sums_over_batches_and_ranks_equal_the_whole(criterion: Criterion) -> None:
    backbone = make("tied")
    whole = scored(criterion, backbone, [(0, 4)])
    assert np.isfinite(whole).all() and len(set(whole)) == len(whole)
    for pieces in ([(0, 2), (2, 4)], [(3, 4), (0, 1), (1, 3)]):
        np.testing.assert_allclose(scored(criterion, backbone, pieces), whole, rtol=1e-10)
    scored(criterion, backbone, [(0, 3)])
    first = criterion.states
    scored(criterion, backbone, [(3, 4)])
    criterion.states = {key: value + first[key] for key, value in criterion.states.items()}
    ranks = [entry["score"] for entry in criterion.finish().values()]
    np.testing.assert_allclose(ranks, whole, rtol=1e-10)


@pytest.mark.parametrize("fails", [False, True])
def test_scoring_leaves_the_network_unchanged(fails: bool) -> None:
    backbone, criterion = make("biases"), Wanda()
    before = copy.deepcopy(backbone.network.state_dict())
    criterion.start(backbone, backbone.units("channel"), 0)
    batch = tiny_tokens()
    if fails:
        batch["tokens"] = batch["tokens"] + VOCABULARY
    with torch.no_grad(), pytest.raises(IndexError) if fails else contextlib.nullcontext():
        criterion.update(batch)
    assert same_tensors(backbone.network.state_dict(), before)
    assert not any(module._forward_pre_hooks for module in backbone.network.modules())


def test_criteria_of_inputs_refuse_other_networks_with_a_reason() -> None:
    for criterion in (Wanda(), Flap()):
        assert criterion.supports(make("tied")) is None
        for family in ("UNet2DModel", "dit"):
            assert "heads and channels of language models" in str(criterion.supports(tiny_backbone(family)))


def test_magnitudes_of_units_are_what_the_student_lacks() -> None:
    backbone, criterion = make("biases"), Magnitude(level="channel")
    criterion.start(backbone, backbone.units("channel"), 0)
    scores, names = criterion.finish(), removal(backbone, 1, 3)

    def total(of: LanguageBackbone) -> float:
        return sum(float(weight.detach().abs().sum()) for weight in of.weights().values())

    lacks = total(backbone) - total(sliced(backbone, names))
    np.testing.assert_allclose(sum(scores[name]["score"] for name in names), lacks, rtol=1e-9)


def test_taylor_scores_a_head_by_its_own_rows_and_columns() -> None:
    backbone, criterion = make("tied"), Taylor(level="channel")
    scores = scored(criterion, backbone, [(0, 2), (2, 4)])
    inputs = backbone.calibration_inputs(tiny_tokens(), 0)
    backbone.loss(inputs).backward()
    attention = backbone.network.model.layers[0].self_attn
    expected = sum(
        float((getattr(attention, name).weight * getattr(attention, name).weight.grad)[rows].detach().abs().sum())
        for name, rows in {"q_proj": slice(0, 8), "k_proj": slice(0, 4), "v_proj": slice(0, 4)}.items()
    )
    expected += float((attention.o_proj.weight * attention.o_proj.weight.grad)[:, :8].detach().abs().sum())
    np.testing.assert_allclose(scores[0], expected, rtol=1e-4)  # sums in float32
