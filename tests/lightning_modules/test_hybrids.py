"""Language models whose layers are of several kinds: what has to stay, and what a plan removes from the rest."""

import functools
from typing import Any

import pytest
import torch
from support.language import VOCABULARY, tiny_tokens
from support.networks import bypasses
from transformers import AutoModelForCausalLM, Gemma4ForCausalLM, Gemma4TextConfig, Lfm2Config, Lfm2ForCausalLM

from lightning_modules.backbones.language.backbone import LanguageBackbone, generate_greedily
from lightning_modules.backbones.language.load import check_shorter

TOKENS = tiny_tokens()["tokens"]
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


@functools.cache
def hybrid(name: str, **options: Any) -> LanguageBackbone:
    """A network of six layers: of lfm2 every second one is a convolution, of gemma4 it has a sliding window."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "lfm2":
            kinds = ["conv", "full_attention"] * 3
            lfm2 = Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=kinds, block_auto_adjust_ff_dim=False))
            return LanguageBackbone(lfm2.eval(), length=12)
        kinds = ["sliding_attention", "full_attention"] * 3
        heads = {"head_dim": 4, "global_head_dim": 8, "sliding_window": 3}
        config = Gemma4TextConfig(**SIZES, **heads, layer_types=kinds, **{"hidden_size_per_layer_input": 0} | options)
        return LanguageBackbone(Gemma4ForCausalLM(config).eval(), length=12)


@pytest.mark.parametrize(("name", "required"), [("lfm2", 1), ("gemma4", 5)])
@torch.no_grad()
def test_a_plan_of_all_units_leaves_a_stock_network_that_generates(name, required, tmp_path):
    backbone = hybrid(name)
    check_shorter(backbone, name)
    units = [unit.name for unit in backbone.units()]
    assert units == [f"model.layers.{i}" for i in range(6) if i != required]
    student = backbone.pruned(bypasses(units))
    with backbone.without(units):
        expected = backbone.predict({"sample": TOKENS})
    assert torch.equal(student.predict({"sample": TOKENS}), expected)
    student.save(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(stock(TOKENS).logits, expected)
    assert torch.equal(generate_greedily(stock, TOKENS, 4), generate_greedily(student.network, TOKENS, 4))


@torch.no_grad()
def test_settings_of_single_layers_go_with_their_layers(tmp_path):
    backbone = hybrid("gemma4")
    student = backbone.pruned(bypasses(["model.layers.0", "model.layers.3"]))
    assert student.network.config.to_dict()["per_layer_config"] == {"0": {"head_dim": 8}, "3": {"head_dim": 8}}
    student.save(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(stock(TOKENS).logits, student.predict({"sample": TOKENS}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 64},
            r"embed_tokens_per_layer\.weight has ano",
        ),
        ({"num_kv_shared_layers": 2}, r"teacher\.path=/g: a Gemma4ForCausalLM (cannot lose|without) model\.layers\.\d"),
    ],
)
def test_a_network_that_cannot_be_shortened_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_shorter(hybrid("gemma4", **options), "/g")
