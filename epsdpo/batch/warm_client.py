"""Has a stage done by a fork of the batch's warm process, and ends as that does; without one, starts it anew.

    python -I -S warm_client.py ADDRESS NOTICES COMMAND...

It is run as a file, and imports little, since each stage waits for it. Why a stage was started anew is said in its own
log, and added to the file NOTICES.
"""

import contextlib
import json
import os
import select
import signal
import socket
import struct
import sys
from pathlib import Path

KILLED = 128 + 9  # as a shell says it
ORPHANED = 4  # as `epsdpo.runs.watch`, which is not imported here


def circumstances():
    """What a process is given by the one that starts it, and a fork would have from another."""
    import resource  # late: the runner imports this module, also where there is none

    umask = os.umask(0)
    os.umask(umask)
    return {
        "working directory": str(Path.cwd()),
        "umask": umask,
        "limits": {
            name: list(resource.getrlimit(getattr(resource, name))) for name in dir(resource) if name[:7] == "RLIMIT_"
        },
        "processors": sorted(os.sched_getaffinity(0)),
        "priority": os.nice(0),
    }


def same_user(connection):
    """Whether the other end is a process of this user: an address without a file is open to every user."""
    size = struct.calcsize("3i")
    return struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[1] == os.getuid()


def main(address, notices, command):
    with socket.socket(socket.AF_UNIX) as connection:
        reason = _ask(connection, address, command)
    with contextlib.suppress(OSError):  # a full disk, of which the stage itself knows what to say
        print(f"started anew: {reason}", file=sys.stderr, flush=True)
        with Path(notices).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{reason}\n")
    os.execvp(command[0], command)


def _ask(connection, address, command):
    """Wait for the end of the stage, and end like it; or return why there is no fork to do it."""
    request = {"command": command, "environment": dict(os.environ), **circumstances()}
    try:
        connection.connect(f"\0{address}")
        if not same_user(connection):
            return "its warm process is not of this user"
        socket.send_fds(connection, [b"\n"], [1, 2])
        connection.sendall(json.dumps(request).encode() + b"\n")
        answer = _line(connection)
    except OSError:
        answer = b""
    if not answer:
        return "the process kept warm for this batch is gone"
    if "refused" in json.loads(answer):
        return json.loads(answer)["refused"]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: connection.send(bytes([number])))
    try:
        code = int(_line(connection) or KILLED)
    except OSError:
        code = KILLED
    sys.exit(code if code >= 0 else 128 - code)


def _line(connection):
    """The next that is said; this process ends at once if its standard input closes, as stages of a batch do."""
    while connection not in select.select([0, connection], [], [])[0]:
        if not os.read(0, 1024):
            os._exit(ORPHANED)
    return connection.makefile("rb", buffering=0).readline()


if __name__ == "__main__":
    main(*sys.argv[1:3], sys.argv[3:])
