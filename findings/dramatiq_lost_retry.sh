#!/usr/bin/env bash
# dramatiq 2.2.1: a message whose retry cannot be put is acknowledged all the same, and is gone.
#
# Guess: where the broker fails when a retry is put (it is full, or away for a second), the message stays unacknowledged and
# comes again, as dramatiq's "at least once" says, or is a dead letter.
# Seen: retries are put by a middleware, whose exceptions are logged ("Unexpected failure in after_process_message") and
# dropped; the worker acknowledges the message then. It is neither in the queue nor among the dead letters; the same goes for
# what follows in a pipeline, and for callbacks. One failure of a moment is enough.
#
# What follows: our broker remembers that something could not be put, and gives the message back instead.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q dramatiq==2.2.1
"$folder/venv/bin/python" -W ignore - <<'CODE'
import logging
import sys

import dramatiq
from dramatiq.brokers.stub import StubBroker

logging.disable(logging.CRITICAL)


class Away(StubBroker):
    """Fails once, when the first retry is put."""

    failures = 1

    def enqueue(self, message, *, delay=None):
        if delay is not None and self.failures:
            self.failures -= 1
            raise dramatiq.ConnectionClosed("away for a moment")
        return super().enqueue(message, delay=delay)


broker = Away()
dramatiq.set_broker(broker)
ran = []


@dramatiq.actor(max_retries=5, min_backoff=1, max_backoff=1)
def fail_at_first():
    ran.append(1)
    if len(ran) == 1:
        raise ValueError("try again")


fail_at_first.send()
worker = dramatiq.Worker(broker, worker_timeout=10)
worker.start()
broker.join("default", timeout=30_000)
worker.stop()
print(f"dramatiq {dramatiq.__version__}: ran {len(ran)} time, dead letters {len(broker.dead_letters)}")
sys.exit(ran != [1] or broker.dead_letters != [])
CODE
