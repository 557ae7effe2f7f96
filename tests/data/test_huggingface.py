"""Data sets laid out as on the Hugging Face Hub, written by its own library and read from a folder or from its cache."""

import sys
from io import BytesIO

import pytest
from pictures import dotted
from PIL import Image

from r1export.data.request import Request
from r1export.data.sources import load_task
from r1export.errors import InputError, Unsupported

datasets = pytest.importorskip("datasets", reason="the extra `hf` is not installed")

NAMES = ["tabby_cat", "sea_horse"]


@pytest.fixture(autouse=True)
def _quiet_and_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "prepared"))
    datasets.disable_progress_bars()


def rows(reds, labels, **columns):
    """Images of one red level each, beside a column that is neither image nor label."""
    pictures = [dotted((red, 0, 0)) for red in reds]
    features = {"id": datasets.Value("int64"), "image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    values = {"id": list(range(len(reds))), "image": pictures, "label": labels} | columns
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def write(folder, **splits):
    for name, split in splits.items():
        split.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder


def reds(images):
    return [images.read(i).getpixel((0, 0))[0] for i in range(len(images))]


def test_images_are_read_with_their_labels_split_and_class_names(tmp_path):
    folder = write(tmp_path / "pets", train=rows([10, 20, 30], [0, 1, 0]), test=rows([40, 50], [1, 0]))
    task = load_task(Request(f"hf:{folder}"))
    assert (task.name, task.classes) == ("pets", ("tabby cat", "sea horse"))
    assert (reds(task.train), task.train.labels.tolist()) == ([10, 20, 30], [0, 1, 0])
    assert (reds(task.test), task.test.labels.tolist()) == ([40, 50], [1, 0])


def test_without_a_test_the_validation_is_tested(tmp_path):
    write(tmp_path / "pets", train=rows([10, 20], [0, 1]), validation=rows([30], [1]))
    assert reds(load_task(Request("hf:pets", root=tmp_path)).test) == [30]


def test_with_neither_a_fifth_of_each_class_is_held_out_by_the_seed(tmp_path):
    write(tmp_path / "pets", train=rows(range(20), [i % 2 for i in range(20)]))
    one, again, other = (load_task(Request("hf:pets", root=tmp_path, seed=seed)) for seed in (1, 1, 2))
    assert sorted(reds(one.train) + reds(one.test)) == list(range(20))
    assert (len(one.train), sorted(one.test.labels.tolist())) == (16, [0, 0, 1, 1])
    assert reds(one.test) == reds(again.test) != reds(other.test)
    probe = load_task(Request("hf:pets", root=tmp_path, test_only=True))
    assert (len(probe.train), len(probe.test)) == (0, 20)


def test_a_configuration_is_named_after_a_colon(tmp_path):
    for name, red in (("small", 10), ("large", 90)):
        write(tmp_path / "pets" / name, train=rows([red, red], [0, 1]), test=rows([red], [0]))
    (tmp_path / "pets" / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_dir: small\n- config_name: large\n  data_dir: large\n---\n"
    )
    assert reds(load_task(Request("hf:pets:large", root=tmp_path)).test) == [90]
    for wrong in ("", ":medium"):
        with pytest.raises(InputError, match=r"hf:pets: .*(small|medium)"):
            load_task(Request(f"hf:pets{wrong}", root=tmp_path))


def test_what_the_hub_left_in_its_cache_needs_no_network(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "datasets--someone--pets"
    write(cached / "snapshots" / ("a" * 40), train=rows([10, 20], [0, 1]), test=rows([30], [0]))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    assert reds(load_task(Request("hf:someone/pets")).test) == [30]
    with pytest.raises(InputError, match=r"hf:someone/dogs: .*download = true"):
        load_task(Request("hf:someone/dogs"))


def test_columns_that_are_no_images_and_labels_are_named(tmp_path):
    split = rows([10, 20], [0, 1]).remove_columns("label")
    write(tmp_path / "pets", train=split, test=split)
    with pytest.raises(InputError, match=r"id \(Value\), image \(Image\); expected one Image and one ClassLabel"):
        load_task(Request("hf:pets", root=tmp_path))


def test_a_damaged_image_is_named_by_split_and_index(tmp_path):
    file = BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    torn = {"bytes": file.getvalue()[:40], "path": None}
    split = rows([10, 20], [0, 1]).cast_column("image", datasets.Image(decode=False)).to_list()
    split[1]["image"] = torn
    features = rows([10], [0]).features
    write(tmp_path / "pets", train=datasets.Dataset.from_list(split, features=features), test=rows([10], [0]))
    with pytest.raises(InputError, match="hf:pets: image 1 of train"):
        load_task(Request("hf:pets", root=tmp_path)).train.read(1)


@pytest.mark.parametrize("column", ["image", "label"])
def test_a_row_that_lacks_its_image_or_label_is_named(tmp_path, column):
    split = rows([10, 20], [0, 1]).cast_column("image", datasets.Image(decode=False)).to_list()
    split[1][column] = None
    features = rows([10], [0]).features
    write(tmp_path / "pets", train=datasets.Dataset.from_list(split, features=features), test=rows([10], [0]))
    with pytest.raises(InputError, match=r"hf:pets: image 1 of train is missing|hf:pets: row 1 of train has no label"):
        load_task(Request("hf:pets", root=tmp_path)).train.read(1)


def test_the_extra_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(Unsupported, match=r"r1export\[hf\]"):
        load_task(Request("hf:someone/pets"))
