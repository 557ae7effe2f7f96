"""A recipe: everything that determines the result of a run, as one value (recipe_file.py reads it)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from r1export.errors import InputError
from r1export.update.names import is_special

TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class _Section(BaseModel):
    """A table of a recipe. Types are strict: neither true nor "20" is a number."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, strict=True
    )

    @model_validator(mode="before")
    @classmethod
    def _arrays(cls, values: Any) -> Any:
        """TOML arrays as tuples, as strict types expect."""
        if not isinstance(values, dict):
            return values
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


Colour = tuple[float, float, float]


class Base(_Section):
    """The CLIP model to fine-tune: an open_clip name with a pretrained tag, a folder or repository, local weights, or `builtin:NAME`."""

    model: str = ""
    """open_clip model name, `local-dir:FOLDER` or `hf-hub:OWNER/NAME` (in open_clip's format), or a built-in model:
    `builtin:photo` (photographs), `builtin:photo-vit` (photographs, a vision transformer) or `builtin:world` (drawn shapes)."""
    pretrained: str = ""
    """open_clip's pretrained tag for `model`."""
    weights: str = ""
    """Local `.safetensors` file, instead of a tag."""
    config: str = ""
    """open_clip config (JSON) for `weights`, with or without `preprocess_cfg`, if `model` is not an open_clip name."""
    tokenizer: str = ""
    """Local `tokenizer.json`, or a folder with one; replaces the tokenizer in the model's config."""
    image_size: int | None = Field(None, ge=1, le=4096)
    """Image size in pixels, if it differs from the config; position embeddings are resized."""
    mean: Colour | None = None
    """Mean of red, green and blue in 0..1. Default: from the config, the tag, or all tags of the model."""
    std: Colour | None = None
    """Standard deviation of red, green and blue in 0..1. Default: as for `mean`."""
    interpolation: Literal["bicubic", "bilinear"] | None = None
    """Interpolation when images are resized. Default: as for `mean`."""
    resize_mode: Literal["shortest", "longest", "squash"] | None = None
    """Resize the shortest side and crop, the longest side and pad, or both sides (squash). Default: as for `mean`."""
    quick_gelu: bool | None = None
    """Use QuickGELU, as OpenAI's models do. Default: from the config or the tag."""
    allow_pickle: bool = False
    """Load pickled weights (`.pt`, `.bin`). Unpickling can run code: only for sources that you trust."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.model.startswith("builtin:"):
            if others := self.model_dump(exclude_defaults=True).keys() - {"model"}:
                raise ValueError(f"{self.model} needs no other settings: remove {', '.join(sorted(others))}")
            return self
        if self.model.startswith(("local-dir:", "hf-hub:")):
            if self.pretrained or self.weights or self.config:
                raise ValueError(f"{self.model} includes weights and config: remove pretrained, weights and config")
            return self
        if bool(self.pretrained) == bool(self.weights):
            raise ValueError("set either pretrained (a tag) or weights (a .safetensors file)")
        if bool(self.model) == bool(self.config):
            raise ValueError("set either model (an open_clip name) or config (a JSON file)")
        return self

    @model_validator(mode="after")
    def _colours(self) -> Self:
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std is {list(self.std)}, expected values greater than 0")
        return self


class Data(_Section):
    """The images."""

    root: str = ""
    """Base folder of relative paths in sources, and of torchvision's data sets. Default: the recipe's folder."""
    shots: int = Field(0, ge=0)
    """Training images per class; 0 uses all."""
    test_limit: int = Field(0, ge=0)
    """Test images per task, sampled by seed; 0 uses all."""
    download: bool = False
    """Let torchvision or the Hugging Face Hub download missing data sets."""
    decode: Literal["r1export", "open_clip"] = "r1export"
    """`r1export` decodes images as viewers show them (docs/inputs.md); `open_clip` uses open_clip's transform only."""
    skip_broken: bool = False
    """Skip unreadable images and list them in the report, instead of failing."""
    augment: Literal["none", "crop"] = "none"
    """`crop` trains on random crops of 90 to 100 % of each image: one fixed crop with `shots`, a new one in every epoch otherwise."""
    candidates: Literal["task", "all"] = "task"
    """Candidate classes of a test image: the classes of its task, or of all tasks (X-TAIL)."""


class TaskSource(_Section):
    """One task of the sequence."""

    name: TaskName
    """Name of the task (letters, digits, `_`, `.`, `-`), used for releases, updates and files."""
    source: str
    """`torchvision:NAME`, `folder:DIR`, `npz:FILE`, `hf:NAME` (Hugging Face; `hf:NAME:CONFIG`) or `builtin:NAME`."""
    templates: tuple[str, ...] = ()
    """Prompts with one `{}` for the class name. Default: the prompts of the source."""

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if is_special(name):
            raise ValueError("the name is reserved on Windows or on devices, choose another name")
        return name


class Pool(_Section):
    """The pool of rank-1 experts of every adapted layer. Defaults: arXiv 2601.22828, except `init`."""

    rank: int = Field(12, ge=1, le=4096)
    """Number of experts in the pool."""
    k_train: int = Field(8, ge=1)
    """Number of experts that a batch trains."""
    k_merge: int = Field(4, ge=1)
    """Number of experts per layer that are merged at the end of a task; by `select = "effect"` as many in bytes over all layers."""
    alpha: float = Field(1.0, gt=0)
    """LoRA scaling: alpha / rank."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Dropout on the input of the experts."""
    factors: Literal["fp32", "fp16"] = "fp32"
    """Precision of the merged experts; `fp16` halves the size of updates."""
    init: Literal["gradient", "random"] = "gradient"
    """`gradient` lets experts start with the input directions in which the task's loss is steepest; `random` as in LoRA and the published code."""
    router: Literal["random", "straight-through"] = "random"
    """`random` keeps the router at its random initialization, as the published code does; `straight-through` trains it."""
    select: Literal["effect", "votes"] = "effect"
    """Merged experts: those with the largest `effect` on the loss, as many as k_merge per layer would take in bytes, or the k_merge of each
    layer with the most `votes`, as published."""
    text_token: Literal["start", "end"] = "start"
    """Router input in the text tower: the start token, which sees no text, or the end token, which sees all of it."""
    past: Literal["merged", "pool"] = "merged"
    """Experts of earlier tasks in the orthogonality loss: the merged ones, or all of their pools, as in the published code."""
    gate: Literal["binary", "sparse"] = "binary"
    """Expert weights: `binary` (1), or `sparse` (trained with soft thresholds, without a router; CoDyRA)."""
    towers: tuple[Literal["visual", "textual"], ...] = ("visual", "textual")
    """Towers with experts."""
    targets: tuple[Literal["q", "k", "v", "out", "fc", "proj", "conv"], ...] = ("q", "k", "v", "out", "fc", "proj")
    """Layers with experts in each block: attention q, k, v, out; fc and proj, the linears of an MLP or the pointwise
    convolutions (the last is proj); conv, convolutions with larger kernels. Grouped convolutions are never adapted."""
    layers: tuple[int, ...] = ()
    """Blocks of each tower with experts, numbered from 0 over all stages; empty means all. Negative numbers count from the
    last block (-1); those beyond a tower's first block are ignored."""

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if max(self.k_train, self.k_merge) > self.rank:
            raise ValueError(f"k_train {self.k_train} and k_merge {self.k_merge} must not exceed rank {self.rank}")
        if not self.towers or not self.targets:
            raise ValueError("towers and targets must not be empty")
        return self


class Train(_Section):
    """Training of each task. Defaults: arXiv 2601.22828, except `distill_weight`, `consolidate`, `protect` and `protect_own`, which
    reduce forgetting."""

    iterations: int = Field(500, ge=1)
    """Iterations per task."""
    batch_size: int = Field(32, ge=2)
    """Images per iteration."""
    learning_rate: float = Field(2e-3, gt=0)
    """Initial learning rate of AdamW."""
    min_learning_rate: float = Field(1e-6, ge=0)
    """Final learning rate of the cosine schedule."""
    weight_decay: float = Field(1e-2, ge=0)
    """Weight decay of AdamW."""
    method: Literal["experts", "full"] = "experts"
    """`full` fine-tunes all weights: a baseline for `r1export train` only, with updates as large as the model."""
    loss: Literal["in-batch", "all-classes"] = "in-batch"
    """Contrastive over the classes in a batch, or cross-entropy over all classes of the task."""
    orthogonality: Literal["output", "none"] = "output"
    """`output` penalizes overlap with the output directions of earlier tasks' experts."""
    orthogonality_weight: float = Field(0.1, ge=0)
    """Weight of the activation-guided orthogonality loss, from the second task on."""
    protect: float = Field(0.9, ge=0, lt=1)
    """Fraction of the energy of earlier tasks' inputs to protect: new experts ignore these input directions. 0 disables it."""
    protect_own: float = Field(0.8, ge=0, lt=1)
    """The same for the inputs that the task's own images produce before training, as a proxy for pretraining data. 0 disables it."""
    distill_weight: float = Field(2.0, ge=0)
    """Weight of the distillation loss, which preserves the previous model's predictions on the task's images and reference names. 0 disables it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` runs the frozen model under autocast; experts and optimizer state stay in float32."""
    guard: float | None = Field(None, ge=0)
    """Percentage points of zero-shot accuracy that a task may cost, estimated on crops of its own images: its update is scaled down until
    it does. Default: no limit."""
    consolidate: float = Field(0.3, ge=0, le=1)
    """Fraction of the iterations after which the selection of experts is fixed and only these are trained. 1 disables it."""
    checkpoint_every: int = Field(50, ge=1)
    """Iterations between checkpoints within a task."""
    tensorboard: bool = False
    """Log losses, throughput and accuracies to RUN/tensorboard; requires the `tensorboard` extra."""
    seed: int = Field(42, ge=0)
    """Random seed of image selection, batches, initialization and dropout."""


class Export(_Section):
    """The ONNX graphs."""

    opset: int = Field(20, ge=18, le=23)
    """ONNX opset of the graphs."""
    variants: tuple[Literal["fp16", "int8"], ...] = ()
    """Additional precisions of every release, each with its own graphs, tolerances and accuracy."""
    static_batch: int = Field(0, ge=0, le=64)
    """Also write the fp32 towers with this fixed batch size, at opset 18, for compilers without dynamic shapes. 0 disables it."""


class Verify(_Section):
    """Verification: parity and latency."""

    samples: int = Field(0, ge=0)
    """Test images and prompts per task for the parity check; 0 uses 32, fewer for large models."""
    batches: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 2, 5), min_length=1)
    """Batch sizes of the parity check."""
    max_abs: float = Field(5e-5, gt=0)
    """Max. absolute difference of unit-norm embeddings, or four times the base model's export error if that is larger."""
    min_cosine: float = Field(1 - 1e-6, gt=0, le=1)
    """Lowest allowed cosine of any sample."""
    margin: float = Field(0.02, gt=0, lt=1)
    """Relative margin within which merged and base latency count as equal."""
    pairs: int = Field(400, ge=20)
    """Runs of base and merged model in the latency check; half if the ratio is clear by then, more until it is known, fewer if they take over 3 s per model."""
    images: int = Field(0, ge=0)
    """Test images per task for the freezing and shrink gaps (G2, G3) and the embedding drift; 0 uses 200, fewer for large models."""


class Recipe(_Section):
    """One run: a base model and a sequence of tasks."""

    base: Base
    tasks: tuple[TaskSource, ...] = Field(min_length=1)
    order: tuple[str, ...] = ()
    """Training order of the tasks, by name. Default: the order of `tasks`."""
    probe: TaskSource | None = None
    """Test-only task that measures how much the base model forgets."""
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
            raise ValueError(f"the probe and a task are both named {self.probe.name}: change probe.name")
        if self.order and sorted(self.order) != sorted(names):
            raise ValueError(f"order must list each task exactly once: {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _compatible(self) -> Self:
        gate, consolidate = self.pool.gate, self.train.consolidate
        if self.train.guard is not None and self.train.method == "full":
            raise ValueError('train.guard scales experts, but train.method is "full": remove one of them')
        if gate == "sparse" and consolidate < 1:
            raise ValueError(
                f'pool.gate "sparse" needs train.consolidate = 1, found {consolidate}: its gates are thresholded until the end'
            )
        return self

    @property
    def stream(self) -> tuple[TaskSource, ...]:
        """The tasks in training order."""
        by_name = {task.name: task for task in self.tasks}
        return tuple(by_name[name] for name in self.order) if self.order else self.tasks

    def dumps(self) -> str:
        """The whole recipe, defaults included, as TOML: `Recipe.model_validate(tomllib.loads(recipe.dumps())) == recipe`."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def in_order(recipe: Recipe, order: str) -> Recipe:
    """The recipe with its tasks in another order: comma-separated names, or `reversed`.

    Raises InputError unless it lists each task exactly once.
    """
    names = [task.name for task in recipe.stream]
    wanted = names[::-1] if order == "reversed" else [name.strip() for name in order.split(",")]
    if sorted(wanted) != sorted(names):
        raise InputError(f"--order {order}", f"list each task exactly once: {','.join(names)}")
    return recipe.model_copy(update={"order": tuple(wanted)})
