#!/usr/bin/env bash
# Chronicle Queue 2026.4 (Java 17): ExcerptAppender.sync() waits for no disk unless the queue was built with a syncMode.
#
# Guess: sync() returns when what was appended before it is on the disk, as its name and fsync's promise.
# Seen: with the builder's defaults it calls msync(MS_ASYNC), which on Linux starts no write at all and returns in some
# microseconds: 390,000 "synced" appends a second on a disk that does 10,000. With syncMode(SyncMode.SYNC) it is MS_SYNC.
#
# What follows: a rate of synced appends says nothing until the system calls were looked at; benchmarks/rivals builds
# the queue with SyncMode.SYNC.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >pom.xml <<'END'
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>finding</groupId><artifactId>finding</artifactId><version>1</version>
  <dependencies>
    <dependency><groupId>net.openhft</groupId><artifactId>chronicle-queue</artifactId><version>2026.4</version></dependency>
    <dependency><groupId>org.slf4j</groupId><artifactId>slf4j-nop</artifactId><version>2.0.17</version></dependency>
  </dependencies>
</project>
END
cat >Finding.java <<'END'
import net.openhft.chronicle.bytes.SyncMode;
import net.openhft.chronicle.queue.ExcerptAppender;
import net.openhft.chronicle.queue.impl.single.SingleChronicleQueueBuilder;

public final class Finding {
    public static void main(String[] arguments) {
        SingleChronicleQueueBuilder builder = SingleChronicleQueueBuilder.binary(arguments[0]);
        if (arguments.length > 1) {
            builder.syncMode(SyncMode.valueOf(arguments[1]));
        }
        ExcerptAppender appender = builder.build().createAppender();
        for (int i = 0; i < 100; i++) {
            appender.writeText("a record");
            appender.sync();
        }
        System.exit(0);
    }
}
END
mvn -q -B dependency:copy-dependencies -DoutputDirectory=jars
options=(-Dchronicle.analytics.disable=true)
for name in java.lang java.lang.reflect java.io java.util java.nio sun.nio.ch; do
  options+=("--add-opens=java.base/$name=ALL-UNNAMED")
done
for name in java.base/jdk.internal.ref java.base/sun.nio.ch jdk.unsupported/sun.misc jdk.compiler/com.sun.tools.javac.file; do
  options+=("--add-exports=$name=ALL-UNNAMED")
done
options+=("--add-opens=jdk.compiler/com.sun.tools.javac=ALL-UNNAMED")
javac -cp 'jars/*' Finding.java

# How many calls of each kind: arguments as of Finding.
flushes() {
  strace -f -o trace -e trace=msync,fsync,fdatasync java "${options[@]}" -cp 'jars/*:.' Finding "$@"
  printf '%s waiting, %s not' "$(grep -cE 'MS_SYNC|fsync|fdatasync' trace || true)" "$(grep -c MS_ASYNC trace || true)"
}
default=$(flushes "$folder/default")
asked=$(flushes "$folder/asked" SYNC)
echo "Chronicle Queue 2026.4, 100 calls of sync(): by default $default; with SyncMode.SYNC $asked"
[[ $default == "0 waiting, "* && $default != *", 0 not" && $asked != "0 waiting"* ]]
