"""The offline default: drawn tasks, real digits, and a packaged base model that can really do something."""

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file

from r1export.data.synthetic import BUILTIN_MODELS, PAIRS, SIZE, UNSEEN_PAIRS, load_builtin
from r1export.data.task import ImageSet, Task
from r1export.errors import InputError

NAMES = ("world", "patterns", "arrows", "digits")


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    weights, config = BUILTIN_MODELS["world"]
    open_clip.add_model_config(config)
    model = open_clip.create_model(config.stem).eval()
    model.load_state_dict(load_file(weights))
    return model


def _pixels(images: ImageSet, indices: range | np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(images.read(int(i))) for i in indices])


@torch.no_grad()
def _hits(base: torch.nn.Module, task: Task, images: ImageSet) -> np.ndarray:
    """Which of the images (n,) the base names rightly among all classes of the task, without training."""
    tokenize = open_clip.get_tokenizer(BUILTIN_MODELS["world"].config.stem)
    text = base.encode_text(tokenize([task.templates[0].format(name) for name in task.classes]), normalize=True)
    x = torch.from_numpy(_pixels(images, range(len(images)))).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    return (base.encode_image((x - mean) / std) @ text.T).argmax(1).numpy() == images.labels


@pytest.mark.parametrize("name", NAMES)
def test_an_image_depends_on_its_index_only(name: str) -> None:
    order = np.array([5, 2, 9, 2])
    once, again = load_builtin(name).train, load_builtin(name).train
    np.random.seed(3)
    forwards = _pixels(once, order)
    np.random.seed(4)
    assert np.array_equal(forwards, _pixels(again, order[::-1])[::-1])
    assert forwards.shape == (4, SIZE, SIZE, 3)


@pytest.mark.parametrize("name", NAMES)
def test_train_and_test_share_no_image(name: str) -> None:
    task = load_builtin(name)
    train = {x.tobytes() for x in _pixels(task.train, range(200))}
    test = {x.tobytes() for x in _pixels(task.test, range(200))}
    assert len(train) == len(test) == 200  # every image is new
    assert not train & test


@pytest.mark.parametrize("name", ["world", "patterns", "arrows"])
def test_drawn_tasks_have_equally_many_images_of_each_class(name: str) -> None:
    task = load_builtin(name)
    for images in (task.train, task.test):
        counts = np.bincount(images.labels, minlength=len(task.classes))
        assert counts.min() == counts.max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_labels_index_the_classes_and_templates_take_one_name(name: str) -> None:
    task = load_builtin(name)
    assert task.name == name
    assert task.train.labels.dtype == np.int64
    assert set(task.train.labels) == set(task.test.labels) == set(range(len(task.classes)))
    assert all(template.count("{}") == 1 for template in task.templates)
    assert 200 <= len(task.test) <= 400  # the demo evaluates every test set after every task


def test_digits_are_the_scans_that_come_with_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    scans, task = load_digits(), load_builtin("digits")
    assert np.array_equal(np.concatenate([task.train.labels, task.test.labels]), scans.target)
    for start, images in ((0, task.train), (len(task.train), task.test)):
        # Enlarging blurs a little and averaging it back does not undo that: 5 % of the range on average.
        small = _pixels(images, range(50))[..., 0].reshape(50, 8, 4, 8, 4).mean((2, 4))
        assert np.abs(small - scans.images[start : start + 50] * 255 / 16).mean() < 0.05 * 255


def test_an_unknown_name_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(InputError, match=r"'letters'.*world, patterns, arrows, digits"):
        load_builtin("letters")


def test_packaged_weights_are_small() -> None:
    weights, config = BUILTIN_MODELS["world"]
    assert weights.stat().st_size + config.stat().st_size < 10e6


def test_base_names_the_world_without_training(base: torch.nn.Module) -> None:
    task = load_builtin("world")
    assert _hits(base, task, task.test).mean() > 0.8  # chance is 1 in 64; measured 0.836


def test_base_names_pairs_of_colour_and_shape_it_never_saw(base: torch.nn.Module) -> None:
    task = load_builtin("world")
    unseen = np.isin(task.train.labels, [PAIRS.index(pair) for pair in UNSEEN_PAIRS])
    hits = _hits(base, task, task.train.subset(np.flatnonzero(unseen)))
    assert len(hits) == 256
    assert hits.mean() > 0.6  # chance is 1 in 64; measured 0.688


def test_pieces_of_photographs_are_real_and_none_is_both_trained_and_tested() -> None:
    from sklearn.datasets import load_sample_image

    photos = load_builtin("photos")
    assert photos.classes == ("temple", "flower")
    china = load_sample_image("china.jpg")
    for images, columns in ((photos.train, china[:, :400]), (photos.test, china[:, 400:])):
        piece = np.asarray(images.read(2))
        windows = np.lib.stride_tricks.sliding_window_view(columns[:, :, 0], (1, 128))[:, :, 0]
        assert (windows == piece[0, :, 0]).all(-1).any(), (
            "the first row of the piece stands somewhere in its half of the photograph"
        )
        assert np.bincount(images.labels).tolist() == [100, 100]
