"""Instructions with their answers as samples of token ids, such as Alpaca's."""

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

from datamodules.readers.base import BadSample, Source
from datamodules.readers.hub import hub_table
from datamodules.seeding import torch_rng
from datamodules.texts.corpus import Texts, Tokens
from datamodules.texts.tokens import Tokenizer, file_sha256, found, read

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Form:
    """How a row becomes a prompt and an answer: templates with names of columns in braces.

    `short_prompt` is for rows in which a column of `prompt` is empty. Raises ValueError for what is no template.
    """

    prompt: str
    short_prompt: str
    answer: str

    def __post_init__(self) -> None:
        assert self.columns

    @functools.cached_property
    def columns(self) -> dict[str, list[str]]:
        """The columns that each template names."""
        return {text: columns_of(f"data.{field}", text) for field, text in dataclasses.asdict(self).items()}

    def written(self, row: Row) -> tuple[str, str]:
        """Prompt and answer of a row. Raises BadSample where a column has no text."""
        whole = all(has_text(row, column) for column in self.columns[self.prompt])
        prompt = self.prompt if whole else self.short_prompt
        for column in (*self.columns[prompt], *self.columns[self.answer]):
            if not has_text(row, column):
                raise BadSample(f"column {column!r} has no text")
        return prompt.format_map(row), self.answer.format_map(row)


class Exchanges:
    """Some rows as samples of `length` tokens: a prompt, its answer, the end of the text; cut or padded at the right.

    Padding is token 0, which no token before it sees. `name` is what the table is called in messages.
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
        """{"tokens": int64 (N, length), "mask": bool (N, length), of those that count as targets}"""
        samples = [self.sample(int(number)) for number in self.numbers[indices]]
        tokens, mask = (np.stack(part) for part in zip(*samples, strict=True))
        return {"tokens": tokens, "mask": mask}

    def sample(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            prompt, answer = self.form.written(self.rows[number])
            return masked(self.tokenizer, prompt, answer, self.length, self.answer_only, self.beginning)
        except BadSample as error:
            raise BadSample(f"{self.name}, row {number}: {error}") from error


class Instructions(Tokens):
    """Rows of a table as instructions with their answers, of which `holdout_rows` random ones are never trained on.

    `path` is a .json file (a list of objects) or a .jsonl file (one a line), looked up as those of Texts, or the id of
    a data set on the Hugging Face hub, with its `split`, `subset` and `revision`. `prompt`, `short_prompt` (null: as
    `prompt`) and `answer` are the templates of a Form.

    With `answer_only` the tokens of the prompt are no targets, as in the training of Shortened LLaMA (arXiv
    2402.02834). Rows without a text that is needed, or whose prompt leaves no room for an answer, are bad samples. The
    same rows are held out whatever the seed. Raises ValueError for a column that is not there and for a table that
    cannot be read, MissingData where there is none.
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
        make = {name: functools.partial(self.made, name) for name in ("train", "holdout")}
        super().__init__(make, tokenizer, length, batch_size, seed, num_workers, max_bad_fraction, bos)
        self.form = Form(prompt, prompt if short_prompt is None else short_prompt, answer)
        self.holdout_rows, self.answer_only = holdout_rows, answer_only
        self.file = found(path) if path.endswith((".json", ".jsonl")) else None
        self.path, self.part, self.configuration, self.revision = path, split, subset, revision

    @functools.cached_property
    def rows(self) -> Sequence[Row]:
        wanted = list(dict.fromkeys(column for columns in self.form.columns.values() for column in columns))
        if self.file is None:
            return hub_table(self.path, self.part, wanted, self.configuration, revision=self.revision)
        rows = json_rows(self.file)
        for column in wanted:
            if rows and column not in rows[0]:
                raise ValueError(f"{self.path} has no column {column!r}; it has: {', '.join(rows[0])}")
        return rows

    def made(self, split: str) -> Source:
        count = len(self.rows)
        if not 0 < self.holdout_rows < count:
            raise ValueError(
                f"data.holdout_rows={self.holdout_rows} is out of range; {self.path} has {count} rows, of which at "
                "least one is held out and one is trained on"
            )
        order = torch.randperm(count, generator=torch_rng("holdout")).numpy()
        part = order[: self.holdout_rows] if split == "holdout" else order[self.holdout_rows :]
        beginning = self.tokenizer.beginning(self.bos, self.tokenizer.adds_bos or self.tokenizer.needs_bos)
        return Exchanges(
            self.rows, np.sort(part), self.form, self.tokenizer, self.length, self.answer_only, self.path, beginning
        )

    def trained_on(self) -> set[str]:
        if self.file is not None:
            return {file_sha256(self.file)}
        return set(Texts(self.part, self.path, self.configuration).identities())


def columns_of(field: str, template: str) -> list[str]:
    """The names in the braces of a template; ValueError where there are none, or other things."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"{field}={template!r} is no template: {error}") from error
    if not names or not all(name.isidentifier() for name in names):
        raise ValueError(f"{field}={template!r} is no template; name columns in braces, such as {{instruction}}")
    return names


def has_text(row: Row, column: str) -> bool:
    return isinstance(row.get(column), str) and bool(row[column].strip())


def masked(
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


def json_rows(file: Path) -> list[Row]:
    """The objects of a .json file with a list of them, or of the lines of a .jsonl file."""
    text = read(file)
    try:
        lines = [line for line in text.split("\n") if line.strip()]
        rows = [json.loads(line) for line in lines] if file.suffix == ".jsonl" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as {file.suffix[1:]}: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file} is no list of objects with named values")
    return rows
