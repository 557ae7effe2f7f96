"""The graphs that rung L5 times, as jobs on one provider."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from r1export.verify import latency
from r1export.verify.latency import BASE, Contenders, Opener
from r1export.verify.runtimes.runtime import PROVIDERS, job, open_session
from r1export.verify.steady_timing import steady_timing


def make_contenders(
    base: Path, releases: Mapping[str, Path], unmerged: Mapping[str, Path], feeds: dict[str, np.ndarray], provider: str
) -> Contenders:
    """The graphs of the base, of releases by name and of their unmerged models on one provider; on the CPU by processor time."""
    openers, controls = (
        {name: opener(path, feeds, provider) for name, path in graphs.items()} for graphs in (releases, unmerged)
    )
    contenders = Contenders(PROVIDERS[provider].name, opener(base, feeds, provider), openers, controls)
    if provider != "cpu":
        return contenders
    named = {latency.control_of(name): path for name, path in unmerged.items()}
    graphs = {BASE: base} | dict(releases) | named
    return replace(contenders, steady=steady_timing(graphs, feeds, named))


def timeable(providers: Iterable[str]) -> list[str]:
    """The providers whose latency is meaningful."""
    return [provider for provider in providers if PROVIDERS[provider].timed]


def opener(graph: Path, feeds: dict[str, np.ndarray], provider: str) -> Opener:
    """Opens a fresh session on `graph` and gives the job of running it once on `feeds`."""
    return lambda: job(open_session(graph, provider=provider), feeds, provider)
