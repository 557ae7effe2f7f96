"""The CLIP model that is fine-tuned: open_clip weights, tokenizer and preprocessing in one class."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from r1export.adapt.checkpoint import SUFFIX, check_header, load_weights_
from r1export.adapt.deployed_form import DEPLOYED_FORM, deploy_
from r1export.adapt.hf_text import check_hf_tower
from r1export.adapt.hub_tokenizer import make_tokenizer
from r1export.adapt.model_config import ModelConfig
from r1export.adapt.model_source import Source, find_source
from r1export.adapt.preprocess_settings import UNSET, PreprocessSettings
from r1export.errors import InputError, R1ExportError, Unsupported, first_line

# An nn.Module with encode_image, encode_text and logit_scale: one of several classes of open_clip, which has no types.
ClipModel = Any


@dataclass(frozen=True)
class Preprocess:
    """open_clip's preprocessing, split where the pixels are still bytes."""

    config: PreprocessCfg

    @cached_property
    def _crop(self) -> Callable[[Image.Image], Image.Image]:
        *crop, to_tensor, normalize = image_transform_v2(self.config, is_train=False).transforms
        kinds = type(to_tensor).__name__, type(normalize).__name__
        assert kinds == ("MaybeToTensor", "Normalize"), f"open_clip changed its transform: {kinds}"

        def apply(image: Image.Image) -> Image.Image:
            for step in crop:
                image = step(image)
            return image

        return apply

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        size = self.config.size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def fill(self) -> tuple[int, int, int]:
        """The color (red, green, blue) under transparency and around images that are padded."""
        color = self.config.fill_color
        red, green, blue = (color, color, color) if isinstance(color, int) else color
        return red, green, blue

    def crop(self, image: Image.Image) -> np.ndarray:
        """Resize and crop as open_clip does: uint8 (3, height, width)."""
        return np.array(self._crop(image), np.uint8).transpose(2, 0, 1)

    def resized(self, image: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
        """A part of an image, (left, top, right, bottom) in pixels, at the size that the tower sees: uint8 (3, height, width).

        Bicubic, as open_clip resizes the crops that it trains with.
        """
        height, width = self.size
        part = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC, box)
        return np.array(part, np.uint8).transpose(2, 0, 1)

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 (n, 3, h, w) -> float32, bit for bit what open_clip's ToTensor and Normalize give."""
        mean, std = (
            torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (self.config.mean, self.config.std)
        )
        return pixels.float().div_(255).sub_(mean).div_(std)

    def to_json(self) -> dict[str, Any]:
        """The preprocess.json for clients."""
        config = self.config
        return {
            "size": list(self.size), "mode": config.mode, "resize_mode": config.resize_mode, "interpolation": config.interpolation,
            "fill_color": config.fill_color, "scale": 1 / 255, "mean": list(config.mean), "std": list(config.std), "layout": "NCHW",
        }  # fmt: skip


@dataclass(frozen=True)
class Clip:
    """A frozen CLIP in eval mode with the two functions that feed it; `notes` say what loading it decided.

    `deployed_form` is the number of the procedure that its image tower went through, 0 if there was nothing to do.
    `model_cfg` is open_clip's description of the model, as it was built.
    """

    name: str
    model: ClipModel
    preprocess: Preprocess
    tokenizer: Callable[[list[str]], Tensor]
    deployed_form: int = 0
    notes: tuple[str, ...] = ()
    model_cfg: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        scale: Tensor = self.model.logit_scale
        return scale.device

    def tokenize(self, texts: list[str]) -> Tensor:
        """int64 (n, context_length)."""
        return self.tokenizer(texts).to(self.device)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """uint8 (n, 3, h, w) -> unit-norm float (n, D)."""
        embeds: Tensor = self.model.encode_image(self.preprocess.normalize(pixels.to(self.device)), normalize=True)
        return embeds

    def encode_text(self, tokens: Tensor) -> Tensor:
        """int64 (n, L) -> unit-norm float (n, D)."""
        embeds: Tensor = self.model.encode_text(tokens, normalize=True)
        return embeds

    def to_open_clip_config(self) -> dict[str, Any]:
        """open_clip_config.json: `model_cfg` and `preprocess_cfg`, as open_clip's local-dir: reads them."""
        config = self.preprocess.config
        names = ("mean", "std", "interpolation", "resize_mode", "fill_color")
        preprocess = {name: getattr(config, name) for name in names} | {"size": list(self.preprocess.size)}
        return {"model_cfg": dict(self.model_cfg), "preprocess_cfg": preprocess}

    def parameters(self) -> dict[str, np.ndarray]:
        """All weights by their state_dict names, copied to numpy: parameters and, where a tower has BatchNorm, its statistics."""
        return {name: value.detach().cpu().numpy().copy() for name, value in self._tensors().items()}

    def load_(self, weights: Mapping[str, np.ndarray]) -> None:
        """Overwrite the named weights in place."""
        tensors = self._tensors()
        with torch.no_grad():
            for name, value in weights.items():
                tensors[name].copy_(torch.from_numpy(np.array(value)))

    def with_weights(self, weights: Mapping[str, np.ndarray]) -> Clip:
        """The same model with these weights, all of them by name; on the CPU it shares their memory and must not be trained."""
        shared = {id(value): value for value in (*self.model.parameters(), *self.model.buffers())}
        model = copy.deepcopy(self.model, shared)
        device = self.model.logit_scale.device
        tensors = {name: torch.from_numpy(value).to(device) for name, value in weights.items()}
        model.load_state_dict(tensors, strict=False, assign=True)
        return replace(self, model=model)

    @contextmanager
    def unloaded(self, weights: Mapping[str, np.ndarray]) -> Iterator[None]:
        """Within it the model has no weights, and cannot be used; afterwards it has these, all of them by name."""
        tensors, device = self._tensors(), self.device
        for tensor in tensors.values():
            tensor.data = tensor.data.new_empty(0)
        try:
            yield
        finally:
            for name, tensor in tensors.items():
                tensor.data = torch.from_numpy(weights[name].copy()).to(device)

    def _tensors(self) -> dict[str, Tensor]:
        return {
            name: value for name, value in self.model.state_dict(keep_vars=True).items() if value.is_floating_point()
        }


def licence(pretrained: str) -> str:
    """The licence of published weights where it is known here, else empty: the card then says to ask their source.

    Sources: github.com/openai/CLIP (LICENSE) and the model cards of huggingface.co/laion.
    """
    return "MIT" if pretrained == "openai" or pretrained.startswith("laion") else ""


def load_clip(
    model: str = "",
    *,
    pretrained: str = "",
    weights: Path | None = None,
    config: Path | None = None,
    tokenizer: Path | None = None,
    preprocess: PreprocessSettings = UNSET,
    image_size: int | None = None,
    quick_gelu: bool | None = None,
    device: str = "cpu",
    allow_pickle: bool = False,
    deployed: bool = True,
) -> Clip:
    """Load an open_clip model: a name with a pretrained tag, or `local-dir:FOLDER`, `hf-hub:OWNER/NAME`, or local weights with a name or a config.

    `tokenizer` is a tokenizer.json, or a folder with one, in place of what the model's own config names. `preprocess`,
    `image_size` (pixels) and `quick_gelu` come before what the config or the tag says. `allow_pickle` lets torch read
    weights that are not safetensors; `deployed` brings the image tower into its deployed form (deployed_form.py).

    Raises:
        InputError: open_clip does not know the model or the tag; a file is missing, malformed, not safetensors
            and no pickle allowed, or does not fit the model; a config would load from elsewhere; nothing says how
            pictures are prepared.
        Unsupported: open_clip cannot make the model here, or its weights cannot be fetched.
    """
    source = find_source(model, pretrained=pretrained, weights=weights, config=config, allow_pickle=allow_pickle)
    described = source.config.changed(image_size=image_size, quick_gelu=source.activation(quick_gelu))
    try:
        with _quiet():
            words = make_tokenizer(
                described.origin, described.text, tokenizer or source.tokenizer, may_fetch=source.may_fetch
            )
            prepared = source.preprocess(preprocess)
            module, notes = _loaded(described, source, device, allow_pickle)
            notes += _set_size_(module, image_size)
    except R1ExportError:
        raise
    except Exception as error:  # open_clip and torch raise whatever an impossible config or a hub makes them meet
        raise _not_built(error, source) from error
    module.eval().requires_grad_(False)
    check_hf_tower(described.origin, module, words)
    cropped = Preprocess(PreprocessCfg(**prepared.values | {"size": module.visual.image_size}))
    form = DEPLOYED_FORM if deployed and deploy_(module.visual, cropped.size) else 0
    if sum(isinstance(part, torch.nn.Conv2d) for part in module.visual.modules()) > 1:
        module.visual.to(memory_format=torch.channels_last)  # depthwise convolutions on a CPU: 2.4 times as fast
    shown = tuple(filter(None, (prepared.note, *notes)))
    return Clip(source.name, module, cropped, words, form, shown, described.values)


def _loaded(config: ModelConfig, source: Source, device: str, allow_pickle: bool) -> tuple[ClipModel, list[str]]:
    """The module with its weights, and what a person should know about them. A header that does not fit takes no memory."""
    if source.tag:
        module = config.build(device)
        open_clip.load_checkpoint(module, str(source.weights))
        return module, []
    if source.weights is None:
        return config.build(device), []
    if source.weights.suffix == SUFFIX or not allow_pickle:
        with torch.device("meta"):
            skeleton = config.build("meta")
        check_header(skeleton, source.weights)
    module = config.build(device)
    return module, load_weights_(module, source.weights, allow_pickle=allow_pickle)


def _set_size_(module: ClipModel, image_size: int | None) -> list[str]:
    """timm makes its towers for one size of images and changes it afterwards, open_clip's own are made for any."""
    visual = module.visual
    if image_size is None or not hasattr(visual, "trunk"):
        return []
    before = getattr(visual.trunk, "pos_embed", None)
    if hasattr(visual.trunk, "set_input_size"):
        visual.set_input_size(image_size)
    visual.image_size = (image_size, image_size)
    after = getattr(visual.trunk, "pos_embed", None)
    if before is None or after is None or before.shape == after.shape:
        return []
    return [f"position embeddings of the image tower resized from {tuple(before.shape)} to {tuple(after.shape)}"]


def _not_built(error: Exception, source: Source) -> R1ExportError:
    """Bad input where a config says what to build, which cannot load from elsewhere. Else the environment lacks something."""
    origin = source.config.origin
    if not source.may_fetch and not isinstance(error, MemoryError | torch.OutOfMemoryError):
        return InputError(
            f"{origin}: open_clip fails to build the model: {type(error).__name__}: {first_line(error)}",
            "fix the config; open_clip's model_configs has examples",
        )
    return Unsupported(
        f"open_clip fails to load {source.name}: {first_line(error)}",
        "download the weights once, or set base.weights; check the free memory",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip logs what it builds and from where; the notes say what matters."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
