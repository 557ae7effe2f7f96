"""The eleven MTIL sets: prompts in label order, and torchvision's layouts read from small copies on disk."""

import hashlib
import json
import pickle
import struct
import tomllib
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from pictures import dotted
from torchvision import datasets

from r1export.data import torchvision_sets
from r1export.data.request import Request
from r1export.data.sources import load_task
from r1export.data.task import ImageSet, few_shot
from r1export.errors import InputError
from r1export.recipe_file import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"

# The two orders of the benchmark.
ORDER_I = (
    "aircraft",
    "caltech101",
    "cifar100",
    "dtd",
    "eurosat",
    "flowers102",
    "food101",
    "mnist",
    "oxfordiiitpet",
    "stanfordcars",
    "sun397",
)
ORDER_II = (
    "stanfordcars",
    "food101",
    "mnist",
    "oxfordiiitpet",
    "flowers102",
    "sun397",
    "aircraft",
    "caltech101",
    "dtd",
    "eurosat",
    "cifar100",
)

EUROSAT = (
    "AnnualCrop",
    "Forest",
    "HerbaceousVegetation",
    "Highway",
    "Industrial",
    "Pasture",
    "PermanentCrop",
    "Residential",
    "River",
    "SeaLake",
)


def put(file: Path, red: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    dotted((red, 0, 0), (16, 16)).save(file, quality=100)
    return file


def red(images: ImageSet, i: int) -> int:
    """The red level of a flat image; JPEG may be off by one."""
    return images.read(i).getpixel((4, 4))[0]


def underscored(key: str) -> list[str]:
    return [name.replace(" ", "_") for name in torchvision_sets.class_names(key)]


@pytest.mark.parametrize("count", [0, 1, 2, 40, 8677, 27000])
def test_the_permutation_is_torchs(count: int):
    expected = torch.randperm(count, generator=torch.Generator().manual_seed(42))
    assert np.array_equal(torchvision_sets._permutation(count, 42), expected.numpy())


# Prompts


def test_there_are_1201_classes_in_eleven_sets():
    counts = {key: len(torchvision_sets.class_names(key)) for key in ORDER_I}
    assert counts == {
        "aircraft": 100,
        "caltech101": 101,
        "cifar100": 100,
        "dtd": 47,
        "eurosat": 10,
        "flowers102": 102,
        "food101": 101,
        "mnist": 10,
        "oxfordiiitpet": 37,
        "stanfordcars": 196,
        "sun397": 397,
    }
    assert sum(counts.values()) == 1201


def test_order_two_has_the_same_sets():
    assert sorted(ORDER_II) == sorted(ORDER_I)


@pytest.mark.parametrize("key", [*ORDER_I, "cifar10"])
def test_names_and_templates_of_a_set_are_distinct_and_whole(key):
    names, templates = torchvision_sets.class_names(key), torchvision_sets.templates(key)
    assert len({"".join(filter(str.isalnum, name.casefold())) for name in names}) == len(names), (
        "names are matched by letters and digits"
    )
    assert all(name == " ".join(name.split()) and "_" not in name for name in names)
    assert len(set(templates)) == len(templates)
    assert all(template.count("{}") == 1 for template in templates)


@pytest.mark.parametrize("key", ["cifar10", "cifar100", "dtd", "food101"])
def test_sets_that_torchvision_labels_by_sorted_name_are_sorted(key):
    assert underscored(key) == sorted(underscored(key))


def test_pets_are_sorted_without_regard_to_case():
    assert underscored("oxfordiiitpet") == sorted(underscored("oxfordiiitpet"), key=str.casefold)


@pytest.mark.parametrize(("key", "torchvision"), [("flowers102", datasets.Flowers102), ("mnist", datasets.MNIST)])
def test_names_follow_the_labels_that_torchvision_itself_lists(key, torchvision):
    own = [name.replace("-", " ").rstrip("?") for name in torchvision.classes]
    ours = [name.replace("-", " ") for name in torchvision_sets.class_names(key)]
    other_words = {"pink and yellow dahlia": "pink yellow dahlia", "air plant": "ball moss"}
    assert [other_words.get(name, name) for name in ours] == own


def test_sun397_keeps_the_place_before_its_qualifier_in_the_order_of_paths():
    names = torchvision_sets.class_names("sun397")
    assert names[8] == "apartment building outdoor"
    assert names.index("jail indoor") + 1 == names.index("jail cell"), "jail/indoor is before jail_cell"


# Layouts. Images that no test reads need not exist: labels come from the lists.


def test_aircraft(tmp_path):
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    names = torchvision_sets.class_names("aircraft")
    put(data / "images" / "0034309.jpg", 90)
    (data / "variants.txt").write_text("\n".join(names) + "\n")
    (data / "images_variant_train.txt").write_text(f"0000002 {names[3]}\n0034309 {names[99]}\n")
    (data / "images_variant_test.txt").write_text(f"0000003 {names[73]}\n")
    task = torchvision_sets.load("FGVCAircraft", tmp_path)
    assert (task.name, task.classes) == ("aircraft", names)
    assert (task.train.labels.tolist(), task.test.labels.tolist()) == ([3, 99], [73])
    assert red(task.train, 1) == pytest.approx(90, abs=1)


CALTECH_FOLDERS = {
    "off-center face": "Faces",
    "centered face": "Faces_easy",
    "leopard": "Leopards",
    "motorbike": "Motorbikes",
    "airplane": "airplanes",
    "side of a car": "car_side",
    "body of a cougar cat": "cougar_body",
    "face of a cougar cat": "cougar_face",
    "head of a crocodile": "crocodile_head",
    "head of a flamingo": "flamingo_head",
    "snoopy (cartoon beagle)": "snoopy",
    "yin and yang symbol": "yin_yang",
}


def test_caltech101(tmp_path):
    folders = [CALTECH_FOLDERS.get(name, name.replace(" ", "_")) for name in torchvision_sets.class_names("caltech101")]
    assert folders == sorted(folders), "torchvision's labels are the sorted folders"
    for name in ["BACKGROUND_Google", *folders]:
        (tmp_path / "caltech101" / "101_ObjectCategories" / name).mkdir(parents=True)
    for n in range(1, 6):
        put(tmp_path / "caltech101" / "101_ObjectCategories" / "airplanes" / f"image_{n:04d}.jpg", 10 * n)
    task = torchvision_sets.load("Caltech101", tmp_path)
    assert task.classes == torchvision_sets.class_names("caltech101")
    assert {task.classes[label] for label in (*task.train.labels, *task.test.labels)} == {"airplane"}
    assert sorted(round(red(images, i), -1) for images in (task.train, task.test) for i in range(len(images))) == [
        10,
        20,
        30,
        40,
        50,
    ]


@pytest.mark.parametrize(("key", "torchvision"), [("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)])
def test_cifar(tmp_path, monkeypatch, key, torchvision):
    def dump(name: str, content: dict) -> str:
        file = tmp_path / torchvision.base_folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(pickle.dumps(content))
        return hashlib.md5(file.read_bytes()).hexdigest()

    labels = "labels" if key == "cifar10" else "fine_labels"
    pixels = np.zeros((2, 3, 32, 32), np.uint8)
    pixels[1, 0, 4, 4] = 200
    for listing, own in (("train_list", [4, 5]), ("test_list", [3, 7])):
        batch = {"data": pixels.reshape(2, -1), labels: own}
        monkeypatch.setattr(
            torchvision, listing, [[name, dump(name, batch)] for name, _ in getattr(torchvision, listing)]
        )
    meta = torchvision.meta | {"md5": dump(torchvision.meta["filename"], {torchvision.meta["key"]: underscored(key)})}
    monkeypatch.setattr(torchvision, "meta", meta)

    task = torchvision_sets.load(torchvision.__name__, tmp_path)
    assert task.classes == torchvision_sets.class_names(key)
    assert task.train.labels.tolist() == [4, 5] * len(torchvision.train_list)
    assert task.test.labels.tolist() == [3, 7]
    assert (red(task.test, 0), red(task.test, 1)) == (0, 200)


def test_cifar_with_another_checksum_is_not_unpickled(tmp_path):
    folder = tmp_path / datasets.CIFAR100.base_folder
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(InputError, match="cannot open CIFAR100: Dataset not found or corrupted"):
        torchvision_sets.load("CIFAR100", tmp_path)


def test_dtd(tmp_path):
    data = tmp_path / "dtd" / "dtd"
    (data / "labels").mkdir(parents=True)
    lines = [f"{name}/{name}_0001.jpg" for name in underscored("dtd")]
    (data / "labels" / "train1.txt").write_text("\n".join([*reversed(lines), "woven/woven_0002.jpg"]))
    (data / "labels" / "test1.txt").write_text("\n".join(lines))
    put(data / "images" / lines[46], 77)
    task = torchvision_sets.load("dtd", tmp_path)
    assert task.classes == torchvision_sets.class_names("dtd")
    assert sorted(task.train.labels.tolist()) == [*range(45), 44, 45, 46]
    assert task.test.labels.tolist() == list(range(47))
    assert red(task.test, 46) == pytest.approx(77, abs=1)


def make_eurosat(root: Path) -> None:
    for label, name in enumerate(EUROSAT):
        for n in range(1, 6):
            put(root / "eurosat" / "2750" / name / f"{name}_{n}.jpg", 20 * label)


@pytest.fixture
def eurosat(tmp_path):
    make_eurosat(tmp_path)
    return tmp_path


def test_eurosat(eurosat):
    task = load_task(Request("torchvision:EuroSAT", root=eurosat))
    assert task.classes[0] == "annual crop land"
    assert task.classes[9] == "lake or sea"
    assert (len(task.train), len(task.test)) == (40, 10)
    for images in (task.train, task.test):
        assert [round(red(images, i) / 20) for i in range(len(images))] == images.labels.tolist()


def test_a_set_without_official_split_is_split_as_random_split_does(eurosat):
    train, test = torch.utils.data.random_split(
        datasets.EuroSAT(eurosat), [40, 10], generator=torch.Generator().manual_seed(42)
    )
    task = torchvision_sets.load("EuroSAT", eurosat)
    assert task.train.labels.tolist() == [train.dataset.targets[i] for i in train.indices]
    assert task.test.labels.tolist() == [test.dataset.targets[i] for i in test.indices]


def test_few_shots_of_a_torchvision_set_can_be_taken(eurosat):
    images = few_shot(torchvision_sets.load("EuroSAT", eurosat).train, shots=1, seed=42)
    assert sorted(images.labels.tolist()) == list(range(10))


def test_flowers102(tmp_path, monkeypatch):
    data = tmp_path / "flowers-102"
    put(data / "jpg" / "image_00003.jpg", 60)
    scipy.io.savemat(data / "imagelabels.mat", {"labels": np.array([[77, 1, 102, 5]])})
    scipy.io.savemat(data / "setid.mat", {"trnid": [[1, 3]], "valid": [[2]], "tstid": [[4, 2]]})
    files = {key: (name, None) for key, (name, _) in datasets.Flowers102._file_dict.items()}
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", files)
    task = torchvision_sets.load("Flowers102", tmp_path)
    assert [task.classes[label] for label in task.train.labels] == ["passion flower", "blackberry lily"]
    assert sorted(task.classes[label] for label in task.test.labels) == ["english marigold", "pink primrose"]
    assert red(task.train, 1) == pytest.approx(60, abs=1)


def test_food101(tmp_path):
    data = tmp_path / "food-101"
    (data / "meta").mkdir(parents=True)
    for split in ("train", "test"):
        (data / "meta" / f"{split}.json").write_text(
            json.dumps({name: [f"{name}/{split}7"] for name in underscored("food101")})
        )
    put(data / "images" / "waffles" / "train7.jpg", 30)
    put(data / "images" / "waffles" / "test7.jpg", 50)
    task = torchvision_sets.load("Food101", tmp_path)
    assert task.classes == torchvision_sets.class_names("food101")
    assert task.train.labels.tolist() == list(range(101))
    assert red(task.train, 100) == pytest.approx(30, abs=1)
    assert red(task.test, 100) == pytest.approx(50, abs=1)


def test_mnist(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.zeros((10, 28, 28), np.uint8)
    pixels[:, 4, 4] = np.arange(10)
    for part, labels in (("train", range(9, -1, -1)), ("t10k", range(10))):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, 10, 28, 28) + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 10) + bytes(labels))
    task = load_task(Request("torchvision:MNIST", root=tmp_path))
    assert task.classes[3] == "3 - three"
    assert (task.train.labels.tolist(), task.test.labels.tolist()) == (list(range(9, -1, -1)), list(range(10)))
    assert task.test.read(6).getpixel((4, 4)) == (6, 6, 6)


def test_oxfordiiitpet(tmp_path):
    data = tmp_path / "oxford-iiit-pet"
    (data / "annotations").mkdir(parents=True)
    lines = [f"{name}_{label + 10} {label + 1} 1 1" for label, name in enumerate(underscored("oxfordiiitpet"))]
    for split, ordered in (("trainval", lines[::-1]), ("test", lines[5:])):
        (data / "annotations" / f"{split}.txt").write_text("\n".join(ordered))
    put(data / "images" / "Birman_16.jpg", 30)
    task = torchvision_sets.load("OxfordIIITPet", tmp_path)
    assert task.classes == torchvision_sets.class_names("oxfordiiitpet")
    assert (len(task.train), len(task.test)) == (37, 32)
    birman = task.train.labels.tolist().index(6)
    assert task.classes[6] == "Birman"
    assert red(task.train, birman) == pytest.approx(30, abs=1)


def test_stanfordcars(tmp_path):
    data = tmp_path / "stanford_cars"
    (data / "devkit").mkdir(parents=True)
    annotations = np.array(
        [("00001.jpg", 14), ("00002.jpg", 196), ("00003.jpg", 2)], [("fname", object), ("class", object)]
    )
    scipy.io.savemat(data / "devkit" / "cars_train_annos.mat", {"annotations": annotations[:2]})
    scipy.io.savemat(data / "cars_test_annos_withlabels.mat", {"annotations": annotations[1:]})
    scipy.io.savemat(
        data / "devkit" / "cars_meta.mat",
        {"class_names": np.array(torchvision_sets.class_names("stanfordcars"), object)},
    )
    put(data / "cars_train" / "00002.jpg", 40)
    (data / "cars_test").mkdir()
    task = torchvision_sets.load("StanfordCars", tmp_path)
    assert [task.classes[label] for label in task.train.labels] == [
        "Audi TTS Coupe 2012",
        "smart fortwo Convertible 2012",
    ]
    assert task.test.labels.tolist() == [195, 1]
    assert red(task.train, 1) == pytest.approx(40, abs=1)


def sun397(root: Path, paths: list[str]) -> None:
    (root / "SUN397").mkdir()
    (root / "SUN397" / "ClassName.txt").write_text("\n".join(paths) + "\n")
    for n in range(5):
        put(root / "SUN397" / "a" / "abbey" / f"sun_a{n}.jpg", 10)
        put(root / "SUN397" / "j" / "jail_cell" / f"sun_j{n}.jpg", 90)


def sun_paths() -> list[str]:
    return [f"/{name[0]}/{name.replace(' ', '_')}" for name in torchvision_sets.class_names("sun397")]


def test_sun397(tmp_path):
    sun397(tmp_path, sun_paths())
    task = torchvision_sets.load("SUN397", tmp_path)
    assert task.classes == torchvision_sets.class_names("sun397")
    assert (len(task.train), len(task.test)) == (8, 2)
    for images in (task.train, task.test):
        assert {task.classes[label]: round(red(images, i), -1) for i, label in enumerate(images.labels)}.items() <= {
            "abbey": 10,
            "jail cell": 90,
        }.items()


def test_the_order_of_the_file_system_does_not_move_images_between_train_and_test(tmp_path, monkeypatch):
    sun397(tmp_path, sun_paths())
    files = sorted((tmp_path / "SUN397").rglob("sun_*.jpg"))
    splits = []
    for found in (files, files[::-1]):
        monkeypatch.setattr(Path, "rglob", lambda self, pattern, found=found: found)
        splits.append(torchvision_sets.load("SUN397", tmp_path))
    assert splits[0].train.labels.tolist() == splits[1].train.labels.tolist()
    assert splits[0].test.labels.tolist() == splits[1].test.labels.tolist()


def test_a_copy_with_its_classes_in_another_order_is_named_by_its_own_list(tmp_path):
    sun397(tmp_path, sun_paths()[::-1])
    task = torchvision_sets.load("SUN397", tmp_path)
    assert task.classes == torchvision_sets.class_names("sun397")[::-1]
    names = {task.classes[label] for label in (*task.train.labels, *task.test.labels)}
    assert names == {"abbey", "jail cell"}


def test_a_copy_that_moved_one_name_and_renamed_another_is_refused(tmp_path):
    paths = sun_paths()
    paths[0], paths[1] = paths[1], "/a/abbey_ruins"
    (tmp_path / "SUN397").mkdir()
    (tmp_path / "SUN397" / "ClassName.txt").write_text("\n".join(paths))
    with pytest.raises(InputError, match="label 1, expected 'airplane cabin'"):
        torchvision_sets.load("SUN397", tmp_path)


def test_a_copy_with_too_few_classes_is_refused(tmp_path):
    for name in EUROSAT[:9]:
        put(tmp_path / "eurosat" / "2750" / name / "1.jpg")
    with pytest.raises(InputError, match="eurosat has 9 classes, expected 10"):
        torchvision_sets.load("EuroSAT", tmp_path)


# What is not there


@pytest.mark.parametrize("entry", torchvision_sets._SETS.values(), ids=lambda entry: entry.torchvision)
def test_a_set_that_is_not_there_is_named_with_its_root(tmp_path, entry):
    with pytest.raises(InputError, match=f"cannot open {entry.torchvision}") as refused:
        torchvision_sets.load(entry.torchvision, tmp_path)
    assert refused.value.message.startswith(str(tmp_path))
    assert "data.download" in refused.value.remedy


def test_a_set_is_downloaded_only_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.EuroSAT, "download", lambda self: make_eurosat(Path(self.root)))
    with pytest.raises(InputError, match="cannot open EuroSAT"):
        load_task(Request("torchvision:EuroSAT", root=tmp_path))
    assert len(load_task(Request("torchvision:EuroSAT", root=tmp_path / "new", download=True)).train) == 40


def test_a_download_that_fails_is_said_to_be_one(tmp_path, monkeypatch):
    def fail(self):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.EuroSAT, "download", fail)
    with pytest.raises(InputError, match="no route to host") as refused:
        torchvision_sets.load("EuroSAT", tmp_path, download=True)
    assert "network" in refused.value.remedy


def test_a_root_that_does_not_exist_is_refused_and_not_made(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        torchvision_sets.load("Caltech101", tmp_path / "gone")
    assert not (tmp_path / "gone").exists()


def test_an_unknown_set_lists_the_known_ones(tmp_path):
    with pytest.raises(InputError, match="unknown data set torchvision:ImageNet") as refused:
        torchvision_sets.load("ImageNet", tmp_path)
    assert "FGVCAircraft" in refused.value.remedy


# Recipes


@pytest.mark.parametrize("name", ["mtil-5shot", "mtil-full"])
def test_the_mtil_recipes_have_order_one_and_offer_order_two(name):
    recipe = load_recipe(RECIPES / f"{name}.toml")
    assert tuple(task.name for task in recipe.stream) == ORDER_I
    assert all(
        task.source.removeprefix("torchvision:") == torchvision_sets._SETS[task.name].torchvision
        for task in recipe.tasks
    )
    [line] = [line for line in (RECIPES / f"{name}.toml").read_text().splitlines() if line.startswith("# order = ")]
    assert tuple(tomllib.loads(line.removeprefix("# "))["order"]) == ORDER_II


def test_the_mini_mtil_recipe_learns_sets_that_torchvision_downloads_and_needs_no_other_file():
    recipe = load_recipe(RECIPES / "mini-mtil.toml")
    assert {task.name: task.source.removeprefix("torchvision:") for task in recipe.tasks} == {
        name: torchvision_sets._SETS[name].torchvision
        for name in ("caltech101", "flowers102", "cifar10", "eurosat", "mnist", "dtd", "oxfordiiitpet")
    }
    assert recipe.base.model.startswith("builtin:")
    assert load_task(Request(recipe.probe.source, test_only=True)).test
