"""The CLIP model that is fine-tuned: open_clip weights, tokenizer and preprocessing in one class."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from r1export.adapt.deployed_form import DEPLOYED_FORM, deploy_
from r1export.adapt.hub_tokenizer import make_tokenizer
from r1export.adapt.model_config import read_model_config
from r1export.errors import InputError, R1ExportError, Unsupported, first_line

# An nn.Module with encode_image, encode_text and logit_scale: one of several classes of open_clip, which has no types.
ClipModel = Any


@dataclass(frozen=True)
class Preprocess:
    """What open_clip does to an image before the visual tower, cut where the pixels are still bytes."""

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

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 (n, 3, h, w) -> float32, bit for bit what open_clip's ToTensor and Normalize give."""
        mean, std = (
            torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (self.config.mean, self.config.std)
        )
        return pixels.float().div_(255).sub_(mean).div_(std)

    def to_json(self) -> dict[str, Any]:
        """Everything a client needs to do the same."""
        config = self.config
        return {
            "size": list(self.size), "mode": config.mode, "resize_mode": config.resize_mode, "interpolation": config.interpolation,
            "fill_color": config.fill_color, "scale": 1 / 255, "mean": list(config.mean), "std": list(config.std), "layout": "NCHW",
        }  # fmt: skip


@dataclass(frozen=True)
class Clip:
    """A frozen CLIP in eval mode with the two functions that feed it.

    `deployed_form` is the number of the procedure that its image tower went through, 0 if there was nothing to do.
    """

    name: str
    model: ClipModel
    preprocess: Preprocess
    tokenizer: Callable[[list[str]], Tensor]
    deployed_form: int = 0

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

    def parameters(self) -> dict[str, np.ndarray]:
        """All weights by their state_dict names, copied to numpy: parameters and, where a tower has BatchNorm, its statistics."""
        return {name: value.detach().cpu().numpy().copy() for name, value in self._tensors().items()}

    def load_(self, weights: Mapping[str, np.ndarray]) -> None:
        """Overwrite the named weights in place."""
        tensors = self._tensors()
        with torch.no_grad():
            for name, value in weights.items():
                tensors[name].copy_(torch.from_numpy(np.array(value)))

    def _tensors(self) -> dict[str, Tensor]:
        return {
            name: value for name, value in self.model.state_dict(keep_vars=True).items() if value.is_floating_point()
        }


def licence(pretrained: str) -> str:
    """The licence of published weights where it is known here, else empty: the card then says to ask their source.

    Sources: github.com/openai/CLIP (LICENSE) and the model cards of huggingface.co/laion.
    """
    return "MIT" if pretrained == "openai" or pretrained.startswith("laion") else ""


def digest(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors, sorted by name."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        sha.update(f"{name}\0{tensor.dtype.str}\0{tensor.shape}\0".encode())
        sha.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def load_clip(
    model: str = "",
    *,
    pretrained: str = "",
    weights: Path | None = None,
    config: Path | None = None,
    tokenizer: Path | None = None,
    device: str = "cpu",
    allow_pickle: bool = False,
    deployed: bool = True,
) -> Clip:
    """Load an open_clip model with a pretrained tag, or local weights with, if need be, their config.

    `allow_pickle` lets torch read a tag's weights where none are published as safetensors; `deployed` brings the image
    tower into its deployed form (deployed_form.py).

    Raises:
        InputError: open_clip does not know the model or the tag; a file is missing, malformed, not safetensors
            and no pickle allowed, or does not fit the model; a config would load from elsewhere.
        Unsupported: open_clip cannot make the model here, or its weights cannot be fetched.
    """
    custom = None if config is None else read_model_config(config)
    name = model if custom is None else custom.name
    if custom is not None:
        custom.register()
    _check_name(name, pretrained)
    try:
        with _quiet():
            origin, values = (
                (name, open_clip.get_model_config(name)) if custom is None else (str(config), custom.values)
            )
            words = make_tokenizer(origin, values["text_cfg"], tokenizer, may_fetch=custom is None)
            if custom is not None:
                _check_shapes(name, weights)
            module = _create(name, pretrained, device, allow_pickle)
    except R1ExportError:
        raise
    except Exception as error:  # open_clip and torch raise whatever an impossible config or a hub makes them meet
        raise _not_built(error, name, pretrained, config) from error
    if weights is not None:
        _load_weights_(module, weights)
    module.eval().requires_grad_(False)
    preprocess = Preprocess(PreprocessCfg(**open_clip.get_model_preprocess_cfg(module)))
    form = DEPLOYED_FORM if deployed and deploy_(module.visual, preprocess.size) else 0
    return Clip(f"{name}/{pretrained}" if pretrained else name, module, preprocess, words, form)


def _check_name(model: str, pretrained: str) -> None:
    if model not in open_clip.list_models():
        raise InputError(
            f"open_clip {open_clip.__version__} knows no model {model!r}",
            "open_clip.list_models() names them, or give base.config",
        )
    if pretrained and pretrained not in open_clip.list_pretrained_tags_by_model(model):
        known = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise InputError(f"{model} has no pretrained tag {pretrained!r}", f"known tags: {known}")


def _not_built(error: Exception, model: str, pretrained: str, config: Path | None) -> R1ExportError:
    """Bad input where a config says what to build, which cannot load from elsewhere. Else the environment lacks something."""
    if config is not None and not isinstance(error, MemoryError | torch.OutOfMemoryError):
        return InputError(
            f"{config}: open_clip cannot build this model: {type(error).__name__}: {first_line(error)}",
            "correct the config: see open_clip's own in its model_configs",
        )
    return Unsupported(
        f"open_clip cannot make {model} {pretrained}: {first_line(error)}",
        "fetch the weights once with network, or give base.weights; check the free memory",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip warns that a model without a tag is random; here its weights follow from a file."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


def _create(model: str, pretrained: str, device: str, allow_pickle: bool) -> ClipModel:
    """The module with the weights of its tag, if it has one, read from the very file that was looked at.

    What a tag was trained with decides about the activation: open_clip builds ViT-B-16 without QuickGELU, warns, and the
    weights of OpenAI would give other embeddings.
    """
    file = _weights_of_tag(model, pretrained, allow_pickle) if pretrained else ""
    quick = bool(pretrained) and open_clip.get_pretrained_cfg(model, pretrained).get("quick_gelu", False)
    # create_model itself loads nothing, neither the tag nor a text tower's own weights: both could be pickles.
    module = open_clip.create_model(
        model, pretrained=pretrained or None, load_weights=False, pretrained_text=False, device=device,
        force_quick_gelu=quick,
    )  # fmt: skip
    if file:
        open_clip.load_checkpoint(module, file)
    return module


def _weights_of_tag(model: str, pretrained: str, allow_pickle: bool) -> str:
    """The file that holds the weights of a tag, fetched if need be. Raises InputError if torch would have to unpickle it unasked."""
    file: str = open_clip.download_pretrained(open_clip.get_pretrained_cfg(model, pretrained))
    if not (allow_pickle or file.endswith(".safetensors")):
        raise InputError(
            f"{model} {pretrained}: {file} is not safetensors, and reading a pickle can run code",
            "set base.allow_pickle=true if you trust its source, or convert it and give base.weights",
        )
    return file


def _check_shapes(model: str, weights: Path | None) -> None:
    """Compare what a config says with the header of the weights, before memory is taken for a model of any size."""
    if weights is None:
        return
    with torch.device("meta"):
        skeleton = open_clip.create_model(model, load_weights=False, pretrained_text=False, device="meta")
    sizes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    stored = _shapes_in(weights)
    for name in sorted(sizes.keys() | stored.keys()):
        if sizes.get(name) != stored.get(name):
            raise InputError(
                f"{weights} does not fit the model: {name} is {stored.get(name, 'missing')}, "
                f"expected {sizes.get(name, 'no such tensor')}",
                "check base.model and base.config",
            )


def _shapes_in(weights: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors, from the header alone."""
    with _safetensors(weights), safe_open(weights, "pt") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def _load_weights_(module: nn.Module, weights: Path) -> None:
    """Safetensors only: reading weights never runs code."""
    with _safetensors(weights):
        state = load_file(weights)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"{weights} does not fit the model: {' '.join(str(error).split())[:200]}",
            "check base.model and base.config",
        ) from None


@contextmanager
def _safetensors(weights: Path) -> Iterator[None]:
    """What goes wrong while the file is read is an InputError."""
    if not weights.is_file():
        problem = "not a file" if weights.exists() else "no such file"
        raise InputError(f"{weights}: {problem}", "give the path of a .safetensors file as base.weights")
    try:
        yield
    except Exception as error:  # SafetensorError, or what torch raises for the dtypes and sizes of a damaged header
        raise InputError(
            f"{weights}: not a safetensors file: {first_line(error)}",
            "convert the checkpoint with safetensors.torch.save_file",
        ) from error
