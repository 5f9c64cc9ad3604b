"""Nested dictionaries under joined names."""

import pytest

from conf.nested import flatten_dict

NESTED = {"a": {"b": 1, "c": {"d": [{"e": 2}]}}, "f": None, "g": {}}


@pytest.mark.parametrize("separator", [".", "/"])
def test_only_dictionaries_are_flattened(separator):
    assert flatten_dict(NESTED, separator) == {f"a{separator}b": 1, separator.join("acd"): [{"e": 2}], "f": None}
    assert flatten_dict(NESTED) == flatten_dict(NESTED, ".")
