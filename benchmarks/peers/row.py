"""The row of a contender, as WORK/rows/NAME.json and the report of the comparison have it."""

from __future__ import annotations

from typing import NotRequired, TypedDict, final


class Said(TypedDict):
    """How a command ended, and the line of its output that tells most."""

    exit_code: int
    said: str


class Fault(Said):
    """What a contender's own check said of a planted fault, and how far off the embeddings were."""

    off_by: float


class Graph(TypedDict):
    """An image tower to be timed, and the adapter to be active in it."""

    graph: str
    adapter: NotRequired[str]


class Ratio(TypedDict):
    """A ratio of times with its 95 % interval, and the verdict of `r1export verify` on it."""

    ratio: float
    ci95: list[float]
    verdict: str


class Timing(TypedDict):
    """Median milliseconds of each graph of a contender, and ratios to its own base."""

    ms: dict[str, float]
    ratios: dict[str, Ratio]


class Timings(TypedDict):
    """Those of all contenders: WORK/timing.json."""

    contenders: dict[str, Timing]
    rounds: int
    load: float


@final
class Row(TypedDict):
    """What was measured of a contender; `timing` is added at the end, when all have been built.

    `graphs` are "base", "adapted", and "off" for an adapter that is built in but not active.
    """

    versions: dict[str, str]
    first_seconds: float
    later_seconds: float
    bundle_seconds: NotRequired[float]
    release_bytes: int
    update_bytes: int
    factor_bytes: NotRequired[int]
    parity: float
    check_on_the_sound_model: NotRequired[Said]
    faults: dict[str, Fault]
    graphs: dict[str, Graph]
    timing: NotRequired[Timing]


@final
class Failed(TypedDict):
    """The row of a contender that could not be built."""

    failed: str


Rows = dict[str, Row | Failed]
