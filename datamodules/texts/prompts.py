"""Prompts from a file, for evaluations that do not use the captions of the data set."""

import pandas as pd

from datamodules.readers.base import located


def read_prompts(path: str, column: str | None = None) -> list[str]:
    """Return the lines of a text file that are not empty, or one `column` of a .csv file with a header, in their order.

    A relative `path` is looked up in $SECATEUR_DATA, too. Raises MissingData where the file does not exist, and
    ValueError for a missing column and for an empty prompt in it.
    """
    file = located(path, "evaluation.prompts.path names it; put it there")
    if file.suffix != ".csv":
        prompts = [line.strip() for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    else:
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
        if column not in table:
            raise ValueError(f"evaluation.prompts.column={column!r} is not in {file}; it has: {', '.join(table)}")
        prompts = table[column].str.strip().tolist()
    if not all(prompts) or not prompts:
        raise ValueError(f"evaluation.prompts.path={path!r}: a prompt is empty, or there is none")
    return prompts
