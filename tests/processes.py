"""Python processes that begin with our packages imported, which takes seconds: forks of one that has imported them.

    with interpreter("streaming.pipeline") as python:
        done = python.run("-m", "streaming", "run", "--help")

Such a process does what `python -m streaming run --help` does, in an environment, a folder and streams of its own, and
ends as Python ends. Only what modules keep from their import is that of the process they are forked from.
"""

import gc
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from subprocess import CompletedProcess
from typing import IO

ROOT = Path(__file__).parents[1]


class Process:
    """A process, with the names of `subprocess.Popen`."""

    def __init__(self, server: Connection, pid: int, outputs: list[IO[str]]) -> None:
        self._server = server
        self.pid = pid
        self.returncode: int | None = None
        self.outputs = outputs

    @property
    def stdout(self) -> IO[str]:
        return self.outputs[0]

    @property
    def stderr(self) -> IO[str]:
        return self.outputs[1]

    def send_signal(self, number: signal.Signals) -> None:
        if self.returncode is None:  # until it is waited for, no other process gets its number
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self) -> int:
        """The exit code, when it has ended. What was not read of its output is lost."""
        if self.returncode is None:
            self._server.send(self.pid)
            self.returncode = int(self._server.recv())
            for output in self.outputs:
                output.close()
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        """The rest of both outputs, when it has ended."""
        with ThreadPoolExecutor() as pool:
            stdout, stderr = pool.map(lambda output: output.read(), self.outputs)
        self.wait()
        return stdout, stderr


class Interpreter:
    """Starts processes. See `interpreter`."""

    def __init__(self, server: Connection, environment: Mapping[str, str]) -> None:
        self._server = server
        self._environment = environment

    def start(
        self,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        folder: Path = ROOT,
        stdin: int = subprocess.DEVNULL,
        capture: bool = True,
    ) -> Process:
        """Starts `python ARGUMENTS`, which are "-m" and a module or "-c" and a program, and arguments for it.

        `environment` is added to this process's and the interpreter's. `stdin` is a descriptor. Without `capture`,
        output goes where that of this process goes.
        """
        program = [str(argument) for argument in arguments]
        pipes = [os.pipe() for _ in range(2)] if capture else []
        outputs = [write for _, write in pipes] or [1, 2]
        variables = {**os.environ, **self._environment, **(environment or {})}
        with Path(os.devnull).open() as nothing:
            self._server.send((program, variables, str(folder)))
            for descriptor in (nothing.fileno() if stdin == subprocess.DEVNULL else stdin, *outputs):
                send_handle(self._server, descriptor, 0)  # the last one matters on Windows only
        for _, write in pipes:
            os.close(write)
        return Process(self._server, self._server.recv(), [os.fdopen(read) for read, _ in pipes])

    def run(self, *arguments: object, environment: Mapping[str, str] | None = None) -> CompletedProcess[str]:
        """What `python ARGUMENTS` returns and says."""
        process = self.start(*arguments, environment=environment)
        stdout, stderr = process.communicate()
        return CompletedProcess([str(argument) for argument in arguments], process.wait(), stdout, stderr)


@contextmanager
def interpreter(*modules: str, **environment: str) -> Iterator[Interpreter]:
    """An interpreter with the modules imported in the environment, which is added to this process's."""
    here, there = socket.socketpair()
    program = f"from tests.processes import serve; serve({there.fileno()}, {modules})"
    environment = {"OMP_NUM_THREADS": "1"} | environment
    server = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | environment, pass_fds=[there.fileno()]
    )
    there.close()
    with Connection(here.detach()) as connection:
        try:
            yield Interpreter(connection, environment)
        finally:
            server.kill()
            server.wait()


def serve(descriptor: int, modules: tuple[str, ...]) -> None:
    """Imports, then forks for each program that comes and waits for each process whose number comes."""
    gc.disable()
    for module in modules:
        import_module(module)
    gc.freeze()  # a collection in a fork would copy the memory of all that is imported
    gc.enable()
    server = Connection(descriptor)
    while True:
        try:
            asked = server.recv()
        except EOFError:  # the tests have ended
            return
        if isinstance(asked, int):
            server.send(os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1]))
            continue
        program, environment, folder = asked
        streams = [recv_handle(server) for _ in range(3)]
        pid = os.fork()
        if pid == 0:
            server.close()
            _become(program, environment, folder, streams)
            return
        for stream in streams:
            os.close(stream)
        server.send(pid)


def _become(program: list[str], environment: dict[str, str], folder: str, streams: list[int]) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    flag, name, *rest = program
    if flag == "-m":
        sys.argv = [name, *rest]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [flag, *rest]
        exec(name, {"__name__": "__main__"})
