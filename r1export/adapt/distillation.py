"""Distillation: training preserves the previous model's predictions, on names instead of images.

    L = mean_n KL( softmax(s I_n T^T) || softmax(s i_n t^T) )        s = exp(logit_scale)

I_n, T are unit-norm embeddings of the task's images and of reference texts by the previous model, i_n, t those of the model
in training. The texts are the 1,000 class names of ImageNet in open_clip's wording and the classes of earlier tasks: no
other images than the task's are needed. Learning without forgetting (arXiv 1606.09282) in the form of LwF-VR
(arXiv 2303.06628), whose texts are random sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from open_clip import IMAGENET_CLASSNAMES
from torch import Tensor

from r1export.adapt.clip import Clip
from r1export.adapt.image_cache import Images
from r1export.adapt.text_truncation import short_texts

REFERENCES = 32  # reference texts of a step: as many as a batch has images
BATCH = 64  # names or images embedded at a time


@dataclass(frozen=True)
class DistillationTargets:
    """Embeddings by the model before a task: `images` (N, D) of its training images, `texts` (M, D) of `tokens` (M, L)."""

    images: Tensor
    texts: Tensor
    tokens: Tensor

    def draw(self, seed: int) -> np.ndarray:
        """REFERENCES different texts, int64; the same for the same seed."""
        return np.random.default_rng(seed).choice(len(self.tokens), REFERENCES, replace=False)

    def loss(self, image: Tensor, text: Tensor, images: np.ndarray, texts: np.ndarray, scale: Tensor) -> Tensor:
        """The loss above for embeddings (n, D), (m, D) of training images `images` (n,) and reference texts `texts` (m,)."""
        teacher = scale * self.images[images] @ self.texts[texts].T
        student = scale * image @ text.T
        return F.kl_div(student.float().log_softmax(1), teacher.float().softmax(1), reduction="batchmean")


def reference_names(learned: Sequence[str] = ()) -> tuple[str, ...]:
    """ImageNet's class names and `learned`, those of earlier tasks, each once."""
    return tuple(dict.fromkeys((*IMAGENET_CLASSNAMES, *learned)))


@torch.no_grad()
def distillation_targets(
    clip: Clip,
    train: Images,
    visited: np.ndarray,
    names: Sequence[str],
    on_batch: Callable[[], None] = lambda: None,
) -> DistillationTargets:
    """Embeddings by the model as it stands of the training images `visited`, int64 (n,), and of texts with `names`.

    Embeddings of other images stay zero. Always computed in the same batches, so a resumed run gets the same targets.
    `on_batch` is called after each batch of BATCH names or images.
    """
    clip.model.eval()
    tokens = clip.tokenize([f"a photo of a {name}." for name in names])
    texts = []
    with short_texts(clip.model):
        for part in tokens.split(BATCH):
            texts.append(clip.encode_text(part))
            on_batch()
    images = texts[0].new_zeros(len(train), texts[0].shape[1])
    for start in range(0, len(visited), BATCH):
        batch = visited[start : start + BATCH]
        images[batch] = clip.encode_image(train.batch(batch))
        on_batch()
    return DistillationTargets(images, torch.cat(texts), tokens)
