"""The programs of docs/guide/engines.md, of those engines that are installed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import millstream

pytest.importorskip("polars")

PAGE = (Path(__file__).parents[2] / "docs" / "guide" / "engines.md").read_text()
READER = re.search(r"^```python\n# ranges.py\n(.*?)^```", PAGE, re.M | re.S)[1]
PROGRAMS = re.findall(r"^## (\w+)\n.*?^```python\n(# with ranges.py.*?)^```", PAGE, re.M | re.S)
ENGINES = {"Dask": "dask", "Ray": "ray", "Spark": "pyspark", "dlt": "dlt"}


def test_each_engine_has_a_program():
    assert {name for name, _ in PROGRAMS} == set(ENGINES)


@pytest.mark.parametrize(("name", "program"), PROGRAMS, ids=[name for name, _ in PROGRAMS])
def test_an_engine_reads_a_stream(tmp_path, name, program):
    pytest.importorskip(ENGINES[name])
    with millstream.open(tmp_path / "store") as store:
        stream = store.stream("events", partitions=2)
        for partition in range(2):
            stream.append_many([b"x" * (n % 10) for n in range(1050)], partition=partition)
    (tmp_path / "ranges.py").write_text(READER)
    (tmp_path / "program.py").write_text(f"path = {str(tmp_path / 'store')!r}\n{program}")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    env = {**os.environ, "PYTHONPATH": path, "RUNTIME__DLTHUB_TELEMETRY": "false"}
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.split()[-1] == str(2 * sum(n % 10 for n in range(1050)))
