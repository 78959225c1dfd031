"""One short-lived process per case: `python -m cvmcore.live.server` forks one for each, and says how it ended.

A VM belongs to the process that made it, and whatever a case leaves behind dies with its process. Requests and answers
are JSON, one a line, strictly in turn: `["begin"]`; then `["call", op, arguments]`, `["state", fd]`; `["end"]`.
"""

from __future__ import annotations

import json
import os
import signal
from typing import Any

from cvmcore.live.driver import Driver, Refused
from cvmcore.live.measure import measured

PATIENCE_S = 60
"""A request that hangs longer is killed; measuring has as long for each sample."""


def receive() -> Any:
    """The next request; None at the end of the input. Nothing is read ahead: it could be the other process's."""
    line = bytearray()
    while not line.endswith(b"\n"):
        piece = os.read(0, 1 << 16)
        if not piece:
            return None
        line += piece
    return json.loads(line)


def send(answer: Any) -> None:
    """Answer the request."""
    data = json.dumps(answer).encode() + b"\n"
    while data:
        data = data[os.write(1, data) :]


def case() -> None:
    """Do the requests of one case."""
    driver = Driver()
    send({"ready": True})
    while (request := receive()) not in (None, ["end"]):
        signal.alarm(PATIENCE_S * (request[1] if request[0] == "measure" else 1))
        try:
            match request:
                case ["call", str(op), dict(arguments)]:
                    send({"answer": driver.call(op, arguments)})
                case ["state", int(fd)]:
                    send({"answer": driver.state(fd)})
                case ["measure", int(times)]:
                    send({"answer": measured(times)})
                case _:
                    send({"refused": f"no request: {request}"})
        except Refused as error:
            send({"refused": str(error)})
        signal.alarm(0)


def main() -> None:
    """Serve cases until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while receive() is not None:
        child = os.fork()
        if child == 0:
            try:
                case()
            except BaseException as error:  # whatever it is, it must not go on into the server's loop
                send({"failed": f"{type(error).__name__}: {error}"})
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        send({"ended": signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else ""})


if __name__ == "__main__":
    main()
