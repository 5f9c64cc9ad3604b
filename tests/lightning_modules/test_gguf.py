"""Language models from GGUF files: scaled rotary embeddings, and what is refused."""

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from support.language import tiny_llama, tiny_tokens
from transformers import LlamaForCausalLM

from datamodules.readers.base import MissingData
from datamodules.texts.tokenizers import load_tokenizer
from lightning_modules.backbones.files import list_weight_files
from lightning_modules.backbones.language.load import load_language_model, read_network


def test_a_gguf_file_that_is_damaged_is_named(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert list_weight_files(str(tmp_path / "tiny.gguf")) == [tmp_path / "tiny.gguf"]
    for read in (load_language_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"tiny\.gguf cannot be read"):
            read(str(tmp_path / "tiny.gguf"))


def test_the_package_for_gguf_files_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    for read in (load_language_model, load_tokenizer):
        with pytest.raises(MissingData, match=r"tiny\.gguf needs .*: pip install -e '\.\[language\]'"):
            read(str(tmp_path / "tiny.gguf"))


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def scaled() -> LlamaForCausalLM:
    """A network of one layer whose rotary embeddings of 8 frequencies are scaled as Llama 3's."""
    config = tiny_llama().config
    config.num_hidden_layers, config.head_dim, config.rope_parameters = 1, 16, LLAMA3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def write_gguf(
    network: LlamaForCausalLM, file: Path, factors: torch.Tensor, scaling: str = "", bias: bool = False
) -> Path:
    """Write a network of one layer as llama.cpp does, with the tensor that scales its rotary embeddings."""
    config, state = network.config, network.state_dict()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if scaling:
        writer.add_string("llama.rope.scaling.type", scaling)
    writer.add_tensor("rope_freqs.weight", factors.numpy())
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    for name, name_there in GGUF_NAMES.items():
        weight = state[f"model.layers.0.{name}.weight"]
        if name_there in ("attn_q", "attn_k"):  # rotated rows in pairs
            halves = weight.view(-1, 2, config.head_dim // 2, config.hidden_size)
            weight = halves.transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(f"blk.0.{name_there}.weight", weight.contiguous().numpy())
    if bias:
        writer.add_tensor("blk.0.attn_q.bias", np.ones(config.num_attention_heads * config.head_dim, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def rope_factors(network: LlamaForCausalLM) -> torch.Tensor:
    """The factors by which the unscaled frequencies are divided."""
    return 10000.0 ** (-torch.arange(0, 16, 2) / 16) / network.model.rotary_emb.inv_freq


@torch.no_grad()
def test_scaled_rotary_embeddings_of_a_gguf_file_are_those_of_the_folder(scaled, tmp_path):
    network = read_network(write_gguf(scaled, tmp_path / "scaled.gguf", rope_factors(scaled)))
    assert network.config.rope_parameters == LLAMA3
    tokens = tiny_tokens(1, 60)["tokens"]
    assert torch.equal(network(tokens).logits, scaled(tokens).logits)
    unscaled = read_network(write_gguf(scaled, tmp_path / "unscaled.gguf", torch.ones(8)))
    assert unscaled.config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"factors": torch.arange(1.0, 9.0)},
            r"file\.gguf scales its rotary embeddings \(rope_freqs\.weight\) in another",
        ),
        ({"scaling": "yarn"}, r"file\.gguf scales its rotary embeddings \(yarn\) in another way than Llama 3"),
        ({"bias": True}, r"file\.gguf holds 5,360 weights, and a LlamaForCausalLM as transformers reads it has 5,296"),
    ],
)
def test_parts_of_a_gguf_file_that_would_be_left_out_are_refused(scaled, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_network(write_gguf(scaled, tmp_path / "file.gguf", **{"factors": torch.ones(8)} | options))
