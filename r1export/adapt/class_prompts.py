"""Check that the classes of a task have different tokens, so that the text tower can distinguish them."""

from __future__ import annotations

import numpy as np

from r1export.adapt.clip import Clip
from r1export.data.task import Task
from r1export.errors import InputError

_TAILS = (" one", " two")  # what could follow a class name: both are lost if there is no room for a token after it


def check_prompts(clip: Clip, task: Task) -> None:
    """Refuse class names that give the same tokens, and prompts that are cut off before the class name ends.

    Raises InputError with the names: they differ in what the tokenizer drops, such as case, spaces, or the form of Unicode,
    or the template and the name are as long as the text tower reads, or longer.
    """
    template = max(task.templates, key=lambda each: len(each.partition("{}")[0].encode()))
    for each in dict.fromkeys((task.templates[0], template)):
        _refuse_cut_off(clip, task, each)
        _refuse_same(clip, task, each)


def _refuse_same(clip: Clip, task: Task, template: str) -> None:
    seen: dict[bytes, str] = {}
    for name, row in zip(task.classes, _rows(clip, [template.format(name) for name in task.classes]), strict=True):
        other = seen.setdefault(row.tobytes(), name)
        if other != name:  # a probe may repeat a name
            raise InputError(
                f"{task.name}: the classes {other!r} and {name!r} are the same for the text tower: its tokenizer gives both "
                f"the same tokens",
                "rename one of them",
            )


def _refuse_cut_off(clip: Clip, task: Task, template: str) -> None:
    heads = [template.partition("{}")[0] + name for name in task.classes]
    first, second = (_rows(clip, [head + tail for head in heads]) for tail in _TAILS)
    cut = np.flatnonzero((first == second).all(axis=1))
    if len(cut):
        more = f" (and {len(cut) - 1} more)" if len(cut) > 1 else ""
        raise InputError(
            f"{task.name}: the class {task.classes[cut[0]][:60]!r}{more} in the template {template[:60]!r} fills or exceeds the "
            f"{first.shape[1]} tokens that the text tower reads, which cuts the name off",
            "shorten the name or the template",
        )


def _rows(clip: Clip, texts: list[str]) -> np.ndarray:
    """The tokens of texts, int64 (n, L)."""
    rows: np.ndarray = clip.tokenize(texts).cpu().numpy()
    return rows
