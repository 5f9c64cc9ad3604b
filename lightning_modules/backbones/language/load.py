"""Loading language models: folders and hub ids of transformers, GGUF files, and checkpoints of llama2.c."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from datamodules.texts.tokenizers import has_tokenizer, load_tokenizer
from lightning_modules.backbones.files import check_weights, find_model, find_network_folder
from lightning_modules.backbones.language.backbone import DEFAULT_BLOCK, DEFAULT_LENGTH, LanguageBackbone
from lightning_modules.backbones.language.gguf import read_gguf
from lightning_modules.backbones.loading import load_network

log = logging.getLogger(__name__)

HEADER = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
"""Names of the seven int32 at the beginning of a checkpoint of llama2.c, as in llama2.c."""
ROTATED = ("self_attn.q_proj", "self_attn.k_proj")
"""Weights whose outputs are rotated by rotary embeddings."""


def load_language_model(
    path: str, tokenizer: str | None = None, length: int = DEFAULT_LENGTH, block: int = DEFAULT_BLOCK
) -> LanguageBackbone:
    """Return a decoder-only language model with its tokenizer, in float32 and eval mode.

    Raises MissingData for files that do not exist, and ValueError for files that cannot be read, for other
    architectures, and for networks that are not of their stock class any more when a layer is removed.

    Args:
        path: a folder or a hub id of transformers, a .gguf file, or a checkpoint of llama2.c (.bin); files are looked
            up in $SECATEUR_DATA, too.
        tokenizer: a folder, a hub id, a .gguf or a SentencePiece .model file; None is the one beside the weights, if
            there is one.
        length: number of tokens of a sample when costs are counted.
        block: greatest number of channels per unit of width.
    """
    location = find_model(path)
    network = read_network(location)
    backbone = LanguageBackbone(network, length=length, block=block)
    if not 2 <= length <= backbone.longest:
        raise ValueError(f"teacher.length={length} is out of range; choose 2 to {backbone.longest} tokens")
    check_shorter(backbone, path)
    if tokenizer is None and (location.suffix == ".gguf" or has_tokenizer(location)):
        tokenizer = str(location)
    if tokenizer is None:
        log.warning("teacher.path=%s has no tokenizer beside it: it reads and writes token ids only", path)
        return backbone
    loaded = load_tokenizer(tokenizer)
    vocabulary = max(loaded.get_vocab().values()) + 1
    if vocabulary > network.config.vocab_size:
        raise ValueError(
            f"teacher.tokenizer={tokenizer!r} has {vocabulary} tokens, and the network in {location} has "
            f"{network.config.vocab_size}; choose the tokenizer that it was trained with"
        )
    backbone.tokenizer = loaded
    return backbone


def check_shorter(backbone: LanguageBackbone, path: str) -> None:
    """Raise ValueError where the stock class does not build the network that is left when a layer is removed."""
    meta = LanguageBackbone(backbone.meta_network())
    if len(meta.layers()) == 1:
        return
    removable = [name for name in meta.layers() if name not in meta.required_layers]
    for name in dict.fromkeys([*removable[:1], *removable[-1:]]):
        try:
            student = meta.pruned([{"unit": name, "kind": "bypass"}])
        except Exception as error:  # networks of other kinds fail in many ways
            raise ValueError(
                f"teacher.path={path}: a {type(backbone.network).__name__} cannot lose {name}: {error}"
            ) from error
        shapes = {key: tensor.shape for key, tensor in student.network.state_dict().items()}
        stock = {key: tensor.shape for key, tensor in student.meta_network().state_dict().items()}
        if stock != shapes:
            key = min(stock.items() ^ shapes.items())[0]
            raise ValueError(
                f"teacher.path={path}: a {type(backbone.network).__name__} without {name} is no stock network: there, "
                f"{key} has another shape, since it depends on the number of layers or on a layer's place"
            )


def read_network(path: Path) -> Any:
    """Return the language model in a folder or file, of a class of transformers, in eval mode.

    Raises ValueError for a file of another kind and for what cannot be read.
    """
    if path.is_dir():
        folder = find_network_folder(path)
        check_layers(build_meta_network(folder), folder)
        return load_network(folder)
    if path.suffix not in READERS:
        raise ValueError(f"{path} is no language model: choose a folder or one of: {', '.join(READERS)}")
    network, info = READERS[path.suffix](path)
    check_layers(network, path)
    check_weights(network, info, path)
    network.config.name_or_path = ""  # an export must not contain paths of this machine
    return network.eval()


def build_meta_network(folder: Path) -> nn.Module:
    """Return the network that a folder's config.json describes, on the meta device, without weights.

    Raises ValueError where it describes no causal language model, or one with quantized weights.
    """
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


def check_layers(network: Any, path: Path) -> None:
    """Raise ValueError for an architecture whose decoder layers are not all in the list `model.layers`."""
    layers = getattr(getattr(network, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != getattr(network.config, "num_hidden_layers", None):
        raise ValueError(
            f"{path} is a {type(network).__name__}: choose a decoder-only language model whose layers are all in "
            "`model.layers`, such as Llama, Mistral or Qwen"
        )


def read_llama2c(file: Path) -> tuple[Any, dict[str, Any]]:
    """Return the network in a checkpoint of llama2.c (its version 0), and the lists of keys of a loader.

    A checkpoint is a header of seven int32, float32 tensors of all layers together, and tables of rotary embeddings,
    which are not needed. A negative vocabulary means that the classifier has weights of its own, the last tensor.
    Raises ValueError for another kind of file and for one of another size than its header says.
    """
    header = np.fromfile(file, "<i4", len(HEADER)).tolist()
    fields = dict(zip(HEADER, header, strict=False))
    dim, hidden, layers, heads, kv_heads, vocabulary, longest = (*header, *[0] * 7)[:7]
    if min(dim, hidden, layers, heads, kv_heads, longest, abs(vocabulary)) < 1 or dim % (2 * heads) or heads % kv_heads:
        raise ValueError(f"{file} is no checkpoint of llama2.c (version 0): its header would be {fields}")
    size, tied, count = dim // heads, vocabulary > 0, abs(vocabulary)
    layer_shapes = {
        "input_layernorm": (dim,),
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (size * kv_heads, dim),
        "self_attn.v_proj": (size * kv_heads, dim),
        "self_attn.o_proj": (dim, dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
        "mlp.up_proj": (hidden, dim),
    }
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (count, dim)}
    shapes |= {name: (layers, *shape) for name, shape in layer_shapes.items()}
    shapes |= {"norm": (dim,), "rotary": (2, longest, size // 2)} | ({} if tied else {"lm_head": (count, dim)})
    expected, size_of_file = 4 * (len(HEADER) + sum(map(math.prod, shapes.values()))), file.stat().st_size
    if size_of_file != expected:
        raise ValueError(f"{file} has {size_of_file:,} bytes, and its header {fields} needs {expected:,}: damaged?")
    values = torch.from_numpy(np.fromfile(file, "<f4", offset=4 * len(HEADER)))
    parts = values.split([math.prod(shape) for shape in shapes.values()])
    tensors = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    for name in ROTATED:
        tensors[name] = torch.stack([unpair_rows(weight, size) for weight in tensors[name]])
    state = {f"model.{name}.weight": tensors[name] for name in ("embed_tokens", "norm")}
    state |= {f"model.layers.{i}.{name}.weight": part for name in layer_shapes for i, part in enumerate(tensors[name])}
    state["lm_head.weight"] = tensors["embed_tokens" if tied else "lm_head"]
    config = LlamaConfig(
        vocab_size=count,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=longest,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    with no_init_weights():
        network = LlamaForCausalLM(config)
    network.tie_weights()  # without random weights, transformers does not do it
    missing, unexpected = network.load_state_dict(state)
    return network, {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": []}


def unpair_rows(weight: Tensor, size: int) -> Tensor:
    """Return a weight with the rows of each head reordered from pairs to halves.

    Rows 2i and 2i+1 of a head of `size` rows, which are rotated together, become rows i and i + size/2.
    """
    return weight.view(-1, size // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


READERS = {".gguf": read_gguf, ".bin": read_llama2c}
"""Functions that read a file, by its ending."""
