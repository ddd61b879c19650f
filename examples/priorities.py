"""Priorities: what is urgent overtakes, and ageing keeps the rest from waiting for ever.

Run it: `python examples/priorities.py`.
"""

import itertools

import millstream

URGENT, USUAL, IDLE = 0, 1, 2


def main() -> None:
    with millstream.temporary() as store:
        mail = store.queue("mail", priorities=3)
        for number in range(3):
            mail.put(b"newsletter %d" % number, priority=IDLE)
        for number in range(3):
            mail.put(b"receipt %d" % number, priority=USUAL)
        mail.put(b"password reset", priority=URGENT)
        print("strict:", ", ".join(m.value.decode() for m in mail.get_many(10, timeout=0)))

        fair = store.queue("fair", priorities=3, ageing=True)
        fair.put(b"newsletter", priority=IDLE)
        for number in itertools.count(1):
            fair.put(b"receipt", priority=USUAL)  # always something that is more urgent
            with fair.get(timeout=5) as message:
                if message.priority == IDLE:
                    print(f"with ageing: the newsletter was number {number}")
                    break


if __name__ == "__main__":
    main()
