"""What pickles name is public, so that files of the package may move and old pickles stay good."""

import inspect
import pickle
import pickletools

import pytest

import millstream
from millstream import codecs, compat, errors

MODULES = ("codecs", "compat", "errors", "inspect", "testing", "worker")
HOMES = {f"millstream.{name}" for name in MODULES}
HOMES |= {"millstream"}
DOCUMENTED = ("errors", "inspect", "worker", "codecs")
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
LIVE = {
    "Batch",
    "Consumer",
    "Group",
    "Message",
    "Mirror",
    "Pipe",
    "Relay",
    "Transaction",
    "View",
    "Worker",
}
"""What belongs to its process."""
ABSTRACT = {"Durability", "__version__"}


@pytest.fixture(scope="module")
def store():
    with millstream.temporary() as store:
        yield store


@pytest.fixture(scope="module")
def objects(store):
    """An object of each public class that pickles, by its name; and some that have none."""
    stream, queue = store.stream("s"), store.queue("q", codec="json")
    queue.put(1)
    message = queue.get()
    with store.stream("t").consumer(group="g") as consumer:
        consumer.poll(0)
        group = consumer.group
        of_group = group.stats()
        members, partitions = group.members(), group.partitions()
    first = stream.append(b"x", key=b"k")
    message.reject("why")
    stats = stream.stats()
    found = [
        store, stream, queue, first, millstream.Put(1, priority=0), millstream.Span(0, 1, 2, 3),
        millstream.Retention(records=1), millstream.RetryPolicy(), millstream.Compaction(),
        stream.producer(id="p"), stats, *stats.partitions, queue.stats(), *members, *partitions,
        queue.dead, *queue.dead.list(), *peeked(queue), stream.compact(),
        millstream.CompactionProgress(*range(len(fields(millstream.CompactionProgress)))),
        millstream.Record(b"", None, {}, 0, first),
        millstream.Advice(*fields(millstream.Advice)),
        millstream.worker.Counts(1, 2, 3, 4), codecs.json, codecs.pickle,
        of_group, store.stats(), *store.processes(), store.capabilities["queue.delay"],
    ]  # fmt: skip
    found += [error(name) for name in errors.__all__]
    return {type(one).__name__: one for one in found}


def fields(kind):
    return list(inspect.signature(kind).parameters)


def peeked(queue):
    queue.put(2)
    return queue.peek(1)


def error(name):
    kind = getattr(errors, name)
    return kind(1.5) if name in ("Retry", "Snooze") else kind("what")


def named(data):
    """The texts in a pickle that lead to the package."""
    texts = {str(argument) for _, argument, _ in pickletools.genops(data) if argument is not None}
    words = {word for text in texts for word in text.split(" ")}
    return {word for word in words if word.split(".")[0] == "millstream"}


def public():
    """Each class and function of the face, and of the modules that are documented."""
    for module in [millstream, *(getattr(millstream, name) for name in DOCUMENTED)]:
        for name in module.__all__:
            found = getattr(module, name)
            if (inspect.isclass(found) or inspect.isroutine(found)) and name not in ABSTRACT:
                yield f"{module.__name__}.{name}", found


PUBLIC = dict(public())


def test_every_public_class_has_an_object_here_or_belongs_to_its_process(objects):
    classes = {one.__name__ for one in PUBLIC.values() if inspect.isclass(one)}
    ours = {name for name in millstream.__all__ if name in classes}
    assert ours - objects.keys() == LIVE | {"MillstreamWarning"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pickles_of_objects_name_public_modules_alone(objects, protocol):
    wrong = {}
    for name, one in objects.items():
        data = pickle.dumps(one, protocol)
        wrong |= {name: strange} if (strange := named(data) - HOMES) else {}
        assert type(pickle.loads(data)) is type(one)
    assert not wrong


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_say_where_they_are_public(name):
    found = PUBLIC[name]
    assert found.__module__ in HOMES
    for protocol in PROTOCOLS:
        data = pickle.dumps(found, protocol)
        assert pickle.loads(data) is found
        assert named(data) <= HOMES


def test_pickles_of_drop_ins_name_their_public_module():
    before = set(millstream.store.store._all_open())
    for kind in (compat.Queue, compat.PriorityQueue, compat.SimpleQueue):
        data = pickle.dumps(kind())
        assert named(data) <= HOMES
        assert type(pickle.loads(data)) is kind
    for store in set(millstream.store.store._all_open()) - before:  # a queue of theirs has no owner
        store.close()


def test_a_private_module_in_a_pickle_is_found():
    assert named(pickle.dumps(pickle.dumps)) == set()
    assert named(b"cmillstream.hidden\n_made\n.") == {"millstream.hidden"}
