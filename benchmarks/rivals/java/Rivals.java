import io.aeron.Aeron;
import io.aeron.ExclusivePublication;
import io.aeron.Subscription;
import io.aeron.driver.MediaDriver;
import io.aeron.driver.ThreadingMode;
import java.util.Random;
import net.openhft.chronicle.bytes.Bytes;
import net.openhft.chronicle.bytes.SyncMode;
import net.openhft.chronicle.queue.ChronicleQueue;
import net.openhft.chronicle.queue.ExcerptAppender;
import net.openhft.chronicle.queue.ExcerptTailer;
import net.openhft.chronicle.queue.impl.single.SingleChronicleQueueBuilder;
import org.agrona.concurrent.UnsafeBuffer;

/**
 * What Java's fastest logs do with records of 100 bytes: ENGINE WORK PATH SECONDS prints a rate;
 * "consume" prints "ready" first, when its producer may come.
 *
 * <p>Each work runs once as long before it is measured, so that it is compiled. Those that wait for
 * another process spin with Thread.onSpinWait, as both libraries advise for the lowest latency.
 */
public final class Rivals {
    private static final int SIZE = 100;
    private static final int COUNT = 1_000;
    private static final byte[][] VALUES = new byte[COUNT][SIZE];
    private static final String CHANNEL = "aeron:ipc?term-length=64m";
    private static final int STREAM = 1;

    private interface Step {
        void run(byte[] value);
    }

    public static void main(String[] arguments) {
        Random random = new Random(COUNT);
        for (byte[] value : VALUES) {
            random.nextBytes(value);
        }
        String path = arguments[2];
        double seconds = Double.parseDouble(arguments[3]);
        switch (arguments[0] + " " + arguments[1]) {
            case "chronicle append" -> append(path, seconds, false);
            case "chronicle sync" -> append(path, seconds, true);
            case "chronicle read" -> read(path, seconds);
            case "chronicle both" -> both(path, seconds);
            case "chronicle produce" -> produce(path);
            case "chronicle consume" -> consume(path, seconds);
            case "aeron produce" -> publish(path);
            case "aeron consume" -> subscribe(path, seconds);
            default -> throw new IllegalArgumentException(arguments[0] + " " + arguments[1]);
        }
        System.exit(0);
    }

    private static double rate(double seconds, Step step) {
        long done = 0;
        long began = System.nanoTime();
        long most = (long) (seconds * 1e9);
        long taken;
        do {
            for (int i = 0; i < 100; i++) {
                step.run(VALUES[(int) ((done + i) % COUNT)]);
            }
            done += 100;
            taken = System.nanoTime() - began;
        } while (taken < most);
        return done * 1e9 / taken;
    }

    private static void print(double seconds, Step step) {
        rate(seconds, step);
        System.out.println(rate(seconds, step));
    }

    private static ChronicleQueue open(String path) {
        // As it comes, sync() is msync(MS_ASYNC), which waits for no disk.
        return SingleChronicleQueueBuilder.binary(path).syncMode(SyncMode.SYNC).build();
    }

    private static void write(ExcerptAppender appender, byte[] value) {
        appender.writeBytes(bytes -> bytes.write(value));
    }

    private static void append(String path, double seconds, boolean synced) {
        ExcerptAppender appender = open(path).createAppender();
        print(seconds, value -> {
            write(appender, value);
            if (synced) {
                appender.sync();
            }
        });
    }

    private static void read(String path, double seconds) {
        ChronicleQueue queue = open(path);
        ExcerptAppender appender = queue.createAppender();
        int records = 200 * COUNT;
        for (int i = 0; i < records; i++) {
            write(appender, VALUES[i % COUNT]);
        }
        double best = 0;
        long most = System.nanoTime() + (long) (2 * seconds * 1e9);
        Bytes<?> into = Bytes.elasticHeapByteBuffer(SIZE);
        do {
            ExcerptTailer tailer = queue.createTailer();
            long began = System.nanoTime();
            long seen = 0;
            for (int i = 0; i < records; i++) {
                into.clear();
                tailer.readBytes(into);
                seen += into.toByteArray().length;
            }
            if (seen != (long) records * SIZE) {
                throw new IllegalStateException("read " + seen + " bytes");
            }
            best = Math.max(best, records * 1e9 / (System.nanoTime() - began));
        } while (System.nanoTime() < most);
        System.out.println(best);
    }

    private static Step taker(ChronicleQueue queue) {
        ExcerptTailer tailer = queue.createTailer();
        Bytes<?> into = Bytes.elasticHeapByteBuffer(SIZE);
        return value -> {
            into.clear();
            while (!tailer.readBytes(into)) {
                Thread.onSpinWait();
            }
        };
    }

    private static void both(String path, double seconds) {
        ChronicleQueue queue = open(path);
        ExcerptAppender appender = queue.createAppender();
        Step take = taker(queue);
        print(seconds, value -> {
            write(appender, value);
            take.run(value);
        });
    }

    private static void produce(String path) {
        ExcerptAppender appender = open(path).createAppender();
        for (int i = 0; ; i++) {
            write(appender, VALUES[i % COUNT]);
        }
    }

    private static void consume(String path, double seconds) {
        Step take = taker(open(path));
        System.out.println("ready");
        print(seconds, take);
    }

    private static Aeron client(String path) {
        return Aeron.connect(new Aeron.Context().aeronDirectoryName(path));
    }

    private static void publish(String path) {
        ExclusivePublication publication = client(path).addExclusivePublication(CHANNEL, STREAM);
        UnsafeBuffer buffer = new UnsafeBuffer(new byte[SIZE]);
        for (int i = 0; ; i++) {
            buffer.putBytes(0, VALUES[i % COUNT]);
            while (publication.offer(buffer, 0, SIZE) < 0) {
                Thread.onSpinWait();
            }
        }
    }

    private static void subscribe(String path, double seconds) {
        MediaDriver.launch(new MediaDriver.Context().aeronDirectoryName(path)
            .dirDeleteOnStart(true).threadingMode(ThreadingMode.SHARED));
        Subscription subscription = client(path).addSubscription(CHANNEL, STREAM);
        System.out.println("ready");
        byte[] into = new byte[SIZE];
        long[] waiting = {0};
        print(seconds, value -> {
            while (waiting[0] == 0) {
                waiting[0] = subscription.poll((buffer, offset, length, header) ->
                    buffer.getBytes(offset, into, 0, length), 100);
                if (waiting[0] == 0) {
                    Thread.onSpinWait();
                }
            }
            waiting[0]--;
        });
    }

    private Rivals() {}
}
