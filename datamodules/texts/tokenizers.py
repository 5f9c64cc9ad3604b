"""Tokenizers of language models from folders, the hub, GGUF and SentencePiece files, as those of transformers."""

import functools
import logging
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, normalizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from datamodules.readers.base import MissingData
from datamodules.readers.hub_files import hub_files, hub_folder, or_missing
from datamodules.texts.tokens import Tokenizer, find_text

log = logging.getLogger(__name__)

ENDINGS = (".json", ".model", ".txt", ".jinja")
"""Endings of the files that a tokenizer consists of."""
NAMES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Names of files: a folder with a tokenizer has at least one of them."""
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""The character that SentencePiece writes for a space."""
PROBE = "  Once upon a time,  the \ufb01sh said:\n\t'\U0001f680'   <s>1,024 cafe\u0301 "
"""A text on which a converted tokenizer is compared with the original: spaces, ligatures, emoji, special tokens."""


def find_tokenizer(path: str) -> Path:
    """Return the folder or file of a tokenizer: at `path`, in $SECATEUR_DATA or its shared/text, or on the hub.

    Raises MissingData where it is in none of them, with what to get and how.
    """
    try:
        return find_text(path)
    except MissingData:
        if Path(path).expanduser().is_absolute() or path.count("/") != 1:
            raise
    with or_missing("tokenizer", path):
        return hub_folder(path, ENDINGS, hub_files(path))


def tokenizer_files(path: str) -> list[Path]:
    """Return the files that a tokenizer consists of, for a fingerprint."""
    location = find_tokenizer(path)
    return sorted(file for file in location.iterdir() if file.suffix in ENDINGS) if location.is_dir() else [location]


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has the files of a tokenizer."""
    return any((folder / name).exists() for name in NAMES)


def load_tokenizer(path: str) -> Any:
    """Return a tokenizer of transformers: from a folder or a hub id, a .gguf file, or a SentencePiece .model file.

    Raises MissingData where it cannot be found, and ValueError, with its path, where it cannot be read.
    """
    location = find_tokenizer(path)
    if location.suffix == ".model":
        return convert_sentencepiece(location)
    if location.suffix != ".gguf" and location.is_file():
        raise ValueError(f"tokenizer={path!r}: choose a folder, a hub id, a .gguf or a SentencePiece .model file")
    arguments: dict[str, Any] = {"pretrained_model_name_or_path": location}
    if location.suffix == ".gguf":
        arguments = {"pretrained_model_name_or_path": location.parent, "gguf_file": location.name}
        require_gguf(location)
    elif not has_tokenizer(location):
        raise MissingData(f"tokenizer={path!r} has none of the files {', '.join(NAMES)}")
    try:
        return AutoTokenizer.from_pretrained(**arguments, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # readers raise almost anything for damaged files
        raise ValueError(f"the tokenizer in {location} cannot be read: {type(error).__name__}: {error}") from error


def require_gguf(file: Path) -> None:
    """Raise MissingData where the package that reads .gguf files is not installed."""
    try:
        import gguf  # noqa: F401, PLC0415  an optional extra
    except ImportError as error:
        raise MissingData(f"{file} needs the reader of GGUF files: pip install -e '.[language]'") from error


def convert_sentencepiece(file: Path) -> Any:
    """Return a tokenizer of transformers that gives the ids of a SentencePiece model, the token for a beginning first.

    The conversion in transformers gives other ids: it orders merges by id where SentencePiece orders them by score,
    puts no space before a text that begins with one, and reads "<unk>" in a text as the token. Raises ValueError for
    models other than BPE with plain spaces, such as that of Llama.
    """
    from sentencepiece import SentencePieceProcessor  # noqa: PLC0415  for this kind of file only

    try:
        pieces = SentencePieceProcessor(model_file=str(file))
    except Exception as error:
        raise ValueError(f"{file} is no SentencePiece model: {error}") from error
    ids = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    halves = [(piece[:k], piece[k:]) for piece in ids for k in range(1, len(piece))]
    merges = [pair for pair in halves if pair[0] in ids and pair[1] in ids]
    merges.sort(key=lambda pair: -pieces.get_score(ids[pair[0] + pair[1]]))  # stable: ties by id, as in SentencePiece
    unknown = pieces.id_to_piece(pieces.unk_id())
    model = tokenizers.Tokenizer(BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    model.normalizer = normalizers.Sequence([normalizers.Replace(" ", SPACE), normalizers.Prepend(SPACE)])
    model.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    begin, end = (pieces.id_to_piece(i) if i >= 0 else None for i in (pieces.bos_id(), pieces.eos_id()))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token=begin,
        eos_token=end,
        unk_token=unknown,
        add_bos_token=begin is not None,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    if tokenizer.encode(PROBE, add_special_tokens=False) != pieces.encode(PROBE):
        raise ValueError(
            f"{file} is a SentencePiece model of another kind than BPE with plain spaces; choose the folder or hub id "
            "of a model whose tokenizer transformers knows"
        )
    return tokenizer


def needs_bos(tokenizer: Any) -> bool:
    """Return whether networks with this tokenizer of transformers predict badly without its token for a beginning.

    Gemma's do: their perplexity is many times higher without it.
    """
    return type(tokenizer).__name__.startswith("Gemma")


def tokenizer(path: str | None) -> Tokenizer:
    """Return the tokenizer of a language model, by a path or hub id as of load_tokenizer; raises what that raises.

    Raises ValueError without a path.
    """
    if path is None:
        raise ValueError(
            "data.tokenizer.path=null: the teacher has no tokenizer; choose a language model (teacher=stories15m), or "
            "a path"
        )
    loaded = load_tokenizer(path)
    return Tokenizer(
        functools.partial(loaded.encode, add_special_tokens=False, verbose=False),
        max(loaded.get_vocab().values()) + 1,
        loaded.bos_token_id,
        loaded.eos_token_id,
        adds_bos=loaded.bos_token_id in loaded.encode(""),
        needs_bos=needs_bos(loaded),
        decode=loaded.decode,
    )
