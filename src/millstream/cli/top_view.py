"""The terminal view of `millstream top`, in textual: tables that follow a `picture.Watch`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from rich.text import Text
from textual import work
from textual.app import App
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen, Screen
from textual.widgets import DataTable, Footer, Input, Label, Static, TabbedContent, TabPane
from textual.worker import get_current_worker

from millstream.cli.output import age_text, count_text, rate_text, size_text
from millstream.cli.picture import act

if TYPE_CHECKING:
    from textual.app import ComposeResult
    from textual.binding import BindingType

    from millstream.cli.picture import Watch

__all__ = ["Top", "show"]

Row = dict[str, Any]


class Column(NamedTuple):
    """A column of a table: its title, what of a row is shown, and what it is sorted by."""

    title: str
    text: Callable[[Row], str]
    key: Callable[[Row], Any]


def number(title: str, name: str) -> Column:
    """A column of a count."""
    return Column(title, lambda row: count_text(row[name]), lambda row: row[name])


def rate(title: str, name: str) -> Column:
    """A column of a rate; nothing where it is not known yet."""
    return Column(
        title,
        lambda row: "-" if row[name] is None else rate_text(row[name], 1),
        lambda row: row[name] or 0.0,
    )


def age(title: str, name: str) -> Column:
    """A column of an age in seconds."""
    return Column(title, lambda row: age_text(row[name]), lambda row: row[name] or 0.0)


def size(title: str, name: str) -> Column:
    """A column of bytes."""
    return Column(title, lambda row: size_text(row[name]), lambda row: row[name])


def text(title: str, name: str) -> Column:
    """A column of text."""
    return Column(title, lambda row: str(row[name]), lambda row: str(row[name]))


def seconds(title: str, name: str) -> Column:
    """A column of a time of day; nothing where there is none."""
    return Column(title, lambda row: clock_text(row[name]), lambda row: row[name] or 0.0)


def clock_text(at: float | None) -> str:
    """A time, of the clock here."""
    return "-" if at is None else datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S")


def said(value: Row | None) -> str:
    """What bytes say, on one line."""
    if value is None:
        return "-"
    shown = value.get("text", value.get("hex", ""))
    line = " ".join(str(shown).split())
    return line if len(line) <= 60 else f"{line[:57]}..."


def bytes_of(title: str, name: str) -> Column:
    """A column of what bytes say."""
    return Column(title, lambda row: said(row[name]), lambda row: said(row[name]))


TABLES: dict[str, tuple[Column, ...]] = {
    "queues": (
        text("Queue", "name"),
        number("Ready", "ready"),
        number("Delayed", "delayed"),
        number("Leased", "leased"),
        number("Dead", "dead"),
        age("Oldest", "oldest_age"),
        rate("Put", "put_rate"),
        rate("Done", "done_rate"),
        number("Workers", "workers"),
        Column("", lambda row: state_of(row), lambda row: state_of(row)),
    ),
    "streams": (
        text("Stream", "name"),
        number("Partitions", "partitions"),
        number("Records", "records"),
        rate("In", "in_rate"),
        rate("Out", "out_rate"),
        Column(
            "Lag",
            lambda row: count_text(max((one["lag"] for one in row["groups"]), default=0)),
            lambda row: max((one["lag"] for one in row["groups"]), default=0),
        ),
        age("Oldest", "oldest_age"),
        size("Log", "log_bytes"),
        size("Disk", "allocated_bytes"),
        Column("", lambda row: state_of(row), lambda row: state_of(row)),
    ),
    "groups": (
        text("Group", "name"),
        text("Stream", "stream"),
        number("Members", "members"),
        number("Lag", "lag"),
        age("Behind", "lag_seconds"),
        rate("Out", "out_rate"),
        Column("", lambda row: state_of(row), lambda row: state_of(row)),
    ),
    "processes": (
        Column("Process", lambda row: str(row["pid"]), lambda row: row["pid"]),
        seconds("Since", "since"),
        Column("Holds", lambda row: holdings_text(row), lambda row: holdings_text(row)),
        text("Command", "command"),
    ),
    "partitions": (
        number("Partition", "partition"),
        number("First", "first_offset"),
        number("Next", "next_offset"),
        number("Durable", "durable_offset"),
        number("Records", "records"),
        age("Oldest", "oldest_age"),
        number("Segments", "segments"),
        size("Disk", "allocated_bytes"),
        text("Health", "health"),
    ),
    "records": (
        number("Offset", "offset"),
        seconds("At", "at"),
        bytes_of("Key", "key"),
        bytes_of("Value", "value"),
    ),
    "shares": (
        number("Partition", "partition"),
        Column("Position", lambda row: str(row["position"] or 0), lambda row: row["position"] or 0),
        number("End", "next_offset"),
        number("Lag", "lag"),
        age("Behind", "lag_seconds"),
        Column("Member", lambda row: owner_text(row), lambda row: owner_text(row)),
    ),
    "messages": (
        text("Id", "id"),
        text("State", "state"),
        number("Priority", "priority"),
        number("Attempts", "attempts"),
        seconds("Put", "put_at"),
        bytes_of("Key", "key"),
        bytes_of("Value", "value"),
    ),
    "dead letters": (
        text("Id", "id"),
        number("Attempts", "attempts"),
        text("Reason", "reason"),
        seconds("Died", "last_at"),
        bytes_of("Value", "value"),
        text("Last error", "last_error"),
    ),
}


FIRST = ("queues", "streams", "groups", "processes")
"""The tables that are seen first."""


def state_of(row: Row) -> str:
    """What is unusual about it, in a word."""
    if row["health"] != "sound":
        return str(row["health"])
    return "paused" if row.get("paused") else ""


def owner_text(row: Row) -> str:
    """The member that reads a partition."""
    lost = " lost" if row["lost"] else ""
    return ("-" if row["owner"] is None else str(row["owner"])) + lost


def holdings_text(row: Row) -> str:
    """What a process holds."""
    held = [f"{count} of {name}" for name, count in row["leases"].items()]
    held += [
        f"{len(one['partitions'])} partitions of {one['stream']} for {one['group']}"
        for one in row["groups"]
    ]
    return ", ".join(held) or "-"


def rows_of(picture: Row, what: str) -> list[Row]:
    """The rows of one of the first tables."""
    if what == "groups":
        return [group for stream in picture["streams"] for group in stream["groups"]]
    rows: list[Row] = picture[what]
    return rows


def headline(picture: Row) -> str:
    """The store in one line."""
    members = picture["members"]
    parts = [
        str(picture["path"]),
        str(picture["health"]),
        f"{members} process{'' if members == 1 else 'es'}",
        f"durability {picture['durability']}",
    ]
    if picture["needs_recovery"]:
        parts.append("needs recovery")
    return "  ".join(parts)


# --- tables ---------------------------------------------------------------------------------------


class Rows(DataTable[Text]):
    """A table of rows that come anew; sorted, filtered, with the cursor where it was.

    Cells are `Text`: a str would be read as markup, and what is stored may look like that.
    """

    def __init__(self, what: str, id: str) -> None:
        super().__init__(id=id, cursor_type="row", zebra_stripes=True)
        self.what = what
        self.columns_of = TABLES[what]
        self.sorted_by, self.falling, self.wanted = 0, False, ""
        self.headed = (-1, False)
        self.rows_now: list[Row] = []
        self.shown: list[Row] = []

    def on_mount(self) -> None:
        """Have the columns, also where there are no rows yet."""
        if not self.columns:
            self.head()

    def head(self) -> None:
        """Titles, with a mark where it is sorted."""
        self.headed = self.sorted_by, self.falling
        for index, column in enumerate(self.columns_of):
            mark = "" if index != self.sorted_by else " v" if self.falling else " ^"
            self.add_column(column.title + mark)

    def show_rows(self, rows: Sequence[Row]) -> None:
        """Show these, which are the same ones as before, or others."""
        self.rows_now = list(rows)
        column = self.columns_of[self.sorted_by]
        cells = [[one.text(row) for one in self.columns_of] for row in rows]
        found = [
            (column.key(row), row, texts)
            for row, texts in zip(rows, cells, strict=True)
            if self.wanted.lower() in " ".join(texts).lower()
        ]
        found.sort(key=lambda one: one[0], reverse=self.falling)
        cursor, top = self.cursor_row, self.scroll_y
        headed = self.sorted_by, self.falling
        self.clear(columns=headed != self.headed)
        if headed != self.headed or not self.columns:
            self.head()
        self.shown = [row for _, row, _ in found]
        for _, _, texts in found:
            self.add_row(*(Text(one, no_wrap=True, end="") for one in texts))
        if self.shown:
            self.move_cursor(row=min(cursor, len(self.shown) - 1), scroll=False)
            self.scroll_to(y=top, animate=False)

    def sort_by_next(self) -> None:
        """Sort by the next column; numbers begin with the largest."""
        self.sorted_by = (self.sorted_by + 1) % len(self.columns_of)
        self.falling = bool(
            self.rows_now
            and isinstance(self.columns_of[self.sorted_by].key(self.rows_now[0]), int | float)
        )
        self.show_rows(self.rows_now)

    def turn(self) -> None:
        """Sort the other way round."""
        self.falling = not self.falling
        self.show_rows(self.rows_now)

    def filter_by(self, wanted: str) -> None:
        """Show only what has this text."""
        self.wanted = wanted
        self.show_rows(self.rows_now)

    @property
    def chosen(self) -> Row | None:
        """The row under the cursor."""
        return self.shown[self.cursor_row] if 0 <= self.cursor_row < len(self.shown) else None


# --- questions ------------------------------------------------------------------------------------


class Ask(ModalScreen[bool]):
    """Asks before something is done."""

    CSS = """
    Ask { align: center middle; }
    Ask > Vertical { width: 64; height: auto; padding: 1 2; border: thick $warning;
                     background: $surface; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        ("y", "dismiss(True)", "Yes"),
        ("n,escape", "dismiss(False)", "No"),
    ]

    def __init__(self, question: str) -> None:
        super().__init__()
        self.question = question

    def compose(self) -> ComposeResult:
        """The question, and how to answer."""
        with Vertical():
            yield Label(self.question, id="question", markup=False)
            yield Label("y: yes    n: no", markup=False)


class AskText(ModalScreen[str | None]):
    """Asks for a word, a position say."""

    CSS = """
    AskText { align: center middle; }
    AskText > Vertical { width: 64; height: auto; padding: 1 2; border: thick $accent;
                         background: $surface; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [("escape", "dismiss(None)", "Leave it")]

    def __init__(self, question: str) -> None:
        super().__init__()
        self.question = question

    def compose(self) -> ComposeResult:
        """The question, and a line."""
        with Vertical():
            yield Label(self.question, markup=False)
            yield Input(id="answer")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """It is answered."""
        self.dismiss(event.value.strip() or None)


class Reading(ModalScreen[None]):
    """A text to read: a message, a dead letter with its traceback, the help."""

    CSS = """
    Reading { align: center middle; }
    Reading > VerticalScroll { width: 90%; height: 85%; padding: 0 1; border: round $accent;
                               background: $surface; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [("escape,enter,q", "dismiss(None)", "Back")]

    def __init__(self, shown: str) -> None:
        super().__init__()
        self.shown = shown

    def compose(self) -> ComposeResult:
        """The text."""
        with VerticalScroll():
            yield Static(self.shown, id="reading", markup=False)


def lines_of(row: Row) -> str:
    """All fields of a row, the long ones last."""
    short, long = [], []
    for name, value in row.items():
        if isinstance(value, dict) and ("bytes" in value):
            long.append(f"{name} ({value['bytes']} bytes):\n{value.get('text', value.get('hex'))}")
        elif name.endswith("_at") or name in ("at", "due", "expires"):
            short.append(f"{name}: {clock_text(value)}")
        elif name == "traceback":
            if value:
                long.append(f"traceback:\n{value}")
        elif name == "headers":
            short += [f"header {header}: {said(one)}" for header, one in value.items()]
        else:
            short.append(f"{name}: {value}")
    return "\n".join(short) + "\n\n" + "\n\n".join(long)


HELP = """\
enter   look closer: a queue, a dead letter, a stream, a partition, a group
escape  back
tab     the next table
/       filter: only rows with this text
s, o    sort by the next column; the other way round
space   hold: do not follow for a while

In a queue:   r redrive dead letters (d: only this one)   x purge dead letters
              P purge what waits   p pause, or resume
In a group:   k seek: set where it goes on

Nothing is done before it was asked for and confirmed.
"""


# --- screens --------------------------------------------------------------------------------------


class Looking(Screen[None]):
    """What screens have in common: tables that follow, filter, sort."""

    BINDINGS: ClassVar[list[BindingType]] = [
        ("slash", "filter", "Filter"),
        ("s", "sort", "Sort"),
        ("o", "turn", "Order"),
        ("space", "hold", "Hold"),
        ("tab", "next_table", "Next"),
        ("question_mark", "help", "Help"),
    ]
    held = False

    @property
    def top(self) -> Top:
        """The application."""
        app = self.app
        assert isinstance(app, Top)
        return app

    def table(self) -> Rows | None:
        """The table that is seen."""
        raise NotImplementedError

    def follow(self) -> None:
        """Show what there is now."""
        raise NotImplementedError

    def action_filter(self) -> None:
        """Ask for what to filter by."""
        self.add_class("filtering")
        self.query_one("#filter", Input).focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter as it is typed."""
        if (table := self.table()) is not None:
            table.filter_by(event.value)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Back to the table, filtered."""
        if not event.value:
            self.remove_class("filtering")
        if (table := self.table()) is not None:
            table.focus()

    def action_next_table(self) -> None:
        """Show the next tab, if there is one."""
        for tabs in self.query(TabbedContent):
            names = [str(pane.id) for pane in tabs.query(TabPane)]
            tabs.active = names[(names.index(tabs.active) + 1) % len(names)]

    def on_tabbed_content_tab_activated(self, event: TabbedContent.TabActivated) -> None:
        """Keys are for the table that is seen."""
        if (table := self.table()) is not None:
            table.focus()

    def action_sort(self) -> None:
        """Sort by the next column."""
        if (table := self.table()) is not None:
            table.sort_by_next()

    def action_turn(self) -> None:
        """Sort the other way round."""
        if (table := self.table()) is not None:
            table.turn()

    def action_hold(self) -> None:
        """Follow no more, or again."""
        self.held = not self.held
        self.notify("held: space follows again" if self.held else "following")

    def action_help(self) -> None:
        """Say which keys there are."""
        self.app.push_screen(Reading(HELP))

    def ask(self, question: str, what: str, **named: Any) -> None:
        """Do something if the answer is yes."""

        def answered(yes: bool | None) -> None:
            if yes:
                self.top.do(what, **named)

        self.app.push_screen(Ask(question), answered)


class Overview(Looking):
    """The store: queues, streams, groups and processes."""

    def compose(self) -> ComposeResult:
        """A line about the store, and the tables."""
        yield Label("", id="head", markup=False)
        with TabbedContent(id="tabs"):
            for what in FIRST:
                with TabPane(what.capitalize(), id=f"tab-{what}"):
                    yield Rows(what, id=what)
        yield Input(placeholder="filter", id="filter")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Keys are for the table."""
        self.table().focus()

    def table(self) -> Rows:
        """The table of the tab that is seen."""
        active = self.query_one(TabbedContent).active.removeprefix("tab-")
        return self.query_one(f"#{active or 'queues'}", Rows)

    def follow(self) -> None:
        """Show the picture."""
        picture = self.top.picture
        if picture is None or self.held or len(self.query(Rows)) < len(FIRST):
            return
        self.query_one("#head", Label).update(headline(picture))
        for what in FIRST:
            self.query_one(f"#{what}", Rows).show_rows(rows_of(picture, what))

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Look closer."""
        table = event.data_table
        row = table.chosen if isinstance(table, Rows) else None
        if row is None or not isinstance(table, Rows):
            return
        if table.what == "queues":
            self.app.push_screen(OfQueue(row["name"]))
        elif table.what == "streams":
            self.app.push_screen(OfStream(row["name"]))
        elif table.what == "groups":
            self.app.push_screen(OfGroup(row["stream"], row["name"]))
        else:
            self.app.push_screen(Reading(lines_of(row)))


class Closer(Looking):
    """One thing of the store."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape", "app.pop_screen", "Back")]
    what = ""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.heading = title
        self.reading = False
        """Is a thread at it? The next one waits for the next turn."""

    def compose(self) -> ComposeResult:
        """A line about it, and a table."""
        yield Label(self.heading, id="head", markup=False)
        yield Rows(self.what, id="rows")
        yield Input(placeholder="filter", id="filter")
        yield Footer(show_command_palette=False)

    def table(self) -> Rows:
        """The table."""
        return self.query_one("#rows", Rows)

    def on_mount(self) -> None:
        """Show it at once."""
        self.table().focus()
        self.follow()

    def follow(self) -> None:
        """Read and show it."""
        if not self.held and not self.reading:
            self.reading = True
            self.read_rows(self.top)

    @work(thread=True)
    def read_rows(self, top: Top) -> None:
        """In a thread: it may take its time, and the screen may be left meanwhile."""
        from millstream.errors import MillstreamError

        try:
            heading, rows = self.read(top.source)
        except MillstreamError as error:
            top.tell(top.complain, str(error))
            return
        finally:
            self.reading = False
        top.tell(self.show, heading, rows)

    def read(self, source: Watch) -> tuple[str, list[Row]]:
        """The heading, and the rows."""
        raise NotImplementedError

    def show(self, heading: str, rows: list[Row]) -> None:
        """Show what was read."""
        if self.is_attached and self.query(Rows):
            self.query_one("#head", Label).update(heading)
            self.table().show_rows(rows)

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Look closer."""
        table = event.data_table
        if isinstance(table, Rows) and table.chosen is not None:
            self.open(table.chosen)

    def open(self, row: Row) -> None:
        """Look closer at a row."""
        self.app.push_screen(Reading(lines_of(row)))


class OfStream(Closer):
    """The partitions of a stream."""

    what = "partitions"

    def __init__(self, name: str) -> None:
        super().__init__(f"stream {name}")
        self.stream = name

    def read(self, source: Watch) -> tuple[str, list[Row]]:
        """The partitions."""
        found = source.stream(self.stream)
        heading = f"stream {self.stream}  {found['health']}  {count_text(found['records'])} records"
        return heading, found["partitions"]

    def open(self, row: Row) -> None:
        """The records of a partition."""
        self.app.push_screen(OfPartition(self.stream, row["partition"]))


class OfPartition(Closer):
    """The last records of a partition."""

    what = "records"

    def __init__(self, stream: str, partition: int) -> None:
        super().__init__(f"partition {partition} of {stream}")
        self.place = stream, partition

    def read(self, source: Watch) -> tuple[str, list[Row]]:
        """The records."""
        found = source.records(*self.place, None)
        heading = f"partition {self.place[1]} of {self.place[0]}: the last records of"
        return f"{heading} {found['first_offset']} to {found['next_offset']}", found["records"]


class OfGroup(Closer):
    """The partitions of a group."""

    what = "shares"
    BINDINGS: ClassVar[list[BindingType]] = [("k", "seek", "Seek")]

    def __init__(self, stream: str, group: str) -> None:
        super().__init__(f"group {group} of {stream}")
        self.place = stream, group

    def read(self, source: Watch) -> tuple[str, list[Row]]:
        """The partitions."""
        found = source.group(*self.place)
        members = ", ".join(str(one["process"]) for one in found["members"]) or "no members"
        return f"group {self.place[1]} of {self.place[0]}: {members}", found["partitions"]

    def action_seek(self) -> None:
        """Ask where it is to go on, then whether it really is."""
        stream, group = self.place

        def answered(to: str | None) -> None:
            if to:
                question = f"Have group {group} of {stream} go on at {to}, in all partitions?"
                self.ask(question, "seek", stream=stream, group=group, to=to)

        self.app.push_screen(
            AskText("Go on where? an offset, -N, earliest, latest, or a time"), answered
        )


class OfQueue(Closer):
    """A queue: its messages, and its dead letters."""

    BINDINGS: ClassVar[list[BindingType]] = [
        ("r", "redrive", "Redrive"),
        ("d", "redrive_one", "Redrive this"),
        ("x", "purge_dead", "Purge dead"),
        ("P", "purge", "Purge"),
        ("p", "pause", "Pause"),
    ]

    def __init__(self, name: str) -> None:
        super().__init__(f"queue {name}")
        self.queue = name
        self.paused = False

    def compose(self) -> ComposeResult:
        """A line about it, its messages and its dead letters."""
        yield Label(self.heading, id="head", markup=False)
        with TabbedContent(id="tabs"):
            with TabPane("Messages", id="tab-messages"):
                yield Rows("messages", id="messages")
            with TabPane("Dead letters", id="tab-letters"):
                yield Rows("dead letters", id="letters")
        yield Input(placeholder="filter", id="filter")
        yield Footer(show_command_palette=False)

    def table(self) -> Rows:
        """The table of the tab that is seen."""
        active = self.query_one(TabbedContent).active.removeprefix("tab-")
        return self.query_one(f"#{active or 'messages'}", Rows)

    def read(self, source: Watch) -> tuple[str, list[Row]]:
        """What waits, then the dead letters."""
        queue, messages = source.queue(self.queue), source.messages(self.queue)
        self.paused = bool(queue["paused"])
        figures = "  ".join(
            f"{name} {count_text(queue[name])}"
            for name in ("ready", "delayed", "held", "leased", "dead", "put", "done", "failed")
        )
        paused = "  paused" if self.paused else ""
        letters = [{**one, "is_dead": True} for one in source.letters(self.queue)]
        return f"queue {self.queue}{paused}  {figures}", [*messages, *letters]

    def show(self, heading: str, rows: list[Row]) -> None:
        """Show both."""
        if self.is_attached and len(self.query(Rows)) == 2:
            self.query_one("#head", Label).update(heading)
            messages = [row for row in rows if "is_dead" not in row]
            self.query_one("#messages", Rows).show_rows(messages)
            letters = [row for row in rows if "is_dead" in row]
            self.query_one("#letters", Rows).show_rows(letters)

    def action_redrive(self) -> None:
        """Have all dead letters tried again."""
        self.ask(f"Redrive all dead letters of {self.queue}?", "redrive", queue=self.queue)

    def action_redrive_one(self) -> None:
        """Have this one tried again."""
        row = self.query_one("#letters", Rows).chosen
        if row is not None:
            named: Row = {"queue": self.queue, "ids": [int(row["id"])]}
            self.ask(f"Redrive dead letter {row['id']} of {self.queue}?", "redrive", **named)

    def action_purge_dead(self) -> None:
        """Remove all dead letters."""
        question = f"Remove all dead letters of {self.queue} for good?"
        self.ask(question, "purge dead", queue=self.queue)

    def action_purge(self) -> None:
        """Remove all that waits."""
        self.ask(f"Remove all messages that wait in {self.queue}?", "purge", queue=self.queue)

    def action_pause(self) -> None:
        """Pause, or resume."""
        what = "resume" if self.paused else "pause"
        self.ask(f"{what.capitalize()} {self.queue}?", what, queue=self.queue)


class Top(App[None]):
    """A store as it changes."""

    CSS = """
    #head { background: $boost; width: 100%; height: 1; }
    #filter { display: none; height: 3; }
    .filtering #filter { display: block; }
    """
    TITLE = "millstream top"
    BINDINGS: ClassVar[list[BindingType]] = [("q", "quit", "Quit")]

    def __init__(self, watch: Watch, every: float = 1.0) -> None:
        super().__init__()
        self.source = watch
        self.every = every
        self.picture: Row | None = None
        self.looking = False
        self.done = ""
        """What came of the last action."""

    def on_mount(self) -> None:
        """Begin to look."""
        self.push_screen(Overview())
        self.look()
        self.set_interval(self.every, self.look)

    def tell(self, callback: Callable[..., object], *arguments: object) -> None:
        """Have something done by the view, from a thread; nothing, where the user has left."""
        if self.is_running and not get_current_worker().is_cancelled:
            self.call_from_thread(callback, *arguments)

    def complain(self, text: str) -> None:
        """Say what went wrong."""
        self.notify(text, severity="error", markup=False)

    def look(self) -> None:
        """Take a picture, unless the last one is still being taken."""
        if not self.looking:
            self.looking = True
            self.take_picture()

    @work(thread=True)
    def take_picture(self) -> None:
        """In a thread: a store on a slow disk does not hold up the keys."""
        from millstream.errors import MillstreamError

        try:
            picture = self.source.picture(max_age=self.every / 2)
        except (MillstreamError, OSError) as error:
            self.tell(self.complain, str(error))
            return
        finally:
            self.looking = False
        self.tell(self.seen, picture)

    def seen(self, picture: Row) -> None:
        """Show it."""
        self.picture = picture
        for screen in self.screen_stack:
            if isinstance(screen, Looking):
                screen.follow()

    @work(thread=True, group="do")
    def do(self, what: str, **named: Any) -> None:
        """Do what was confirmed, in a thread, and say what came of it."""
        from millstream.errors import MillstreamError

        began = time.monotonic()
        try:
            found = act(self.source.path, what, **named)
        except (MillstreamError, OSError) as error:
            self.tell(self.ended, f"{what}: {error}", "error")
            return
        came = ", ".join(f"{name}: {value}" for name, value in found.items())
        spent = time.monotonic() - began
        self.tell(self.ended, f"{came} ({spent:.2g} s)", "information")

    def ended(self, text: str, severity: Any) -> None:
        """Say what came of an action, and look again."""
        self.done = text
        self.notify(text, severity=severity, markup=False)
        self.look()
        if isinstance(self.screen, Looking):
            self.screen.follow()


def show(watch: Watch, every: float) -> None:
    """Show a store until the user leaves."""
    Top(watch, every).run()
