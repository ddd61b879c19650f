"""What the processes of the groups' crash tests do; a line of history for each thing done.

`python group_workers.py FUNCTION DIRECTORY ARGUMENTS`. `? partition fence first next` was handed
out, `- partition fence next` is committed, `! partition` was refused.
"""

import os
import sys
import time

import millstream


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def consume(directory: str, delivery: str, session: str) -> None:
    """Handle batches of a group for ever, a millisecond each."""
    with millstream.open(directory, durability="process") as store:
        stream = store.stream("s")
        consumer = stream.consumer(
            group="g", delivery=delivery, max_records=20, session=float(session)
        )
        say("=", os.getpid())
        while True:
            batch = consumer.poll(None)
            where = batch.partition, consumer._member.fence_of(batch.partition)
            say("?", *where, batch.first_offset, batch.next_offset)
            time.sleep(0.001)  # the work, so that kills come in the middle of it
            if delivery == "at_least_once":
                try:
                    consumer.commit(batch)
                    say("-", *where, batch.next_offset)
                except millstream.Fenced:
                    say("!", batch.partition)


def hammer(directory: str) -> None:
    """Commit as fast as it goes, to and fro, so that a kill often comes in the middle of it."""
    with millstream.open(directory, durability="process") as store:
        consumer = store.stream("s").consumer(group="g", max_records=1, session=300)
        while True:
            batches = [consumer.poll(None)]
            for partition in set(consumer.assignment) - {batches[0].partition}:
                consumer.pause(partition)
            batches.append(consumer.poll(None))
            say("=", os.getpid())
            try:
                while True:
                    for batch in batches * 50:
                        consumer.commit(batch, allow_backwards=True)
                    consumer.poll()
            except millstream.Fenced:
                consumer.resume()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
