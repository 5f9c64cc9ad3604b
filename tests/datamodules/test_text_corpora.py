"""Text corpora: deterministic blocks of tokens, random documents, two texts that share nothing, what is refused."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from datasets import config as datasets_config
from omegaconf import OmegaConf
from transformers import GemmaTokenizer

from conf.schema import ConfigError, build
from datamodules.readers.base import MissingData, data_root
from datamodules.texts.corpus import Corpus, Documents, Text, Texts
from datamodules.texts.tokenizers import tokenizer
from datamodules.texts.tokens import Tokenizer, find_text
from experiments.engine.run import Run

LETTERS = Tokenizer(lambda text: [ord(letter) for letter in text], 0x110000)
"""a toy tokenizer: one token a character"""


def decode(tokens: np.ndarray) -> list[str]:
    return ["".join(map(chr, block)) for block in tokens]


def corpus(train: str = "a.txt", holdout: str = "b.txt", length: int = 2, **options: object) -> Corpus:
    return Corpus(train, holdout, LETTERS, length, **({"batch_size": 1} | options))


def blocks(data: Corpus, split: str) -> list[str]:
    return decode(data.source(split).blocks)


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$SECATEUR_DATA with a.txt, b.txt and a folder `many` of two files."""
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    (tmp_path / "many" / "deep").mkdir(parents=True)
    for name, text in {"a.txt": "abcdefgh", "b.txt": "ijkl", "many/2.txt": "zz", "many/deep/1.txt": "äö"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy of a data set of the hub: a column `text`, splits `train` of three rows and `test` of one."""
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for split, rows in {"train": ["ab", "c", None], "test": ["defg"]}.items():
        Dataset.from_dict({"text": rows, "id": [0] * len(rows)}).to_parquet(tmp_path / "set" / f"{split}.parquet")
    return str(tmp_path / "set")


# Blocks


def test_a_text_is_cut_into_blocks_without_its_rest():
    text = Text("abcdefgh", LETTERS, 3)
    assert len(text) == 2 and text.captions is None
    tokens = text.take(np.array([1, 0, 1]))["tokens"]
    assert tokens.dtype == np.int64 and decode(tokens) == ["def", "abc", "def"]


def test_a_length_that_gives_no_block_is_refused(texts):
    with pytest.raises(ValueError, match=r"data\.length=1 is out of range; choose a whole number of 2 or more"):
        corpus(length=1)
    with pytest.raises(ValueError, match=r"data\.holdout has 4 tokens; choose data\.length of that or less, not 5"):
        corpus(length=5).sample_shape()


def test_each_split_has_its_own_text(texts):
    data = corpus(holdout=str(texts / "b.txt"))
    assert blocks(data, "train") == ["ab", "cd", "ef", "gh"] and blocks(data, "holdout") == ["ij", "kl"]
    assert data.source("train") is data.source("train")
    assert (data.sample_shape(), data.vocabulary, data.captions("train", 3)) == ((2,), 0x110000, None)


def test_the_files_of_a_folder_are_joined_in_alphabetical_order(texts):
    assert blocks(corpus("many", "a.txt", 6), "train") == ["zz\n\näö"]


def test_files_in_shared_text_are_found_last(texts):
    (texts / "shared" / "text").mkdir(parents=True)
    for name, text in (("a.txt", "other"), ("c.txt", "third")):
        (texts / "shared" / "text" / name).write_text(text)
    data = corpus("a.txt", "c.txt", 5)
    assert (blocks(data, "train"), blocks(data, "holdout")) == (["abcde"], ["third"])


def test_a_missing_file_or_one_without_text_is_named(texts):
    with pytest.raises(MissingData, match=r"none\.txt does not exist"):
        corpus("none.txt")
    (texts / "empty").mkdir()
    with pytest.raises(MissingData, match=r"empty holds no \.txt file"):
        corpus("empty")
    (texts / "a.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt is not a text in UTF-8"):
        corpus().source("train")


# Random documents


def test_documents_are_long_enough_and_chosen_at_most_once():
    letters = "abcdefghijkl"
    texts = [letter * (number + 1) for number, letter in enumerate(letters)]
    drawn = [decode(Documents(texts, LETTERS, 4, count, "it").documents) for count in (1, 5, 9)]
    assert drawn[2][:5] == drawn[1] and drawn[1][:1] == drawn[0]
    assert sorted(drawn[2]) == texts[3:] != drawn[2]
    with pytest.raises(ValueError, match=r"data\.documents=10: it has 9 documents of 4 tokens or more"):
        Documents(texts, LETTERS, 4, 10, "it")


@pytest.mark.parametrize(
    ("separator", "documents"),
    [(None, ["ab\n\ncd\ne", "zzz"]), ("\n\n", ["ab", "cd\ne", "zzz"]), ("\n", ["ab", "cd", "zzz"])],
)
def test_a_document_is_a_file_or_a_part_of_one(texts, separator, documents):
    (texts / "many" / "2.txt").write_text("ab\n\ncd\ne")
    (texts / "many" / "deep" / "1.txt").write_text("zzz")
    data = corpus("many", "a.txt", 2, documents=1, separator=separator)
    chosen = Documents(data.texts["train"].read(), LETTERS, 2, len(documents), "it").documents
    assert sorted(decode(chosen)) == documents
    with pytest.raises(ValueError, match=rf"it has {len(documents)} documents of 2 tokens or more"):
        Documents(data.texts["train"].read(), LETTERS, 2, len(documents) + 1, "it")


def test_a_document_is_a_row_of_the_hub_that_has_a_text(hub):
    data = corpus("train", "test", hub=hub, documents=1)
    assert decode(data.source("train").documents) == ["ab"] and decode(data.source("holdout").documents) == ["defg"]
    with pytest.raises(ValueError, match=r"data\.train has 1 documents of 2 tokens or more"):
        corpus("train", "test", hub=hub, documents=2).source("train")


def test_rows_of_the_hub_that_have_changed_have_another_fingerprint(hub, texts):
    """Files have none: their contents are a part of a run's id."""
    first = corpus("train", "test", hub=hub).fingerprint()
    assert first is not None and corpus("train", "test", hub=hub).fingerprint() == first
    Dataset.from_dict({"text": ["defh"], "id": [0]}).to_parquet(Path(hub) / "test.parquet")
    assert corpus("train", "test", hub=hub).fingerprint() != first
    assert corpus().fingerprint() is None and corpus("train", "test", hub="/nowhere").fingerprint() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"documents": 0}, r"data\.documents=0 is out of range"),
        ({"separator": "\n"}, r"data\.separator='\\n' cuts files into documents"),
        ({"separator": "", "documents": 1}, r"data\.separator='' cuts files into documents"),
        ({"separator": "\n", "documents": 1, "hub": "some/set"}, r"data\.separator='\\n' cuts files into documents"),
    ],
)
def test_impossible_settings_of_documents_are_refused(texts, options, message):
    with pytest.raises(ValueError, match=message):
        corpus(**options)


# Two texts that share nothing


@pytest.mark.parametrize("holdout", ["many", "many/2.txt", "linked.txt"])
def test_a_file_in_both_splits_is_refused_and_named(texts, holdout):
    (texts / "linked.txt").symlink_to(texts / "many" / "2.txt")
    with pytest.raises(ValueError, match=rf"data.train=many and data.holdout={holdout} share .*many/2\.txt: choose"):
        corpus("many", holdout)


def test_two_files_of_the_same_content_are_refused_by_name(texts):
    (texts / "copy.txt").write_text("abcdefgh")
    with pytest.raises(ValueError, match=r"share .*a\.txt \(the same as .*copy\.txt\): choose other texts"):
        corpus("a.txt", "copy.txt")


def test_empty_files_may_be_in_both_splits(texts):
    for folder in ("many", "more"):
        (texts / folder).mkdir(exist_ok=True)
        (texts / folder / "empty.txt").touch()
    (texts / "more" / "text.txt").write_text("xy")
    assert blocks(corpus("many", "more"), "holdout") == ["\n\n", "xy"]


def test_a_column_of_the_hub_is_a_text(hub):
    data = corpus("train[:2]", "test", hub=hub)
    assert (blocks(data, "train"), blocks(data, "holdout")) == (["ab", "\n\n"], ["de", "fg"])
    with pytest.raises(ValueError, match="has no column 'words'; it has: text, id"):
        corpus("train", "test", hub=hub, column="words").source("train")
    with pytest.raises(ValueError, match=r"set \(train\), row 2: the caption is missing"):
        corpus("train", "test", hub=hub).source("train")


def test_rows_in_both_splits_are_refused_by_name(hub):
    with pytest.raises(ValueError, match=r"data\.train=train and data\.holdout=train share train"):
        corpus("train", "train", hub=hub)
    for train, holdout in (("train", "train[:1]"), ("train[1:]", "train[:50%]"), ("test+train[-1:]", "train[2:]")):
        with pytest.raises(ValueError, match="share rows of train; choose parts that have none in common"):
            corpus(train, holdout, hub=hub).source("train")
    data = corpus("train[1:2]", "train[:1]", hub=hub, documents=1)
    assert decode(data.source("holdout").documents) == ["ab"]


def test_trained_texts_are_known_by_contents_and_names_of_splits(texts):
    def sha256(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    assert corpus().trained_on() == {sha256("abcdefgh")}
    assert corpus("many", "a.txt").trained_on() == {sha256("zz"), sha256("äö")}
    data = corpus("train", "test", hub="some/set", subset="v1")
    assert data.trained_on() == {sha256("some/set/v1/train")} == set(Texts("train", "some/set", "v1").identities())
    assert Texts("a.txt").identities() == {sha256("abcdefgh"): str(texts / "a.txt")}


# As configured


def test_an_unknown_key_of_the_configuration_is_named(configure):
    with pytest.raises(ConfigError, match=r"data\.lenght is unknown; did you mean 'length'"):
        configure("data=wikitext2", "+data.lenght=3")


def test_a_text_for_a_teacher_without_a_tokenizer_is_refused(configure):
    with pytest.raises(Exception, match=r"data\.tokenizer\.path=null: the teacher has no tokenizer; choose a language"):
        build(configure("data=wikitext2").data)


@pytest.mark.parametrize("choice", ["wikitext2", "ptb", "bookcorpus", "alpaca_cleaned"])
def test_runs_from_before_the_key_bos_keep_their_ids(configure, choice):
    cfg = configure(f"data={choice}")
    assert Run(configure(f"data={choice}", "data.bos=true"), "teacher").id != Run(cfg, "teacher").id
    with_key = Run(cfg, "teacher").id
    OmegaConf.set_struct(cfg, False)
    del cfg.data["bos"]
    assert Run(cfg, "teacher").id == with_key


@pytest.mark.parametrize("choice", ["ptb", "bookcorpus", "alpaca_cleaned"])
def test_texts_of_the_hub_are_requested_as_configured(configure, choice, monkeypatch):
    asked = []

    def load(path, subset, data_files, split, revision):
        asked.append((path, split, revision))
        raise ConnectionError

    monkeypatch.setattr("datasets.load_dataset", load)
    cfg = configure(f"data={choice}")
    cfg.data.tokenizer = None
    data = build(cfg.data)
    for split in ("train", "holdout"):
        with pytest.raises(MissingData, match="neither from the hub nor from a cache"):
            data.source(split)
    expected = {
        "ptb": [("ptb-text-only/ptb_text_only", split, "refs/convert/parquet") for split in ("train", "validation")],
        "bookcorpus": [
            ("bookcorpus/bookcorpus", split, "refs/convert/parquet") for split in ("train[1%:]", "train[:1%]")
        ],
        "alpaca_cleaned": [("yahma/alpaca-cleaned", "train", None)] * 2,
    }
    assert asked == expected[choice]


@pytest.mark.data
@pytest.mark.parametrize(
    ("path", "counts", "beginning"),
    [("llama_tokenizer.model", (298065, 339369), [1]), ("SmolLM2-135M-Instruct.Q4_1.gguf", (273868, 312144), [])],
)
def test_blocks_of_wikitext2_decode_to_its_text(configure, path, counts, beginning):
    for name in (path, "wikitext2_test.txt"):
        if not any((data_root() / folder / name).exists() for folder in ("", "shared/text")):
            pytest.skip(f"$SECATEUR_DATA has no {name}")
    data = build(configure("data=wikitext2", "data.length=64", f"data.tokenizer.path={path}").data)
    from datamodules.texts.tokenizers import load_tokenizer

    decode = load_tokenizer(path).decode
    assert data.sample_shape() == (64,) and data.tokenizer.get_beginning("auto", data.tokenizer.adds_bos) == beginning
    for split, name, count in zip(
        ("train", "holdout"), ("wikitext2_valid.txt", "wikitext2_test.txt"), counts, strict=True
    ):
        source, text = data.source(split), find_text(name).read_text()
        assert len(source) == count // 64 and source.blocks.max() < data.vocabulary
        for block in source.take(np.array([0, 2000, len(source) - 1]))["tokens"]:
            assert decode(block[1:-1].tolist()).strip() in text  # a block may begin or end within a character


def test_a_tokenizer_adds_no_special_tokens_but_knows_them(tmp_path):
    from support.pipelines import _clip_tokenizer

    tokenizer_ = _clip_tokenizer()
    tokenizer_.save_pretrained(tmp_path)
    encode = tokenizer(str(tmp_path))
    assert len(encode("the")) == 1 and encode("the the") == encode("the") * 2
    assert [encode.bos, *encode("the"), encode.eos] == tokenizer_("the")["input_ids"]
    assert encode.vocabulary == len(tokenizer_) == max(tokenizer_.get_vocab().values()) + 1
    assert encode.adds_bos and not encode.needs_bos


def test_the_tokenizer_of_gemma_needs_its_token_for_a_beginning(tmp_path):
    vocabulary = {piece: number for number, piece in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "a", "b"])}
    GemmaTokenizer(vocab=vocabulary, merges=[]).save_pretrained(tmp_path)
    encode = tokenizer(str(tmp_path))
    assert (encode("ab"), encode.bos, encode.eos, encode.needs_bos) == ([4, 5], 2, 1, True)
