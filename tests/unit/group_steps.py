"""What tests of consumer groups have in common: a stream of four partitions, and short words."""


def filled(store):
    """Four partitions with ten records each, in one batch."""
    stream = store.stream("s", partitions=4)
    fill(stream)
    return stream


def fill(stream, count=10):
    for partition in range(stream.partitions):
        values = [b"%d.%d" % (partition, i) for i in range(count)]
        stream.append_many(values, partition=partition)


def taken(consumer, timeout=0.0):
    """Values that come until none did for `timeout` seconds."""
    found = []
    while (batch := consumer.poll(timeout)) is not None:
        found += batch.values
    return found


def at(stream, name="g"):
    """The committed offsets of a group; 0 where there is none."""
    return [0 if p is None else p.offset for p in stream.group(name).positions().values()]
