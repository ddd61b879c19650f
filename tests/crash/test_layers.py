"""A store shipped in an image: its files are in the lower layer of an overlay that is written to.

A file is copied up when somebody opens it to write. Maps that were made before stay with the one
below; its device and inode are the same.
"""

import contextlib
import os
import subprocess
import sys

import crash_workers as workers
import pytest

import millstream

NAMESPACE = ("unshare", "--mount")


def layered(path):
    """Mount an overlay over what is in `path`/lower; where."""
    names = [os.path.join(path, name) for name in ("lower", "layer", "store")]
    os.mkdir(names[1])
    subprocess.run(["mount", "-t", "tmpfs", "layer", names[1]], check=True)
    for name in ("upper", "work"):
        os.mkdir(os.path.join(names[1], name))
    os.mkdir(names[2])
    layers = f"lowerdir={names[0]},upperdir={names[1]}/upper,workdir={names[1]}/work"
    subprocess.run(["mount", "-t", "overlay", "-o", layers, "overlay", names[2]], check=True)
    return names[2]


def image(path):
    """What the image has: a stream, a group that has read half of it, a queue."""
    with millstream.open(os.path.join(path, "lower")) as store:
        stream = store.stream("s")
        stream.append_many([b"old"] * 10)
        with stream.consumer(group="g", max_records=5) as consumer:
            consumer.poll()
            consumer.commit()
        store.queue("q").put(b"old")


def values(stream, **options):
    """All records, as often as they are looked for."""
    return [bytes(value) for batch in stream.read(**options) for value in batch.values]


CASES = (
    "before_all", "settings", "between_open_and_use", "before_the_append", "writer", "killed",
    "dropped",
)  # fmt: skip


@pytest.mark.root
@pytest.mark.parametrize("case", CASES)
def test_nobody_goes_stale_on_an_overlay(tmp_path, case):
    """A reader's log, groups and queues stood still for ever, without a word."""
    workers.need("unshare", "mount", root=True)
    image(tmp_path)
    assert "seen" in workers.run(f"test_layers.{case}", str(tmp_path), prefix=NAMESPACE)


def append(path):
    """Another process that writes: two records more, one read by the group, a message."""
    worker = workers.start("test_layers.write", path)
    assert workers.line(worker) == "open"
    return worker


def write(path):
    with millstream.open(path) as store:
        print("open", flush=True)
        for line in sys.stdin:
            stream = store.stream("s")
            if line == "use\n":
                stream.next_offset(0)
            else:
                stream.append_many([b"new"] * 2)
                with stream.consumer(group="g", max_records=1) as consumer:
                    consumer.poll()
                    consumer.commit()
                store.queue("q").put(b"new")
            print("done", flush=True)


def tell(worker, what):
    worker.stdin.write(what + "\n")
    worker.stdin.flush()
    assert workers.line(worker) == "done"


def refused(call):
    """It does not answer with what is below; opening again is what to do."""
    with pytest.raises(millstream.Closed, match="overlay.*open the store again"):
        call()


def all_is_seen(path, copies=1):
    with millstream.open(path, mode="r") as store:
        stream = store.stream("s")
        assert values(stream) == [b"old"] * 10 + [b"new"] * 2 * copies
        assert stream.group("g").lag() == 5 + copies
        assert len(store.queue("q")) == 1 + copies


def before_all(path):
    """The reader was first."""
    path = layered(path)
    with millstream.open(path, mode="r") as store:
        stream, queue = store.stream("s"), store.queue("q")
        group, following = stream.group("g"), stream.read(follow=True, timeout=30)
        assert len(next(following)) == 10
        assert (group.lag(), len(queue), len(values(stream))) == (5, 1, 10)
        worker = append(path)
        tell(worker, "append")
        for call in (
            lambda: next(following), lambda: values(stream), group.lag, group.partitions,
            stream.stats, lambda: stream.next_offset(0), lambda: len(queue), queue.stats,
            lambda: values(store.stream("s")),
        ):  # fmt: skip
            refused(call)
        all_is_seen(path)
        assert workers.stop(worker) == 0
    all_is_seen(path)
    print("seen", flush=True)


def settings(path):
    """Only settings change, and the number of partitions."""
    path = layered(path)
    with millstream.open(path, mode="r") as store:
        stream, queue = store.stream("s"), store.queue("q")
        partition_of_key = stream.partition_for(b"k")
        worker = workers.start("test_layers.alter", path)
        assert workers.line(worker) == "altered"
        for call in (
            lambda: stream.partitions, lambda: stream.retention, lambda: stream.segment_bytes,
            lambda: stream.durability, lambda: stream.compaction,
            lambda: stream.partition_for(b"k"), lambda: queue.lease, lambda: queue.retry,
            lambda: queue.durability,
        ):  # fmt: skip
            refused(call)
        assert "closed" in repr(stream)
        assert partition_of_key == 0
    with millstream.open(path, mode="r") as store:
        assert (store.stream("s").partitions, store.queue("q").lease) == (5, 7.0)
    assert workers.stop(worker) == 0
    print("seen", flush=True)


def alter(path):
    """Another process that stays."""
    with millstream.open(path) as store:
        store.stream("s").alter(segment_bytes=1 << 20)
        store.stream("s").add_partitions(4)
        store.queue("q").alter(lease=7)
        print("altered", flush=True)
        sys.stdin.read()


def between_open_and_use(path):
    """The reader came when the writer had the store open, but not the stream."""
    path = layered(path)
    worker = append(path)
    with millstream.open(path, mode="r") as store:
        stream = store.stream("s")
        assert len(values(stream)) == 10
        tell(worker, "append")
        refused(lambda: values(stream))
    all_is_seen(path)
    assert workers.stop(worker) == 0
    print("seen", flush=True)


def before_the_append(path):
    """The reader mapped the segment when the writer had the stream open, but not appended."""
    path = layered(path)
    worker = append(path)
    tell(worker, "use")
    with millstream.open(path, mode="r") as store:
        stream = store.stream("s")
        following = stream.read(follow=True, timeout=30)
        assert len(next(following)) == 10
        for copies in range(1, 4):
            tell(worker, "append")
            assert list(next(following).values) == [b"new"] * 2
            assert len(values(stream)) == 10 + 2 * copies
            assert stream.next_offset(0) == 10 + 2 * copies
    all_is_seen(path, 3)
    assert workers.stop(worker) == 0
    print("seen", flush=True)


def writer(path):
    """One that reads before it appends, and one that reads what another appends."""
    path = layered(path)
    with millstream.open(path) as store:
        stream = store.stream("s")
        following = stream.read(follow=True, timeout=30)
        assert len(next(following)) == 10
        worker = append(path)
        tell(worker, "append")
        assert list(next(following).values) == [b"new"] * 2
        stream.append(b"own")
        assert list(next(following).values) == [b"own"]
        assert stream.group("g").lag() == 7
        assert len(store.queue("q")) == 2
        assert workers.stop(worker) == 0
    print("seen", flush=True)


def killed(path):
    """The image was made of a store that nobody had closed."""
    from open_copy import copy_open

    with millstream.open(os.path.join(path, "lower")) as store:
        store.stream("s").append(b"killed")
        copy_open(os.path.join(path, "lower"), os.path.join(path, "image"))
    os.rename(os.path.join(path, "lower"), os.path.join(path, "closed"))
    os.rename(os.path.join(path, "image"), os.path.join(path, "lower"))
    path = layered(path)
    with millstream.open(path, mode="r") as store:
        assert store.needs_recovery
        stream = store.stream("s")
        following = stream.read(follow=True, timeout=30)
        assert sum(len(next(following)) for _ in range(1)) == 11
        worker = append(path)
        tell(worker, "append")
        assert list(next(following).values) == [b"new"] * 2
        assert workers.stop(worker) == 0
    print("seen", flush=True)


def dropped(path):
    """A directory of the lower layer cannot be renamed: what was dropped stayed, unusable."""
    path = layered(path)
    with millstream.open(path) as store:
        for make, drop in ((store.stream, store.drop_stream), (store.queue, store.drop_queue)):
            name = "s" if drop == store.drop_stream else "q"
            known = make(name)
            for _ in range(2):
                drop(name)
                with pytest.raises(millstream.NotFound):
                    make(name, create=False)
                with pytest.raises(millstream.NotFound):
                    drop(name)
                with pytest.raises(millstream.Closed, match="dropped"):
                    len(known) if name == "q" else known.append(b"x")
                known = make(name, create=True)
            known.put(b"new") if name == "q" else known.append(b"new")
        assert (store.streams(), store.queues()) == (["s"], ["q"])
    with millstream.open(path, mode="r") as store:
        assert values(store.stream("s")) == [b"new"]
        assert len(store.queue("q")) == 1
    assert millstream.inspect.verify(path).ok
    print("seen", flush=True)


@pytest.mark.root
@pytest.mark.parametrize("goes_on", ["another", "the next"])
@pytest.mark.parametrize("removed", [0, 1, 3, 99])
def test_drop_on_an_overlay_that_is_killed_leaves_all_or_nothing(tmp_path, removed, goes_on):
    """It renames the configuration first, and removes that last."""
    workers.need("unshare", "mount", root=True)
    image(tmp_path)
    where = "test_layers.drop_in_parts", str(tmp_path), str(removed), goes_on
    assert "seen" in workers.run(*where, prefix=NAMESPACE)


def drop_and_die(path, kind, removed):
    """Die when so many files were removed."""
    from millstream.disk import files

    remove, count = files.remove, 0

    def remove_some(name):
        nonlocal count
        if count == removed:
            os._exit(9)
        count += 1
        remove(name)

    store = millstream.open(path)
    files.remove = remove_some
    store.drop_stream("s") if kind == "stream" else store.drop_queue("q")
    os._exit(9)


def drop_in_parts(path, removed, goes_on):
    """Others go on, or the next opener does: the name is free."""
    path = layered(path)
    with contextlib.ExitStack() as stack:
        if goes_on == "another":
            store = stack.enter_context(millstream.open(path))
        for kind in ("stream", "queue"):
            call = f"drop_and_die({path!r}, {kind!r}, {int(removed)})"
            command = f"import test_layers; test_layers.{call}"
            done = subprocess.run([sys.executable, "-c", command], cwd=os.path.dirname(__file__))
            assert done.returncode == 9
        if goes_on == "the next":
            with millstream.open(path, mode="r") as reader:
                for make in (lambda: reader.stream("s"), lambda: reader.queue("q")):
                    with pytest.raises(millstream.NotFound):
                        make()
            store = stack.enter_context(millstream.open(path))
            assert (store.streams(), store.queues()) == ([], [])
        for make in (store.stream, store.queue):
            with pytest.raises(millstream.NotFound):
                make("s" if make == store.stream else "q", create=False)
        assert store.stream("s", create=True).append(b"new").offset == 0
        store.queue("q", create=True).put(b"new")
        assert len(store.queue("q")) == 1
    assert millstream.inspect.verify(path).ok
    print("seen", flush=True)
