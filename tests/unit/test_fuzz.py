"""Stores with damaged files, and journals of any content, through the Python face; fixed seeds."""

import contextlib
import gc
import logging
import os

import pytest
from fuzz import fuzz_journal, fuzz_store


@pytest.fixture(scope="module", params=[fuzz_store, fuzz_journal], ids=["store", "journal"])
def harness(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "store"
    request.param.build(path)
    return request.param, path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(4))
def test_foreign_bytes_raise_nothing_but_errors_of_millstream(harness, number):
    module, built = harness
    logging.disable()
    try:
        for data in [*module.inputs(15, number), *module.FOUND[number::4]]:
            print(data[:100].hex())  # shown where it fails
            module.one_input(data, built)
    finally:
        logging.disable(logging.NOTSET)


def open_files():
    """What descriptors and maps of this process lead to."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    with open("/proc/self/maps") as lines:
        return found + [line.split(maxsplit=5)[-1] for line in lines]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [0, 1, 100])
def test_file_that_ends_early_is_an_error_of_millstream(tmp_path, size):
    built = tmp_path / "built"
    fuzz_store.build(built)
    tried = 0
    for name, whole, _ in fuzz_store.image(built):
        if whole <= size:
            continue
        copied = tmp_path / f"{tried}"
        fuzz_store.copy(built, copied)
        os.truncate(copied / name, size)
        print(name)  # shown where it fails
        fuzz_store.use(copied, "r")
        fuzz_store.use(copied, "rw")
        fuzz_store.check_nothing_runs()
        gc.collect()  # tracebacks hold what could not be opened
        assert [one for one in open_files() if one.startswith(str(copied))] == []
        tried += 1
    assert tried > 10
