"""Tiny language models with random weights, and tokens and tokenizers for them."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 64
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ \n.,:?!"


def tiny_llama(layers: int = 4, tie: bool = True) -> LlamaForCausalLM:
    """Return a Llama with four query heads and two key-value heads per layer, in eval mode, the same in every call."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        initializer_range=0.2,  # large, so that a layer has an effect in so few channels
        tie_word_embeddings=tie,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = LlamaForCausalLM(config)
        for name, parameter in network.named_parameters():
            if "norm" in name:  # the usual ones would hide a norm that is left out
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return network.eval()


def tiny_language(layers: int = 4) -> Any:
    """Return a backbone around `tiny_llama`, without a tokenizer."""
    from lightning_modules.backbones.language.backbone import LanguageBackbone

    return LanguageBackbone(tiny_llama(layers), length=12)


def tiny_tokens(count: int = 4, length: int = 12) -> dict[str, Any]:
    """Return a batch of `count` blocks of random tokens, with the keys of a batch of Corpus.subset."""
    rng = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (count, length), generator=rng)
    number = torch.arange(count)
    return {"tokens": tokens, "number": number, "of": torch.full((count,), count), "index": number}


def letters(bos: str | None = "<s>") -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character."""
    vocabulary = {piece: i for i, piece in enumerate(["<s>", "</s>", "<unk>", *LETTERS])}
    assert len(vocabulary) <= VOCABULARY
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    model.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token=bos, eos_token="</s>", unk_token="<unk>")
