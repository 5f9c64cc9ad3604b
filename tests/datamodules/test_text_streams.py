"""Texts as streams of samples: order, resuming, ranks, random windows, and instructions with their masks."""

import hashlib
import json
import re
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import config as datasets_config
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from support.process import ROOT

from conf.checks import check_target
from conf.schema import build
from datamodules.bad_samples import TooManyBadSamples
from datamodules.base import Samples
from datamodules.readers.base import BadSample, MissingData
from datamodules.texts.corpus import Corpus, Documents, Tokens, Windows
from datamodules.texts.instructions import Instructions, encode_exchange
from datamodules.texts.tokens import Tokenizer

LETTERS = Tokenizer(lambda text: [ord(letter) for letter in text], 0x110000, 1, 2)
"""a toy tokenizer: one token a character; 1 begins a text and 2 ends it"""
ROWS = [{"do": f"{number:02}", "with": "xy"[: number % 3], "say": chr(97 + number) * 3} for number in range(20)]
FORM = {"prompt": "{do}+{with}=", "short_prompt": "{do}=", "answer": "{say}"}
KINDS = ("blocks", "windows", "instructions")


@pytest.fixture
def make(tmp_path: Path):
    """make(kind, ...) -> data of 11 blocks, of windows of 11 documents, or of 11 instructions, of 5 tokens each."""
    letters = "abcdefghijk"
    (tmp_path / "blocks.txt").write_text("".join(letter * 4 + "." for letter in letters))
    (tmp_path / "documents.txt").write_text("\n".join(letter.upper() + letter * 3 + "0123" for letter in letters))
    (tmp_path / "held.txt").write_text("12345\n67890")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[:15]))

    def make(kind: str, **options: Any) -> Tokens:
        options = {"tokenizer": LETTERS, "length": 5, "batch_size": 4, "seed": 0} | options
        if kind == "instructions":
            return Instructions(
                str(tmp_path / "rows.json"), holdout_rows=4, **{**FORM, "answer_only": False, **options}
            )
        if kind == "windows":
            documents = {"documents": 11, "separator": "\n"}
            return Corpus(str(tmp_path / "documents.txt"), str(tmp_path / "held.txt"), **(documents | options))
        return Corpus(str(tmp_path / "blocks.txt"), str(tmp_path / "held.txt"), **options)

    return make


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


def decode(tokens: torch.Tensor) -> list[str]:
    return ["".join(map(chr, sample)) for sample in tokens.tolist()]


# The stream


@pytest.mark.parametrize(("kind", "workers"), [*((kind, 0) for kind in KINDS), ("windows", 2)])
def test_a_resumed_loader_gives_the_remaining_batches(make, kind, workers):
    undisturbed = list(islice(make(kind).train_dataloader(), 7))
    for taken in (1, 4):  # within the first pass of 2.75 batches, and within the second
        loader = make(kind, num_workers=workers).train_dataloader()
        before = list(islice(iter(loader), taken))
        resumed = make(kind, num_workers=workers).train_dataloader()
        resumed.load_state_dict(loader.state_dict())
        after = list(islice(iter(resumed), 7 - taken))
        assert all(same(*pair) for pair in zip(before + after, undisturbed, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_share_the_batches_of_one_process(make, kind):
    def on_rank(rank: int) -> Tokens:
        data = make(kind)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        return data

    loaders = [iter(on_rank(rank).train_dataloader()) for rank in range(2)]
    for batch in islice(make(kind).train_dataloader(), 6):
        first, second = (next(loader) for loader in loaders)
        assert len(first["tokens"]) == len(second["tokens"]) == 2
        assert same({key: torch.stack([first[key], second[key]], 1).flatten(0, 1) for key in batch}, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_has_every_sample_once_in_the_order_of_the_seed(make, kind):
    def order(seed: int) -> list[int]:
        return torch.cat([batch["index"] for batch in islice(make(kind, seed=seed).train_dataloader(), 11)]).tolist()

    assert sorted(order(0)[:11]) == list(range(11)) and sorted(order(0)[11:22]) == list(range(11))
    assert order(0) == order(0) != order(1) and order(0)[:11] != order(0)[11:22]


@pytest.mark.parametrize("kind", KINDS)
def test_a_subset_depends_on_neither_batch_size_nor_seed_of_the_run(make, kind):
    (whole,) = make(kind).subset("train", 7, seed=3, batch_size=7)
    assert whole["tokens"].dtype == torch.int64 and whole["tokens"].shape == (7, 5)
    assert (whole["number"].tolist(), whole["of"].tolist()) == (list(range(7)), [7] * 7)
    parts = list(make(kind, seed=9).subset("train", 7, seed=3, batch_size=2))
    assert same({key: torch.cat([part[key] for part in parts]) for key in whole}, whole)
    parts = list(make(kind).subset("train", 7, seed=3, batch_size=2, spread=True))
    spread = {key: torch.cat([part[key] for part in parts]) for key in whole}
    assert sorted(spread["number"].tolist()) == list(range(7))
    assert spread["number"].tolist() != list(range(7))
    assert torch.equal(spread["tokens"], whole["tokens"][spread["number"]])
    (other,) = make(kind).subset("train", 7, seed=4, batch_size=7)
    assert not torch.equal(other["index"], whole["index"])


def test_each_split_has_the_samples_of_its_text(make):
    (train,), (held,) = (make("blocks").subset(*chosen, 0, 20) for chosen in (("train", 11), ("holdout", 2)))
    assert sorted(decode(train["tokens"])) == [letter * 4 + "." for letter in "abcdefghijk"]
    assert sorted(decode(held["tokens"])) == ["\n6789", "12345"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_only_with_samples_of_the_same_length_and_number(make, kind):
    state = make(kind).state_dict()
    assert (state["length"], state["samples"]) == (5, 11)
    make(kind).load_state_dict(state)
    with pytest.raises(ValueError, match=r"had data\.length=5, now it is 4, which gives other samples"):
        make(kind, length=4).load_state_dict(state)
    with pytest.raises(ValueError, match=r"had 12 training samples, now data\.train has 11"):
        make(kind).load_state_dict(state | {"samples": 12})


def test_too_large_batches_and_latents_are_refused(make):
    with pytest.raises(ValueError, match=r"data\.batch_size=12 is more than the 11 training samples"):
        make("blocks", batch_size=12).train_dataloader()
    with pytest.raises(ValueError, match=r"latents='some': texts have no latents; choose latents=null"):
        make("blocks").use_latents("some")


# The token for a beginning


@pytest.mark.parametrize(
    ("kind", "bos", "needs", "first"),
    [
        ("blocks", "auto", False, ""),
        ("blocks", "auto", True, "\1"),
        ("blocks", False, True, ""),
        ("windows", True, False, "\1"),
        ("windows", "auto", False, ""),
        ("instructions", "auto", False, "\1"),
        ("instructions", False, False, "0"),
    ],
)
def test_a_token_for_the_beginning_is_put_before_every_sample(make, kind, bos, needs, first):
    tokenizer = Tokenizer(LETTERS.encode, LETTERS.vocabulary, 1, 2, needs_bos=needs)
    data = make(kind, length=4, bos=bos, tokenizer=tokenizer)
    (batch,) = data.subset("train", 11, 0, 11)
    samples = decode(batch["tokens"])
    assert {len(sample) for sample in samples} == {4}
    assert any(sample.startswith(first) for sample in samples)
    assert all(sample.startswith("\1") for sample in samples) == ("\1" in first)


def test_an_unknown_bos_or_a_tokenizer_without_one_is_refused(make):
    with pytest.raises(ValueError, match=r"data\.bos='yes' is unknown; choose one of: auto, true, false"):
        make("blocks", bos="yes")
    plain = Tokenizer(LETTERS.encode, LETTERS.vocabulary, None, 2, needs_bos=True)
    with pytest.raises(ValueError, match=r"data\.bos=true: the tokenizer has no token for a beginning"):
        make("blocks", bos=True, tokenizer=plain).sample_shape()
    assert decode(make("blocks", tokenizer=plain).source("train").blocks[:1]) == ["aaaa."]


# Windows


@settings(derandomize=True, database=None, deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=9), st.integers(0, 3))
def test_a_window_of_a_document_depends_on_seed_and_position(positions, seed):
    documents = Documents([chr(97 + k) + "0123456789"[: k + 4] for k in range(7)], LETTERS, 5, 7, "it")
    together = Windows(documents, 5, seed).__getitems__(positions)
    assert together["index"].tolist() == [position % 7 for position in positions]
    for place, position in enumerate(positions):
        alone = Windows(documents, 5, seed).__getitems__([position])
        assert same(alone, {key: value[place : place + 1] for key, value in together.items()})
        document = "".join(map(chr, documents.documents[position % 7]))
        assert decode(alone["tokens"])[0] in document


def test_training_sees_every_window_and_a_subset_one_per_document(make):
    documents = Documents(["01234567"], LETTERS, 5, 1, "it")
    assert set(decode(Windows(documents, 5).__getitems__(list(range(60)))["tokens"])) == {
        "01234",
        "12345",
        "23456",
        "34567",
    }
    data = make("windows")
    (fixed,) = data.subset("train", 11, 0, 11)
    (again,) = data.subset("train", 11, 1, 11)
    assert sorted(decode(fixed["tokens"])) == sorted(decode(again["tokens"]))
    trained = [decode(batch["tokens"]) for batch in islice(data.train_dataloader(), 11)]
    assert len({window for batch in trained for window in batch}) > 20  # of 4 x 11 there are


# Instructions


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


@pytest.mark.parametrize(
    ("length", "answer_only", "tokens", "mask"),
    [
        (8, False, [1, *letters("01="), *letters("bb"), 2, 0], "01111110"),
        (8, True, [1, *letters("01="), *letters("bb"), 2, 0], "00001110"),
        (7, True, [1, *letters("01="), *letters("bb"), 2], "0000111"),
        (5, True, [1, *letters("01="), *letters("b")], "00001"),
        (5, False, [1, *letters("01="), *letters("b")], "01111"),
    ],
)
def test_padding_the_first_token_and_optionally_the_prompt_do_not_count(length, answer_only, tokens, mask):
    ids, targets = encode_exchange(LETTERS, "01=", "bb", length, answer_only, [1])
    assert (ids.dtype, targets.dtype) == (np.int64, bool)
    assert (ids.tolist(), "".join(str(int(target)) for target in targets)) == (tokens, mask)


def test_without_special_tokens_a_sample_is_prompt_and_answer():
    plain = Tokenizer(LETTERS.encode, LETTERS.vocabulary)
    for answer_only, mask in ((True, [False] * 3 + [True] * 2), (False, [False] + [True] * 4)):
        tokens, counted = encode_exchange(plain, "01=", "bb", 6, answer_only)
        assert (tokens.tolist(), counted.tolist()) == ([*letters("01=bb"), 0], [*mask, False])


def test_a_prompt_that_leaves_no_room_for_an_answer_is_a_bad_sample():
    with pytest.raises(BadSample, match=r"its prompt of 4 tokens leaves none of data\.length=4 for an answer"):
        encode_exchange(LETTERS, "01=", "bb", 4, True, [1])
    assert encode_exchange(LETTERS, "01=", "bb", 4, False, [1])[1].tolist() == [False, True, True, True]


def instructions(path: object, rows: list[Any] | str = ROWS, **options: Any) -> Instructions:
    """Instructions of 12 tokens, of rows that are written to a file where they are given."""
    if isinstance(path, Path):
        lines = "\n".join(json.dumps(row) for row in rows)
        text = rows if isinstance(rows, str) else lines if path.suffix == ".jsonl" else json.dumps(rows)
        path.write_text(text)
    options = {"tokenizer": LETTERS, "length": 12, "holdout_rows": 5, "batch_size": 2} | FORM | options
    return Instructions(str(path), **options)


def whole(data: Tokens, split: str, count: int) -> dict[int, str]:
    """{number: text} of all samples of a split, in their order."""
    (batch,) = data.subset(split, count, 0, count)
    texts = (text.strip("\0\1\2") for text in decode(batch["tokens"]))
    return dict(sorted(zip(batch["index"].tolist(), texts, strict=True)))


def test_rows_fill_the_right_template_and_some_are_held_out(tmp_path):
    data = instructions(tmp_path / "rows.jsonl")
    train, held = whole(data, "train", 15), whole(data, "holdout", 5)
    written = [
        f"{row['do']}+{row['with']}={row['say']}" if row["with"] else f"{row['do']}={row['say']}" for row in ROWS
    ]
    assert sorted([*train.values(), *held.values()]) == sorted(written)
    assert list(held.values()) != written[:5]  # a random share
    again = instructions(tmp_path / "rows.jsonl", seed=7)
    assert (whole(again, "train", 15), whole(again, "holdout", 5)) == (train, held)
    assert (data.sample_shape(), data.vocabulary, data.captions("train", 2)) == ((12,), 0x110000, None)


def test_json_json_lines_and_the_hub_give_the_same_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    Dataset.from_list(ROWS).to_parquet(tmp_path / "set" / "train.parquet")
    places = [tmp_path / "rows.jsonl", tmp_path / "rows.json", str(tmp_path / "set")]
    sources = [instructions(place) for place in places]
    samples = [whole(data, "train", 15) for data in sources]
    assert samples[0] == samples[1] == samples[2]
    for data, file in zip(sources, ("rows.jsonl", "rows.json"), strict=False):
        assert data.trained_on() == {hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()}
    name = f"{tmp_path}/set/None/train"
    assert sources[2].trained_on() == {hashlib.sha256(name.encode()).hexdigest()}
    first = sources[2].fingerprint()
    assert first is not None and [data.fingerprint() for data in sources[:2]] == [None, None]
    Dataset.from_list([*ROWS[:-1], ROWS[-1] | {"say": "other"}]).to_parquet(tmp_path / "set" / "train.parquet")
    assert instructions(str(tmp_path / "set")).fingerprint() != first  # the data under the same name have changed
    with pytest.raises(ValueError, match="set has no column 'mood'; it has: do, with, say"):
        instructions(str(tmp_path / "set"), prompt="{mood}").sample_shape()


def test_bad_rows_are_replaced_and_counted_and_too_many_stop(tmp_path, capsys):
    bad = [{**ROWS[0], "say": None}, {**ROWS[1], "do": "  "}, {**ROWS[2], "do": "0123456789"}, {**ROWS[3], "say": 3}]
    rows = [*ROWS, *bad]
    data = instructions(tmp_path / "rows.json", rows, holdout_rows=1, batch_size=23, max_bad_fraction=0.1)
    batches = list(islice(data.train_dataloader(), 3))
    used = {text.strip("\0\1\2").split("=")[1][:1] for batch in batches for text in decode(batch["tokens"])}
    assert used <= {row["say"][0] for row in ROWS} and {len(batch["tokens"]) for batch in batches} == {23}
    held = data.source("holdout").numbers[0]
    reasons = ["column 'say' has no text", "column 'do' has no text", "its prompt of 15 tokens", "column 'say' has no"]
    expected = [reason for number, reason in enumerate(reasons, 20) if number != held]
    for batch in batches:
        assert len(batch["skipped"]) == len(expected)
        assert all(any(reason in message for message in batch["skipped"]) for reason in expected)
        data.on_before_batch_transfer(batch, 0)
    assert data.skipped.count == 3 * len(expected) and "rows.json, row 2" in capsys.readouterr().out
    strict = instructions(tmp_path / "rows.json", rows, holdout_rows=1, max_bad_fraction=0.0)
    with pytest.raises(TooManyBadSamples, match=r"data\.train: \d of \d+ samples cannot be used"):
        list(strict.subset("train", 23, 0, 23))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "{do"}, r"data\.prompt='\{do' is no template"),
        ({"short_prompt": "{}="}, r"data\.short_prompt='\{\}=' is no template; name columns in braces"),
        ({"answer": "yes"}, r"data\.answer='yes' is no template"),
        ({"answer": "{mood}"}, r"rows\.json has no column 'mood'; it has: do, with, say"),
        ({"holdout_rows": 0}, r"data\.holdout_rows=0 is out of range; .*rows\.json has 20 rows"),
        ({"holdout_rows": 20}, r"data\.holdout_rows=20 is out of range"),
        ({"rows": "[{"}, r"rows\.json cannot be read as json"),
        ({"rows": "[1]"}, r"rows\.json is not a list of objects"),
        ({"rows": '{"a": 1}'}, r"rows\.json is not a list of objects"),
    ],
)
def test_instructions_that_cannot_be_read_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        instructions(tmp_path / "rows.json", **options).sample_shape()


def test_a_missing_table_and_an_invalid_line_are_named(tmp_path):
    with pytest.raises(MissingData, match=r"none\.jsonl does not exist"):
        instructions(f"{tmp_path}/none.jsonl")
    with pytest.raises(ValueError, match=r"rows\.jsonl cannot be read as jsonl"):
        instructions(tmp_path / "rows.jsonl", '{"do": "a"}\n{"do":').sample_shape()


def test_the_templates_in_conf_name_the_columns_of_alpaca(configure, tmp_path):
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    (tmp_path / "rows.json").write_text(json.dumps([row, {**row, "input": ""}]))
    cfg = configure("data=alpaca_cleaned", f"data.path={tmp_path}/rows.json", "data.holdout_rows=1")
    cfg.data.tokenizer = None
    data = build(cfg.data)
    prompt, answer = data.form.fill(data.rows[0])
    assert re.sub(r"^.*\n\n", "", prompt, count=1) == (
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n"
    )
    short, _ = data.form.fill(data.rows[1])
    assert answer == "3" and re.sub(r"^.*\n\n", "", short, count=1) == "### Instruction:\nAdd.\n\n### Response:\n"
    assert (data.length, cfg.data.answer_only, configure("data=alpaca_cleaned").data.holdout_rows) == (256, True, 2000)


# The page


def test_the_example_of_a_text_in_the_docs_works(tmp_path):
    page = (ROOT / "docs" / "datasets.md").read_text()
    (text,) = [
        block for block in re.findall(r"```yaml\n(.*?)```", page, re.S) if "datamodules.texts.corpus.Corpus" in block
    ]
    (tmp_path / "essays").mkdir()
    (tmp_path / "essays" / "1.txt").write_text("a" * 300)
    (tmp_path / "essays_held_out.txt").write_text("b" * 128)
    cfg = OmegaConf.create({"seed": 3, "teacher": {"tokenizer": "x"}, "data": OmegaConf.create(text)})
    cfg.data.train, cfg.data.holdout = (cfg.data[key].replace("/texts", str(tmp_path)) for key in ("train", "holdout"))
    check_target("data", cfg.data)
    cfg.data.tokenizer = None
    data = build(cfg.data, tokenizer=LETTERS)
    assert (data.sample_shape(), len(data.source("train")), len(data.source("holdout"))) == ((128,), 2, 1)
    assert isinstance(data.training(3), Samples) and data.training(3).seed == 3
