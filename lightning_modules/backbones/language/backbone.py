"""Decoder-only language models of transformers as backbones: Llama, Qwen, Mistral, and what is built like them.

Their units of depth are whole decoder layers, and a student is the stock class with fewer of them, renumbered
(Shortened LLaMA, arXiv 2402.02834).

Shapes: N samples, L tokens, V entries of the vocabulary.
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

from criteria.base import Batch, Level, Unit, parse_level
from criteria.selection.base import check_names
from lightning_modules.backbones.base import Change, NetworkBackbone
from lightning_modules.backbones.diffusion.pruned_unet import put_modules
from lightning_modules.backbones.language.width import DecoderChannels, listening

LAYERS = "model.layers"

NO_TARGET = -100
"""Stands for a token that is not to be predicted, as in PyTorch's cross entropy."""


class Skip(nn.Module):
    """What stays of a removed decoder layer: the hidden states that go into it."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class LanguageBackbone(NetworkBackbone):
    """A causal language model whose layers are in `model.layers`, and the tokenizer that goes with it (or None).

    Options: `length`, the tokens of a sample when costs are counted and times are taken (128); `block`, the most
    channels of a unit of width (8).
    """

    library = "transformers"
    writes_text = True
    width_changes_stages = False

    def __init__(self, network: nn.Module, tokenizer: Any = None, **options: Any) -> None:
        super().__init__(network, **options)
        self.tokenizer = tokenizer

    def twin(self, network: nn.Module) -> Self:
        return type(self)(network, self.tokenizer, **self.options)

    @property
    def length(self) -> int:
        return self.options.get("length", 128)

    @property
    def longest(self) -> int:
        """The most tokens that the network was made for; sys.maxsize where its configuration does not say it."""
        return getattr(self.network.config, "max_position_embeddings", sys.maxsize)

    # Units and their removal

    def layers(self) -> dict[str, nn.Module]:
        """Every decoder layer (or what stands for it) by module path, in the order of the forward pass."""
        return {f"{LAYERS}.{i}": layer for i, layer in enumerate(self.network.get_submodule(LAYERS))}

    def units(self, level: str = "depth") -> list[Unit]:
        """Depth: the decoder layers. Channels: heads and blocks of channels. ValueError for operators."""
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
            if not isinstance(layer, Skip)
        ]

    @functools.cached_property
    def channels(self) -> DecoderChannels:
        """The heads and blocks of channels."""
        return DecoderChannels(self.network, self.meta_network(), self.length, self.options.get("block", 8))

    def consumers(self, name: str) -> dict[str, Tensor]:
        """{layer: which of its inputs are the channels of a unit}."""
        return self.channels.consumers(name)

    def listening(self, listeners: Mapping[str, Callable[[Tensor], None]]) -> AbstractContextManager[None]:
        """Each of some layers gives its input to a function in every forward pass inside."""
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
        """A stock network with the layers that stay, renumbered, so that its key-value cache has no gaps; or one with
        the heads and channels that stay."""
        kinds = {change["kind"] for change in changes}
        if kinds == {"slice"}:
            return self.adopt(self.channels.sliced(change["unit"] for change in changes), changes)
        if kinds - {"bypass"}:
            raise ValueError(
                f"a {type(self.network).__name__} can lose whole layers, or heads and channels; the plan says "
                f"{sorted(kinds)}"
            )
        check_names([change["unit"] for change in changes], self.units(), "plan.units")
        moved, there = self.renumbered(changes), self.layers()
        if not moved:
            raise ValueError("plan.units: all layers would go; at least one stays")
        everything = self.network.model.layers
        try:  # a copy of what stays, without ever holding a second copy of what goes
            self.network.model.layers = nn.ModuleList([there[name] for name in moved])
            student = copy.deepcopy(self.network)
        finally:
            self.network.model.layers = everything
        for i, layer in enumerate(student.model.layers):
            for part in layer.modules():
                if hasattr(part, "layer_idx"):
                    part.layer_idx = i
        shorten(student.config, [list(there).index(name) for name in moved])
        return self.adopt(student, changes)

    def renumbered(self, changes: Sequence[Change]) -> dict[str, str]:
        """{path of a layer that stays: its path in the student}."""
        gone = {change["unit"] for change in changes if change["kind"] == "bypass"}
        kept = [name for name in self.layers() if name not in gone]
        return {name: f"{LAYERS}.{i}" for i, name in enumerate(kept)}

    def adopt(self, network: nn.Module, changes: Sequence[Change] = ()) -> Self:
        return self.student(network, self.renumbered(changes))

    def stages(self) -> dict[str, nn.Module]:
        """The layers themselves."""
        return self.layers()

    # What the network takes and gives

    def check_data(self, data: Any) -> None:
        """Data that are no tokens, tokens that the network does not know, and longer samples than it was made for."""
        if not hasattr(data, "vocabulary"):
            raise ValueError(
                f"{type(data).__name__} gives no tokens, and the teacher is a language model; choose a text, such as "
                "data=wikitext2"
            )
        (length,), config = data.sample_shape(), self.network.config
        if data.vocabulary > config.vocab_size:
            raise ValueError(
                f"data.tokenizer has {data.vocabulary} kinds of tokens, and the teacher knows {config.vocab_size}; "
                "choose the teacher's own tokenizer"
            )
        if length > self.longest:
            raise ValueError(f"data.length={length} is more than the {self.longest} tokens the teacher was made for")

    def training_inputs(self, batch: Batch) -> Batch:
        """{"sample": (N,L), "mask": (N,L) of the tokens that count as targets, where not all do}."""
        return {"sample": batch["tokens"]} | ({"mask": batch["mask"]} if "mask" in batch else {})

    def calibration_inputs(self, batch: Batch, seed: int, purpose: str = "calibration") -> Batch:
        return self.training_inputs(batch)

    def example_inputs(self, batch: int, device: torch.device | str) -> Batch:
        inputs = {"sample": torch.zeros(batch, self.length, dtype=torch.long, device=device)}
        if torch.device(device).type == "meta":  # transformers would look at values to see which mask it needs
            inputs["attention_mask"] = torch.zeros(batch, 1, self.length, self.length, device=device)
        return inputs

    def predict(self, inputs: Batch) -> Tensor:
        """Logits (N,L,V); zeros where they predict a token that does not count, such as padding behind a sample."""
        mask = inputs.get("attention_mask")
        logits = self.network(input_ids=inputs["sample"], attention_mask=mask, use_cache=False, return_dict=False)[0]
        if "mask" not in inputs:
            return logits
        counts_NL = F.pad(inputs["mask"][:, 1:], (0, 1))
        return logits.masked_fill(~counts_NL[..., None], 0)

    def losses(self, output: Tensor, inputs: Batch) -> Tensor:
        """Mean negative log-likelihood of each sample's tokens after the first, as far as they count: (N,)."""
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
        """Each prompt's most likely continuation, `tokens` tokens long or up to the end of the text, token by token.

        One prompt at a time, so that none depends on the others.
        """
        assert self.tokenizer is not None
        network = self.network.to(device).eval()
        texts = []
        for prompt in prompts:
            given = self.tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
            made = greedy(network, given, tokens)[0]
            # New tokens alone would lose the space between them and the prompt in some tokenizers.
            whole, begun = (self.tokenizer.decode(ids, skip_special_tokens=True) for ids in (made, given[0]))
            texts.append(whole.removeprefix(begun))
        return texts

    # Costs, files

    def meta_network(self) -> nn.Module:
        with torch.device("meta"):
            return type(self.network)(copy.deepcopy(self.network.config))

    def save(self, folder: Path) -> None:
        self.network.save_pretrained(folder)

    # Exports

    def save_export(self, folder: Path) -> None:
        """Write a stock model of transformers, with its tokenizer where it has one."""
        self.save(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def reload_arguments(self) -> list[str]:
        return ["" if self.tokenizer is None else PROBE]

    def random_arguments(self) -> dict[str, Any]:
        shape = self.example_inputs(2, "cpu")["sample"].shape
        rng = torch.Generator().manual_seed(0)
        return {"input_ids": torch.randint(self.network.config.vocab_size, shape, generator=rng)}

    def expected_outputs(self, arguments: dict[str, Any]) -> dict[str, Tensor]:
        """Also: the tokens that it writes, and those that its tokenizer reads."""
        outputs = super().expected_outputs(arguments)
        outputs["tokens"] = greedy(self.network, arguments["input_ids"], 16)
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
"""A text that an export's tokenizer has to read as the teacher's does."""


def greedy(network: Any, tokens: Tensor, new: int) -> Tensor:
    """Token ids (N,L) and up to `new` more, the most likely ones, with a key-value cache."""
    return network.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # whatever the model's own configuration says
        pad_token_id=network.config.pad_token_id or 0,
    )


def shorten(config: Any, kept: Sequence[int]) -> None:
    """Make a configuration that of the same network with these of its layers; lists of one entry a layer go along."""
    count = config.num_hidden_layers
    for key, value in config.to_dict().items():
        if "layer" in key and isinstance(value, list) and len(value) == count:
            setattr(config, key, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)
