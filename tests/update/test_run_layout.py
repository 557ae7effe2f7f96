"""Paths in a run and in a release: what docs/formats.md says, from names and numbers alone."""

import re
from pathlib import Path

from r1export.update import release_layout
from r1export.update.names import PATH
from r1export.update.run_layout import RunLayout

DOCS = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
RUN = RunLayout(Path("RUN"))


def test_every_path_of_a_run_is_documented() -> None:
    task = RUN.task(3, "NAME")
    paths = [
        RUN.recipe_file, RUN.run_json, RUN.metrics_file, RUN.zero_shot, RUN.graphs(), RUN.variant().weight_map, RUN.tensorboard,
        task.factors, task.pool, task.metrics, task.accuracy, task.checkpoint,
    ]  # fmt: skip
    for path in paths:
        assert str(path.relative_to("RUN")).replace("03-", "NN-") in DOCS, path


def test_variants_lie_in_folders_of_their_own_with_the_same_names() -> None:
    assert RUN.releases(["a", "b"]) == [Path("RUN/releases") / name for name in ("00-base", "01-a", "02-b")]
    assert RUN.releases(["a"], "int8") == [Path("RUN/variants/int8/releases") / name for name in ("00-base", "01-a")]
    assert RUN.release(1, "a", "fp16") == RUN.variant("fp16").release(1, "a")
    assert RUN.release(0) == Path("RUN/releases/00-base")
    assert RUN.graphs("fp16") == Path("RUN/variants/fp16/graphs")


def test_trained_tasks_are_those_with_factors_in_order(tmp_path: Path) -> None:
    run = RunLayout(tmp_path)
    for number, name in ((2, "b"), (1, "a"), (3, "c")):
        run.task(number, name).path.mkdir(parents=True)
        if number < 3:
            run.task(number, name).factors.write_bytes(b"")
    assert run.trained() == [run.task(1, "a"), run.task(2, "b")]
    assert RunLayout(tmp_path / "nothing").trained() == []


def test_every_file_of_a_release_is_documented_and_may_be_in_a_manifest() -> None:
    section = DOCS.split("## A release\n")[1].split("**`manifest.json`**")[0]
    documented = {line.split()[0] for line in section.splitlines() if re.match(r" {4}\S", line)}
    files = {
        *release_layout.GRAPHS, *release_layout.WEIGHTS.values(), release_layout.PREPROCESS_GRAPH, release_layout.PREPROCESS, release_layout.MODEL_CONFIG,
        f"{release_layout.TOKENIZER}/", release_layout.class_embeddings_file("TASK"), release_layout.class_names_file("TASK"),
        release_layout.GOLDEN, *release_layout.UNLISTED,
    }  # fmt: skip
    assert documented == files - {release_layout.UPDATE}
    assert all(PATH.fullmatch(name.rstrip("/")) for name in files)
