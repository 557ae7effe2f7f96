"""A survey looks at every picture and says what is in it, what was changed, what is broken, and what is in both splits."""

import numpy as np
import pytest
from PIL import Image

from r1export.data.folder import read
from r1export.data.request import Request
from r1export.data.survey import SIDE, THUMBNAILS, survey
from r1export.data.task import ImageSet, Task
from r1export.errors import InputError


def noise(seed: int, size: tuple[int, int] = (20, 10)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8))


@pytest.fixture
def pets(tmp_path):
    for n, place in enumerate(("train/cat", "train/dog", "test/cat", "test/dog")):
        (tmp_path / place).mkdir(parents=True)
        for i in range(3):
            noise(10 * n + i, (20 + i, 10)).save(tmp_path / place / f"{i}.png")
    return tmp_path


def look(pets):
    return survey(read(Request(f"folder:{pets}", skip_broken=True)))


def test_counts_sizes_and_modes_are_those_of_the_files(pets) -> None:
    noise(99).convert("L").save(pets / "train/cat/gray.png")
    cat, dog = look(pets).classes
    assert (cat.name, cat.train, cat.test, cat.sizes) == ("cat", 4, 3, ((20, 10), (22, 10)))
    assert (cat.modes, dog.modes) == ({"RGB": 6, "L": 1}, {"RGB": 6})


def test_what_cannot_be_read_is_named_and_counted_in_its_class(pets) -> None:
    (pets / "test/dog/1.png").write_bytes(b"x")
    found = look(pets)
    assert found.refused == 1
    assert str(pets / "test/dog/1.png") in found.classes[1].refused[0]


def test_a_class_of_broken_pictures_has_no_sizes(pets) -> None:
    for path in pets.glob("t*/dog/*.png"):
        path.write_bytes(b"x")
    assert look(pets).classes[1].sizes is None


def test_twins_are_found_by_their_pixels_whatever_their_files_are(pets) -> None:
    noise(10).save(pets / "train/dog/0.png")
    noise(10).save(pets / "test/dog/twin.bmp")
    assert look(pets).twins == ((str(pets / "train/dog/0.png"), str(pets / "test/dog/twin.bmp")),)


def test_pictures_of_the_same_bytes_and_another_shape_are_no_twins(pets) -> None:
    picture = np.asarray(noise(77, (20, 10)))
    Image.fromarray(picture).save(pets / "train/dog/0.png")
    Image.fromarray(picture.reshape(20, 10, 3)).save(pets / "test/dog/0.png")
    assert look(pets).twins == ()


def test_thumbnails_are_few_and_small(pets) -> None:
    for i in range(2 * THUMBNAILS):
        noise(i, (300, 200)).save(pets / f"train/cat/{i}.png")
    thumbnails = look(pets).classes[0].thumbnails
    assert len(thumbnails) == THUMBNAILS
    assert max(max(each.image.size) for each in thumbnails) <= SIDE


def test_a_label_outside_of_the_classes_is_bad_input() -> None:
    images = ImageSet.drawn(np.array([0, 7]), lambda i: noise(i))
    with pytest.raises(InputError, match="odd: label 7 in test, expected 0 to 1"):
        survey(Task("odd", ("cat", "dog"), ("{}",), images.subset(np.array([0])), images))
