"""One line of a recipe names a task; what cannot be found is named together with the remedy."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pictures import dotted

from r1export.data.request import Request, expand_path
from r1export.data.sources import READERS, load_task
from r1export.errors import InputError

DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture
def pets(tmp_path):
    """A folder of two classes with five images each, at ROOT/pets."""
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for n in range(5):
            dotted((n, 0, 0)).save(tmp_path / "pets" / name / f"{n}.png")
    return tmp_path


def test_a_relative_path_starts_at_the_root(pets):
    task = load_task(Request("folder:pets", root=pets))
    assert (task.name, task.classes, task.templates) == ("pets", ("cat", "dog"), ("a photo of a {}.",))
    assert (len(task.train), len(task.test)) == (8, 2)


def test_an_absolute_path_does_not(pets):
    assert load_task(Request(f"folder:{pets}/pets", root=Path("elsewhere"))).classes == ("cat", "dog")


def test_a_name_and_templates_replace_those_of_the_source(pets):
    task = load_task(Request("folder:pets", root=pets), name="animals", templates=("a painting of a {}.",))
    assert (task.name, task.templates) == ("animals", ("a painting of a {}.",))


def test_the_seed_decides_the_split_of_a_folder(pets):
    held_out = {
        load_task(Request("folder:pets", root=pets, seed=seed)).test.read(0).getpixel((0, 0)) for seed in range(9)
    }
    assert len(held_out) > 1


def test_environment_variables_and_home_are_expanded_in_source_and_root(pets, monkeypatch):
    monkeypatch.setenv("PETS_DIR", str(pets))
    monkeypatch.setenv("HOME", str(pets))
    assert load_task(Request("folder:${PETS_DIR}/pets")).classes == ("cat", "dog")
    assert load_task(Request("folder:~/pets", root=Path("elsewhere"))).classes == ("cat", "dog")
    assert load_task(Request("folder:pets", root=Path("${PETS_DIR}"))).classes == ("cat", "dog")


@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_that_is_not_set_is_named_with_the_way_to_set_it(monkeypatch, value):
    monkeypatch.delenv("PETS_DIR", raising=False)
    if value is not None:
        monkeypatch.setenv("PETS_DIR", value)
    for call in (
        lambda: load_task(Request("npz:${PETS_DIR}/x.npz")),
        lambda: load_task(Request("npz:x.npz", root=Path("${PETS_DIR}"))),
    ):
        with pytest.raises(InputError, match="PETS_DIR is not set") as refused:
            call()
        assert "export PETS_DIR=" in refused.value.remedy


def test_a_home_folder_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="no such home folder"):
        expand_path("~nobody-of-this-name/x")


@pytest.mark.parametrize("source", ["", "pets", "zip:pets", "folder", "folder:", "npz:", "builtin:"])
def test_an_unknown_source_lists_the_known_ones(source):
    with pytest.raises(InputError, match="unknown") as refused:
        load_task(Request(source))
    assert all(kind in refused.value.remedy for kind in ("folder:", "npz:", "torchvision:", "builtin:"))


def test_a_task_is_checked_and_the_message_names_its_source(pets):
    with pytest.raises(InputError, match="exactly one") as refused:
        load_task(Request("folder:pets", root=pets), templates=("no hole",))
    assert refused.value.message.startswith("folder:pets: ")
    (pets / "pets" / "emu").mkdir()
    with pytest.raises(InputError, match="class 'emu' has no training images"):
        load_task(Request("folder:pets", root=pets))


def test_a_pack_without_training_images_is_a_probe_and_nothing_else(pets):
    label = np.array([0, 1])
    np.savez(
        pets / "probe.npz",
        blob=np.zeros(2, np.uint8),
        off=np.arange(3),
        label=label,
        split=np.full(2, 2),
        names=np.array(["cat", "dog"]),
    )
    assert len(load_task(Request("npz:probe.npz", root=pets, test_only=True)).test) == 2
    with pytest.raises(InputError, match="no training images"):
        load_task(Request("npz:probe.npz", root=pets))


def test_a_builtin_task_needs_no_files():
    task = load_task(Request("builtin:patterns"), name="stripes")
    assert task.name == "stripes"
    assert task.train.read(0).mode == "RGB"


def test_torchvision_needs_a_root():
    with pytest.raises(InputError, match="torchvision:DTD") as refused:
        load_task(Request("torchvision:DTD"))
    assert "data.root" in refused.value.remedy


def test_reading_a_task_loads_no_torch(pets):
    code = (
        "import sys; from r1export.data.sources import load_task; from r1export.data.request import Request;"
        f"load_task(Request('folder:{pets}/pets')).train.read(0); load_task(Request('builtin:patterns')).train.read(0);"
        "print(sorted({'torch', 'torchvision', 'open_clip', 'onnx', 'datasets', 'sklearn'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_every_reader_is_named_where_a_source_is_unknown():
    with pytest.raises(InputError) as refused:
        load_task(Request("zip:x"))
    assert all(f"{scheme}:" in refused.value.remedy for scheme in READERS)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real packs are not on this machine")
def test_the_real_probe_is_loaded_with_the_first_of_its_synonyms():
    task = load_task(Request("npz:tinyimagenet_val.npz", root=DATA, test_only=True))
    assert task.classes[:2] == ("goldfish", "European fire salamander")
    assert (len(task.classes), len(task.train), len(task.test)) == (200, 0, 5000)
