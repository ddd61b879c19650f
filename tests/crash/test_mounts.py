"""Real mounts with odd names and contents, in a mount namespace that ends with the test."""

import os
import subprocess

import crash_workers as workers
import pytest

import millstream

NAMESPACE = ("unshare", "--mount")
NAMES = (
    b"latin-\xe9",
    "öäü".encode(),
    "名前".encode(),
    b"a b\tc\nd",
    b"back\\040slash\\",
    b" - ",
    b"#",
)


def mount(kind, target, *options):
    """Mount it in the namespace of this worker."""
    subprocess.run(["mount", "-t", kind, *options, kind, target], check=True)


@pytest.mark.root
def test_kind_of_file_system_is_seen_whatever_mounts_are_called(tmp_path):
    """Names that are not UTF-8 made every open fail; other letters hid what was mounted there."""
    workers.need("unshare", "mount", root=True)
    assert "seen" in workers.run("test_mounts.open_on_odd_mounts", str(tmp_path), prefix=NAMESPACE)


def open_on_odd_mounts(path):
    """Open stores on mounts that are fine and on ones that are not, while all are mounted."""
    made = {}
    for kind in ("ramfs", "tmpfs"):
        for name in NAMES:
            directory = os.path.join(os.fsencode(path), kind.encode() + name)
            os.mkdir(directory)
            mount(kind, directory)
            made[directory] = kind
    for directory, kind in made.items():
        store = directory + b"/store"
        if kind == "tmpfs":
            with millstream.open(store) as opened:
                assert opened.stream("s").append(b"1").offset == 0
        else:
            with pytest.raises(millstream.Unsupported, match="ramfs"):
                millstream.open(store)
    with pytest.raises(millstream.Unsupported, match="devpts"):
        millstream.open("/dev/pts")
    print("seen", flush=True)
