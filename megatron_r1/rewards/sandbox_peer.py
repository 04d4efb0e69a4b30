"""The conversation between a program's process and its test's: requests and replies, one frame each.

Part of the boot code, see sandbox_values.py.
"""

from __future__ import annotations

from megatron_r1.rewards.sandbox_values import MAX_FRAME_BYTES, decode, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

REQUEST, REPLY = "request", "reply"
CALLBACK = "callback"


class Gone(BaseException):
    """The process at the other end has closed it. No assertion can catch it as an Exception."""


class Oversized(BaseException):
    """A reply longer than MAX_FRAME_BYTES."""


def send(file: Any, content: bytes) -> None:
    """One frame into an unbuffered file. BrokenPipeError where nobody reads it any more."""
    left = memoryview(str(len(content)).encode() + b"\n" + content)
    while left:
        left = left[file.write(left) :]


def receive(file: Any) -> bytes:
    """One frame. Gone at the end of the file or for a broken frame, Oversized beyond MAX_FRAME_BYTES."""
    length = file.readline(12).strip()
    if not length.isdigit():
        raise Gone
    if int(length) > MAX_FRAME_BYTES:
        raise Oversized
    content = file.read(int(length))
    if len(content) < int(length):
        raise Gone
    return content


class Peer:
    """One end of the conversation. While it waits for a reply it answers requests: a program may call what it was
    given. `answer` does what a request asks; `lend` and `borrow` are for what has no plain form."""

    def __init__(
        self,
        incoming: Any,
        outgoing: Any,
        answer: Callable[..., Any],
        lend: Callable[[Any], bytes],
        borrow: Callable[[list], Any],
    ) -> None:
        self.incoming, self.outgoing = incoming, outgoing
        self.answer, self.lend, self.borrow = answer, lend, borrow

    def ask(self, *request: Any) -> list:
        """The other end's reply: [True, value], or [False, names of an exception's types, its arguments]."""
        send(self.outgoing, encode((REQUEST, *request), self.lend))
        while True:
            kind, *rest = decode(receive(self.incoming), self.borrow)
            if kind == REPLY:
                return rest
            self.reply(rest)

    def serve(self) -> None:
        """Answers requests until no more can come."""
        while True:
            try:
                content = receive(self.incoming)
            except Gone:
                return
            self.reply(decode(content, self.borrow)[1:])

    def reply(self, request: list) -> None:
        try:
            content = encode((REPLY, True, self.answer(*request)), self.lend)
        except Exception as error:
            content = self._failed(error)
        send(self.outgoing, content)

    def _failed(self, error: Exception) -> bytes:
        kinds = [kind.__name__ for kind in type(error).__mro__ if issubclass(kind, Exception)]
        try:
            return encode(
                (REPLY, False, kinds, [str(part)[:200] if type(part) is str else part for part in error.args])
            )
        except Exception:  # arguments that cannot be sent, or a program's class that misbehaves
            return encode((REPLY, False, kinds, [str(error)[:200]]))
