"""Forks, PID namespaces, copied and restored directories: no false death, ghost or mix-up."""

import json
import os
import shutil
import signal
import subprocess
import sys

import crash_workers as workers
import pytest
from open_copy import copy_open

import millstream

NAMESPACE = ("unshare", "-p", "-f", "--kill-child", "--mount-proc")


@pytest.mark.root
def test_two_pid_namespaces_share_a_store(tmp_path):
    workers.need("unshare", root=True)
    path, history = tmp_path / "store", tmp_path / "history"
    history.mkdir()
    options = {"partitions": 1}
    with millstream.open(path) as store:
        store.stream("s", segment_bytes=1 << 16)
    writers = [
        workers.start(
            "write_for_ever", str(path), str(history), f"n{i}", 1, options, prefix=NAMESPACE
        )
        for i in range(2)
    ]
    for one in writers:
        assert workers.line(one) == "open"
    with millstream.open(path) as store:
        living = [
            store.session.members.describe(millstream._native.owner_word(i, 0)) for i in range(2)
        ]
        assert all("of another PID namespace" in text for text in living), living
        alive = [word_of(path, i) for i in range(2)]
        assert not any(store.session.members.is_dead(word) for word in alive), (
            "no false proof of death"
        )
        before = store.stream("s").next_offset(0)
        workers.until(
            lambda: store.stream("s").next_offset(0) > before + 200, "progress of the namespaces"
        )
        writers[0].kill()  # of unshare: --kill-child takes the namespace with it
        dead = workers.until(
            lambda: [word for word in alive if store.session.members.is_dead(word)],
            "proof of death",
        )
        assert len(dead) == 1
        workers.kill(writers[0])
        before = store.stream("s").next_offset(0)
        workers.until(
            lambda: store.stream("s").next_offset(0) > before + 200, "progress of the other"
        )
        assert workers.stop(writers[1]) == 0
    records, _ = workers.judge(path, history)
    workers.verified(path)
    workers.report(records, 1, 1)


def word_of(path, index):
    data = (path / "members").read_bytes()
    return millstream._native.owner_word(
        index, int.from_bytes(data[64 + 64 * index :][:4], "little")
    )


def fork_and_look(path, how):
    """Fork with an open store: the child's handles are closed, the parent's life goes on."""
    store = millstream.open(path)
    stream = store.stream("s")
    stream.append(b"parent 0")
    reading = stream.read(follow=True, timeout=0.1)
    next(reading)
    word = store.session.members.word
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for use in (
                lambda: stream.append(b"child"),
                lambda: stream.next_offset(0),
                lambda: store.stream("s"),
                lambda: list(stream.read()),
                lambda: next(reading),
                lambda: store.flush(),
            ):
                try:
                    use()
                except millstream.Closed:
                    continue
                os._exit(2)
            assert store.closed
            with millstream.open(path) as mine:
                assert not mine.session.members.is_dead(word), "the parent looks dead"
                mine.stream("s").append(b"child 0")
            store.close()
            code = 0
        finally:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL if code == 0 else signal.SIGABRT)
            if how == "_exit" or code:
                os._exit(code)
        sys.exit(0)
    _, status = os.waitpid(child, 0)
    assert status == (signal.SIGKILL if how == "kill" else 0), status
    with millstream.open(path) as other:
        assert not other.session.members.is_dead(word), "the parent died with its child"
    assert stream.append(b"parent 1").offset == 2
    store.close()
    print("fine", flush=True)


@pytest.mark.parametrize("how", ["exit", "_exit", "kill"])
def test_forked_child_cannot_use_or_harm_its_parents_store(tmp_path, how):
    assert (
        workers.run("test_lives_and_copies.fork_and_look", str(tmp_path / "store"), how) == "fine\n"
    )
    with millstream.open(tmp_path / "store") as store:
        values = [bytes(v) for batch in store.stream("s").read() for v in batch.values]
    assert values == [b"parent 0", b"child 0", b"parent 1"]
    assert json.loads((tmp_path / "store/store.json").read_text())["body"]["clean"]
    workers.verified(tmp_path / "store")
    workers.report(3, 1, 0)


def fill(path, first, last):
    with millstream.open(path, durability="process") as store:
        stream = store.stream("s", segment_bytes=1 << 16)
        for i in range(first, last):
            stream.append(b"%d " % i + b"v" * 500)


def numbers(path):
    with millstream.open(path) as store:
        return [
            int(bytes(v).split()[0]) for batch in store.stream("s").read() for v in batch.values
        ]


def test_directory_copied_while_closed_opens_and_lives_its_own_life(tmp_path):
    fill(tmp_path / "a", 0, 300)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    fill(tmp_path / "b", 300, 500)
    fill(tmp_path / "a", 300, 310)
    assert numbers(tmp_path / "a") == list(range(310))
    assert numbers(tmp_path / "b") == list(range(500))
    workers.verified(tmp_path / "a")
    workers.verified(tmp_path / "b")
    workers.report(800, 0, 0)


def test_directory_copied_while_open_opens_as_a_prefix(tmp_path):
    path = tmp_path / "a"
    with millstream.open(path, durability="process") as store:
        stream = store.stream("s", segment_bytes=1 << 16)
        for i in range(250):
            stream.append(b"%d " % i + b"v" * 500)
        copy_open(path, tmp_path / "b")
        for i in range(250, 300):
            stream.append(b"%d " % i + b"v" * 500)
        assert numbers(tmp_path / "b") == list(range(250))
        fill(tmp_path / "b", 250, 400)
    assert numbers(path) == list(range(300))
    assert numbers(tmp_path / "b") == list(range(400))
    workers.verified(tmp_path / "b")
    workers.report(550, 0, 0)


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("leave", [True, False])
def test_remount_with_older_pages_opens_as_a_prefix(tmp_path, clean, leave):
    """An older control file and older segments come back under a newer store.json."""
    path = tmp_path / "store"
    fill(path, 0, 150)
    shutil.copytree(path, tmp_path / "older")
    if clean:
        fill(path, 150, 400)
    else:
        writer = workers.start("append_each_line", str(path), 0, "process")
        assert workers.line(writer) == "open"
        for i in range(150, 400):
            assert workers.ask(writer, f"{i} " + "v" * 500) == f"ok {i}"
        workers.kill(writer)
    if not leave:
        shutil.rmtree(path / "streams")
    shutil.copytree(tmp_path / "older/streams", path / "streams", dirs_exist_ok=True)
    assert numbers(path) == list(range(150)), "a prefix, no ghosts"
    fill(path, 150, 500)
    assert numbers(path) == list(range(500))
    workers.report(500, 1, 0)


def test_first_open_killed_before_the_store_is_there(tmp_path):
    """Kill at every file call of the creation; the next open creates it, or finds it."""
    for step in [*range(24), *range(24, 300, 5)]:
        path = tmp_path / f"store{step}"
        opener = workers.start("test_lives_and_copies.create_until", str(path), step)
        opener.wait(workers.DEADLINE_S)
        died = opener.returncode == -9
        workers.kill(opener)
        with millstream.open(path) as store:
            store.stream("s").append(b"x")
        workers.verified(path)
        if not died:
            break
    assert not died
    assert step > 10
    workers.report(step, step, 0)


def create_until(path, calls):
    import test_kill_storm

    test_kill_storm.recover_until(path, calls)


def test_store_is_named_by_its_path_not_by_the_working_directory(tmp_path):
    subprocess.run(
        [sys.executable, "-c", "import millstream; millstream.open('here').close()"],
        cwd=tmp_path,
        check=True,
    )
    assert (tmp_path / "here/store.json").exists()
