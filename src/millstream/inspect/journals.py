"""The page of a store's journal, read without the core; its records are a stream's."""

from __future__ import annotations

from collections.abc import Iterator

from millstream.errors import StorageError
from millstream.inspect.catalog import StoreInfo, StreamInfo, unreadable
from millstream.inspect.layout import JOURNAL, File, Finding, Invalid, Layout, Note, hash64

PAGE = Layout("8sII16sQ", "magic version reserved store_id checksum")
PAGE_BYTES = 4096


def verify(store: StoreInfo, stream: StreamInfo) -> Iterator[Finding]:
    """Yield what is wrong with the page, where the stream is the journal.

    Nothing of it is lost: it says what need not be done again, and is made anew.
    """
    path = stream.path / "page"
    if stream.name != JOURNAL or not path.exists():
        return
    try:
        with File(path) as file:
            if file.size < PAGE_BYTES:
                raise Invalid("size of at least", PAGE_BYTES, file.size)
            raw = file.read(0, PAGE.size).tobytes()
            fields, right = PAGE.read(raw), hash64(raw[:32])
            expected = {"magic": b"MSJOURN1", "version": 1, "store_id": store.store_id}
            for name, value in {**expected, "checksum": right}.items():
                if fields[name] != value:
                    raise Invalid(name, value, fields[name])
    except Invalid as bad:
        yield Note("journal", path, None, f"cannot be used, and is made anew: {bad}")
    except StorageError as error:
        yield unreadable(path, error)
