"""The schedules of the queue catch what is planted in it: the judge itself is judged."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "csrc"
PROGRAM = ROOT / "tests/c/test_ms_queue_schedules.c"
FLAGS = ["-std=c11", "-O1", "-w", "-DMS_DEBUG", "-DMS_SCHEDULER", "-DCHECK_FAILURE_COUNT_MAX=1"]
FLAGS += [f"-I{CORE}", f"-I{ROOT}/tests/c"]

PLANTED = {
    "a lease is taken without asking for the word": (
        "ms_delivery.c",
        "leased = ms_move(at, word, to);",
        'MS_YIELD("planted"); atomic_store(at, to); leased = true;',
    ),
    "an acknowledgement does not ask whose lease it is": (
        "ms_ending.c",
        "if (MS_UNLIKELY(ms_lease_is_over(lease, now))) return MS_LOST;\n"
        "  return ms_queue_finish(queue, lease->slot, lease->word, now, out_owner);",
        "return ms_queue_finish(queue, lease->slot, *ms_word_at(queue, lease->slot), now,"
        " out_owner);",
    ),
    "a slot is taken from one who is writing it": (
        "ms_slots.c",
        "if (ms_word_state(found) != MS_MESSAGE_FREE) return false;",
        "if (ms_word_state(found) != MS_MESSAGE_FREE &&"
        " ms_word_state(found) != MS_MESSAGE_WRITING) return false;",
    ),
    "the sweep believes that all holders are dead": (
        "ms_sweep.c",
        "is_among((uint32_t)(owner >> 16), p->dead, p->dead_count)) {",
        "p->dead_count) {",
    ),
    "the sweep leaves what the dead were writing": (
        "ms_sweep.c",
        "is_among((uint32_t)word & 0x7fffffff, p->dead, p->dead_count) &&",
        "false &&",
    ),
    "lost hints are not looked for": ("ms_sweep.c", "if (p->reconcile &&", "if (false &&"),
    "the next of a key is not let go": (
        "ms_bucket.c",
        "if (!before && next) let_go(",
        "if (false) let_go(",
    ),
    "a message goes before the one of its key that is in flight": (
        "ms_delivery.c",
        "state = MS_MESSAGE_HELD;",
        "state = MS_MESSAGE_READY;",
        "ordered_by_key",
    ),
    "a deduplication id whose putter died counts for ever": (
        "ms_claim.c",
        "if (claim->state == MS_DEDUP_DONE) return MS_END;",
        "return MS_END;",
        "deduplication",
    ),
    "who acknowledges leaves the deduplication id pending": (
        "ms_claim.c",
        "if (key[0] == 0 || table_of(queue) == NULL) return MS_OK;",
        "return MS_OK;",
        "deduplication",
    ),
}
"""The file, what stands there, the fault, and whose schedules catch it: the first, if unnamed."""


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """The core and the schedules without a fault, compiled once."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("planted")
    return {source.name: compiled(source, folder) for source in [*CORE.glob("*.c"), PROGRAM]}


def compiled(source, folder):
    target = folder / f"{source.stem}.o"
    build = ["cc", *FLAGS, "-c", str(source), "-o", str(target)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    return target


def outcome(objects, folder, *wanted):
    program = folder / "schedules"
    build = ["cc", *map(str, objects.values()), "-pthread", "-o", str(program)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    return subprocess.run([str(program), *wanted], capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("fault", PLANTED)
def test_schedules_catch(fault, objects, tmp_path):
    file, right, wrong, *wanted = PLANTED[fault]
    text = (CORE / file).read_text()
    assert text.count(right) == 1, f"the place in {file} is not there any more"
    (tmp_path / file).write_text(text.replace(right, wrong))
    found = outcome({**objects, file: compiled(tmp_path / file, tmp_path)}, tmp_path, *wanted)
    assert found.returncode != 0, found.stdout
