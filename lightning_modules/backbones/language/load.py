"""Language models from folders and hub ids of transformers, GGUF files, and checkpoints of llama2.c."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from datamodules.texts.tokenizers import has_tokenizer, load_tokenizer
from lightning_modules.backbones.files import check_weights, find_model, find_network_folder
from lightning_modules.backbones.language.backbone import LanguageBackbone
from lightning_modules.backbones.language.gguf import read_gguf
from lightning_modules.backbones.loading import load_network

log = logging.getLogger(__name__)

HEADER = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
"""The seven int32 that a checkpoint of llama2.c begins with, as llama2.c calls them."""
ROTATED = ("self_attn.q_proj", "self_attn.k_proj")
"""the weights whose output is turned by rotary embeddings"""


def load_language_model(path: str, tokenizer: str | None = None, length: int = 128, block: int = 8) -> LanguageBackbone:
    """A decoder-only language model with its tokenizer, float32 and in eval mode.

    `path` is a folder or a hub id of transformers, a .gguf file, or a checkpoint of llama2.c (.bin); files are looked
    up in $SECATEUR_DATA, too. `tokenizer` is a folder, a hub id, a .gguf or a SentencePiece .model file; None is the
    one beside the weights, if there is one. `length` is the number of tokens of a sample when costs are counted,
    `block` the most channels of a unit of width. Raises MissingData for what is not to be had, and ValueError for files
    that cannot be read, for other architectures, and for networks that are no stock ones any more without a layer.
    """
    place = find_model(path)
    network = read_network(place)
    backbone = LanguageBackbone(network, length=length, block=block)
    if not 2 <= length <= backbone.longest:
        raise ValueError(f"teacher.length={length} is out of range; choose 2 to {backbone.longest} tokens")
    check_shorter(backbone, path)
    if tokenizer is None and (place.suffix == ".gguf" or has_tokenizer(place)):
        tokenizer = str(place)
    if tokenizer is None:
        log.warning("teacher.path=%s has no tokenizer beside it: it reads and writes token ids only", path)
        return backbone
    words = load_tokenizer(tokenizer)
    kinds = max(words.get_vocab().values()) + 1
    if kinds > network.config.vocab_size:
        raise ValueError(
            f"teacher.tokenizer={tokenizer!r} has {kinds} tokens, and the network in {place} knows "
            f"{network.config.vocab_size}; choose the one it was trained with"
        )
    backbone.tokenizer = words
    return backbone


def check_shorter(backbone: LanguageBackbone, path: str) -> None:
    """Raise ValueError where the stock class does not build what stays when a layer is removed."""
    meta = LanguageBackbone(backbone.meta_network())
    for name in (next(iter(meta.layers())), list(meta.layers())[-1]):
        if len(meta.layers()) == 1:
            return
        student = meta.pruned([{"unit": name, "kind": "bypass"}])
        shapes = {key: tensor.shape for key, tensor in student.network.state_dict().items()}
        stock = {key: tensor.shape for key, tensor in student.meta_network().state_dict().items()}
        if stock != shapes:
            key = min(stock.items() ^ shapes.items())[0]
            raise ValueError(
                f"teacher.path={path}: a {type(backbone.network).__name__} without {name} is no stock network: its "
                f"layers are of several kinds by their places ({key})"
            )


def read_network(place: Path) -> Any:
    """The language model in a folder or file."""
    if place.is_dir():
        folder = find_network_folder(place)
        check_layers(outline(folder), folder)
        return load_network(folder)
    if place.suffix not in READERS:
        raise ValueError(f"{place} is no language model: choose a folder or one of: {', '.join(READERS)}")
    network, info = READERS[place.suffix](place)
    check_layers(network, place)
    check_weights(network, info, place)
    network.config.name_or_path = ""  # where it lay here is nobody's business in an export
    return network.eval()


def outline(folder: Path) -> nn.Module:
    """The network that a folder's config.json describes, on the meta device: its modules without weights."""
    try:
        content = json.loads((folder / "config.json").read_text())
        if "model_type" not in content:
            raise ValueError(f"it describes a {content.get('_class_name', 'network that is not named')}")
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("its weights are quantized; choose those that were not")
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{folder}/config.json is not that of a causal language model: {error}") from error


def check_layers(network: Any, place: Path) -> None:
    """Raise ValueError for an architecture without one list of as many decoder layers as its configuration says."""
    layers = getattr(getattr(network, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != getattr(network.config, "num_hidden_layers", None):
        raise ValueError(
            f"{place} is a {type(network).__name__}: choose a decoder-only language model whose layers are all in "
            "`model.layers`, such as Llama, Mistral or Qwen"
        )


def read_llama2c(file: Path) -> tuple[Any, dict[str, Any]]:
    """The network in a checkpoint of llama2.c (its version 0), and that all its weights are there.

    A header of seven int32, then float32 tensors of all layers at once, then the tables of rotary embeddings, which
    nobody needs. A negative vocabulary means that the classifier is no copy of the embedding; it is the last tensor.
    """
    header = np.fromfile(file, "<i4", len(HEADER)).tolist()
    said = dict(zip(HEADER, header, strict=False))
    dim, hidden, layers, heads, shared, vocabulary, longest = (*header, *[0] * 7)[:7]
    if min(dim, hidden, layers, heads, shared, longest, abs(vocabulary)) < 1 or dim % (2 * heads) or heads % shared:
        raise ValueError(f"{file} is no checkpoint of llama2.c (version 0): its header would say {said}")
    size, tied, count = dim // heads, vocabulary > 0, abs(vocabulary)
    inside = {
        "input_layernorm": (dim,),
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (size * shared, dim),
        "self_attn.v_proj": (size * shared, dim),
        "self_attn.o_proj": (dim, dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
        "mlp.up_proj": (hidden, dim),
    }
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (count, dim)}
    shapes |= {name: (layers, *shape) for name, shape in inside.items()}
    shapes |= {"norm": (dim,), "rotary": (2, longest, size // 2)} | ({} if tied else {"lm_head": (count, dim)})
    wanted = 4 * (len(HEADER) + sum(map(math.prod, shapes.values())))
    if file.stat().st_size != wanted:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes where its header {said} makes {wanted:,}: damaged?")
    values = torch.from_numpy(np.fromfile(file, "<f4", offset=4 * len(HEADER)))
    parts = values.split([math.prod(shape) for shape in shapes.values()])
    tensors = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    for name in ROTATED:
        tensors[name] = torch.stack([halved(weight, size) for weight in tensors[name]])
    state = {f"model.{name}.weight": tensors[name] for name in ("embed_tokens", "norm")}
    state |= {f"model.layers.{i}.{name}.weight": part for name in inside for i, part in enumerate(tensors[name])}
    state["lm_head.weight"] = tensors["embed_tokens" if tied else "lm_head"]
    config = LlamaConfig(
        vocab_size=count,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        max_position_embeddings=longest,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):  # weights are drawn, to be replaced
        network = LlamaForCausalLM(config)
    missing, unexpected = network.load_state_dict(state)
    return network, {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": []}


def halved(weight: Tensor, size: int) -> Tensor:
    """The rows of each head of `size`, given in pairs that are rotated together: the first of each, then the second."""
    return weight.view(-1, size // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


READERS = {".gguf": read_gguf, ".bin": read_llama2c}
