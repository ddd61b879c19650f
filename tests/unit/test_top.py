"""`millstream top`: what is seen in the terminal, by textual's pilot, and what its keys do."""

import asyncio
import json
import re

import pytest

import millstream
from millstream.cli import main
from millstream.cli.picture import Watch

pytest.importorskip("textual")

from millstream.cli.top_view import (
    Ask,
    OfPartition,
    OfQueue,
    OfStream,
    Overview,
    Reading,
    Rows,
    Top,
)

SCREEN = """\
STORE sound 1 process durability interval
Queues Streams Groups Processes
Queue ^ Ready Delayed Leased Dead Oldest Put Done Workers
idle 1 0 0 0 ~ ~ ~ 0
mail 2 0 0 1 ~ ~ ~ 0
tab Next / Filter s Sort o Order space Hold ? Help q Quit"""
QUICK = millstream.RetryPolicy(max_attempts=1)


@pytest.fixture
def filled(tmp_path):
    """A store with streams, a group that is behind, queues, and a dead letter."""
    with millstream.open(tmp_path / "store") as store:
        events = store.stream("events", partitions=2)
        events.append_many([b'{"n": 1}', b"two", b"\xff\x00"], partition=0)
        with events.consumer("readers", max_records=1) as consumer:
            consumer.poll()
            consumer.commit()
        mail = store.queue("mail", retry=QUICK)
        mail.put_many([b"a", b"b", b"c"])
        with pytest.raises(ValueError), mail.get(timeout=5):
            raise ValueError("no such address")
        store.queue("idle").put(b"x")
        store.flush()
        yield store


def seen(app):
    """The screen as text."""
    strips = app.screen._compositor.render_strips()
    return "\n".join("".join(one.text for one in strip).rstrip() for strip in strips)


def piloted(store, steps, size=(120, 30)):
    """Do steps in an application that shows a store; what the last one returned."""

    async def run():
        watch = Watch(store.path)
        try:
            app = Top(watch, every=0.5)
            async with app.run_test(size=size) as pilot:
                await until(pilot, lambda: app.picture is not None)
                return await steps(app, pilot)
        finally:
            watch.close()

    return asyncio.run(run())


async def until(pilot, condition):
    for _ in range(1500):
        if condition():
            await pilot.pause()
            return
        await pilot.pause(0.02)
    raise AssertionError(f"it did not come to that:\n{seen(pilot.app)}")


async def opened(app, pilot, kind):
    """Enter, and wait for the screen that it opens to have rows."""
    await pilot.press("enter")
    await until(pilot, lambda: isinstance(app.screen, kind))


def test_all_that_a_store_has_is_seen(filled):
    async def steps(app, pilot):
        shown = {}
        for tab in ("queues", "streams", "groups", "processes"):
            app.screen.query_one("#tabs").active = f"tab-{tab}"
            table = app.screen.query_one(f"#{tab}", Rows)
            await until(pilot, lambda: table.shown and app.screen.table() is table)  # noqa: B023
            shown[tab] = seen(app)
        return shown

    shown = piloted(filled, steps)
    assert filled.path in shown["queues"] and "sound" in shown["queues"]
    lines = {line.split()[0]: line.split() for line in shown["queues"].splitlines() if line.split()}
    assert lines["mail"][1:5] == ["2", "0", "0", "1"]
    assert lines["idle"][1:5] == ["1", "0", "0", "0"]
    assert "events" in shown["streams"] and "readers" in shown["groups"]
    assert str(filled.processes()[0].pid) in shown["processes"]


def test_the_text_of_the_first_screen(filled):
    """A snapshot: what is not a figure that changes."""

    async def steps(app, pilot):
        await until(pilot, lambda: app.screen.table().shown)
        return seen(app)

    text = piloted(filled, steps, size=(200, 12)).replace(filled.path, "STORE")
    text = re.sub(r" +", " ", re.sub(r"\d+ s |[0-9.]+/s|- ", "~ ", text))
    lines = [line.strip() for line in text.splitlines()]
    assert "\n".join(lines[:2] + lines[3:6] + lines[-1:]) == SCREEN


def test_sorting_filtering_and_holding(filled):
    async def steps(app, pilot):
        table = app.screen.table()
        await until(pilot, lambda: len(table.shown) == 2)
        names = [[row["name"] for row in table.shown]]
        await pilot.press("s")
        names.append([row["name"] for row in table.shown])
        await pilot.press("o")
        names.append([row["name"] for row in table.shown])
        await pilot.press("slash", *"idl", "enter")
        await until(pilot, lambda: len(table.shown) == 1)
        names.append([row["name"] for row in table.shown])
        await pilot.press("space")
        held = app.picture
        filled.queue("new").put(b"x")
        await until(pilot, lambda: app.picture is not held and len(app.picture["queues"]) == 3)
        assert len(table.rows_now) == 2
        return names

    assert piloted(filled, steps) == [
        ["idle", "mail"],
        ["mail", "idle"],
        ["idle", "mail"],
        ["idle"],
    ]


def test_a_dead_letter_is_looked_at_and_redriven_after_asking(filled):
    mail = filled.queue("mail")

    async def steps(app, pilot):
        table = app.screen.table()
        await until(pilot, lambda: len(table.shown) == 2)
        table.move_cursor(row=1)
        await opened(app, pilot, OfQueue)
        letters = app.screen.query_one("#letters", Rows)
        await until(pilot, lambda: len(letters.shown) == 1)
        app.screen.query_one("#tabs").active = "tab-letters"
        await pilot.pause()
        letters.focus()
        await opened(app, pilot, Reading)
        text = seen(app)
        await pilot.press("escape")
        await pilot.press("r")
        await until(pilot, lambda: isinstance(app.screen, Ask))
        asked = seen(app)
        await pilot.press("n")
        await pilot.pause()
        assert len(mail.dead) == 1
        await pilot.press("r")
        await until(pilot, lambda: isinstance(app.screen, Ask))
        await pilot.press("y")
        await until(pilot, lambda: app.done)
        await until(pilot, lambda: not letters.shown)
        return text, asked, app.done

    text, asked, done = piloted(filled, steps)
    assert "no such address" in text and "Traceback (most recent call last)" in text
    assert "Redrive all dead letters of mail?" in asked
    assert done.startswith("redriven: 1")
    assert (len(mail.dead), mail.stats().ready) == (0, 3)


def test_pausing_purging_and_seeking(filled):
    async def steps(app, pilot):
        async def confirmed(key):
            app.done = ""
            await pilot.press(key)
            await until(pilot, lambda: isinstance(app.screen, Ask))
            await pilot.press("y")
            await until(pilot, lambda: app.done)
            return app.done.partition(" (")[0]

        table = app.screen.table()
        await until(pilot, lambda: len(table.shown) == 2)
        table.move_cursor(row=1)
        await opened(app, pilot, OfQueue)
        await until(pilot, lambda: app.screen.query_one("#messages", Rows).shown)
        said = [await confirmed("p")]
        said += [await confirmed("P")]
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, Overview))
        app.screen.query_one("#tabs").active = "tab-groups"
        groups = app.screen.query_one("#groups", Rows)
        await until(pilot, lambda: groups.shown)
        groups.focus()
        await pilot.press("enter")
        await until(
            pilot, lambda: not isinstance(app.screen, Overview) and app.screen.table().shown
        )
        app.done = ""
        await pilot.press("k")
        await pilot.pause()
        await pilot.press(*"earliest", "enter")
        await until(pilot, lambda: isinstance(app.screen, Ask))
        await pilot.press("y")
        await until(pilot, lambda: app.done)
        return [*said, app.done.partition(" (")[0]]

    said = piloted(filled, steps)
    assert said == ["paused: True", "purged: 2", "positions: {'0': 0, '1': 0}"]
    assert filled.queue("mail").paused
    assert filled.stream("events").group("readers").lag() == 3


def test_streams_are_looked_into_down_to_a_record(filled):
    async def steps(app, pilot):
        app.screen.query_one("#tabs").active = "tab-streams"
        table = app.screen.query_one("#streams", Rows)
        await until(pilot, lambda: table.shown)
        table.focus()
        texts = []
        for _ in range(3):
            before = app.screen
            await pilot.press("enter")
            await until(
                pilot,
                lambda: (
                    app.screen is not before  # noqa: B023
                    and (isinstance(app.screen, Reading) or app.screen.table().shown)
                ),
            )
            await until(pilot, lambda: "two" in seen(app) or len(texts) != 1)
            texts.append(seen(app))
        return texts

    partitions, records, record = piloted(filled, steps)
    assert "Partition" in partitions and "sound" in partitions
    assert "two" in records and '{"n": 1}' in records and "ff00" in records
    assert "offset: 0" in record and '{"n": 1}' in record


def test_what_is_stored_is_shown_as_it_is_and_not_as_markup(tmp_path):
    said = "[/etc/x] [red]r[/red] [0]"
    with millstream.open(tmp_path / "store [/x]") as store:
        queue = store.queue("mail", retry=QUICK)
        queue.put_many([said.encode(), b"2", said.encode()])
        queue.get(timeout=5).reject(said)
        queue.put(said.encode(), key=said.encode())
        store.stream("events").append(said.encode(), key=said.encode())

        async def steps(app, pilot):
            shown = {}
            await opened(app, pilot, OfQueue)
            for tab in ("messages", "letters"):
                app.screen.query_one("#tabs").active = f"tab-{tab}"
                table = app.screen.query_one(f"#{tab}", Rows)
                await until(pilot, lambda: table.shown)  # noqa: B023
                await until(pilot, lambda: app.screen.table() is table)  # noqa: B023
                shown[tab] = seen(app)
            await opened(app, pilot, Reading)
            shown["letter"] = seen(app)
            await pilot.press("escape")
            app.screen.ask(f"Do {said}?", "purge", queue="mail")
            await until(pilot, lambda: isinstance(app.screen, Ask))
            shown["question"] = seen(app)
            await pilot.press("n")
            app.complain(f"{said} failed")
            app.ended(f"{said} done", "information")
            await until(pilot, lambda: "done" in seen(app))
            shown["notes"] = seen(app)
            await pilot.press("escape")
            await until(pilot, lambda: isinstance(app.screen, Overview))
            app.screen.query_one("#tabs").active = "tab-streams"
            await until(pilot, lambda: app.screen.table().id == "streams")
            await opened(app, pilot, OfStream)
            await until(pilot, lambda: app.screen.table().shown)
            await opened(app, pilot, OfPartition)
            await until(pilot, lambda: app.screen.table().shown)
            shown["records"] = seen(app)
            return shown

        shown = piloted(store, steps, size=(150, 30))
    for name, text in shown.items():
        assert said in " ".join(text.split()), name


def test_json_is_what_it_would_show(filled, capsys):
    assert main(["top", filled.path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found["queues"]] == ["idle", "mail"]
    assert found["streams"][0]["groups"][0]["lag"] == 2
    assert main(["top", filled.path + "-not", "--json"]) == 3
    assert main(["top", filled.path, "--every", "0"]) == 2
