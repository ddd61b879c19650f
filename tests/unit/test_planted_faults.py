"""The schedules of the queue catch what is planted in it: the judge itself is judged."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "csrc"
PROGRAM = ROOT / "tests/c/test_ms_queue_schedules.c"
FLAGS = ["-std=c11", "-O1", "-w", "-DMS_DEBUG", "-DMS_SCHEDULER", f"-I{CORE}", f"-I{ROOT}/tests/c"]

PLANTED = {
    "a lease is taken without asking for the word": (
        "ms_delivery.c",
        "leased = ms_move(at, word, to);",
        'MS_YIELD("planted"); atomic_store(at, to); leased = true;',
    ),
    "an acknowledgement does not ask whose lease it is": (
        "ms_delivery.c",
        "if (MS_UNLIKELY(ms_lease_is_over(lease, now))) return MS_LOST;\n"
        "  return ms_queue_finish(queue, lease->slot, lease->word, now, out_owner);",
        "return ms_queue_finish(queue, lease->slot, *ms_word_at(queue, lease->slot), now,"
        " out_owner);",
    ),
    "a slot is taken from one who is writing it": (
        "ms_delivery.c",
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
        "is_among((uint32_t)word & 0x7fffffff, p->dead, p->dead_count))",
        "false)",
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
    ),
    "a deduplication id whose putter died counts for ever": (
        "ms_claim.c",
        "if (claim->state == MS_DEDUP_DONE) return MS_END;",
        "return MS_END;",
    ),
    "who acknowledges leaves the deduplication id pending": (
        "ms_claim.c",
        "if (key[0] == 0 || table_of(queue) == NULL) return MS_OK;",
        "return MS_OK;",
    ),
}


def outcome(folder: Path) -> subprocess.CompletedProcess[str]:
    sources = [str(source) for source in sorted(folder.glob("ms_*.c"))]
    program = folder / "schedules"
    build = ["cc", *FLAGS, "-o", str(program), str(PROGRAM), *sources, "-pthread"]
    subprocess.run(build, check=True, capture_output=True, text=True)
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("fault", PLANTED)
def test_schedules_catch(fault, tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    file, right, wrong = PLANTED[fault]
    for source in CORE.glob("*.c"):
        shutil.copy(source, tmp_path)
    text = (tmp_path / file).read_text()
    assert text.count(right) == 1, f"the place in {file} is not there any more"
    (tmp_path / file).write_text(text.replace(right, wrong))
    found = outcome(tmp_path)
    assert found.returncode != 0, found.stdout
