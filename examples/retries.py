"""Retries: a failing job waits longer each time, then goes to the dead letters, and comes back.

The clock is a virtual one, so that a quarter of an hour of waiting takes no time.

Run it: `python examples/retries.py`.
"""

import millstream
from millstream.testing import clock

POLICY = millstream.RetryPolicy(max_attempts=5, backoff=60.0, factor=2.0, jitter=0.0)


def send(message: millstream.Message, server_is_up: bool) -> None:
    """Send a mail, or raise."""
    if message.value == b"nobody":
        raise millstream.Reject("no such address")  # to the dead letters at once
    if not server_is_up:
        raise ConnectionError("the mail server is down")


def send_what_is_due(mail: millstream.Queue, minutes: int, *, server_is_up: bool) -> None:
    """Try every message that is due now. The `with` ends its lease as the attempt ended."""
    while True:
        outcome = "sent"
        try:
            with mail.get(timeout=0) as message:
                outcome = "rejected"  # which the end of the block does, quietly
                send(message, server_is_up)
                outcome = "sent"
        except millstream.Empty:
            return
        except ConnectionError as error:
            outcome = f"failed: {error}"
        print(f"{minutes:3} min, attempt {message.attempt} of {message.value.decode()}: {outcome}")


def main() -> None:
    with clock() as virtual, millstream.temporary() as store:
        mail = store.queue("mail", retry=POLICY)
        mail.put_many([b"ann", b"nobody"])
        minutes = 0
        for wait in (0, 1, 2, 4, 8):
            minutes += wait
            virtual.advance(60 * wait + 1)  # nothing comes early, nor to the very millisecond
            send_what_is_due(mail, minutes, server_is_up=False)

        for letter in mail.dead.list():
            print(f"dead: {letter.value.decode()}: {letter.last_error}")
        ours = [letter.id for letter in mail.dead.list() if letter.value == b"ann"]
        print(f"redriven: {mail.dead.redrive(ours)}")
        send_what_is_due(mail, minutes, server_is_up=True)
        print(f"left: {len(mail)}; dead: {len(mail.dead.list())}")


if __name__ == "__main__":
    main()
