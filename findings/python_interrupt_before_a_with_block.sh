#!/usr/bin/env bash
# CPython 3.14: Ctrl-C between the start of `with lock:` and its block, and the lock is held for ever.
#
# Guess: a handler of a signal that raises is called before a threading.Lock is taken or within the block of its `with`,
# and never between, so that the lock is given back. It is so in 3.11, 3.12, 3.13 and 3.15.
# Seen (CPython 3.14.8, Debian forky, x86-64): of 17,065 KeyboardInterrupts in a loop of `with lock: pass`, 10,969 left the
# lock held. `__enter__` is an ordinary call there, and after a call the interpreter looks for signals; what the handler
# raises comes before the block, so no `__exit__` is called.
# So what is held by a `with` in code that Ctrl-C may end must give itself back when the statement's own reference dies.
#
# Takes python3.14 where there is one, else Debian's packages of it, with their C library, into a temporary folder: on
# Debian alone. Ends with 0 while that is so, 1 when it changed, 2 where no 3.14 can be had.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python=(python3.14)
if ! command -v python3.14 >/dev/null; then
  mkdir -p "$scratch"/{etc/sources.list.d,etc/preferences.d,state/lists/partial,cache/archives/partial,debs,tree}
  awk 'BEGIN {RS = ""; ORS = "\n\n"} !/security/' /etc/apt/sources.list.d/debian.sources |
    sed 's/^Suites:.*/Suites: forky/' >"$scratch/etc/sources.list.d/forky.sources"
  : >"$scratch/state/status"
  apt=(apt-get -qq -o "Dir::Etc=$scratch/etc" -o "Dir::State=$scratch/state" -o "Dir::Cache=$scratch/cache")
  apt+=(-o "Dir::State::status=$scratch/state/status" -o APT::Sandbox::User=root)
  "${apt[@]}" update
  (cd "$scratch/debs" && "${apt[@]}" download python3.14-minimal libpython3.14-minimal libc6 libexpat1 zlib1g) || exit 2
  for deb in "$scratch"/debs/*.deb; do dpkg-deb -x "$deb" "$scratch/tree"; done
  libraries=$scratch/tree/usr/lib/$(uname -m)-linux-gnu
  python=(env "PYTHONHOME=$scratch/tree/usr" "$libraries/$(basename "$(readlink -f "$libraries"/ld-linux-*.so.*)")")
  python+=(--library-path "$libraries" "$scratch/tree/usr/bin/python3.14")
fi
"${python[@]}" - <<'PY'
import signal, sys, threading, time

lock = threading.Lock()
left = caught = 0
signal.signal(signal.SIGALRM, signal.default_int_handler)
until = time.monotonic() + 3
while time.monotonic() < until:
    try:
        signal.setitimer(signal.ITIMER_REAL, 5e-5)
        while True:
            with lock:
                pass
    except KeyboardInterrupt:
        caught += 1
        if lock.locked():
            left += 1
            lock.release()
print(f"CPython {sys.version.split()[0]}: {caught} interrupts, {left} left the lock held")
sys.exit(not left)
PY
