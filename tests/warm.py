"""Processes that have torch and transformers when they start: forked from one that has them.

A test that kills a run needs a process of the system. That it imports everything anew, for ten
seconds, shows nothing. What is forked is otherwise as from a fresh interpreter: it has its own
arguments, variables, streams and signals, runs its program as `__main__`, and ends as programs end,
but for the second in which the interpreter takes its modules apart.
"""

import atexit
import fcntl
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import termios
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Nobody reads these in an import. Where another variable differs, the process must be a fresh one.
FREE = {"PYTHONPATH", "NO_COLOR", "OPENAI_API_KEY"}


class Process:
    """A process of the server, with what tests use of subprocess.Popen."""

    def __init__(self, command: list[str], connection: socket.socket, out: int, err: int):
        self.args, self.connection = command, connection
        self.pid, self.returncode = int(connection.recv(99)), None
        self.stdout, self.stderr = (os.fdopen(fd) if fd >= 0 else None for fd in (out, err))

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                self.returncode = int(self.connection.recv(99))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self.connection.close()
        return self.returncode

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        files = [file for file in (self.stdout, self.stderr) if file]
        with ThreadPoolExecutor() as threads:  # a process waits where its pipe is full
            texts = [threads.submit(lambda f=f: "" if f.closed else f.read()) for f in files]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        for file in files:
            file.close()
        return tuple(text.result() for text in texts)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Server:
    """Starts processes in one environment."""

    def __init__(self, environment: dict[str, str]):
        self.environment = dict(environment)
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, pass_fds=[theirs.fileno()]
            )

    def fits(self, environment: dict[str, str]) -> bool:
        return {key for key, _ in self.environment.items() ^ environment.items()} <= FREE

    def start(
        self,
        command: list[str],
        env: dict[str, str],
        stdin: int | None = None,
        output: int | None = None,
        start_new_session: bool = False,
    ) -> Process:
        """As subprocess.Popen: in ROOT, with pipes where no `output` is given for both streams."""
        assert self.fits(env) and command[0] == sys.executable
        request = json.dumps([command[1:], dict(env), start_new_session]).encode()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        out, err = (os.pipe(), os.pipe()) if output is None else ((-1, output),) * 2
        with theirs, Path(os.devnull).open() as nothing:
            fds = [nothing.fileno() if stdin is None else stdin, out[1], err[1], theirs.fileno()]
            socket.send_fds(self.socket, [request], fds)
        if output is None:
            os.close(out[1])
            os.close(err[1])
        return Process(command, ours, out[0], err[0])

    def close(self) -> None:
        self.socket.close()
        self.process.wait()


def next_process(requests: socket.socket) -> list[str]:
    """Forks a process for each request; the words of its command, in that process."""
    on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # pytest's, in the same terminal
    while True:
        request, fds, *_ = socket.recv_fds(requests, 1 << 20, 4)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not request:
            os._exit(0)
        if not os.fork():
            break
        for fd in fds:
            os.close(fd)
    requests.close()
    *streams, number = fds
    connection = socket.socket(fileno=number)
    if child := os.fork():  # one process for each, that waits for its end and tells of it
        for fd in streams:
            os.close(fd)
        connection.send(str(child).encode())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with suppress(BrokenPipeError):  # a test that failed has not waited
            connection.send(str(status).encode())
        os._exit(0)
    connection.close()
    signal.signal(signal.SIGINT, on_ctrl_c)
    for own, fd in enumerate(streams):
        os.dup2(fd, own)
        os.close(fd)
    sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())
    words, environment, new_session = json.loads(request)
    if new_session:
        os.setsid()
        if os.isatty(0):
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.environ.clear()
    os.environ.update(environment)
    return words


def run(words: list[str]) -> None:
    """What the interpreter does with the words that follow its name."""
    module = words[1] if words[0] == "-m" else ""
    sys.argv = words[1:] if module else words
    first = Path.cwd() if module else Path(words[0]).resolve().parent
    sys.path[:] = [str(first), *os.environ["PYTHONPATH"].split(os.pathsep), *LIBRARIES]
    if module:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    LIBRARIES = [each for each in sys.path if each != str(ROOT / "tests")]
    sys.path.append(str(ROOT))
    gc.disable()
    import train  # noqa: F401, and all that it imports

    gc.freeze()  # else each process looks through all that was imported, and copies it
    words = next_process(socket.socket(fileno=int(sys.argv[1])))
    gc.enable()
    status = 0
    try:
        run(words)
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise  # the interpreter prints it
        status = end.code or 0
    threading._shutdown()  # waits for threads, as the interpreter does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
