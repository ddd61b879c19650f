#!/usr/bin/env bash
# confluent-kafka 2.16.1: `produce_batch` documents a 'timestamp' of each message, and refuses it with
# NotImplementedError. Guessed: it is sent. It needs no server: nothing is sent.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --only-binary :all: confluent-kafka==2.16.1
"$folder/venv/bin/python" - <<'PY'
import sys

import confluent_kafka

producer = confluent_kafka.Producer({"bootstrap.servers": "127.0.0.1:1", "log_level": 0})
said = " ".join(confluent_kafka.Producer.produce_batch.__doc__.split())
print(f"confluent-kafka {confluent_kafka.__version__}")
print(f"documented: {'timestamp' in said}")
try:
    producer.produce_batch("t", [{"value": b"x", "timestamp": 1_357_000_000_000}], partition=0)
    found = "taken"
except NotImplementedError as error:
    found = f"NotImplementedError: {error}"
print(f"produce_batch with a timestamp: {found}")
producer.purge()
sys.exit(not ("'timestamp'" in said and found.startswith("NotImplementedError")))
PY
