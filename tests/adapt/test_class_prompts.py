"""Classes that the text tower cannot tell apart are refused by name, by comparing tokens."""

from dataclasses import replace

import pytest

from r1export.adapt.class_prompts import check_prompts
from r1export.errors import InputError


@pytest.mark.parametrize(
    "pair",
    [
        ("T-Shirt", "t-shirt"),
        ("polar bear", "polar  bear"),
        ("caf\u00e9", "cafe\u0301"),
        ("cat", "\uff43\uff41\uff54"),
        ("salt & pepper", "salt &amp; pepper"),
        ("cat", " cat "),
        ("cat", "cat\u00a0"),
    ],
)
def test_names_with_the_same_tokens_are_refused(tiny_clip, stripes, pair) -> None:
    with pytest.raises(InputError, match=r"are the same for the text tower.*rename one") as refused:
        check_prompts(tiny_clip, replace(stripes, classes=("dog", *pair)))
    assert all(repr(name) in str(refused.value) for name in pair)


def test_names_that_differ_in_a_token_are_accepted(tiny_clip, stripes) -> None:
    check_prompts(
        tiny_clip, replace(stripes, classes=("cat", "cats", "cat!", "ca t", "c\u00e2t", "\u732b", "\U0001f408"))
    )


@pytest.mark.parametrize("template", ["{}", "a photo of {}.", "a photo of the very small {}"])
def test_a_name_that_is_cut_off_is_refused_and_one_that_leaves_room_is_not(tiny_clip, stripes, template) -> None:
    room = tiny_clip.tokenize([""]).shape[1] - 2 - len(template.partition("{}")[0].split())
    fits, cut = " ".join(["cat"] * (room - 1)), " ".join(["cat"] * (room + 1))
    check_prompts(tiny_clip, replace(stripes, templates=(template,), classes=("dog", fits)))
    with pytest.raises(InputError, match=r"the class 'cat cat.* 12 tokens .*shorten the name or the template"):
        check_prompts(tiny_clip, replace(stripes, templates=(template,), classes=("dog", cut)))


def test_the_template_with_the_longest_beginning_decides(tiny_clip, stripes) -> None:
    templates = ("{}", "a b c d e f g h i j k l m {}")
    with pytest.raises(InputError, match="shorten the name or the template"):
        check_prompts(tiny_clip, replace(stripes, templates=templates))
