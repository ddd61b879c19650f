"""Workers: functions that are called with the messages of a queue, in threads or in processes.

`queue.worker(...)` registers a function, `run` works until SIGTERM or SIGINT, `Worker` is the
handle for programs that decide themselves when.
"""

from millstream.queues.worker import Counts, Worker, register, run

__all__ = ["Counts", "Worker", "register", "run"]
