"""What an engine can do: the names, what a directory says, and how a lack is refused."""

import pickle
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

import millstream
from millstream import Capability, address
from millstream.capabilities import NAMES, Capabilities

TOY = Capabilities(
    "toy 1.0",
    {
        "queue.delay": Capability("native", limits={"seconds": 60}),
        "queue.priority": Capability("emulated", "a subject for each"),
        "queue.release": Capability("none", "nack, which counts"),
    },
)


@pytest.fixture
def store():
    with millstream.temporary() as made:
        yield made


def test_a_directory_has_every_capability(store):
    assert store.engine == "file"
    assert set(store.capabilities) == set(NAMES)
    assert {one.level for one in store.capabilities.values()} == {"native"}
    store.require(*NAMES)
    assert store.native is store
    assert len(store.queue("q", emulate={"delay", "priority"})) == 0
    assert store.stream("s", emulate=["group"]).partitions == 1


@pytest.mark.parametrize("wrong", ["queue.fast", "delay", "", "stream"])
def test_a_name_that_is_not_known_is_no_capability(store, wrong):
    for call in (store.capabilities.__getitem__, store.require):
        with pytest.raises(millstream.InvalidArgument, match="is not known"):
            call(wrong)
    with pytest.raises(millstream.InvalidArgument):
        store.queue("q", emulate={f"{wrong}!"})
    with pytest.raises(millstream.InvalidType):
        store.queue("q", emulate="delay")
    with pytest.raises(millstream.InvalidType):
        store.require(7)
    assert store.queues() == []


def test_what_an_engine_lacks_is_refused_with_what_to_do():
    TOY.require("queue.delay", "queue.priority")
    with pytest.raises(millstream.Unsupported) as caught:
        TOY.require("queue.delay", "queue.release")
    error = caught.value
    assert (error.capability, error.engine) == ("queue.release", "toy 1.0")
    assert error.instead == "nack, which counts"
    assert str(error) == "toy 1.0: queue.release is not supported; nack, which counts"
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), vars(again)) == (str(error), vars(error))
    with pytest.raises(millstream.Unsupported, match=r"emulate=\{'priority'\}"):
        TOY.require("queue.priority", emulated=False)


def test_what_is_emulated_is_so_by_consent_alone():
    assert TOY.consent("queue", {"priority", "delay"}) == {"queue.priority", "queue.delay"}
    with pytest.raises(millstream.Unsupported, match=r"queue\.ttl"):
        TOY.consent("queue", {"ttl"})


def test_an_engine_cannot_say_what_has_no_name():
    with pytest.raises(millstream.InvalidArgument, match="is not known"):
        Capabilities("toy", {"queue.fast": Capability("native")})


def test_an_engine_of_others_is_found_by_its_entry_point(monkeypatch):
    def opened(where, **options):
        return where, options

    monkeypatch.setattr(sys.modules[__name__], "opened", opened, raising=False)
    entry = EntryPoint("toy", f"{__name__}:opened", address.GROUP)
    monkeypatch.setattr(address, "_entry_point", lambda scheme: {"toy": entry}.get(scheme))
    where, options = millstream.open("toy://here", durability="process", timeout=3)
    assert where == "toy://here"
    wanted = {"durability": "process", "mode": "rw", "create": True, "timeout": 3.0}
    assert options == wanted
    with pytest.raises(millstream.InvalidArgument, match="names a server"):
        millstream.inspect.verify("toy://here")
    gone = EntryPoint("toy", "no_such_module:opened", address.GROUP)
    monkeypatch.setattr(address, "_entry_point", lambda scheme: gone)
    with pytest.raises(millstream.Unsupported, match="cannot be imported"):
        millstream.open("toy://here")


def test_an_engine_without_its_client_says_what_to_install():
    program = (
        "import millstream\n"
        "from millstream import address\n"
        "address.ENGINES['toy'] = ('millstream.no_such_engine', 'toy')\n"
        "try: millstream.open('toy://127.0.0.1:4222')\n"
        "except millstream.Unsupported as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install 'millstream[toy]'" in done.stdout, done


def test_an_address_of_a_server_with_one_slash_says_how_to_write_it(monkeypatch):
    monkeypatch.setitem(address.ENGINES, "toy", ("millstream.no_such_engine", "toy"))
    for wrong in ("toy:/127.0.0.1", " toy://127.0.0.1"):
        with pytest.raises(millstream.InvalidArgument, match="toy://HOST:PORT"):
            millstream.open(wrong)
