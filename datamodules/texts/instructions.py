"""Instructions with answers, such as Alpaca's, as samples of token ids."""

import dataclasses
import functools
import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.inventory import fingerprint_rows
from datamodules.readers.base import BadSample, MissingData, Source
from datamodules.readers.hub import hub_table
from datamodules.seeding import torch_rng
from datamodules.texts.corpus import Texts, Tokens
from datamodules.texts.tokens import Tokenizer, find_text, hash_file, read_text

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Form:
    """Templates of a prompt and an answer, with names of columns in braces.

    `short_prompt` is for rows in which a column of `prompt` is empty. Raises ValueError for an invalid template.
    """

    prompt: str
    short_prompt: str
    answer: str

    def __post_init__(self) -> None:
        assert self.columns

    @functools.cached_property
    def columns(self) -> dict[str, list[str]]:
        """{template: names of its columns}."""
        return {text: find_columns(f"data.{field}", text) for field, text in dataclasses.asdict(self).items()}

    def fill(self, row: Row) -> tuple[str, str]:
        """Return the prompt and the answer of a row; raises BadSample where a column has no text."""
        is_complete = all(has_text(row, column) for column in self.columns[self.prompt])
        prompt = self.prompt if is_complete else self.short_prompt
        for column in (*self.columns[prompt], *self.columns[self.answer]):
            if not has_text(row, column):
                raise BadSample(f"column {column!r} has no text")
        return prompt.format_map(row), self.answer.format_map(row)


class Exchanges:
    """Rows of a table as samples: a prompt, its answer and the end of the text, cut or padded at the right.

    Padding is token 0, which no token before it can attend to.

    Args:
        rows: the rows of the table.
        numbers: numbers of the rows that are samples.
        form: the templates.
        tokenizer: the tokenizer.
        length: tokens per sample.
        answer_only: the tokens of the prompt are no targets.
        name: the table's name in messages.
        beginning: ids that are put before each prompt.
    """

    captions = None

    def __init__(
        self,
        rows: Sequence[Row],
        numbers: np.ndarray,
        form: Form,
        tokenizer: Tokenizer,
        length: int,
        answer_only: bool,
        name: str,
        beginning: Sequence[int] = (),
    ) -> None:
        self.rows, self.numbers, self.form, self.name = rows, numbers, form, name
        self.tokenizer, self.length, self.answer_only, self.beginning = tokenizer, length, answer_only, beginning

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return {"tokens": int64 (N,L), "mask": bool (N,L)}; the mask says which tokens are targets."""
        samples = [self.sample(int(number)) for number in self.numbers[indices]]
        tokens, mask = (np.stack(part) for part in zip(*samples, strict=True))
        return {"tokens": tokens, "mask": mask}

    def sample(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens and the mask of a row, each (L,); raises BadSample, with the row, where it is unusable."""
        try:
            prompt, answer = self.form.fill(self.rows[number])
            return encode_exchange(self.tokenizer, prompt, answer, self.length, self.answer_only, self.beginning)
        except BadSample as error:
            raise BadSample(f"{self.name}, row {number}: {error}") from error


class Instructions(Tokens):
    """Rows of a table as instructions with answers; random rows, the same for every seed, are never trained on.

    Rows without a text in a column of a template, or whose prompt leaves no room for an answer, are bad samples. Raises
    ValueError for a missing column and for a table that cannot be read, and MissingData where there is none.

    Args:
        path: a .json file (a list of objects) or a .jsonl file (one object per line), looked up like those of Texts,
            or the id of a data set on the Hugging Face hub.
        prompt: see Form.
        answer: see Form.
        tokenizer: see Tokens.
        length: see Tokens.
        holdout_rows: number of rows that are held out.
        batch_size: see DataModule.
        seed: see DataModule.
        num_workers: see DataModule.
        short_prompt: see Form; None is `prompt`.
        answer_only: the tokens of the prompt are no targets, as in the training of Shortened LLaMA (arXiv 2402.02834).
        split: split of the data set on the hub.
        subset: see hub_table.
        revision: see hub_table.
        max_bad_fraction: see DataModule.
        bos: whether the token for the beginning of a text is put before every sample; "auto" does so where the
            tokenizer itself does, and where networks with it need it.
    """

    def __init__(
        self,
        path: str,
        prompt: str,
        answer: str,
        tokenizer: Tokenizer,
        length: int,
        holdout_rows: int,
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        short_prompt: str | None = None,
        answer_only: bool = True,
        split: str = "train",
        subset: str | None = None,
        revision: str | None = None,
        max_bad_fraction: float = 0.01,
        bos: bool | str = "auto",
    ) -> None:
        make = {name: functools.partial(self.make_source, name) for name in ("train", "holdout")}
        super().__init__(make, tokenizer, length, batch_size, seed, num_workers, max_bad_fraction, bos)
        self.form = Form(prompt, prompt if short_prompt is None else short_prompt, answer)
        self.holdout_rows, self.answer_only = holdout_rows, answer_only
        self.file = find_text(path) if path.endswith((".json", ".jsonl")) else None
        self.path, self.part, self.configuration, self.revision = path, split, subset, revision

    @functools.cached_property
    def rows(self) -> Sequence[Row]:
        """The rows of the table."""
        columns = list(dict.fromkeys(column for columns in self.form.columns.values() for column in columns))
        if self.file is None:
            table: Sequence[Row] = hub_table(self.path, self.part, columns, self.configuration, revision=self.revision)
            return table
        rows = read_json_rows(self.file)
        for column in columns:
            if rows and column not in rows[0]:
                raise ValueError(f"{self.path} has no column {column!r}; it has: {', '.join(rows[0])}")
        return rows

    def make_source(self, split: str) -> Source:
        """Return the samples of a split."""
        count = len(self.rows)
        if not 0 < self.holdout_rows < count:
            raise ValueError(
                f"data.holdout_rows={self.holdout_rows} is out of range; choose 1 to {count - 1}: {self.path} has "
                f"{count} rows and at least one is trained on"
            )
        order = torch.randperm(count, generator=torch_rng("holdout")).numpy()
        part = order[: self.holdout_rows] if split == "holdout" else order[self.holdout_rows :]
        beginning = self.tokenizer.get_beginning(self.bos, self.tokenizer.adds_bos or self.tokenizer.needs_bos)
        return Exchanges(
            self.rows, np.sort(part), self.form, self.tokenizer, self.length, self.answer_only, self.path, beginning
        )

    def fingerprint(self) -> str | None:
        """Return a hash of rows of the hub; None of a file, which is a part of a run's id, and of missing rows."""
        try:
            return None if self.file is not None else fingerprint_rows(self.rows)
        except MissingData:
            return None

    def trained_on(self) -> set[str]:
        if self.file is not None:
            return {hash_file(self.file)}
        return set(Texts(self.part, self.path, self.configuration).identities())


def find_columns(field: str, template: str) -> list[str]:
    """Return the names in the braces of a template; raises ValueError where there are none, or other things."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"{field}={template!r} is no template: {error}") from error
    if not names or not all(name.isidentifier() for name in names):
        raise ValueError(f"{field}={template!r} is no template; name columns in braces, such as {{instruction}}")
    return names


def has_text(row: Row, column: str) -> bool:
    """Return whether a column of a row is a text that is not blank."""
    return isinstance(row.get(column), str) and bool(row[column].strip())


def encode_exchange(
    tokenizer: Tokenizer,
    prompt: str,
    answer: str,
    length: int,
    answer_only: bool,
    beginning: Sequence[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of a prompt and its answer, int64 (length,), and a mask of those that count as targets.

    Padding and the first token never count. Raises BadSample where no token does.

    Args:
        tokenizer: the tokenizer; its token for the end of a text comes after the answer.
        prompt: the prompt.
        answer: the answer.
        length: tokens of the sample, which is cut or padded with token 0 at the right.
        answer_only: the tokens of the prompt do not count.
        beginning: ids that are put before the prompt.
    """
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    ids = [*beginning, *tokenizer(prompt + answer), *end][:length]
    first_target = len(beginning) + len(tokenizer(prompt)) if answer_only else 1
    if first_target >= len(ids):
        raise BadSample(f"its prompt of {first_target} tokens leaves none of data.length={length} for an answer")
    tokens, mask = np.zeros(length, np.int64), np.zeros(length, bool)
    tokens[: len(ids)] = ids
    mask[max(first_target, 1) : len(ids)] = True
    return tokens, mask


def read_json_rows(file: Path) -> list[Row]:
    """Return the objects in the list of a .json file, or in the lines of a .jsonl file.

    Raises ValueError for a file that cannot be read so.
    """
    text = read_text(file)
    try:
        lines = [line for line in text.split("\n") if line.strip()]
        rows = [json.loads(line) for line in lines] if file.suffix == ".jsonl" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as {file.suffix[1:]}: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file} is not a list of objects with named values")
    return rows
