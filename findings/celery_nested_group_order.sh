#!/usr/bin/env bash
# Celery 5.7.0: a chord hands its callback the results of a group within its header in reverse order.
#
# Guess: chord([a, group(b, c), d])(body) calls body([a, b, c, d]), or body([a, [b, c], d]): the order of the header, as
# `group` promises ("the order of the results is the order of the tasks").
# Seen: the group is unrolled into the header from its end: the messages carry group_index 0 for a, 1 for c, 2 for b and 3
# for d, whatever the broker. A result backend that orders the parts by that index, as Redis does, gives body([a, c, b, d]).
#
# What follows: who needs the order writes a flat header, or makes the inner group a chord of its own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q celery==5.7.0
"$folder/venv/bin/python" -W ignore - <<'END'
import sys

import celery
from celery import Celery, chord, group

app = Celery("app", broker="memory://", backend="cache+memory://")


@app.task
def part(n):
    return n


@app.task
def body(values):
    return values


chord([part.s(1), group(part.s(2), part.s(3)), part.s(4)])(body.s())
sent = {}
with app.connection() as connection:
    queue = connection.SimpleQueue("celery")
    while True:
        try:
            message = queue.get(block=False)
        except queue.Empty:
            break
        if message.headers["task"].endswith(".part"):
            sent[message.headers["group_index"]] = message.headers["argsrepr"]
found = [sent[index] for index in sorted(sent)]
print(f"celery {celery.__version__}: parts by group_index {found}")
sys.exit(found != ["(1,)", "(3,)", "(2,)", "(4,)"])
END
