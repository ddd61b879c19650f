"""Reminders: messages that are delivered later, one of them called off; and how late they come.

Run it: `python examples/reminders.py`.
"""

import time
from datetime import UTC, datetime, timedelta

import millstream


def main() -> None:
    with millstream.temporary() as store:
        reminders = store.queue("reminders")
        start = time.monotonic()
        due = {b"tea": 0.3, b"bread": 0.6, b"eggs": 0.1}
        for what, seconds in due.items():
            reminders.put(what, delay=seconds)
        reminders.put(b"at a time", at=datetime.now(UTC) + timedelta(seconds=0.8))
        alarm = reminders.put(b"called off", delay=0.5)
        print("called off:", reminders.cancel(alarm))
        next_year = reminders.put(b"passport", delay=365 * 86400)

        for _ in range(4):
            with reminders.get(timeout=10) as message:
                passed = time.monotonic() - start
                late = passed - due.get(message.value, passed)
                print(f"{message.value.decode():10} after {passed:.3f} s")
                if late < 0:
                    raise SystemExit("EARLY")
        print(f"still waiting: {len(reminders)}")
        reminders.cancel(next_year)


if __name__ == "__main__":
    main()
