"""Perplexity of a language model on a text.

Shapes: N segments, L tokens.
"""

import functools
import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.texts.corpus import Texts
from datamodules.texts.tokenizers import needs_bos
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.metrics.protocol import in_parts

STARTS = ("start", "each", "none")
"""Choices of `bos`."""


class Perplexity:
    """exp(mean negative log-likelihood) of the tokens of a text, in segments of `length` tokens that do not overlap.

    Every segment is a context of its own, whose tokens except the first are predicted. The mean is over all predicted
    tokens; a last segment that is not full is left out. The default, and bos=each, are the protocol of Shortened LLaMA
    (arXiv 2402.02834, by its code). Longer segments give lower values.

    Args:
        text: a file or a folder of files or, with `hub`, a split of a data set (`path` of Texts in
            datamodules/texts/corpus.py). Files and rows are joined by an empty line.
        length: tokens per segment; None is the context that the network was trained for, first token included.
        bos: where the tokenizer's token for a beginning is put: at the `start` of the text, as the first token of the
            first segment; before `each` segment, which then has `length` + 1 tokens; or nowhere (`none`).
        batch_size: segments per forward pass; ranks share the batches.
        tokens: use only the first tokens of the text; None uses all.
        hub: see Texts.
        subset: see Texts.
        revision: see Texts.
        column: see Texts.
        separator: files are split at it, and the parts are stripped and joined by an empty line, without empty parts.
    """

    of = "network"
    better: Literal["lower", "higher"] = "lower"
    parts: tuple[str, ...] = ()

    def __init__(
        self,
        text: str,
        length: int | None = 128,
        bos: str = "start",
        batch_size: int = 8,
        tokens: int | None = None,
        hub: str | None = None,
        subset: str | None = None,
        revision: str | None = None,
        column: str = "text",
        separator: str | None = None,
    ) -> None:
        if bos not in STARTS:
            raise ValueError(f"bos={bos!r} is unknown; choose one of: {', '.join(STARTS)}")
        for name, value, least in (("length", length, 2), ("batch_size", batch_size, 1), ("tokens", tokens, 2)):
            if value is not None and value < least:
                raise ValueError(f"{name}={value} is out of range; choose a whole number of {least} or more")
        self.length, self.bos, self.batch_size, self.tokens = length, bos, batch_size, tokens
        self.encoded: tuple[Any, list[int]] | None = None
        self.tokens_per_segment: int | str = "full"  # until `check` knows the network
        self.source = Texts(text, hub, subset, revision, column, separator)
        self.name = Path(text).name if hub is None else f"{Path(hub).name if Path(hub).exists() else hub} ({text})"
        self.source.identities()  # raises for a wrong path

    @functools.cached_property
    def text(self) -> str:
        texts: Iterable[str] = self.source.read()
        if self.source.hub is None and self.source.separator is not None:
            texts = (text.strip() for text in texts if text.strip())
        return "\n\n".join(texts)

    def check(self, backbone: Any, data: Any) -> None:
        """Raise ValueError for a missing tokenizer, segments that are too long, and a text too short or trained on."""
        if getattr(backbone, "tokenizer", None) is None:
            raise ValueError("perplexity is of a language model with a tokenizer; choose a teacher that has one")
        length, longest = self.context(backbone), backbone.longest
        if length > longest:
            raise ValueError(
                f"length={self.length}, bos={self.bos!r}: segments of {length} tokens are more than the {longest} that "
                "the teacher was made for"
            )
        if self.bos != "each" and needs_bos(backbone.tokenizer):
            raise ValueError(
                f"bos={self.bos!r}: a network with a {type(backbone.tokenizer).__name__} predicts badly without its "
                "token for a beginning before each segment; choose bos=each"
            )
        self.segments(backbone)
        self.tokens_per_segment = length
        trained_on = data.trained_on() if hasattr(data, "trained_on") else set()
        if shared := [name for key, name in self.source.identities().items() if key in trained_on]:
            raise ValueError(f"text={shared[0]} is trained or calibrated on, too; choose another text")

    def context(self, backbone: Any) -> int:
        """Return the number of tokens of a segment, its first one included."""
        if self.length is None:
            return backbone.longest
        return self.length + (self.bos == "each")

    def segments(self, backbone: NetworkBackbone) -> Tensor:
        """Return token ids (N,L); raises ValueError for a text shorter than a segment or a missing first token."""
        tokenizer: Any = backbone.tokenizer
        if self.encoded is None or self.encoded[0] is not tokenizer:  # all networks of a run share one
            self.encoded = tokenizer, tokenizer.encode(self.text, add_special_tokens=False, verbose=False)
        tokens = self.encoded[1][: self.tokens]
        first = [] if self.bos == "none" else [tokenizer.bos_token_id]
        if first == [None]:
            raise ValueError(f"bos={self.bos!r}: the tokenizer has no token for a beginning; choose bos=none")
        if self.bos == "start":
            tokens = first + tokens
        length = self.context(backbone) - (self.bos == "each")
        count = len(tokens) // length
        if not count:
            raise ValueError(f"text={self.source.path!r} has {len(tokens)} tokens; choose a length of that or less")
        rows = torch.tensor(tokens[: count * length]).view(count, length)
        return torch.cat([torch.tensor(first).expand(count, 1), rows], 1) if self.bos == "each" else rows

    def protocol(self) -> dict[str, Any]:
        content = hashlib.sha256(self.text.encode()).hexdigest()[:8]
        limit = {} if self.tokens is None else {"tokens": self.tokens}
        return {
            "text": self.name,
            "content": content,
            "length": self.length or self.tokens_per_segment,
            "bos": self.bos,
        } | limit

    @torch.no_grad()
    def __call__(self, backbone: NetworkBackbone, device: torch.device) -> float:
        segments = self.segments(backbone)
        backbone.to(device).eval()

        def mean_losses(part: np.ndarray) -> np.ndarray:
            """Return a mean negative log-likelihood per segment; all segments predict equally many tokens."""
            inputs = {"sample": segments[torch.from_numpy(part)].to(device)}
            return backbone.losses(backbone.predict(inputs), inputs).double().cpu().numpy()

        parts = in_parts(len(segments), mean_losses, f"perplexity on {self.name}", self.batch_size)
        return math.exp(np.concatenate(list(parts)).mean())
