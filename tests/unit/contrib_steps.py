"""Steps of tests of the drop-ins: the entry points, as an installation by pip has them."""

import os
import sys
import tomllib
from pathlib import Path

import millstream

ROOT = Path(__file__).parents[2]


def install(directory):
    """A PYTHONPATH with the metadata that pip would have written; the tree has none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = directory / "millstream-9999.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: millstream\nVersion: 9999\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {where}" for name, where in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    package = Path(millstream.__file__).parents[1]
    return os.pathsep.join([str(directory), str(package), *filter(None, sys.path)])
