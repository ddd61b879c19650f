"""The benchmarks run: tiny, so that their figures mean nothing and are not looked at."""

import importlib.machinery
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import millstream

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="benchmarks/ is not here"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc) for the limits"),
]


def run(*arguments: str) -> str:
    """Run a module of ours and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{done.stderr}\n{done.stdout}"
    return done.stdout


@pytest.mark.slow
def test_report_measures_every_row_and_its_limit() -> None:
    pytest.importorskip("pyarrow")
    document = json.loads(run("benchmarks", "--tiny", "--json", "--no-rivals"))
    rows = document["rows"]
    assert document["failures"] == {}
    assert len(rows) >= 28
    assert all(row["ours"] and all(value >= 0 for value in row["ours"]) for row in rows)
    assert all(row["limit"] for row in rows if row["limit_is"])
    judged = [row for row in rows if row["target"] != "-"]
    assert len(judged) >= 28
    assert all(row["met"] in (True, False) for row in judged)
    assert {row["unit"] for row in rows} >= {"ns", "µs", "ms", "M/s", "GB/s", "MiB"}


def test_report_prints_tables() -> None:
    printed = run("benchmarks", "--tiny", "--only", "sync.one", "--no-rivals")
    assert "sync append, one caller" in printed
    assert "of 1 targets met" in printed


@pytest.mark.parametrize("name", ["millstream_", "plain_file", "os_write", "sqlite"])
@pytest.mark.parametrize("work", ["append 1", "by 1,000", "read each", "read batch", "get one"])
def test_rival_does_its_work(name: str, work: str, tmp_path: Path) -> None:
    arguments = {"name": name, "work": work, "path": str(tmp_path / "log"), "seconds": 0.005}
    found = json.loads(run("benchmarks.worker", "benchmarks.rivals", "run", json.dumps(arguments)))
    assert "skipped" not in found
    assert found["rate"] is None or found["rate"] > 0


def loaded(name):
    """A program of the benchmarks as a module."""
    loader = importlib.machinery.SourceFileLoader(name, str(ROOT / "benchmarks" / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


def test_against_says_by_how_much_this_tree_is_faster():
    def row(unit, ours):
        return {"question": "?", "unit": unit, "ours": ours}

    this = {"rows": {"time": row("ns", [1.0, 2.0, 9.0]), "rate": row("M/s", [6.0])}}
    other = {"rows": {"time": row("ns", [4.0]), "rate": row("M/s", [2.0])}}
    gone = {"rows": {"time": row("ns", [4.0])}}
    module = loaded("against")
    rows = module.compare({"this": [this], "other": [other]})
    assert [(one["work"], one["ratio"]) for one in rows] == [("time", 2.0), ("rate", 3.0)]
    assert [one["work"] for one in module.compare({"this": [this], "other": [gone]})] == ["time"]
    assert module.cells(rows[1])[-1] == "3.00x"


def test_against_runs_a_build_beside_another(tmp_path):
    found = loaded("against").run(
        Path(millstream.__file__).parents[1], "transactions.whole", "tiny", str(tmp_path)
    )
    assert [*found] == ["rows"]
    assert [*found["rows"]] == ["100 in, 100 out, position"]


def test_instructions_are_held_within_two_percent_of_the_baseline():
    judged = loaded("instructions.py").judged

    baseline = {"append": 2_000, "get": 1_000, "gone": 7, "get: atomic": 0, "append: atomic": 300}
    same = {"append": 2_039, "get": 981, "gone": 7, "get: atomic": 20, "append: atomic": 320}
    assert judged(same, baseline) == []
    other = {"append": 2_050, "get": 970, "new": 1, "get: atomic": 100, "append: atomic": 400}
    assert judged(other, baseline) == [
        "append: 2,050 instead of 2,000 (+2.5%)",
        "append: atomic: 400 instead of 300 (+33.3%)",
        "get: 970 instead of 1,000 (-3.0%)",
        "get: atomic: 100 instead of 0 (+9900.0%)",
        "gone: was not counted",
        "new: not in the baseline",
    ]


def test_atomics_are_counted_by_address():
    text = "\n".join([
        "ob=/lib/_native.so", "fn=a", "0x10 3 5", "0x14 3 7", "calls=2 0x99", "0x10 3 900",
        "ob=/lib/libc.so", "0x10 1 50", "ob=/lib/_native.so", "0x10 4 6",
    ])  # fmt: skip
    assert loaded("instructions.py").executed(text, {0x10}) == 11


def test_tables_of_the_readme_are_made_from_a_report():
    module = loaded("readme.py")
    document = {
        "machine": {
            "date": "2026-01-02 03:04", "commit": "abc", "cores": 2, "cpu": "a CPU",
            "memory_gib": 8, "file_system": "ext4", "kernel": "6.1-x", "python": "3.11.1",
        },
        "scale": "full",
        "rivals": [
            {"name": "ours", "rates": {"append 1": [2e6, 4e6, 3e6]}, "skipped": ""},
            {"name": "theirs", "rates": {"append 1": [5e3]}, "skipped": ""},
            {"name": "gone", "rates": {}, "skipped": "no module"},
        ],
        "queues": [
            {
                "name": "q", "rates": {"by 100": [1e6]}, "skipped": "", "keeps": "a kill",
                "lease": True, "failed": {"1 and 1": "locked"},
            }
        ],
    }  # fmt: skip
    made = module.replaced(
        f"before\n{module.BEGIN}\nold\n{module.END}\nafter\n", module.text_of(document)
    )
    assert made.startswith(f"before\n{module.BEGIN}\n2026-01-02, commit abc: 2 cores of a CPU")
    assert made.endswith(f"Not measured: q, 1 and 1 (locked)\n{module.END}\nafter\n")
    assert "| ours | **3 M** | – |" in made
    assert "| theirs | 5 k | – |" in made
    assert "Not measured: gone (no module)" in made
    assert "| q | a kill | yes | – | **1 M** | – |" in made
    with pytest.raises(SystemExit, match="expected"):
        module.replaced("no comments", "text")


@pytest.mark.parametrize("work", ["put, get, ack", "by 100", "1 and 1"])
@pytest.mark.parametrize("rival", ["Millstream", "Multiprocessing"])
def test_queue_does_its_work(tmp_path, rival, work):
    program = (
        "import sys; from benchmarks.rivals import queues;print(queues.run(*sys.argv[1:4], 0.01))"
    )
    command = [sys.executable, "-c", program, rival, work, str(tmp_path / "q")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    none = rival == "Multiprocessing" and work == "by 100"
    assert ("'rate': None" in done.stdout) == none, done.stdout


def test_a_report_is_written_as_json_markdown_and_plots(tmp_path):
    pytest.importorskip("matplotlib")
    run("benchmarks", "--tiny", "--no-rivals", "--only", "sync", "--out", str(tmp_path))
    document = json.loads((tmp_path / "report.json").read_text())
    written = (tmp_path / "report.md").read_text()
    assert all(f"| {row['work']}" in written for row in document["rows"])
    plots = {file.name: file.read_text() for file in tmp_path.glob("*.svg")}
    assert "tail_latencies.svg" in plots and len(plots) >= 2
    assert all(text.startswith("<?xml") and "</svg>" in text for text in plots.values())


def test_every_rival_has_its_place_in_the_plots(tmp_path):
    pytest.importorskip("matplotlib")
    document = {
        "rows": [],
        "rivals": [{"name": "ours", "rates": {"append 1": [2e6]}, "skipped": ""}],
        "queues": [{"name": "q", "rates": {"by 100": [1e6, 3e6]}, "skipped": ""}],
    }
    (tmp_path / "report.json").write_text(json.dumps(document))
    printed = run("benchmarks.plots", str(tmp_path / "report.json"), str(tmp_path / "plots"))
    names = [Path(line).name for line in printed.splitlines()]
    assert names == ["rivals_append_1.svg", "queues_by_100.svg"]
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {*names}
