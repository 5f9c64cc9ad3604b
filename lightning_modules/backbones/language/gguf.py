"""Language models from GGUF files, with the parts of a file that the reader of transformers passes over.

The layout of a file is in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import copy
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GgufConfig

from datamodules.texts.tokenizers import needs_gguf

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Format characters of `struct` by the number of a type of values."""
STRING, ARRAY = 8, 9
"""Numbers of the other types of values."""

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor by which llama.cpp divides the frequencies of rotary embeddings."""

LLAMA3_CONTEXTS = tuple(2**exponent for exponent in range(5, 21))
"""Context lengths of training among which the one of a file is looked for, since the file does not say it."""


def read_gguf(file: Path) -> tuple[Any, dict[str, Any]]:
    """Return the network in a GGUF file, its weights unpacked from their blocks, and what its loader says of them.

    Raises ValueError for a file that cannot be read, and for one whose scaling of rotary embeddings or whose further
    weights the network does not have.
    """
    needs_gguf(file)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # the reader raises almost anything for damaged files
        raise ValueError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    network, info = loaded
    fields, sizes, rope_factors = read_header(file)
    set_rope_scaling(network, fields, rope_factors, file)
    stored, used = sum(sizes.values()), count_weights(network)
    if stored > used:
        raise ValueError(
            f"{file} holds {stored:,} weights, and a {type(network).__name__} as transformers reads it has {used:,}: "
            "some, such as biases, would be left out. Choose the folder of the same model"
        )
    return network, info


def count_weights(network: nn.Module) -> int:
    """Return the number of values that a network saves, each of a shared weight once."""
    saved = network.state_dict().keys()
    buffers = (buffer for name, buffer in network.named_buffers() if name in saved)
    return sum(tensor.numel() for tensor in (*network.parameters(), *buffers))


def set_rope_scaling(network: Any, fields: dict[str, Any], factors: Tensor | None, file: Path) -> None:
    """Scale the rotary embeddings of a network as its GGUF file says; raises ValueError for a scaling it cannot have.

    Nothing is done where transformers has read a scaling by itself.

    Args:
        network: the network as transformers has read it.
        fields: the fields of the file.
        factors: the tensor ROPE_FACTORS of the file, by which each frequency is divided.
        file: the file.
    """
    parameters = getattr(network.config, "rope_parameters", None) or {}
    # Networks whose attentions are of two kinds have parameters per kind.
    per_kind = [part for part in parameters.values() if isinstance(part, dict)]
    if any(part.get("rope_type", "default") != "default" for part in per_kind or [parameters]):
        return
    scaling = fields.get(f"{fields['general.architecture']}.rope.scaling.type", "none")
    factors = None if factors is None or bool((factors == 1).all()) else factors
    if scaling == "none" and factors is None:
        return
    if factors is not None and scaling == "none" and not per_kind and (config := scaled_like_llama3(network, factors)):
        network.config.rope_parameters = config.rope_parameters
        network.model.rotary_emb = type(network.model.rotary_emb)(config)
        return
    raise ValueError(
        f"{file} scales its rotary embeddings ({ROPE_FACTORS if scaling == 'none' else scaling}) in another way than "
        "Llama 3, which is not read; choose the folder of the same model"
    )


def scaled_like_llama3(network: Any, factors: Tensor) -> Any:
    """Return a configuration whose frequencies are the network's divided by these factors; None where there is none."""
    for context in LLAMA3_CONTEXTS:
        config = copy.deepcopy(network.config)
        config.rope_parameters = config.rope_parameters | {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,  # this and the next as in all models of Llama 3
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": context,
        }
        frequencies = type(network.model.rotary_emb)(config).inv_freq
        if torch.allclose(frequencies * factors, network.model.rotary_emb.inv_freq, rtol=1e-5, atol=0):
            return config
    return None


def read_header(file: Path) -> tuple[dict[str, Any], dict[str, int], Tensor | None]:
    """Return the fields of a GGUF file, the number of values per tensor, and ROPE_FACTORS where it is in the file.

    The sizes are without ROPE_FACTORS. The reader of the package gguf takes seconds for the words of a tokenizer.
    """
    with open(file, "rb") as stream:
        _, _, tensors, count = unpack(stream, "<IIQQ")
        fields = {read_string(stream): read_value(stream, unpack(stream, "<I")[0]) for _ in range(count)}
        sizes, rope_offset = {}, None
        for _ in range(tensors):
            name, (dimensions,) = read_string(stream), unpack(stream, "<I")
            *shape, _, offset = unpack(stream, f"<{dimensions}QIQ")
            sizes[name] = math.prod(shape)
            if name == ROPE_FACTORS:
                rope_offset = offset
        if rope_offset is None:
            return fields, sizes, None
        alignment = fields.get("general.alignment", 32)  # the default of the format
        start = -(-stream.tell() // alignment) * alignment + rope_offset
    values = np.fromfile(file, "<f4", sizes.pop(ROPE_FACTORS), offset=start)
    return fields, sizes, torch.from_numpy(values)


def unpack(stream: BinaryIO, layout: str) -> tuple[Any, ...]:
    """Return the next values of a stream, in a layout of `struct`."""
    return struct.unpack(layout, stream.read(struct.calcsize(layout)))


def read_string(stream: BinaryIO) -> str:
    (length,) = unpack(stream, "<Q")
    return stream.read(length).decode(errors="replace")


def read_value(stream: BinaryIO, kind: int) -> Any:
    """Return the next value of a stream, of a type by its number; the elements of an array as a list."""
    if kind == STRING:
        return read_string(stream)
    if kind == ARRAY:
        element, count = unpack(stream, "<IQ")
        if element in SCALARS:
            return list(unpack(stream, f"<{count}{SCALARS[element]}"))
        return [read_value(stream, element) for _ in range(count)]
    return unpack(stream, f"<{SCALARS[kind]}")[0]
