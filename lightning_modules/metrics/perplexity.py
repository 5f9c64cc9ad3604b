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

BOS_CHOICES = ("start", "each", "none")
"""Values of `bos`: where the token for the beginning of a text is put."""


class Perplexity:
    """Perplexity of a text: exp(mean negative log-likelihood) of its tokens, in segments that do not overlap.

    Each segment is predicted by itself, all tokens but the first. The mean is over all predicted tokens; a last segment
    that is shorter is left out. The default and bos=each are the protocol of Shortened LLaMA (arXiv 2402.02834), as in
    its code. Longer segments give lower values.

    Args:
        text: a file or a folder of files or, with `hub`, a split of a data set (`path` of Texts in
            datamodules/texts/corpus.py). Files and rows are joined by an empty line.
        length: tokens per segment; None is the context that the network was trained for, first token included.
        bos: where the tokenizer's token for a beginning is put: at the `start` of the text, as the first token of the
            first segment; before `each` segment, which then has `length` + 1 tokens; or nowhere (`none`). Networks that
            need it before every sample, such as Gemma, are measured with `each` only.
        batch_size: segments per forward pass; ranks share the batches.
        tokens: number of tokens at the beginning of the text that are used; None uses all.
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
        if bos not in BOS_CHOICES:
            raise ValueError(f"bos={bos!r} is unknown; choose one of: {', '.join(BOS_CHOICES)}")
        for name, value, minimum in (("length", length, 2), ("batch_size", batch_size, 1), ("tokens", tokens, 2)):
            if value is not None and value < minimum:
                raise ValueError(f"{name}={value} is out of range; choose a whole number of {minimum} or more")
        self.length, self.bos, self.batch_size, self.tokens = length, bos, batch_size, tokens
        self.encoded: tuple[Any, list[int]] | None = None
        self.tokens_per_segment: int | str = "full"  # until `check` knows the network
        self.source = Texts(text, hub, subset, revision, column, separator)
        self.name = Path(text).name if hub is None else f"{Path(hub).name if Path(hub).exists() else hub} ({text})"
        self.source.identities()  # raises for a wrong path

    @functools.cached_property
    def text(self) -> str:
        """The whole text, which is read when it is first needed."""
        texts: Iterable[str] = self.source.read()
        if self.source.hub is None and self.source.separator is not None:
            texts = (text.strip() for text in texts if text.strip())
        return "\n\n".join(texts)

    def check(self, backbone: Any, data: Any) -> None:
        """Raise ValueError where the perplexity cannot be measured or would be misleading.

        That is without a tokenizer, without a beginning that the network needs, for segments longer than its context,
        and for a text that is too short or that is trained on.
        """
        if getattr(backbone, "tokenizer", None) is None:
            raise ValueError("perplexity needs a language model with a tokenizer; choose a teacher that has one")
        length, longest = self.segment_length(backbone), backbone.longest
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
            raise ValueError(f"text={shared[0]} is also trained or calibrated on; choose another text")

    def segment_length(self, backbone: Any) -> int:
        """Return the number of tokens of a segment, including its first one."""
        if self.length is None:
            longest: int = backbone.longest
            return longest
        return self.length + (self.bos == "each")

    def segments(self, backbone: NetworkBackbone) -> Tensor:
        """Return token ids (N,L); raises ValueError for a text shorter than a segment and for a missing token."""
        tokenizer: Any = backbone.tokenizer
        if self.encoded is None or self.encoded[0] is not tokenizer:  # all networks of a run share one
            self.encoded = tokenizer, tokenizer.encode(self.text, add_special_tokens=False, verbose=False)
        tokens = self.encoded[1][: self.tokens]
        first = [] if self.bos == "none" else [tokenizer.bos_token_id]
        if first == [None]:
            raise ValueError(f"bos={self.bos!r}: the tokenizer has no token for a beginning; choose bos=none")
        if self.bos == "start":
            tokens = first + tokens
        length = self.segment_length(backbone) - (self.bos == "each")
        count = len(tokens) // length
        if not count:
            raise ValueError(f"text={self.source.path!r} has {len(tokens)} tokens; choose a length of that or less")
        rows = torch.tensor(tokens[: count * length]).view(count, length)
        return torch.cat([torch.tensor(first).expand(count, 1), rows], 1) if self.bos == "each" else rows

    def protocol(self) -> dict[str, Any]:
        """Return what has to be equal for two perplexities to be comparable."""
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
        """Return the perplexity of a network."""
        segments = self.segments(backbone)
        backbone.to(device).eval()

        def mean_losses(part: np.ndarray) -> np.ndarray:
            """Return the mean negative log-likelihood of each segment; all segments have equally many targets."""
            inputs = {"sample": segments[torch.from_numpy(part)].to(device)}
            return backbone.losses(backbone.predict(inputs), inputs).double().cpu().numpy()

        parts = in_parts(len(segments), mean_losses, f"perplexity on {self.name}", self.batch_size)
        return math.exp(np.concatenate(list(parts)).mean())
