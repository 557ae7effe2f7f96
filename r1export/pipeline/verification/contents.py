"""Check the contents of a release against those derived from the base, the factors and the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch.nn import LayerNorm

from r1export.export.model_card import model_card
from r1export.export.preprocess import has_graph
from r1export.export.write_release import rows_of
from r1export.pipeline.context import RunContext
from r1export.pipeline.golden import golden_inputs
from r1export.pipeline.variant import ReleaseRef
from r1export.pipeline.verification.accuracy import check_accuracies
from r1export.pipeline.verification.identity import WEIGHT_FILES, check_manifest_and_files
from r1export.pipeline.verification.inputs import ImageEmbeddings
from r1export.update.atomic_io import json_bytes, sha256_file
from r1export.update.factors import ExpertUpdate
from r1export.update.golden_samples import PICTURES, SAMPLES
from r1export.update.release_layout import (
    MODEL_CARD,
    MODEL_CONFIG,
    PREPROCESS,
    PREPROCESS_GRAPH,
    STATIC_GRAPHS,
    TEXTUAL,
    TOKENIZER,
    TOWERS,
    class_embeddings_file,
    class_names_file,
)  # fmt: skip
from r1export.update.release_manifest import MergedUpdate, ReleaseManifest, TaskEntry
from r1export.verify import contents
from r1export.verify.client_files import ClientTokenizer, ListedClasses, check_preprocess, check_tokenizer
from r1export.verify.contents import Embed, attempt
from r1export.verify.golden import check_classifier, check_golden, read_golden
from r1export.verify.graph_digest import graph_digests
from r1export.verify.results import SKIPPED, UNSIGNED, Check, Contents, Verdict, overall
from r1export.verify.runtimes.runtime import open_session, runner
from r1export.verify.static_graphs import check_static_graphs

BATCH = 64  # prompts embedded at a time
TOWER_GRAPHS = tuple(tower.graph for tower in TOWERS)


def check_contents(
    ref: ReleaseRef, manifest: ReleaseManifest, embeddings: ImageEmbeddings, merged: Mapping[str, np.ndarray]
) -> Contents:
    """Everything that can be known of the contents of a run's release.

    `embeddings` are those of test images, `merged` the parameters of the merged model in fp32.
    """
    context, path = ref.context, ref.path
    tasks = [task.name for task in context.tasks]
    identity = check_manifest_and_files(path, manifest, tasks, expected_fields(ref))
    if overall(check.verdict for check in identity.values()) is Verdict.FAIL:
        return Contents.only(SKIPPED, **identity)
    parameters = merged if ref.variant.is_reference else ref.variant.tensors(ref.updates)
    updates = list(zip(ref.learned, ref.updates, strict=True))
    epsilons = {
        name: module.eps for name, module in context.clip.model.named_modules() if isinstance(module, LayerNorm)
    }
    count, classes = len(parameters), sum(len(task.classes) for task in context.tasks)
    return Contents(
        **identity,
        base=contents.check_base(manifest, context.base_sha256, "the base model of the run"),
        graphs=attempt(lambda: _check_graphs(ref, manifest, epsilons), of=len(epsilons)),
        tensors=attempt(lambda: _check_tensors(ref, manifest, parameters), of=count),
        weights=attempt(lambda: contents.check_weights(path, manifest, parameters, updates), of=count),
        preprocess=attempt(lambda: _check_preprocess(ref), of=PICTURES),
        tokenizer=attempt(lambda: _check_tokenizer(ref), of=SAMPLES),
        classes=attempt(lambda: _check_classes(ref), of=classes),
        classifier=attempt(lambda: check_classifier(path, tasks, parameters), of=len(tasks)),
        golden=attempt(lambda: _check_golden(ref, manifest), of=SAMPLES),
        accuracy=attempt(lambda: check_accuracies(ref, manifest, embeddings), of=len(tasks)),
        card=attempt(lambda: contents.check_text(path / MODEL_CARD, model_card(manifest)), of=1),
        signature=UNSIGNED,
    )


def expected_fields(ref: ReleaseRef) -> dict[str, object]:
    """The fields of a manifest that follow from the run. Accuracies of variants are measured when they are written."""
    context, variant = ref.context, ref.variant
    facts: dict[str, object] = {
        "name": ref.path.name,
        "sequence": ref.number,
        "procedure": variant.procedure,
        "precision": variant.precision,
        "base": replace(context.run.base(), sha256=context.base_sha256),
        "updates": tuple(
            MergedUpdate(name, sha256_file(context.run.task(i, name).factors)) for i, name in enumerate(ref.learned, 1)
        ),
        "graphs": graph_digests(variant.exports.graphs),
        "golden": variant.tolerance,
    }
    return facts | ({"tasks": _expected_tasks(ref)} if variant.is_reference else {})


def _expected_tasks(ref: ReleaseRef) -> tuple[TaskEntry, ...]:
    accuracies = ref.context.run.metrics().after(ref.number)
    return tuple(
        TaskEntry(task.name, len(task.classes), task.name in ref.learned, accuracies[task.name])
        for task in ref.context.tasks
    )


def _check_graphs(ref: ReleaseRef, manifest: ReleaseManifest, epsilons: Mapping[str, float]) -> Check:
    """The epsilons are the model's, and the static graphs, if the recipe asks for them, are the exported ones and compute the same."""
    checks = [contents.check_epsilons(ref.path, TOWER_GRAPHS, epsilons)]
    exported = [name for name in STATIC_GRAPHS if (ref.variant.exports.graphs / name).exists()]
    if exported:
        detail = "the static graphs are the exported ones"
        checks.append(contents.check_same_files(ref.path, ref.variant.exports.graphs, exported, detail))
    return Check.joined([*checks, *check_static_graphs(ref.path, manifest)])


def _check_tensors(ref: ReleaseRef, manifest: ReleaseManifest, parameters: Mapping[str, np.ndarray]) -> Check:
    """The map fits the files, and its rows are those that the run's experts change, of all tasks that there were at export.

    Without the factors of all tasks only the rows of those that are there are known.
    """
    context = ref.context
    updates = context.run.updates(context.recipe)
    whole = len(updates) == len(context.recipe.stream)
    adapted = [tuple(ExpertUpdate.stack(updates[:count]).factors) for count in range(ref.number, len(updates) + 1)]
    problems = [
        f"manifest.json: rows of {name} are {entry.rows}, which differ from the factors"
        for name, entry in manifest.tensors.items()
        if (whole or any(rows.parameter == name for rows in adapted[0]))
        and name in parameters
        and entry.rows not in {rows_of(name, parameters[name].shape, rows) for rows in adapted}
    ]
    count = len(manifest.tensors)
    rows = Check.judge(problems, looked_at=count, of=count, detail="rows match the factors")
    return Check.joined([contents.check_tensor_map(ref.path, manifest, WEIGHT_FILES), rows])


def _check_golden(ref: ReleaseRef, manifest: ReleaseManifest) -> Check:
    """The samples are those of the run's tasks, and the release reproduces them.

    Pictures may differ by what decoders of JPEG differ by: a byte on average.
    """
    stored, expected = read_golden(ref.path), golden_inputs(ref.context)
    pixels, byte = ref.context.clip.preprocess.normalize(expected.pixels).numpy(), _byte(ref)
    problems = []
    if stored.prompts != expected.prompts or not np.array_equal(stored.input_ids, expected.tokens.cpu().numpy()):
        problems.append("the golden prompts don't match the tasks")
    if (
        stored.pixel_values.shape != pixels.shape
        or not np.abs(stored.pixel_values - pixels).mean((1, 2, 3)).max() <= byte
    ):
        problems.append("the golden images don't match the tasks")
    pairs = list(zip(stored.pictures, expected.pictures, strict=False))
    if any(a.shape != b.shape or not np.abs(a.astype(float) - b).mean() <= 1 for a, b in pairs):
        problems.append("the golden images before preprocessing don't match the tasks")
    count = len(pairs) + len(stored.prompts)
    chosen = Check.judge(problems, looked_at=count, of=PICTURES + SAMPLES, detail="its samples match the tasks")
    return Check.joined([chosen, check_golden(ref.path, manifest)])


def _byte(ref: ReleaseRef) -> float:
    """One of 256 steps of a colour, in units of pixel_values."""
    return 1 / 255 / float(min(ref.context.clip.preprocess.to_json()["std"]))


def _check_preprocess(ref: ReleaseRef) -> Check:
    """Check that the files match the run's model, and preprocess images as the model does."""
    expected = json_bytes(ref.context.clip.preprocess.to_json())
    problems = [] if (ref.path / PREPROCESS).read_bytes() == expected else [f"{PREPROCESS} differs from the model's"]
    config = json_bytes(ref.context.clip.to_open_clip_config())
    if (ref.path / MODEL_CONFIG).exists() and (ref.path / MODEL_CONFIG).read_bytes() != config:
        problems.append(f"{MODEL_CONFIG} differs from the model's")
    exported = ref.variant.exports.graphs / PREPROCESS_GRAPH
    here = ref.path / PREPROCESS_GRAPH
    if exported.exists() != here.exists() or (here.exists() and exported.read_bytes() != here.read_bytes()):
        problems.append(f"{PREPROCESS_GRAPH} differs from the exported one")
    files = Check.judge(problems, looked_at=3, of=3, detail="the files match the model")
    graph = has_graph(ref.context.clip.preprocess.to_json())
    return Check.joined([files, check_preprocess(ref.path, read_golden(ref.path), graph)])


def _check_tokenizer(ref: ReleaseRef) -> Check:
    """Check that the files match the run's tokenizer, and give its ids."""
    written = ref.context.tokenizer_files
    here = {path.name: path.read_bytes() for path in (ref.path / TOKENIZER).iterdir()}
    problems = [
        f"{TOKENIZER}/{name} differs from the model's" for name in sorted(written) if here.get(name) != written[name]
    ]
    files = Check.judge(problems, looked_at=len(written), of=len(written), detail="the files match the model")
    return Check.joined([files, check_tokenizer(ref.path, read_golden(ref.path)), _check_prompts(ref)])


def _check_prompts(ref: ReleaseRef) -> Check:
    """Check that clients get the same ids as in training for every class name: their text cleaning has limits."""
    prompts = [task.templates[0].replace("{}", name) for task in ref.context.tasks for name in task.classes]
    expected, found = ref.context.clip.tokenize(prompts).cpu().numpy(), ClientTokenizer(ref.path)(prompts)
    same = (expected == found).all(1) if found.shape == expected.shape else np.zeros(len(prompts), bool)
    problems = [f"tokenizer.json gives wrong input_ids for {prompts[i][:60]!r}" for i in np.flatnonzero(~same)[:3]]
    return Check.judge(problems, looked_at=len(prompts), of=len(prompts), detail="the ids of every class name match")


def _check_classes(ref: ReleaseRef) -> Check:
    """Class embeddings follow from the text tower in fp32; the other precisions carry the same files."""
    tasks = ref.context.tasks
    if not ref.variant.is_reference:
        files = [name(task.name) for task in tasks for name in (class_embeddings_file, class_names_file)]
        detail = f"the embeddings of {len(tasks)} tasks match the fp32 release"
        return contents.check_same_files(ref.path, ref.reference.path, files, detail)
    lists = [ListedClasses(task.name, task.classes, task.templates, task.name in ref.learned) for task in tasks]
    problems = [
        f"{class_names_file(one.task)} differs from the task"
        for one in lists
        if ListedClasses.read(ref.path / class_names_file(one.task)) != one
    ]
    named = Check.judge(problems, looked_at=len(lists), of=len(lists), detail="the names match the tasks")
    embed = _embedder(ref.context, ref.path)
    return Check.joined([named, contents.check_class_embeddings(ref.path, lists, embed, 2 * ref.variant.gate.max_abs)])


def _embedder(context: RunContext, path: Path) -> Embed:
    """Prompts -> embeddings by the release's own text tower, with the tokenizer of the lab."""
    run = runner(open_session(path / TEXTUAL.graph))

    def embed(prompts: list[str]) -> np.ndarray:
        tokens = context.clip.tokenize(prompts).cpu().numpy()
        return np.concatenate([run({TEXTUAL.input: tokens[i : i + BATCH]}) for i in range(0, len(tokens), BATCH)])

    return embed
