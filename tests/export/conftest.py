"""One export of the tiny model, shared by the tests that only read it."""

import pytest
from export import exporting


@pytest.fixture(scope="session")
def exported(tiny_files, tmp_path_factory):
    from r1export.adapt.clip import load_clip

    model = load_clip(weights=tiny_files[0], config=tiny_files[1]).model
    exporting.randomize_(model, 1)
    return exporting.export(model, tmp_path_factory.mktemp("exported"))
