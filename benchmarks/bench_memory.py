"""How much memory does reading take?

Anonymous memory (RssAnon) of a process that reads all of a log and looks at every page of its
values. Mapped pages of files are not counted: the kernel takes them back when it needs them.
"""

from __future__ import annotations

import millstream
from benchmarks.bench_read import big_log
from benchmarks.harness import Bench

EVERY = 64  # batches between two looks


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def read_all(path: str) -> int:
    """How many bytes of anonymous memory the process grew by, at most, while it read."""
    stream = millstream.open(path).stream("s")
    batches = stream.read(partition=0)
    next(batches).values.data.sum()  # NumPy is loaded
    before = most = anonymous_bytes()
    for index, batch in enumerate(batches):
        batch.values.data[::4096].sum()
        if index % EVERY == 0:
            most = max(most, anonymous_bytes())
    return max(most, anonymous_bytes()) - before


def test_reading(bench: Bench) -> None:
    path, size = big_log(bench)
    ours = [float(bench.run(read_all, path=path))]
    work = f"anonymous memory that reading {size / (1 << 30):.2g} GiB adds"
    bench.row(work, (ours, []), unit="MiB", most=64 << 20)
