"""A recipe: everything that decides what a run computes, as one TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from r1export.errors import InputError, refused
from r1export.recipe_paths import find_recipe, resolve_fields, resolve_sources, shipped_recipes, sources
from r1export.update.names import is_special


@dataclass(frozen=True)
class Retired:
    """A field of earlier recipes, or a value of one, and what to write now."""

    field: str
    value: str | None
    """None if any value of the field is meant."""
    advice: str

    def __str__(self) -> str:
        return f"{self.field}" if self.value is None else f'{self.field} = "{self.value}"'

    def used_in(self, values: Mapping[str, Any]) -> bool:
        """Whether the tables of a recipe say so."""
        section, _, name = self.field.partition(".")
        table = values.get(section)
        if not isinstance(table, dict) or name not in table:
            return False
        return self.value is None or self.value in (table[name] if isinstance(table[name], list) else [table[name]])


RETIRED = (
    Retired("train.keep", None, "write train.distill_weight"),
    Retired("pool.towers", "text", 'write "textual"'),
    Retired(
        "pool.gate",
        "frequency",
        'write "binary": weights by votes gained nothing (docs/experiments/negative-results.md)',
    ),
    Retired(
        "train.orthogonality",
        "input",
        'write "output": the input side gained nothing (docs/experiments/negative-results.md)',
    ),
)

TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class _Section(BaseModel):
    """A table of a recipe. Types are strict: true is no number, and "20" is none either."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, strict=True
    )

    @model_validator(mode="before")
    @classmethod
    def _arrays(cls, values: Any) -> Any:
        """TOML's arrays as tuples, which is what strict types expect."""
        if not isinstance(values, dict):
            return values
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


Colour = tuple[float, float, float]


class Base(_Section):
    """The CLIP model that is fine-tuned: an open_clip name with a pretrained tag, a folder or repository, local weights, or `builtin:NAME`."""

    model: str = ""
    """open_clip model name, `local-dir:FOLDER` or `hf-hub:OWNER/NAME` (as open_clip saves them), or one that comes with r1export:
    `builtin:photo` knows photographs, `builtin:world` drawn shapes."""
    pretrained: str = ""
    """Pretrained tag of open_clip for `model`."""
    weights: str = ""
    """Local `.safetensors` file instead of a tag."""
    config: str = ""
    """open_clip config JSON for `weights`, with or without `preprocess_cfg`, where `model` is not one of open_clip's own names."""
    tokenizer: str = ""
    """Local `tokenizer.json`, or a folder with one, in place of the tokenizer that the model's config names."""
    image_size: int | None = Field(None, ge=1, le=4096)
    """Side of the images in pixels, where it is not that of the config: position embeddings are resized."""
    mean: Colour | None = None
    """Mean of red, green and blue as shares of 1; unset takes that of the config, the tag, or all tags of the model."""
    std: Colour | None = None
    """Standard deviation of red, green and blue, likewise."""
    interpolation: Literal["bicubic", "bilinear"] | None = None
    """Filter with which images are resized, likewise."""
    resize_mode: Literal["shortest", "longest", "squash"] | None = None
    """Whether the shortest side is resized and the rest cropped, the longest and the rest filled, or both sides, likewise."""
    quick_gelu: bool | None = None
    """Whether the model computes with QuickGELU, as OpenAI's do; unset takes that of the config or the tag."""
    allow_pickle: bool = False
    """Read weights that are a pickle (`.pt`, `.bin`), which can run code: for sources that you trust."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.model.startswith("builtin:"):
            if others := self.model_dump(exclude_defaults=True).keys() - {"model"}:
                raise ValueError(f"{self.model} is complete: remove {', '.join(sorted(others))}")
            return self
        if self.model.startswith(("local-dir:", "hf-hub:")):
            if self.pretrained or self.weights or self.config:
                raise ValueError(f"{self.model} has weights and a config: remove pretrained, weights and config")
            return self
        if bool(self.pretrained) == bool(self.weights):
            raise ValueError("give either pretrained (a tag) or weights (a .safetensors file)")
        if bool(self.model) == bool(self.config):
            raise ValueError("give model (an open_clip name) or config (a JSON file), one of them")
        return self

    @model_validator(mode="after")
    def _colours(self) -> Self:
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std {list(self.std)} has to be greater than 0")
        return self


class Data(_Section):
    """Where images come from."""

    root: str = ""
    """Folder to which relative paths in sources refer, by default that of the recipe; torchvision keeps its data sets there."""
    shots: int = Field(0, ge=0)
    """Training images per class; 0 takes all."""
    test_limit: int = Field(0, ge=0)
    """Test images per task, drawn by seed; 0 takes all."""
    download: bool = False
    """Let torchvision or the Hugging Face Hub download a data set that is not there."""
    decode: Literal["r1export", "open_clip"] = "r1export"
    """`r1export` decodes pictures as clients show them (docs/inputs.md); `open_clip` leaves that to open_clip's transform."""
    skip_broken: bool = False
    """Leave out pictures that cannot be read, and list them in the report, instead of ending with an error."""
    augment: Literal["none", "crop"] = "none"
    """`crop` trains on random crops of 90 to 100 % of each image: one of each where `shots` are few, anew at every visit where all are taken."""
    candidates: Literal["task", "all"] = "task"
    """Classes among which a test image is classified: those of its task, or of all tasks together (X-TAIL)."""


class TaskSource(_Section):
    """One task of the sequence."""

    name: TaskName
    """Name of the task, of letters, digits, `_`, `.` and `-`; releases, updates and files are named after it."""
    source: str
    """`torchvision:NAME`, `folder:DIR`, `npz:FILE`, `hf:NAME` (Hugging Face; `hf:NAME:CONFIG`) or `builtin:NAME`."""
    templates: tuple[str, ...] = ()
    """Prompts with one `{}` for the class name; empty takes those of the source."""

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if is_special(name):
            raise ValueError("Windows or a device treats files of this name specially: choose another name")
        return name


class Pool(_Section):
    """The pool of rank-1 experts in every adapted linear. Defaults: arXiv 2601.22828."""

    rank: int = Field(12, ge=1, le=4096)
    """Experts in the pool."""
    k_train: int = Field(8, ge=1)
    """Experts that one batch trains."""
    k_merge: int = Field(4, ge=1)
    """Experts that are merged at the end of a task."""
    alpha: float = Field(1.0, gt=0)
    """Scaling is alpha / rank."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Dropout on the input of the experts."""
    factors: Literal["fp32", "fp16"] = "fp32"
    """Precision in which merged experts are packed and shipped: `fp16` halves the updates of devices."""
    router: Literal["random", "straight-through"] = "random"
    """`random` keeps the router as it was drawn, as the published code does; `straight-through` trains it."""
    text_token: Literal["start", "end"] = "start"
    """Token that votes in the text tower: the start sees nothing of the text, the end carries the label."""
    past: Literal["merged", "pool"] = "merged"
    """Experts of earlier tasks that the orthogonality loss keeps new ones off: those merged, or all of their pools, as the released code does."""
    gate: Literal["binary", "sparse"] = "binary"
    """Weights of merged experts: 1, or trained and made sparse (CoDyRA; no router then)."""
    towers: tuple[Literal["visual", "textual"], ...] = ("visual", "textual")
    """Towers that get experts."""
    targets: tuple[Literal["q", "k", "v", "out", "fc", "proj", "conv"], ...] = ("q", "k", "v", "out", "fc", "proj")
    """Layers of a block that get experts: attention q, k, v, out; fc and proj, the linears of an MLP or the pointwise
    convolutions (the last is proj); conv, convolutions with larger kernels. Depthwise and grouped ones never do."""
    layers: tuple[int, ...] = ()
    """Blocks of each tower that get experts, counted from 0 over all stages; empty takes all. Negative numbers count from the last
    block, which is -1, and a tower with fewer blocks has experts in those that it has."""

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if max(self.k_train, self.k_merge) > self.rank:
            raise ValueError(f"k_train {self.k_train} and k_merge {self.k_merge} may not exceed rank {self.rank}")
        if not self.towers or not self.targets:
            raise ValueError("towers and targets may not be empty")
        return self


class Train(_Section):
    """Optimisation of one task. Defaults: arXiv 2601.22828, but for `distill_weight`, `consolidate`, `protect` and `protect_own`, which
    forget less (docs/experiments/forgetting.md)."""

    iterations: int = Field(500, ge=1)
    """Steps per task."""
    batch_size: int = Field(32, ge=2)
    """Images per step."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak learning rate of AdamW."""
    min_learning_rate: float = Field(1e-6, ge=0)
    """Where the cosine schedule ends."""
    weight_decay: float = Field(1e-2, ge=0)
    """Weight decay of AdamW."""
    method: Literal["experts", "full"] = "experts"
    """`full` fine-tunes every weight: a baseline for `r1export train`, whose updates are as large as the model."""
    loss: Literal["in-batch", "all-classes"] = "in-batch"
    """Contrastive among the classes of a batch, or cross-entropy over every class of the task."""
    orthogonality: Literal["output", "none"] = "output"
    """`output` penalizes overlap with the experts that earlier tasks merged."""
    orthogonality_weight: float = Field(0.1, ge=0)
    """Weight of the activation-guided orthogonality loss, from the second task on."""
    protect: float = Field(0.9, ge=0, lt=1)
    """Share of the energy of earlier tasks' inputs whose directions new experts don't read, so that earlier answers hardly move; 0 is off."""
    protect_own: float = Field(0.8, ge=0, lt=1)
    """The same for the inputs that the task's own images give before it is trained: they stand for what the model knows; 0 is off."""
    distill_weight: float = Field(1.0, ge=0)
    """Weight of the distillation loss, which preserves the previous model's predictions on the task's images and reference names; 0 is off."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` computes the frozen model under autocast; experts and their optimiser stay in float32."""
    consolidate: float = Field(0.3, ge=0, le=1)
    """Share of the iterations after which the experts with the most votes are fixed and trained alone; 1 never fixes them."""
    checkpoint_every: int = Field(50, ge=1)
    """Steps between checkpoints inside a task."""
    tensorboard: bool = False
    """Log losses, images per second and accuracies into RUN/tensorboard; needs the extra `tensorboard`."""
    seed: int = Field(42, ge=0)
    """Decides images, batches, initial factors and dropout."""


class Export(_Section):
    """The ONNX graphs."""

    opset: int = Field(20, ge=18, le=23)
    """ONNX opset of the graphs."""
    variants: tuple[Literal["fp16", "int8"], ...] = ()
    """Precisions in which every release is written besides fp32, each with its own graphs, gates and accuracy."""


class Verify(_Section):
    """Parity and latency."""

    samples: int = Field(0, ge=0)
    """Real test images and prompts of each task that parity is measured on; 0 takes 32, fewer for large models."""
    batches: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 2, 5), min_length=1)
    """Batch sizes of the parity check."""
    max_abs: float = Field(5e-5, gt=0)
    """Largest allowed difference of unit-norm embeddings; four times the base model's own error is allowed if larger."""
    min_cosine: float = Field(1 - 1e-6, gt=0, le=1)
    """Smallest allowed cosine of any sample."""
    margin: float = Field(0.02, gt=0, lt=1)
    """Merged and base latency count as equal within this share."""
    pairs: int = Field(400, ge=20)
    """Interleaved base/merged pairs of the latency check, at least: it goes on until the interval is narrow; fewer if they take over 12 s."""
    images: int = Field(0, ge=0)
    """Test images of each task on which the freezing and shrink gaps (G2, G3) and the embedding drift are measured; 0 takes 200, fewer for large models."""


class Recipe(_Section):
    """One run: a base model and a sequence of tasks."""

    base: Base
    tasks: tuple[TaskSource, ...] = Field(min_length=1)
    order: tuple[str, ...] = ()
    """Task names in the order in which they are trained; empty takes the order of `tasks`."""
    probe: TaskSource | None = None
    """Test-only data that shows how much the base model forgets."""
    data: Data = Data()
    pool: Pool = Pool()
    train: Train = Train()
    export: Export = Export()
    verify: Verify = Verify()

    @model_validator(mode="before")
    @classmethod
    def _name_the_probe(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("probe"), dict):
            return values | {"probe": {"name": "probe"} | values["probe"]}
        return values

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [task.name for task in self.tasks]
        if len({name.lower() for name in names}) != len(names):
            raise ValueError("two tasks have the same name")
        if self.probe and self.probe.name.lower() in {name.lower() for name in names}:
            raise ValueError(f"the probe and a task are both named {self.probe.name}: give probe.name another")
        if self.order and sorted(self.order) != sorted(names):
            raise ValueError(f"order must name each task once: {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _thresholds(self) -> Self:
        gate, consolidate = self.pool.gate, self.train.consolidate
        if gate == "sparse" and consolidate < 1:
            raise ValueError(
                f'pool.gate "sparse" is thresholded until the end, train.consolidate {consolidate} fixes it before: set it to 1'
            )
        return self

    @property
    def stream(self) -> tuple[TaskSource, ...]:
        """The tasks in the order in which they are trained."""
        by_name = {task.name: task for task in self.tasks}
        return tuple(by_name[name] for name in self.order) if self.order else self.tasks

    def dumps(self) -> str:
        """The whole recipe, defaults included, as TOML: `Recipe.model_validate(tomllib.loads(recipe.dumps())) == recipe`."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def in_order(recipe: Recipe, order: str) -> Recipe:
    """The recipe with its tasks in another order: their names with commas between them, or `reversed`.

    Raises InputError if it does not name each task once.
    """
    names = [task.name for task in recipe.stream]
    wanted = names[::-1] if order == "reversed" else [name.strip() for name in order.split(",")]
    if sorted(wanted) != sorted(names):
        raise InputError(f"--order {order}", f"name each task once: {','.join(names)}")
    return recipe.model_copy(update={"order": tuple(wanted)})


def load_recipe(path: Path | str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe: a file, or the name of one that comes with r1export.

    Each override is `section.field=value` with a TOML value; a bare word counts as a string.

    `extends = "OTHER.toml"` at the top starts from another recipe, relative to this file, and changes only what is written here.

    >>> load_recipe("quickstart", ("train.iterations=50",)).train.iterations
    50

    Raises:
        InputError: no such file, not TOML, an unknown key, a name that is no longer used, a wrong type, an impossible
            value; the message names the key.
    """
    path = find_recipe(Path(path))
    try:
        values, folders = _read(path)
        for override in overrides:
            _set(values, override)
            _refuse_retired(values, f"--set {override}")
        resolve_fields(values, Path.cwd())
        resolve_sources(values, folders)
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {_describe(error)}", "see the field list in docs/recipe.md") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply", "a recipe has tables of fields, no deeper") from None


def _read(path: Path, extended: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, Path]]:
    """The tables of a recipe and of those that it extends, and the folder that each of its sources is written in."""
    if path.resolve() in extended:
        raise InputError(f"{path}: extends itself", "remove the cycle in extends")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows begin a file with a mark
    except FileNotFoundError:
        names = ", ".join(sorted(file.stem for file in shipped_recipes().glob("*.toml")))
        raise InputError(f"{path}: no such recipe", f"give a file, or one of {names}") from None
    except PermissionError as error:
        raise refused(error, str(path)) from error
    except (OSError, ValueError) as error:  # also for a number of thousands of digits
        raise InputError(f"{path}: not a readable TOML file: {error}", "fix the TOML syntax") from error
    _refuse_retired(values, str(path))
    if not isinstance(parent := values.pop("extends", ""), str):
        raise InputError(f"{path}: extends is {parent!r}", "give the name of one recipe")
    folder = path.resolve().parent
    resolve_fields(values, folder)
    if not parent:
        return values, sources(values, folder)
    inherited, folders = _read(path.parent / parent, (*extended, path.resolve()))
    return _over(inherited, values), folders | sources(values, folder)


def _refuse_retired(values: Mapping[str, Any], location: str) -> None:
    for retired in RETIRED:
        if retired.used_in(values):
            raise InputError(f"{location}: {retired} is no longer used", retired.advice)


def _over(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with `changes` on top, table by table; lists are replaced as a whole."""
    merged = dict(values)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _over(merged[key], value) if both else value
    return merged


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}", "expected section.field=value, for example train.iterations=50")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except ValueError:
        value = text
    *parents, last = key.split(".")
    table: Any = values
    try:
        for parent in parents:
            table = table[int(parent)] if isinstance(table, list) else table.setdefault(parent, {})
        table[int(last) if isinstance(table, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError):
        raise InputError(
            f"--set {override}: there is no {key}", "expected section.field=value or tasks.0.field=value"
        ) from None


def _describe(error: ValidationError) -> str:
    first = error.errors()[0]
    location = ".".join(str(part) for part in first["loc"]) or "recipe"
    unknown = first["type"] == "extra_forbidden"
    shown = "" if unknown or isinstance(first["input"], dict) else f", found {first['input']!r:.200}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    message = "unknown key" if unknown else first["msg"].removeprefix("Value error, ")
    return f"{location}: {message}{shown}{more}"
