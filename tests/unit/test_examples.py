"""Every example and every `python run` block of the docs, each in a process of its own."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
BLOCK = re.compile(r"^( *)```python +run *\n(.*?)^ *```", re.M | re.S)
OPTIONAL = (
    *(
        "apscheduler",
        "celery",
        "django",
        "django_tasks",
        "dramatiq",
        "duckdb",
        "huey",
        "numpy",
        "opentelemetry",
    ),
    *("polars", "prometheus_client", "pyarrow", "taskiq", "torch"),
)


def run(*words, cwd):
    """Run Python with warnings as errors and return what it printed, which must have ended well."""
    command = [sys.executable, "-W", "error", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stderr == ""
    return done.stdout


def example(name, cwd):
    """Run an example; its output, and that it left nothing behind."""
    out = run(EXAMPLES / name, cwd=cwd)
    assert list(cwd.iterdir()) == []
    return out


def test_every_example_has_a_test():
    tests = {name.removeprefix("test_example_") for name in globals()}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tests


def test_example_producer_consumer(tmp_path):
    out = example("producer_consumer.py", tmp_path)
    assert "producer: 5,000 orders" in out
    assert "consumer: 5,000 orders" in out
    counts = [int(n.replace(",", "")) for n in re.findall(r"partition \d: ([\d,]+) records", out)]
    assert len(counts) == 4
    assert sum(counts) == 5_000 + 4  # each partition has one that says the end


def test_example_follow(tmp_path):
    out = example("follow.py", tmp_path)
    assert re.findall(r"^tick +(\d+) after", out, re.M) == [str(i) for i in range(20)]
    assert int(re.search(r"other work (\d+) times", out)[1]) > 0


def test_example_arrow_pipeline(tmp_path):
    pytest.importorskip("numpy")
    out = example("arrow_pipeline.py", tmp_path)
    assert "200,000 readings appended" in out
    for sensor in (0, 25, 49):
        mean = float(re.search(rf"sensor +{sensor}: +(\S+) degrees", out)[1])
        assert abs(mean - sensor) < 0.1
    assert ("by polars" in out) == (find_spec("polars") is not None)
    both = all(find_spec(name) for name in ("duckdb", "pyarrow"))
    assert ("busiest by DuckDB: sensor-" in out) == both


def test_example_replay(tmp_path):
    out = example("replay.py", tmp_path)
    assert "first start: 20,000 records replayed" in out
    assert "from the snapshot: 1,000 records replayed" in out
    assert "from nothing: 21,000 records replayed" in out
    assert "the two books are equal" in out


def test_example_retention(tmp_path):
    out = example("retention.py", tmp_path)
    kept = int(re.search(r"kept ([\d,]+):", out)[1].replace(",", ""))
    assert 10_000 <= kept < 40_000
    first = re.search(r"offsets ([\d,]+) to 39,999", out)[1]
    assert f"offset 0 is gone; there are {first} to 39,999" in out
    assert f"reading begins at {first}" in out
    assert "still valid: 'line 0'" in out


def test_example_cqrs(tmp_path):
    out = example("cqrs.py", tmp_path)
    assert "20,000 changes of 500 orders" in out
    assert "order 7 after its change: returned" in out
    assert "order 8 is there: False" in out
    before, after = (
        int(n.replace(",", "")) for n in re.search(r"(\S+) records to (\S+),", out).groups()
    )
    assert after < before
    assert "opened again: 499 orders, order 9 {'state': 'lost', 'total': 9}" in out


def test_example_crash(tmp_path):
    out = example("crash.py", tmp_path)
    found = re.findall(r"acknowledged up to offset ([\d,]+), found ([\d,]+)", out)
    assert len(found) == 5
    assert all(int(a.replace(",", "")) < int(b.replace(",", "")) for a, b in found)
    assert "nothing acknowledged was lost" in out


def test_example_delivery(tmp_path):
    out = example("delivery.py", tmp_path)
    pattern = r"^(\w+): 2,000 records, 4 kills: (\d+) missing, (\d+) more than once, lag (\d+)$"
    found = {name: tuple(map(int, counts)) for name, *counts in re.findall(pattern, out, re.M)}
    assert found["at_most_once"][1:] == (0, 0)
    assert found["at_most_once"][0] <= 4 * 21
    assert found["at_least_once"][::2] == (0, 0)
    assert found["at_least_once"][1] <= 4 * 21
    assert found["once"][:2] == (0, 0)


def test_example_work_pool(tmp_path):
    out = example("work_pool.py", tmp_path)
    assert "killed one of 3 workers" in out
    assert "300 jobs, 300 results, none lost" in out


def test_example_priorities(tmp_path):
    out = example("priorities.py", tmp_path)
    order = re.search(r"strict: (.*)", out)[1].split(", ")
    assert order[0] == "password reset"
    assert order[1:4] == [f"receipt {i}" for i in range(3)]
    assert order[4:] == [f"newsletter {i}" for i in range(3)]
    assert int(re.search(r"the newsletter was number (\d+)", out)[1]) <= 65


def test_example_reminders(tmp_path):
    out = example("reminders.py", tmp_path)
    assert "called off: True" in out
    times = re.findall(r"^(\S.*?) +after (\S+) s", out, re.M)
    assert [name for name, _ in times] == ["eggs", "tea", "bread", "at a time"]
    assert "still waiting: 1" in out


def test_example_retries(tmp_path):
    out = example("retries.py", tmp_path)
    failed = re.findall(r"^ *(\d+) min, attempt (\d) of ann: failed", out, re.M)
    assert failed == [("0", "1"), ("1", "2"), ("3", "3"), ("7", "4"), ("15", "5")]
    assert "attempt 1 of nobody: rejected" in out
    assert "dead: nobody: no such address" in out
    assert "redriven: 1" in out
    assert "attempt 1 of ann: sent" in out
    assert "left: 0; dead: 1" in out


def test_example_ordered_work(tmp_path):
    out = example("ordered_work.py", tmp_path)
    assert "200 done, 1 failed, 0 released" in out
    assert int(re.search(r"up to (\d+) at a time", out)[1]) > 1
    assert "20 customers, each in order" in out


def test_example_back_pressure(tmp_path):
    out = example("back_pressure.py", tmp_path)
    assert int(re.search(r"never more than (\d+)", out)[1]) <= 10
    assert "of 25 offered at once, 10 fitted" in out
    assert "room again: one was done" in out


def test_example_change_data_capture(tmp_path):
    out = example("change_data_capture.py", tmp_path)
    assert "8 kills of pump and applier" in out
    assert "1,500 changes in the stream, each once" in out
    assert "the copy is equal" in out


def test_example_transactional_outbox(tmp_path):
    out = example("transactional_outbox.py", tmp_path)
    orders, events = re.search(r"12 kills; ([\d,]+) orders, ([\d,]+) events", out).groups()
    assert orders == events
    assert int(orders.replace(",", "")) > 100


def test_example_event_sourcing(tmp_path):
    out = example("event_sourcing.py", tmp_path)
    kills, done, refused = re.search(
        r"(\d+) kills; ([\d,]+) transfers and ([\d,]+) refusals, 4,000 orders", out
    ).groups()
    assert int(kills) > 0
    assert int(done.replace(",", "")) + int(refused.replace(",", "")) == 4_000
    whole = int(re.search(r"from nothing: ([\d,]+)", out)[1].replace(",", ""))
    rest = int(re.search(r"from the snapshot: ([\d,]+)", out)[1].replace(",", ""))
    assert rest < whole / 2
    assert "all balances: 0 cents" in out
    assert "account-3 had 10,000 cents" in out


def blocks():
    """Yield every block of README and docs that is to be run, named by file and line."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = path.read_text(encoding="utf-8")
        for found in BLOCK.finditer(text):
            line = text.count("\n", 0, found.start()) + 1
            code = re.sub(f"^{found[1]}", "", found[2], flags=re.M)
            yield pytest.param(code, id=f"{path.relative_to(ROOT)}:{line}")


@pytest.mark.parametrize("code", list(blocks()))
def test_block_of_the_docs_runs(code, tmp_path):
    for name in OPTIONAL:
        if re.search(rf"^ *(import|from) {name}\b", code, re.M):
            pytest.importorskip(name)
    script = tmp_path / "block.py"
    script.write_text(code)
    run(script, cwd=tmp_path)


def test_example_exactly_once(tmp_path):
    out = run(EXAMPLES / "exactly_once.py", 6, cwd=tmp_path)
    found = re.findall(r"^(\w+): (\w+): 6 kills, (\d+) missing, (\d+) twice$", out, re.M)
    counts = {(kind, stream): (int(lost), int(dup)) for kind, stream, lost, dup in found}
    assert counts["exactly_once", "squares"] == counts["exactly_once", "checked"] == (0, 0)
    assert counts["at_least_once", "squares"][0] == counts["at_least_once", "checked"][0] == 0


def test_example_work_from_stream(tmp_path):
    out = example("work_from_stream.py", tmp_path)
    assert re.findall(r"half \d: (\d+) orders", out) == ["100", "100"]
    assert "200 packed, each once: True" in out
    assert "4 tried again; 200 orders are kept" in out
