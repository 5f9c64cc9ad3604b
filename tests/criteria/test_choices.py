"""Values of fields with a few choices: they are written as they stand in the configuration."""

import json

import pytest

from criteria.base import ChangeKind, Level, Needs, parse_choice, parse_level
from criteria.selection.base import Budget


@pytest.mark.parametrize("kind", [Level, Needs, ChangeKind, Budget])
def test_a_choice_is_written_shown_and_compared_as_its_value(kind):
    for choice in kind:
        assert json.dumps({"a": choice}) == json.dumps({"a": choice.value})
        assert (f"{choice}", repr(choice), hash(choice)) == (choice.value, repr(choice.value), hash(choice.value))
        assert choice == choice.value and parse_choice(kind, "field", choice.value) is choice


def test_what_is_no_choice_names_field_value_and_choices():
    with pytest.raises(ValueError, match=r"^selection\.budget='flop' is unknown; .*: params, macs, flops, latency$"):
        parse_choice(Budget, "selection.budget", "flop")
    with pytest.raises(ValueError, match=r"^criterion\.level='depth' is unknown; choose one of: channel$"):
        parse_level(Level.DEPTH, [Level.CHANNEL])
