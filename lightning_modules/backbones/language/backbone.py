"""Decoder-only language models of transformers as backbones, such as Llama, Qwen and Mistral.

Units of depth are whole decoder layers, and a student is a network of the same class with fewer layers, which are
renumbered (Shortened LLaMA, arXiv 2402.02834).

Shapes: N samples, L tokens, V tokens of the vocabulary.
"""

import copy
import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from criteria.base import Batch, Level, Unit, parse_level
from criteria.selection.base import check_names
from lightning_modules.backbones.base import Change, NetworkBackbone
from lightning_modules.backbones.diffusion.pruned_unet import put_modules
from lightning_modules.backbones.language.width import DecoderChannels, listening
from lightning_modules.backbones.repair.sites import Site, find_layer_sites, find_width_sites, sort_sites

LAYERS = "model.layers"
"""Module path of the list of decoder layers."""

DEFAULT_LENGTH = 128
"""Tokens of a sample when costs are counted; the length of calibration samples in Shortened LLaMA."""
DEFAULT_BLOCK = 8
"""Greatest number of channels per unit of width; tensor cores compute with multiples of eight."""

NO_TARGET = -100
"""Stands for a token that is not to be predicted, as in PyTorch's cross entropy."""


class Skip(nn.Module):
    """Stands in for a removed decoder layer: returns the hidden states that go into it."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class LanguageBackbone(NetworkBackbone):
    """A causal language model whose decoder layers are in `model.layers`.

    Args:
        network: the network, of a class of transformers.
        tokenizer: its tokenizer, of transformers; None where there is none.
        options: `length`, the number of tokens of a sample when costs are counted and times are measured, and `block`,
            the greatest number of channels per unit of width. The defaults are DEFAULT_LENGTH and DEFAULT_BLOCK.
    """

    library = "transformers"
    has_onnx = False
    writes_text = True
    width_changes_stages = False

    def __init__(self, network: nn.Module, tokenizer: Any = None, **options: Any) -> None:
        super().__init__(network, **options)
        self.tokenizer = tokenizer

    def twin(self, network: nn.Module) -> Self:
        return type(self)(network, self.tokenizer, **self.options)

    @property
    def length(self) -> int:
        """Number of tokens of a sample when costs are counted and times are measured."""
        length: int = self.options.get("length", DEFAULT_LENGTH)
        return length

    @property
    def longest(self) -> int:
        """The greatest number of tokens that the network was made for; sys.maxsize where that is unknown."""
        longest: int = getattr(self.network.config, "max_position_embeddings", sys.maxsize)
        return longest

    # Units and their removal

    def layers(self) -> dict[str, nn.Module]:
        """Return every decoder layer, or its stand-in, by module path, in the order of the forward pass."""
        return {f"{LAYERS}.{i}": layer for i, layer in enumerate(self.network.get_submodule(LAYERS))}

    @functools.cached_property
    def required_layers(self) -> set[str]:
        """Module paths of the layers that no plan removes; see find_required_layers."""
        return {f"{LAYERS}.{index}" for index in find_required_layers(self.network.config)}

    def units(self, level: str = "depth") -> list[Unit]:
        """Return the units of a level, in the order of the forward pass; raises ValueError for operators.

        Units of depth are the decoder layers without those that have to stay. Units of channels are heads and blocks
        of channels.
        """
        if parse_level(level) == Level.CHANNEL:
            return self.channels.units()
        if level != Level.DEPTH:
            raise ValueError(
                f"criterion.level={level!r}: of a {type(self.network).__name__} choose criterion.level=depth or channel"
            )
        macs = self.macs()
        return [
            Unit(name, "layer", sum(p.numel() for p in layer.parameters()), macs.of(name))
            for name, layer in self.layers().items()
            if not isinstance(layer, Skip) and name not in self.required_layers
        ]

    @functools.cached_property
    def channels(self) -> DecoderChannels:
        """The units of width: heads and blocks of channels."""
        return DecoderChannels(self.network, self.meta_network(), self.length, self.options.get("block", DEFAULT_BLOCK))

    def consumers(self, name: str) -> dict[str, Tensor]:
        """Return {layer: indices of its inputs that are the channels of a unit}."""
        return self.channels.consumers(name)

    def listening(self, listeners: Mapping[str, Callable[[Tensor], None]]) -> AbstractContextManager[None]:
        """Pass the inputs of some layers to functions while the context lasts; see `listening` in width.py."""
        return listening(self.network, listeners)

    def freed_weights(self, unit: Unit, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        if unit.level == Level.CHANNEL:
            return self.channels.weights(unit.name, tensors)
        return [tensors[f"{unit.name}.{key}"] for key, _ in self.network.get_submodule(unit.name).named_parameters()]

    def survivors(self) -> list[str]:
        return [name for name, layer in self.layers().items() if not isinstance(layer, Skip)]

    def kept(self) -> list[str]:
        return list(self.moved) or self.survivors()

    def stand_in(self, unit: nn.Module) -> nn.Module:
        return Skip()

    def remove(self, names: Iterable[str]) -> dict[str, nn.Module]:
        removed = {name: self.network.get_submodule(name) for name in names}
        put_modules(self.network, {name: Skip() for name in removed})
        return removed

    def pruned(self, changes: Sequence[Change]) -> Self:
        """Return a student: a stock network with the layers that stay, or with the heads and channels that stay.

        Layers are renumbered, so that the key-value cache has no gaps. Raises ValueError for a plan of other changes, a
        plan of all layers, and unknown units.
        """
        kinds = {change["kind"] for change in changes}
        if kinds == {"slice"}:
            return self.adopt(self.channels.sliced(change["unit"] for change in changes), changes)
        if kinds - {"bypass"}:
            raise ValueError(
                f"a {type(self.network).__name__} can lose whole layers, or heads and channels; the plan says "
                f"{sorted(kinds)}"
            )
        check_names([change["unit"] for change in changes], self.units(), "plan.units")
        moved, layers = self.renumber_layers(changes), self.layers()
        if not moved:
            raise ValueError("plan.units: all layers would go; at least one stays")
        all_layers = self.network.model.layers
        try:  # only the layers that stay are copied, so that less memory is needed
            self.network.model.layers = nn.ModuleList([layers[name] for name in moved])
            student = copy.deepcopy(self.network)
        finally:
            self.network.model.layers = all_layers
        for i, layer in enumerate(student.model.layers):
            for part in layer.modules():
                if hasattr(part, "layer_idx"):
                    part.layer_idx = i
        shorten(student.config, [list(layers).index(name) for name in moved])
        return self.adopt(student, changes)

    def renumber_layers(self, changes: Sequence[Change]) -> dict[str, str]:
        """Return {module path of a layer that stays: its module path in the student}."""
        removed = {change["unit"] for change in changes if change["kind"] == "bypass"}
        kept = [name for name in self.layers() if name not in removed]
        return {name: f"{LAYERS}.{i}" for i, name in enumerate(kept)}

    def adopt(self, network: nn.Module, changes: Sequence[Change] = ()) -> Self:
        return self.student(network, self.renumber_layers(changes))

    def repair_sites(self, student: Self, changes: Sequence[Change]) -> list[Site]:
        order, sliced = student.forward_order(), [change["unit"] for change in changes if change["kind"] == "slice"]
        blocks_sites = find_layer_sites(self.layers(), self.paths_in(student), order)
        return sort_sites(find_width_sites(self.channels, sliced) if sliced else blocks_sites, order)

    def stages(self) -> dict[str, nn.Module]:
        """Return the decoder layers, since each is a stage."""
        return self.layers()

    # Inputs and outputs

    def check_data(self, data: Any) -> None:
        """Raise ValueError for data without tokens, unknown tokens, and samples that are too long for the network."""
        if not hasattr(data, "vocabulary"):
            raise ValueError(
                f"{type(data).__name__} has no tokens, and the teacher is a language model; choose a text, such as "
                "data=wikitext2"
            )
        (length,), config = data.sample_shape(), self.network.config
        if data.vocabulary > config.vocab_size:
            raise ValueError(
                f"data.tokenizer has {data.vocabulary} different tokens, and the teacher has {config.vocab_size}; "
                "choose the teacher's own tokenizer"
            )
        if length > self.longest:
            raise ValueError(f"data.length={length} is more than the {self.longest} tokens the teacher was made for")

    def training_inputs(self, batch: Batch) -> Batch:
        """Return {"sample": token ids (N,L), "mask": bool (N,L) of the tokens that are targets, where not all are}."""
        return {"sample": batch["tokens"]} | ({"mask": batch["mask"]} if "mask" in batch else {})

    def calibration_inputs(self, batch: Batch, seed: int, purpose: str = "calibration") -> Batch:
        return self.training_inputs(batch)

    def example_inputs(self, batch: int, device: torch.device | str) -> Batch:
        return self.example_training_inputs(batch, device, (self.length,))

    def example_training_inputs(self, batch: int, device: torch.device | str, shape: Sequence[int] = ()) -> Batch:
        (length,) = shape or (self.length,)
        inputs = {"sample": torch.zeros(batch, length, dtype=torch.long, device=device)}
        if torch.device(device).type == "meta":  # without a mask, transformers reads values to choose one
            inputs["attention_mask"] = torch.zeros(batch, 1, length, length, device=device)
        return inputs

    def predict(self, inputs: Batch) -> Tensor:
        """Return logits (N,L,V); zeros where they predict a token that does not count, such as padding."""
        mask = inputs.get("attention_mask")
        logits: Tensor = self.network(
            input_ids=inputs["sample"], attention_mask=mask, use_cache=False, return_dict=False
        )[0]
        if "mask" not in inputs:
            return logits
        counts_NL = F.pad(inputs["mask"][:, 1:], (0, 1))
        return logits.masked_fill(~counts_NL[..., None], 0)

    def losses(self, output: Tensor, inputs: Batch) -> Tensor:
        """Return the mean negative log-likelihood of each sample's targets, (N,).

        Targets are the tokens after the first, as far as they are in the mask.
        """
        tokens_NL = inputs["sample"]
        # Flat, so that each sum over the vocabulary runs along adjacent numbers: over (N,V,L) it is 1e-4 too low.
        targets_NL = F.pad(tokens_NL[:, 1:], (0, 1), value=NO_TARGET)
        logits = output.float().flatten(0, 1)
        nll = F.cross_entropy(logits, targets_NL.flatten(), ignore_index=NO_TARGET, reduction="none")
        nll_NL = nll.view_as(tokens_NL)[:, :-1]
        return nll_NL.mean(1) if "mask" not in inputs else mean_of_targets(nll_NL, inputs["mask"])

    def distance(self, output: Tensor, reference: Tensor, inputs: Batch) -> Tensor:
        """Return the Kullback-Leibler divergence of the next-token distributions from the teacher's, a scalar.

        It is the mean over the tokens of a sample that count as targets, then over samples, so that the distance of a
        batch is the mean over its parts, however it is divided. Using it for language models, in the place of the
        squared error between noise predictions, is our choice.
        """
        log_s, log_t = (logits.float().log_softmax(-1) for logits in (output, reference))
        divergence_NL = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
        if "mask" not in inputs:
            return divergence_NL.mean()
        return mean_of_targets(divergence_NL[:, :-1], inputs["mask"]).mean()

    @torch.no_grad()
    def write(self, prompts: Sequence[str], tokens: int, device: torch.device) -> list[str]:
        """Return a continuation of each prompt by the most likely tokens, of `tokens` tokens or to the end of the text.

        Prompts are processed one at a time, so that none depends on the others.
        """
        assert self.tokenizer is not None
        network = self.network.to(device).eval()
        continuations = []
        for prompt in prompts:
            prompt_ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
            ids = generate_greedily(network, prompt_ids, tokens)[0]
            # Some tokenizers lose the space after the prompt when the new tokens are decoded alone.
            text, beginning = (self.tokenizer.decode(part, skip_special_tokens=True) for part in (ids, prompt_ids[0]))
            continuations.append(text.removeprefix(beginning))
        return continuations

    # Costs, files

    def meta_network(self) -> nn.Module:
        with torch.device("meta"):
            network: nn.Module = type(self.network)(copy.deepcopy(self.network.config))
        return network

    def save(self, folder: Path) -> None:
        self.network.save_pretrained(folder)

    # Exports

    def save_export(self, folder: Path, sampler: Any = None) -> None:
        """Write a stock model of transformers, and its tokenizer where it has one."""
        self.save(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def reload_arguments(self) -> list[str]:
        return ["" if self.tokenizer is None else PROBE]

    def random_arguments(self, samples: int = 2) -> dict[str, Any]:
        shape = self.example_inputs(samples, "cpu")["sample"].shape
        rng = torch.Generator().manual_seed(0)
        return {"input_ids": torch.randint(self.network.config.vocab_size, shape, generator=rng)}

    def expected_outputs(self, arguments: dict[str, Any]) -> dict[str, Tensor]:
        """Return the logits, "tokens" that the network generates, and "text", the ids that its tokenizer gives."""
        outputs = super().expected_outputs(arguments)
        outputs["tokens"] = generate_greedily(self.network, arguments["input_ids"], 16)
        if self.tokenizer is not None:
            outputs["text"] = torch.tensor(self.tokenizer(PROBE)["input_ids"])
        return outputs

    def card_usage(self) -> str:
        return """    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=50)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
"""


def mean_of_targets(values_NL: Tensor, mask_NL: Tensor) -> Tensor:
    """Return the mean of each sample's values over its targets, (N,); 0 for a sample without targets.

    `values_NL` (N, L-1) are of the predictions of all tokens but the first, `mask_NL` (N,L) says which tokens count.
    """
    counts_NL = mask_NL[:, 1:].to(values_NL)
    return (values_NL * counts_NL).sum(1) / counts_NL.sum(1).clamp_min(1)


PROBE = "Once upon a time, 3 researchers pruned a model.\n"
"""A text for which the tokenizer of an export has to give the ids of the teacher's."""


def generate_greedily(network: Any, tokens: Tensor, new: int) -> Tensor:
    """Return token ids (N,L) followed by up to `new` more, each the most likely one, with a key-value cache."""
    ids: Tensor = network.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # whatever the model's own configuration says
        pad_token_id=network.config.pad_token_id or 0,
    )
    return ids


def shorten(config: Any, kept: Sequence[int]) -> None:
    """Change a configuration to that of the network with the layers `kept` only, including its settings per layer."""
    count, settings = config.num_hidden_layers, config.to_dict()
    for key, value in settings.items():
        if "layer" in key and isinstance(value, list) and len(value) == count:
            setattr(config, key, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)
    if settings.get("per_layer_config"):  # {index: settings of one layer}, such as Gemma 4's
        layers = {int(index): layer for index, layer in settings["per_layer_config"].items()}
        config.per_layer_config = {index: layers[old] for index, old in enumerate(kept) if old in layers}


def find_required_layers(config: Any) -> set[int]:
    """Return the indices of the layers without which transformers cannot use a network of layers of several kinds.

    In generation, tokens are counted by the key-value cache of an attention layer. A network that has other layers,
    too, such as LFM2, keeps its first attention layer; that it is the first is our choice. Where the configuration
    itself decides the kind of the last layer, as Gemma 4's does, the last layer is kept.
    """
    kinds = list(getattr(config, "layer_types", None) or ())
    if len(set(kinds)) < 2:
        return set()
    counting = {kind for kind in set(kinds) if counts_tokens(copy_shortened(config, [kinds.index(kind)]))}
    required = {min(kinds.index(kind) for kind in counting)} if counting and counting != set(kinds) else set()
    without_last = copy_shortened(config, range(len(kinds) - 1))
    if type(config).from_dict(without_last.to_dict()).layer_types != without_last.layer_types:
        required.add(len(kinds) - 1)
    return required


def copy_shortened(config: Any, kept: Sequence[int]) -> Any:
    """Return a copy of a configuration, with the layers `kept` only."""
    copied = copy.deepcopy(config)
    shorten(copied, kept)
    return copied


def counts_tokens(config: Any) -> bool:
    """Return whether the key-value cache of a network can count the tokens it has seen."""
    try:
        DynamicCache(config=config).get_seq_length()
    except ValueError:
        return False
    return True
