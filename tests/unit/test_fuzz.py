"""Stores with damaged files through the Python face, with a fixed seed."""

import logging

import pytest
from fuzz import fuzz_store


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "store"
    fuzz_store.build(path)
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(4))
def test_damaged_stores_raise_nothing_but_errors_of_millstream(built, number):
    logging.disable()
    try:
        for data in [*fuzz_store.inputs(15, number), *fuzz_store.FOUND[number::4]]:
            print(data.hex())  # shown where it fails
            fuzz_store.one_input(data, built)
    finally:
        logging.disable(logging.NOTSET)
