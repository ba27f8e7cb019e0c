"""The engine's own thread, the only one that steps its core, and what passes between it and an event loop.

The event loop puts commands into a queue. The thread answers, after each step, with one callback on the event loop that
has everything that is new (`Mailroom.deliver`). The thread never waits for a consumer: a request whose last chunk is
unread keeps its tokens to itself, and the next chunk has all of them.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import math
import os
import queue
import sys
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, NamedTuple

from specdec.engine.core import EngineCore
from specdec.engine.outputs import ChunkCutter, StreamChunk
from specdec.request.sequence import Sequence

SWITCH_INTERVAL_S = 20e-6
PR_SET_TIMERSLACK = 29  # prctl(2)


class Mailbox:
    """A consumer's end, on the event loop. It holds at most one unread chunk: what comes before it is read is added to
    it."""

    def __init__(self) -> None:
        self.chunk: StreamChunk | None = None
        self.error: BaseException | None = None
        self.traceback: TracebackType | None = None  # the error's, before any consumer raised it
        self.closed = False  # nothing more will come
        self.news = asyncio.Event()

    def put(self, mail: Mail) -> None:
        """Takes mail in and wakes the consumer."""
        if mail.chunk is not None:
            self.chunk = mail.chunk if self.chunk is None else self.chunk.followed_by(mail.chunk)
        if mail.error is not None:
            self.error, self.traceback = mail.error, mail.error.__traceback__
        self.closed = mail.last
        self.news.set()


class Mailroom:
    """The requests of one event loop that have not ended, by id. Nobody touches it but on that loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.requests: dict[str, StreamedRequest] = {}

    def deliver(self, mails: list[Mail]) -> None:
        """Puts mails into their requests' mailboxes, and forgets the requests that have ended."""
        for mail in mails:
            if mail.last:
                self.requests.pop(mail.request.request_id, None)
            mail.request.mailbox.put(mail)


@dataclass(eq=False)
class StreamedRequest:
    """A request as the engine's thread and the event loop share it."""

    sequence: Sequence
    """The request itself, which the thread alone changes."""
    mailroom: Mailroom
    """The event loop's end."""
    deadline: float
    """When it ends whatever it has, in seconds of time.monotonic; inf: never."""
    mailbox: Mailbox = field(default_factory=Mailbox)
    """The consumer's end."""
    wanted: bool = True
    """Whether the consumer is ready for a chunk: set by the consumer as it reads, cleared by the thread as it sends, so
    they take turns."""

    def __post_init__(self) -> None:
        self.request_id = self.sequence.request_id
        self.cutter = ChunkCutter(self.sequence)


class Mail(NamedTuple):
    """Something new about a request, from the thread to the event loop."""

    request: StreamedRequest
    """The request."""
    chunk: StreamChunk | None
    """New output; None for none."""
    error: BaseException | None
    """What ended the request, if an exception did."""
    last: bool
    """Whether nothing more will come."""


class Command(NamedTuple):
    """Something that the event loop asks of the thread."""

    kind: Literal["add", "abort", "abort all", "stop"]
    """What to do; "stop" ends the thread once no request is left."""
    request: StreamedRequest | None = None
    """The request to add or abort."""


def stop(commands: queue.SimpleQueue[Command]) -> None:
    """Aborts everything and ends the thread that obeys these commands."""
    commands.put(Command("abort all"))
    commands.put(Command("stop"))


_threads: dict[threading.Thread, queue.SimpleQueue[Command]] = {}  # those that may be alive, and what they obey


@atexit.register
def _stop_all() -> None:
    """Stops every engine's thread when the interpreter ends: one that is inside a kernel then would take the process
    down with it."""
    for thread, commands in list(_threads.items()):
        stop(commands)
        thread.join()


def _start(thread: threading.Thread, commands: queue.SimpleQueue[Command]) -> None:
    """Starts a thread that `_stop_all` is to wait for, even where it ends later than all who know its engine: what it
    frees as it ends is part of that."""
    for ended in [t for t in list(_threads) if not t.is_alive()]:
        _threads.pop(ended, None)
    thread.start()
    _threads[thread] = commands


def _shorten_switch_interval() -> None:
    """Makes CPython let the calling thread take over from a busy event loop.

    CPython's waiting threads ask the one that runs to let go only after a whole switch interval (5 ms) in which it did
    not do so of itself. An event loop does in each of its turns, in `select`, too briefly for anybody else to wake up:
    one that is never idle, and whose turns are shorter than that, would keep this thread out for good. So the interval
    must be shorter than a turn. It is one for the whole process, and only ever lowered. Linux may oversleep it by 50
    us, unless the thread has a timer slack of its own.
    """
    sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)


class EngineThread:
    """Steps the core while there are requests, and sleeps while there are none."""

    def __init__(self, core: EngineCore, *, shorten_switch_interval: bool = True) -> None:
        """Starts the thread. shorten_switch_interval: see `_shorten_switch_interval`."""
        self.core, self._shorten_switch_interval = core, shorten_switch_interval
        self.broken: BaseException | None = None  # what ended the thread, if it was a fault of ours
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._requests: dict[Sequence, StreamedRequest] = {}
        self._unsent: set[StreamedRequest] = set()  # have tokens that their consumers were not ready for
        self._next_deadline = math.inf
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="specdec-engine", daemon=True)
        self.process_id = os.getpid()
        _start(self._thread, self.commands)

    @property
    def elsewhere(self) -> bool:
        """Whether this is another process than the thread's: a fork takes only the thread along that forks."""
        return os.getpid() != self.process_id

    def send(self, command: Command) -> None:
        """Queues a command. Any thread may call it, a finaliser too."""
        self.commands.put(command)

    def join(self) -> None:
        """Waits for the thread to end."""
        self._thread.join()

    def _run(self) -> None:
        try:
            if self._shorten_switch_interval:
                _shorten_switch_interval()
            with self.core.in_use():
                self.core.use_device()
                while self._requests or not self._stopping:
                    self._turn()
        except BaseException as error:
            self._fail_everyone(error)

    def _turn(self) -> None:
        changed = self._receive()
        changed += self._end_late_requests()
        if not self.core.scheduler.idle:
            changed += self.core.step()
        self._publish(changed)

    def _receive(self) -> list[Sequence]:
        """Obeys all commands there are, waiting for the first one while there are no requests. Returns the sequences
        that ended."""
        ended: list[Sequence] = []
        may_wait = not self._requests
        while True:
            try:
                kind, request = self.commands.get(block=may_wait)
            except queue.Empty:
                return ended
            may_wait = False
            if kind == "stop":
                self._stopping = True
            elif kind == "abort all":
                ended += [s for s in self._requests if self.core.end(s, "abort")]
            elif request is not None and kind == "add":
                self._add(request)
                ended += [request.sequence] if request.sequence.finished else []
            elif request is not None:
                ended += [request.sequence] if self.core.end(request.sequence, "abort") else []

    def _add(self, request: StreamedRequest) -> None:
        self._requests[request.sequence] = request
        self._next_deadline = min(self._next_deadline, request.deadline)
        with contextlib.suppress(Exception):  # the request has it as its error
            self.core.add(request.sequence)

    def _end_late_requests(self) -> list[Sequence]:
        """Ends the requests whose deadline has passed, and returns their sequences."""
        now = time.monotonic()
        if now < self._next_deadline:
            return []
        late = [s for s, request in self._requests.items() if request.deadline <= now]
        self._next_deadline = min((r.deadline for r in self._requests.values() if r.deadline > now), default=math.inf)
        return [s for s in late if self.core.end(s, "deadline")]

    def _publish(self, changed: list[Sequence]) -> None:
        """Sends what is new: to consumers who are ready, and whatever is left of requests that have ended."""
        mails: dict[Mailroom, list[Mail]] = {}
        self._unsent.update(self._requests[s] for s in changed if s in self._requests)
        for request in [r for r in self._unsent if r.wanted or r.sequence.finished]:
            self._unsent.remove(request)
            mail = self._mail(request)
            if mail.last:
                del self._requests[request.sequence]
            if mail.last or mail.chunk is not None:
                request.wanted = False
                mails.setdefault(request.mailroom, []).append(mail)
        for mailroom, batch in mails.items():
            if not _post(mailroom, batch):
                self._drop_requests_of(mailroom)

    def _mail(self, request: StreamedRequest) -> Mail:
        sequence = request.sequence
        if sequence.error is None:
            try:
                return Mail(request, request.cutter.take(), None, sequence.finished)
            except Exception as error:  # the detokeniser's
                self.core.end(sequence, "error", error)
                return Mail(request, None, error, True)
        return Mail(request, None, sequence.error, True)

    def _drop_requests_of(self, mailroom: Mailroom) -> None:
        """Aborts and forgets all requests of an event loop that is closed: nobody will read them."""
        for request in [r for r in self._requests.values() if r.mailroom is mailroom]:
            self.core.end(request.sequence, "abort")
            del self._requests[request.sequence]
            self._unsent.discard(request)

    def _fail_everyone(self, error: BaseException) -> None:
        """Gives the error that ends the thread to everyone who waits, and to whoever comes later, by `broken`."""
        self.broken = error
        requests = list(self._requests.values())
        while True:
            try:
                request = self.commands.get_nowait().request
            except queue.Empty:
                break
            if request is not None and request not in requests:
                requests.append(request)
        for request in requests:
            _post(request.mailroom, [Mail(request, None, error, True)])


def _post(mailroom: Mailroom, mails: list[Mail]) -> bool:
    """Queues mails on their event loop; returns False where that is closed."""
    try:
        mailroom.loop.call_soon_threadsafe(mailroom.deliver, mails)
    except RuntimeError:
        return False
    return True
