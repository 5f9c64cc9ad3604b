"""The published sizes of language models and of what Shortened LLaMA leaves of them, on the meta device."""

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from conf.schema import ROOT
from lightning_modules.backbones.language.backbone import LanguageBackbone

LLAMA_7B = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
LLAMA_13B = LlamaConfig(
    vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
)
LLAMA3_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8
)
QWEN = Qwen2Config(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
STORIES = LlamaConfig(
    vocab_size=32000,
    hidden_size=288,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=6,
    tie_word_embeddings=True,
)
PUBLISHED = {
    "llama_7b": (LLAMA_7B, 6_738_415_616),
    "llama2_7b": (LLAMA_7B, 6_738_415_616),
    "vicuna_7b": (LLAMA_7B, 6_738_415_616),
    "vicuna_13b": (LLAMA_13B, 13_015_864_320),
    "llama3_8b": (LLAMA3_8B, 8_030_261_248),
    "qwen": (QWEN, 494_032_768),
    "smollm2_135m": (SMOLLM2, 134_515_008),
    "stories15m": (STORIES, 15_191_712),
}
"""What the configuration of each teacher says, and its parameters."""

SHORTENED = {
    (7, 202_383_360): {
        6: 5_524_115_456,
        9: 4_916_965_376,
        11: 4_512_198_656,
        12: 4_309_815_296,
        15: 3_702_665_216,
        20: 2_690_748_416,
        26: 1_476_448_256,
    },
    (13, 317_204_480): {8: 10_478_228_480},
}
"""{(billions of parameters, parameters of a block): {blocks removed: parameters left}} (arXiv 2402.02834)."""


def outline(config: LlamaConfig | Qwen2Config) -> LanguageBackbone:
    with torch.device("meta"):
        return LanguageBackbone(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("teacher", PUBLISHED)
def test_a_teacher_has_the_published_number_of_parameters(teacher):
    config, parameters = PUBLISHED[teacher]
    assert outline(config).params() == parameters
    file = ROOT / "conf" / "teacher" / f"{teacher}.yaml"
    header, cfg = file.read_text().replace("\n# ", " "), OmegaConf.load(file)
    assert f"{parameters:,} parameters" in header and f"{config.num_hidden_layers} decoder layers" in header
    assert (
        cfg.name == teacher
        and cfg._target_ == "lightning_modules.backbones.language.load.load_language_model"
        and cfg.license
    )
    if "/" in cfg.path:
        assert f"# hf download {cfg.path}\n" in file.read_text() and cfg.tokenizer == cfg.path


@pytest.mark.parametrize(("size", "block"), SHORTENED)
def test_removing_blocks_leaves_the_published_number_of_parameters(size, block):
    teacher = outline({7: LLAMA_7B, 13: LLAMA_13B}[size])
    units = teacher.units()
    assert {unit.params for unit in units} == {block} and {unit.kind for unit in units} == {"layer"}
    for count, left in SHORTENED[size, block].items():
        gone = [{"unit": unit.name, "kind": "bypass"} for unit in units[3 : 3 + count]]
        student = teacher.pruned(gone)
        assert student.params() == teacher.params() - count * block == left
        assert student.network.config.num_hidden_layers == len(units) - count
