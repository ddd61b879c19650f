#!/usr/bin/env bash
# RabbitMQ 4.3.6: what was confirmed to a quorum queue is gone after a kill, if the queue was declared less than a second before.
#
# Guess: a confirm of a durable message in a quorum queue says that it is on disk in the log of the queue; so it is there
# after SIGKILL of the server and a restart, however young the queue is. A quorum queue is chosen for just that.
# Seen: the queue is there and empty where the kill came some 0.2 s behind its declaration; with 3 s between declaration and
# kill all three messages are there. Between 0.1 and 0.8 s all were lost, at 1.2 s none; the cause was not looked for.
#
# What follows: whoever declares a queue and hands work to it at once waits two seconds first, and does not declare queues
# for single requests.
#
# Needs root (a mount namespace), Debian's tools and the network: the packages of Debian's testing suite are unpacked into a
# temporary folder and installed nowhere. Where that suite has another version by now, it is named and the run fails.
set -euo pipefail
folder=$(mktemp -d)
beam() { pgrep -s "$1" beam.smp || true; }
cleanup() {
  [ -z "${server:-}" ] || kill -9 $(beam "$server") "$server" 2>/dev/null || true
  [ -z "${names:-}" ] || kill -9 -- "-$names" 2>/dev/null || true
  wait 2>/dev/null || true
  rm -rf --one-file-system "$folder"
}
trap cleanup EXIT
apt=$folder/apt root=$folder/root home=$folder/home
mkdir -p "$apt"/etc/sources.list.d "$apt"/etc/preferences.d "$apt"/state/lists/partial "$apt"/cache/archives/partial "$home/home"
ln -s /etc/apt/apt.conf.d "$apt/etc/apt.conf.d"
touch "$apt/etc/sources.list" "$apt/state/status"
awk 'BEGIN { RS = ""; ORS = "\n\n" } !/security/' /etc/apt/sources.list.d/debian.sources |
  sed -E 's/^Suites:.*/Suites: forky/' > "$apt/etc/sources.list.d/forky.sources"
printf 'Dir::Etc "%s/etc"; Dir::State "%s/state"; Dir::State::status "%s/state/status"; Dir::Cache "%s/cache";\n' \
  "$apt" "$apt" "$apt" "$apt" > "$apt/apt.conf"
export APT_CONFIG=$apt/apt.conf
apt-get -qq -o APT::Sandbox::User=root update
apt-get -qq -o APT::Sandbox::User=root install -y --no-install-recommends --download-only rabbitmq-server base-files dash coreutils sed grep hostname findutils > "$folder/apt.log"
unset APT_CONFIG
mkdir -p "$root"/usr/{bin,sbin,lib,lib64} "$root"/{dev,proc,tmp,b,etc}
for name in bin sbin lib lib64; do ln -s "usr/$name" "$root/$name"; done
for package in "$apt"/cache/archives/*.deb; do dpkg -x "$package" "$root"; done
[ -e "$root/bin/sh" ] || ln -s dash "$root/bin/sh"
echo "127.0.0.1 localhost" > "$root/etc/hosts"
echo "hosts: files" > "$root/etc/nsswitch.conf"
echo "root:x:0:0:root:/b/home:/bin/sh" > "$root/etc/passwd"
mknod -m 666 "$root/dev/null" c 1 3; mknod -m 666 "$root/dev/zero" c 1 5
mknod -m 666 "$root/dev/random" c 1 8; mknod -m 666 "$root/dev/urandom" c 1 9
version=$(ls "$apt"/cache/archives/ | sed -nE 's/^rabbitmq-server_([0-9.]+).*/\1/p')
echo "RabbitMQ $version"
[ "$version" = 4.3.6 ] || { echo "another version: look again"; exit 1; }
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --only-binary :all: pika==1.4.4

port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
amqp=$(port) epmd=$(port) dist=$(port)
printf '%s\n' "listeners.tcp.1 = 127.0.0.1:$amqp" "disk_free_limit.absolute = 100MB" > "$home/rabbitmq.conf"
echo "[]." > "$home/enabled_plugins"
inside='mount --bind "$1" "$0/b"; mount --bind /proc "$0/proc"; top=$0; shift; exec chroot "$top" "$@"'
run() {
  exec env -i PATH=/usr/bin:/usr/sbin:/usr/lib/rabbitmq/bin HOME=/b/home LANG=C.UTF-8 ERL_EPMD_PORT="$epmd" ERL_EPMD_ADDRESS=127.0.0.1 \
    RABBITMQ_NODENAME=rabbit@localhost RABBITMQ_DIST_PORT="$dist" RABBITMQ_MNESIA_BASE=/b/data RABBITMQ_LOG_BASE=/b/log \
    RABBITMQ_LOGS=/b/server.log RABBITMQ_CONFIG_FILE=/b/rabbitmq.conf RABBITMQ_ENABLED_PLUGINS_FILE=/b/enabled_plugins \
    RABBITMQ_PID_FILE=/b/pid RABBITMQ_ALLOW_INPUT=1 RABBITMQ_SERVER_START_ARGS=-noinput \
    setsid unshare -m sh -c "$inside" "$root" "$home" "$@" < /dev/null > "$folder/out.log" 2>&1
}
run epmd -address 127.0.0.1 -port "$epmd" & names=$!
start() {
  run /usr/lib/rabbitmq/bin/rabbitmq-server & server=$!
  for _ in $(seq 600); do
    if (exec 3<> "/dev/tcp/127.0.0.1/$amqp") 2>/dev/null; then return; fi
    sleep 0.2
  done
  echo "the server does not start"; cat "$folder/out.log"; exit 1
}
restart() { kill -9 $(beam "$server"); wait "$server" 2>/dev/null || true; start; }
client() { timeout 60 "$folder/venv/bin/python" - "$amqp" "$@" <<'END'
import sys
import time

import pika

port, what, name, seconds = int(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])
for attempt in range(100):
    try:
        connection = pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", port))
        break
    except pika.exceptions.AMQPConnectionError:
        time.sleep(0.2)
channel = connection.channel()
if what == "fill":
    channel.confirm_delivery()
    channel.queue_declare(name, durable=True, arguments={"x-queue-type": "quorum"})
    declared = time.monotonic()
    for value in (b"a", b"b", b"c"):  # each returns behind its confirm
        channel.basic_publish("", name, value, pika.BasicProperties(delivery_mode=2))
    time.sleep(max(0, seconds - (time.monotonic() - declared)))
else:
    time.sleep(seconds)  # the queue elects its leader
    print(sum(channel.basic_get(name, auto_ack=True)[2] is not None for _ in range(4)))
END
}

start
client fill young 0.2; restart; young=$(client count young 3)
client fill older 3; restart; older=$(client count older 3)
echo "of 3 confirmed messages after a kill: $young where the queue was 0.2 s old, $older where it was 3 s old"
[ "$young" = 0 ] && [ "$older" = 3 ] || { echo "that has changed"; exit 1; }
echo "as found"
