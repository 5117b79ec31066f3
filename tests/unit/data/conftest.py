"""A described model and a dataset, each once for all tests that only read them."""

import pytest


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    from tests.unit.data.samples import describe

    folder = tmp_path_factory.mktemp("model")
    return folder, describe(folder)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    from tests.unit.data.loaders import COUNT
    from tests.unit.data.samples import convert_folder, write_pretrain

    folder = tmp_path_factory.mktemp("a dataset")
    write_pretrain(folder / "raw", COUNT)
    convert_folder(folder / "raw")
    return folder / "raw" / "wds"
