#!/usr/bin/env bash
# huey 3.5.4: `import huey` imports gevent.monkey wherever gevent is installed, though nothing is patched.
#
# Guess: gevent is imported where greenlets are asked for: by a consumer with worker_type="greenlet".
# Seen: after `import huey` alone gevent.monkey is in sys.modules, no module is patched, and threads are real.
#
# What follows: "gevent.monkey was imported" does not mean that the program uses greenlets. What prepares for greenlets by
# that sign, as millstream's locks do, runs in programs with real threads too, and has to be right for them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q huey==3.5.4 gevent==25.9.1
"$folder/venv/bin/python" - <<'END'
import sys

import huey

imported = "gevent.monkey" in sys.modules
patched = imported and sys.modules["gevent.monkey"].is_module_patched("threading")
print(f"huey {huey.__version__}: gevent.monkey imported: {imported}; threading patched: {patched}")
sys.exit((imported, patched) != (True, False))
END
