"""Text corpora: deterministic blocks of tokens, two texts that share nothing, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from datasets import config as datasets_config

from conf.schema import ConfigError, build
from datamodules.sources import MissingData, data_root
from datamodules.text import Corpus, Text, found, tokenizer


def letters(text: str) -> list[int]:
    """A toy tokenizer: one token a character."""
    return [ord(letter) for letter in text]


def said(tokens: np.ndarray) -> list[str]:
    return ["".join(map(chr, block)) for block in tokens]


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$SECATEUR_DATA with a.txt, b.txt and a folder `many` of two files."""
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    (tmp_path / "many" / "deep").mkdir(parents=True)
    for name, text in {"a.txt": "abcdefgh", "b.txt": "ijkl", "many/2.txt": "zz", "many/deep/1.txt": "äö"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_a_text_comes_in_blocks_without_overlap_and_without_its_rest():
    text = Text("abcdefgh", letters, 3)
    assert len(text) == 2 and text.captions is None
    tokens = text.take(np.array([1, 0, 1]))["tokens"]
    assert tokens.dtype == np.int64 and said(tokens) == ["def", "abc", "def"]


@pytest.mark.parametrize(("length", "message"), [(0, "data.length=0 is out of range"), (9, "text has 8 tokens")])
def test_a_length_that_gives_no_block_is_refused(length, message):
    with pytest.raises(ValueError, match=message):
        Text("abcdefgh", letters, length)


def test_each_split_has_its_own_text(texts):
    corpus = Corpus("a.txt", str(texts / "b.txt"), letters, 2)
    assert said(corpus.source("train").blocks) == ["ab", "cd", "ef", "gh"]
    assert said(corpus.source("holdout").blocks) == ["ij", "kl"]
    assert corpus.source("train") is corpus.source("train")


def test_the_files_of_a_folder_are_joined_by_an_empty_line_in_alphabetical_order(texts):
    assert said(Corpus("many", "b.txt", letters, 6).source("train").blocks) == ["zz\n\näö"]


def test_files_are_looked_for_in_shared_text_last(texts):
    (texts / "shared" / "text").mkdir(parents=True)
    for name in ("a.txt", "c.txt"):
        (texts / "shared" / "text" / name).write_text("other")
    assert said(Corpus("a.txt", "c.txt", letters, 5).source("train").blocks) == ["abcde"]
    assert said(Corpus("c.txt", "a.txt", letters, 5).source("train").blocks) == ["other"]


@pytest.mark.parametrize("holdout", ["many", "many/2.txt", "linked.txt"])
def test_a_file_in_both_splits_is_refused_and_named(texts, holdout):
    (texts / "linked.txt").symlink_to(texts / "many" / "2.txt")
    with pytest.raises(ValueError, match=rf"data.train=many and data.holdout={holdout} share .*many/2\.txt"):
        Corpus("many", holdout, letters, 1)


def test_what_is_not_there_or_no_text_is_named(texts):
    with pytest.raises(MissingData, match=r"none\.txt does not exist"):
        Corpus("none.txt", "a.txt", letters, 1)
    (texts / "empty").mkdir()
    with pytest.raises(MissingData, match=r"empty holds no \.txt file"):
        Corpus("empty", "a.txt", letters, 1)
    (texts / "a.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt is no text in UTF-8"):
        Corpus("a.txt", "b.txt", letters, 1).source("train")


def test_a_column_of_the_hub_is_a_text(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, rows in {"train": ["ab", "c"], "test": ["de"]}.items():
        (tmp_path / "set").mkdir(exist_ok=True)
        Dataset.from_dict({"text": rows, "id": [0] * len(rows)}).to_parquet(tmp_path / "set" / f"{split}.parquet")
    corpus = Corpus("train", "test", letters, 2, hub=str(tmp_path / "set"))
    assert said(corpus.source("train").blocks) == ["ab", "\n\n"]
    assert said(corpus.source("holdout").blocks) == ["de"]
    with pytest.raises(ValueError, match="share train"):
        Corpus("train", "train", letters, 2, hub=str(tmp_path / "set"))
    with pytest.raises(ValueError, match="has no column 'words'; it has: text, id"):
        Corpus("train", "test", letters, 2, hub=str(tmp_path / "set"), column="words").source("train")


def test_the_configuration_names_what_it_does_not_know(configure):
    with pytest.raises(ConfigError, match=r"data\.lenght is unknown; did you mean 'length'"):
        configure("data=wikitext2", "+data.lenght=3")


def test_a_tokenizer_of_transformers_adds_no_special_tokens(tmp_path):
    from helpers_pipelines import _clip_tokenizer

    _clip_tokenizer().save_pretrained(tmp_path)
    encode = tokenizer(str(tmp_path))
    assert len(encode("the")) == 1 and encode("the the") == encode("the") * 2


@pytest.mark.data
def test_wikitext2_as_configured_gives_blocks_that_say_the_text(configure):
    if not (data_root() / "shared" / "text" / "wikitext2_test.txt").exists():
        pytest.skip("$SECATEUR_DATA has no shared/text/wikitext2_test.txt")
    corpus = build(configure("data=wikitext2", "data.length=64").data)
    from sentencepiece import SentencePieceProcessor

    decode = SentencePieceProcessor(model_file=str(found("llama_tokenizer.model"))).decode
    for split, name in (("train", "wikitext2_valid.txt"), ("holdout", "wikitext2_test.txt")):
        source, text = corpus.source(split), found(name).read_text()
        assert len(source) > 4000
        for block in source.take(np.array([0, 2000, len(source) - 1]))["tokens"]:
            assert decode(block[1:-1].tolist()).strip() in text  # a block may begin or end within a character
