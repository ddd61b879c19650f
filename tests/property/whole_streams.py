"""The steps of the whole machine that are of streams, producers, views and consumer groups."""

from collections import Counter

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from queue_model import DAY, HORIZON
from stream_model import Group, Log, Member, rows_of

from millstream import Fenced, InvalidArgument, OffsetOutOfRange, Position, Retention

GROUPS = {
    "least": ("plain", "at_least_once"),
    "most": ("plain", "at_most_once"),
    "exact": ("plain", "exactly_once"),
    "late": ("kept", "at_least_once"),
    "follow": ("keyed", "exactly_once"),
    "short": ("brief", "at_least_once"),
}
HANG = 4 * DAY  # what a consumer may take for a batch; all other steps together take less
SEGMENT = 1 << 16
EVERYTHING = Retention(records=1 << 40)
done = Counter()
NOBODY = Group("", None, {})

some = st.integers(0, 1 << 16)
parts = st.floats(0, 1)
streams = st.sampled_from(["plain", "plain", "keyed", "keyed", "keyed", "kept", "kept", "brief"])
groups = st.sampled_from([*GROUPS, "exact"])
drawn_rows = st.builds(
    lambda count, key, size, gone: [
        ((key + 3 * i) % 7, None if gone and i % 3 == 0 else size) for i in range(count)
    ],
    *(st.integers(1, 12), st.integers(0, 6), st.sampled_from([1, 40, 12000, 12000]), st.booleans()),
)


class StreamSteps(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.stores, self.logs, self.groups, self.view, self.count = [], {}, {}, None, 0

    def make(self, name):
        count = 1 if name == "brief" else 2
        self.logs[name] = Log(count, compacted=name == "keyed", tombstones_stay=self.stay)
        keep = {"keyed": {"compact": self.compaction}, "kept": {"retention": EVERYTHING}}
        named = keep.get(name, {})
        self.stores[0].stream(name, partitions=count, segment_bytes=SEGMENT, **named)

    def side(self, second):
        return len(self.stores) - 1 if second else 0

    def stream(self, name, second=False):
        return self.stores[self.side(second)].stream(name)

    # --- streams and producers --------------------------------------------------------------------

    def new_rows(self, log, drawn, which, keyed):
        """(partition, key, value) of each, and the partition to name, if it is to be named."""
        p = which % len(log.rows)
        made = []
        for number, size in drawn:
            self.count += 1
            key = b"%d" % number if keyed else None
            value = None if size is None else b"%d " % self.count + b"v" * size
            made.append((log.target(key) if keyed else p, key, value))
        return made, None if keyed else p

    @rule(name=streams, drawn=drawn_rows, which=some, keyed=st.booleans(), single=st.booleans(),
          second=st.booleans())  # fmt: skip
    def append(self, name, drawn, which, keyed, single, second):
        done["append"] += len(drawn)
        stream, log = self.stream(name, second), self.logs[name]
        made, p = self.new_rows(log, drawn, which, keyed)
        if single:
            for _, key, value in made:
                stream.append(value, key=key, partition=p)
        else:
            stream.append_many(
                [row[2] for row in made],
                keys=[row[1] for row in made] if keyed else None,
                partition=p,
            )
        for row in made:
            log.append(*row)

    @rule(name=st.sampled_from(["keyed", "kept", "plain"]), id=st.sampled_from(["p", "q"]),
          back=st.integers(-2, 9), drawn=drawn_rows, which=some, keyed=st.booleans(),
          second=st.booleans())  # fmt: skip
    def send(self, name, id, back, drawn, which, keyed, second):
        """From `back` before the last one on: those were sent, so only the others count."""
        done["send"] += 1
        log, producer = self.logs[name], self.stream(name, second).producer(id)
        last = max(sent.get(id, -1) for sent in log.sent)
        first = max(0, last + 1 - back)
        made, p = self.new_rows(log, drawn, which, keyed)
        spans = producer.append_many(
            [row[2] for row in made],
            first_sequence=first,
            keys=[row[1] for row in made] if keyed else None,
            partition=p,
        )
        new = log.send(id, [(first + i, *row) for i, row in enumerate(made)])
        assert {span.partition: span.count for span in spans} == {
            p: count for p, count in enumerate(new) if count
        }

    @rule(keys=st.sampled_from([1, 5, 1 << 16]), second=st.booleans())
    def compact(self, keys, second):
        done["removed by compaction"] += (
            self.stream("keyed", second).compact(memory=32 * keys).records_removed
        )

    @rule(name=st.sampled_from(["keyed", "kept"]), which=some, part=parts, by_policy=st.booleans(),
          second=st.booleans())  # fmt: skip
    def remove(self, name, which, part, by_policy, second):
        stream, p = self.stream(name, second), which % 2
        if not by_policy:
            offset = int(part * stream.next_offset(p))
            first = stream.delete_before(Position(p, 1, offset))
            assert first <= max(self.logs[name].firsts[p], offset)
            self.logs[name].firsts[p] = first
            return
        stream, count = self.stream("kept", second), int(part * 40)
        stream.alter(retention=Retention(records=count))
        done["segments removed"] += stream.enforce_retention()
        log = self.logs["kept"]
        for p, rows in enumerate(log.rows):
            first = stream.first_offset(p)
            assert log.firsts[p] <= first <= max(log.firsts[p], len(rows) - count)
            log.firsts[p] = first
        stream.alter(retention=EVERYTHING)

    def add_a_partition(self, second):
        if len(self.logs["plain"].rows) < 4:
            self.logs["plain"].grow(1)
            assert self.stream("plain", second).add_partitions(1) == len(self.logs["plain"].rows)

    def drop_and_make_anew(self, second):
        done["drop"] += 1
        for side, tx in list(self.txs.items()):
            if any(log is self.logs["brief"] for log, *_ in tx.shares):
                self.roll_back(side)
        self.stores[self.side(second)].drop_stream("brief")
        for member in self.groups.pop("short", NOBODY).members:
            member.consumer.close()
        self.make("brief")

    @rule(name=streams, second=st.booleans())
    def read(self, name, second):
        self.logs[name].check_all(self.stream(name, second))
        self.logs[name].check_producers(self.stream(name, second))

    @rule(fresh=st.booleans())
    def look_through_a_view(self, fresh):
        """One that stays open, or one that goes on from its snapshot."""
        done["view"] += 1
        if fresh:
            with self.stream("keyed").view() as view:
                self.logs["keyed"].check_view(view)
            return
        if self.view is None:
            self.view = self.stream("keyed").view()
        self.logs["keyed"].check_view(self.view)

    def close_view(self):
        if self.view is not None:
            self.view.close()
            self.view = None

    # --- groups -----------------------------------------------------------------------------------

    @rule(name=groups, latest=st.booleans(), second=st.booleans(), count=st.integers(1, 2))
    def join(self, name, latest=False, second=False, count=1):
        stream_name, delivery = GROUPS[name]
        log, stream = self.logs[stream_name], self.stream(stream_name, second)
        if name not in self.groups:
            ends = {p: len(rows) for p, rows in enumerate(log.rows)}
            firsts = {p: first for p in ends if (first := stream.first_offset(p))}
            self.groups[name] = Group(name, log, ends if latest else firsts)
        while count and len(self.groups[name].members) < 3:
            done["join"] += 1
            count -= 1
            member = Member(self.groups[name], self.side(second))
            member.consumer = stream.consumer(
                name, start="latest" if latest else "earliest", delivery=delivery, max_records=3,
                session=1e8, max_processing=HANG, on_assign=member.assigned,
                on_revoke=member.revoked,
            )  # fmt: skip
            self.groups[name].members.append(member)

    def member(self, which, *deliveries):
        """One of the members there are, with deliveries of those that have one of them."""
        found = [
            (name, member)
            for name, one in self.groups.items()
            for member in one.members
            if not deliveries or GROUPS[name][1] in deliveries
        ]
        return found[which % len(found)] if found else (None, None)

    @rule(which=some, times=st.integers(1, 4))
    def poll_some(self, which, times):
        name, member = self.member(which)
        for _ in range(times if member else 0):
            self.poll(member, name)

    def poll(self, member, name):
        """One batch, which must be what comes next in one of the member's partitions."""
        done["poll"] += 1
        stream_name, delivery = GROUPS[name]
        stream, log = self.stream(stream_name), self.logs[stream_name]
        member.joins_again()
        try:
            batch = member.consumer.poll(0)
        except OffsetOutOfRange:
            lost = [p for p in member.at if member.at[p] < stream.first_offset(p)]
            assert lost
            done["fell behind retention"] += 1
            for p in lost:
                self.seek_to(member, p, "earliest", stream.first_offset(p))
            return
        if batch is None:
            for p in member.at.keys() - member.paused:
                log.check(p, member.at[p], len(log.rows[p]), [])
            return
        done["consumed"] += len(batch)
        p = batch.partition
        assert p in member.at.keys() - member.paused and len(batch) <= 3
        log.check(p, member.at[p], batch.next_offset, rows_of([batch]))
        member.at[p] = batch.next_offset
        member.dirty.add(p)
        member.batches.append(batch)
        if delivery == "at_most_once":
            member.group.committed[p] = batch.next_offset
            member.clean(p)

    @rule(name=groups)
    def poll_all(self, name):
        """When all have asked, each partition has one owner, and each owner its fair share."""
        found = self.groups[name].members if name in self.groups else []
        for member in found * 2:
            self.poll(member, name)
        if found and not (GROUPS[name][1] == "exactly_once" and any(m.dirty for m in found)):
            shares = [member.consumer.assignment for member in found]
            count = len(self.logs[GROUPS[name][0]].rows)
            assert sorted(p for share in shares for p in share) == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            assert shares == [sorted(member.at) for member in found]

    @rule(which=some, batches=st.lists(some, max_size=2), rest=st.booleans(),
          backwards=st.booleans())  # fmt: skip
    def commit_position(self, which, batches, rest, backwards):
        """Of some batches, then of all that was handed out."""
        _, member = self.member(which, "at_least_once", "at_most_once")
        for number in batches if member else ():
            self.commit_batch(member, number, backwards)
        if member and (rest or not batches):
            self.commit_all(member)

    def commit_all(self, member):
        done["commit of a position"] += 1
        try:
            member.consumer.commit()
            assert not member.forfeited and not (member.ended and member.dirty)
            member.commit()
        except Fenced:
            assert member.forfeited or member.ended
            done["fenced"] += 1
            member.forfeited = False
            if member.ended:
                member.dirty.clear()
            member.commit()

    def commit_batch(self, member, number, backwards):
        if member.ended or not member.batches:
            return
        batch = member.batches[number % len(member.batches)]
        p, end, committed = batch.partition, batch.next_offset, member.group.committed
        if p in member.sought:
            return
        try:
            member.consumer.commit(batch, allow_backwards=backwards)
            assert backwards or end >= committed.get(p, 0)
        except InvalidArgument:
            assert not backwards and end < committed.get(p, 0)
            return
        committed[p] = end
        if member.at[p] == end:
            member.clean(p)

    @rule(which=some, number=some, how=st.sampled_from(["earliest", "latest", "seek", "seek",
          "pause", "resume", "rewind", "leave"]), part=parts)  # fmt: skip
    def change_a_member(self, which, number, how, part):
        name, member = self.member(which)
        if member is None or member.ended or not member.at:
            return
        done[how] += 1
        p = sorted(member.at)[number % len(member.at)]
        stream = self.stream(GROUPS[name][0])
        first, end = stream.first_offset(p), stream.next_offset(p)
        if how == "leave":
            member.consumer.close()
            member.group.members.remove(member)
        elif how == "rewind":
            lost = False
            try:
                member.consumer.rewind()
            except OffsetOutOfRange:
                lost = True
            member.rewind()
            assert lost is any(at < stream.first_offset(q) for q, at in member.at.items())
        elif how == "pause":
            member.consumer.pause(p)
            member.paused.add(p)
        elif how == "resume":
            member.consumer.resume(p)
            member.paused.discard(p)
        elif how == "seek":
            goal = first + int(part * (end - first))
            self.seek_to(member, p, goal, goal)
        else:
            self.seek_to(member, p, how, first if how == "earliest" else end)

    def seek_to(self, member, p, to, goal):
        member.consumer.seek(to, partition=p)
        member.at[p] = goal
        member.dirty.add(p)
        member.sought.add(p)

    @rule(name=groups, which=some, part=parts, remove=st.booleans())
    def set_a_group(self, name, which, part, remove):
        if name not in self.groups:
            return
        while self.groups[name].members:
            self.groups[name].members.pop().consumer.close()
        stream = self.stream(GROUPS[name][0])
        if remove:
            stream.group(name).remove()
            del self.groups[name]
            return
        p = which % stream.partitions
        first, end = stream.first_offset(p), stream.next_offset(p)
        goal = first + int(part * (end - first))
        stream.group(name).seek(goal, partition=p)
        self.groups[name].committed[p] = goal

    def hang(self, commit):
        """Nobody asks for a batch for longer than is allowed, and somebody notices."""
        if self.queues["jobs"].now + 5 * DAY >= HORIZON:
            return
        done["hang"] += 1
        self.advance(5 * DAY)
        for name, one in self.groups.items():
            if one.members:
                self.stream(GROUPS[name][0]).group(name)._watch(True)
            for member in one.members:
                member.ended = True
                if commit and GROUPS[name][1] != "exactly_once":
                    self.commit_all(member)
