"""Tokenizers of language models from wherever they are kept, as tokenizers of transformers."""

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
from datamodules.texts.tokens import Tokenizer, found

log = logging.getLogger(__name__)

ENDINGS = (".json", ".model", ".txt", ".jinja")
"""of the files that make a tokenizer what it is"""
NAMES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""of which a folder with a tokenizer has at least one"""
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""what SentencePiece writes for a space"""
PROBE = "  Once upon a time,  the \ufb01sh said:\n\t'\U0001f680'   <s>1,024 cafe\u0301 "


def find_tokenizer(path: str) -> Path:
    """The folder or file of a tokenizer: as given, in $SECATEUR_DATA or its shared/text, or from the hub by its id.

    Raises MissingData, saying what to get and how, where it is in none of them.
    """
    try:
        return found(path)
    except MissingData:
        if Path(path).expanduser().is_absolute() or path.count("/") != 1:
            raise
    with or_missing("tokenizer", path):
        return hub_folder(path, ENDINGS, hub_files(path))


def tokenizer_files(path: str) -> list[Path]:
    """The files behind a tokenizer, for a fingerprint."""
    place = find_tokenizer(path)
    return sorted(file for file in place.iterdir() if file.suffix in ENDINGS) if place.is_dir() else [place]


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in NAMES)


def load_tokenizer(path: str) -> Any:
    """A tokenizer of transformers: from a folder or a hub id, a .gguf file, or a SentencePiece .model file.

    Raises MissingData where it is not to be had, and ValueError, naming it, where it cannot be read.
    """
    place = find_tokenizer(path)
    if place.suffix == ".model":
        return from_sentencepiece(place)
    if place.suffix != ".gguf" and place.is_file():
        raise ValueError(f"tokenizer={path!r}: choose a folder, a hub id, a .gguf or a SentencePiece .model file")
    where: dict[str, Any] = {"pretrained_model_name_or_path": place}
    if place.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": place.parent, "gguf_file": place.name}
        needs_gguf(place)
    elif not has_tokenizer(place):
        raise MissingData(f"tokenizer={path!r} has none of the files {', '.join(NAMES)}")
    try:
        return AutoTokenizer.from_pretrained(**where, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # readers raise almost anything for damaged files
        raise ValueError(f"the tokenizer in {place} cannot be read: {type(error).__name__}: {error}") from error


def needs_gguf(file: Path) -> None:
    """Raise MissingData where the package that reads .gguf files is not installed."""
    try:
        import gguf  # noqa: F401, PLC0415  an optional extra
    except ImportError as error:
        raise MissingData(f"{file} needs the reader of GGUF files: pip install -e '.[language]'") from error


def from_sentencepiece(file: Path) -> Any:
    """A SentencePiece model as a tokenizer of transformers that gives the same ids; with the beginning of text first.

    transformers' own conversion orders merges by id where SentencePiece goes by score, puts no space before a text
    that begins with one, and takes "<unk>" in a text for the token. Raises ValueError for what is no BPE model with
    plain spaces, such as that of Llama.
    """
    from sentencepiece import SentencePieceProcessor  # noqa: PLC0415  for this kind of file only

    try:
        pieces = SentencePieceProcessor(model_file=str(file))
    except Exception as error:
        raise ValueError(f"{file} is no SentencePiece model: {error}") from error
    ids = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    halves = [(piece[:k], piece[k:]) for piece in ids for k in range(1, len(piece))]
    merges = [pair for pair in halves if pair[0] in ids and pair[1] in ids]
    merges.sort(key=lambda pair: -pieces.get_score(ids[pair[0] + pair[1]]))  # stable: then by id, as SentencePiece
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
    )
