"""JSON in bounds: each limit on its own, whatever reads the document afterwards."""

import pytest

from r1export.errors import InputError
from r1export.update.strict_json import parse_json


def test_a_document_beyond_its_limit_is_not_parsed():
    assert parse_json(b'{"a": 1}', "x", 8).integer("a") == 1
    with pytest.raises(InputError, match="9 bytes, expected at most 8"):
        parse_json(b'{"a": 1} ', "x", 8)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        ("123456789012345678", "more than 16 digits"),
        ("1e400", "too large"),
        ("-1e999", "too large"),
        ("1." + "0" * 40, "too long"),
        ("-0", "-0, which some"),
    ],
)
def test_numbers_that_no_two_parsers_read_alike_are_refused_wherever_they_stand(number, words):
    with pytest.raises(InputError, match=words):
        parse_json(b'{"x-ignored": %s}' % number.encode(), "x", 1000)


def test_an_array_has_at_most_as_many_items_as_were_asked_for():
    assert len(parse_json(b'{"a": [1, 2]}', "x", 99).array("a", 2)) == 2
    with pytest.raises(InputError, match="at most 2"):
        parse_json(b'{"a": [1, 2, 3]}', "x", 99).array("a", 2)
