"""What is sent of a file whose older version is there already."""

from hypothesis import given
from hypothesis import strategies as st

from r1export.update.lab.byte_delta import differences

lines = st.lists(
    st.sampled_from(
        [b"a line of text that is long enough to be worth keeping, and so it is kept\n", b"b\n", b"c" * 80 + b"\n"]
    ),
    max_size=8,
)


@given(lines, lines)
def test_differences_make_the_new_file_of_the_old_one(old, new):
    one, other = b"".join(old), b"".join(new)
    pieces = differences(one, other)
    assert b"".join((one if kind == "base" else other)[start:stop] for kind, start, stop in pieces) == other
    assert all(start < stop for _, start, stop in pieces)
