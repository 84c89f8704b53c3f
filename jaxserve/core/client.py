"""Where the core runs: a thread of this process, or a process of its own. Either way the same messages pass."""

import contextlib
import json
import socket
import subprocess
import threading
from dataclasses import asdict
from queue import SimpleQueue

from jaxserve.config import EngineConfig
from jaxserve.core.channel import Core, MessageSocket, Outbox, framed
from jaxserve.core.loop import StepLoop, build_step_loop
from jaxserve.core.messages import Failed, Message, Progress, Shutdown, decode, encode
from jaxserve.core.replicas import ReplicatedCore
from jaxserve.python_process import python_command, python_environment

SEND_BUFFER_BYTES = 1 << 14


class CoreThread:
    """A core on a thread of this process; one of `config.replicas`."""

    def __init__(self, config: EngineConfig, replica: int = 0):
        self._config = config
        self._replica = replica
        self._stopping = False
        self._given_up = False
        self._outbox = Outbox(config.publish_ahead)
        self._loop: StepLoop | None = None
        self._thread = threading.Thread(target=self._run, name="jaxserve-core", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.ExitStack() as settings:
            try:
                import jax  # only here, where the core runs

                # Of this thread: whether a program wants its own numbers in 64 bits says nothing of the engine's.
                settings.enter_context(jax.enable_x64(False))
                self._loop = build_step_loop(self._config, self._publish, self._replica)
            except Exception as error:
                self._outbox.put(Failed(str(error) or type(error).__name__))
            else:
                if not self._stopping:
                    self._outbox.put(self._loop.ready)
                    self._loop.run()
            self._loop = None  # and with it the device's memory, whoever has the engine still
        # Only now, when what a failed start held is let go: who reads to the end may leave the process.
        self._outbox.close()

    def _publish(self, message: Message) -> float:
        """Gives a message out. A core that is told to stop while it starts does so when it next tells of progress."""
        if self._stopping and isinstance(message, Progress):
            raise RuntimeError("the core was told to stop while it started")
        return self._outbox.put(message)

    def send(self, command: Message) -> None:
        """Gives the core a command. Thread-safe. While it starts, Shutdown alone is heard."""
        self._stopping = self._stopping or isinstance(command, Shutdown)
        if (loop := self._loop) is not None:
            loop.commands.put(command)

    def receive(self) -> Message | None:
        """The core's next message; None once it has ended."""
        return self._outbox.get()

    def join(self) -> None:
        """Waits for the core to end after Shutdown."""
        if not self._given_up:
            self._thread.join()

    def kill(self) -> None:
        """Leaves the thread behind; it ends with this process."""
        self._given_up = True
        self._outbox.close()


class CoreProcess:
    """A core in a process of its own, so that detokenizing and protocols do not share the step loop's GIL.

    The two ends of a socket pair carry the messages as msgpack. The child ends when its end is closed, so no
    orphan outlives this process.
    """

    def __init__(self, config: EngineConfig):
        here, there = socket.socketpair()
        # What the core has sent and nobody has read is part of what it publishes ahead: no more than a few steps.
        there.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self._connection = MessageSocket(here)
        with there:
            self._process = subprocess.Popen(
                python_command(("-m", "jaxserve.core.process", str(there.fileno()))),
                env=python_environment(),
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._connection.send_bytes(json.dumps(asdict(config)).encode())
        self._lock = threading.Lock()
        self._stopping = False
        self._ended = False
        self._unsent: SimpleQueue[memoryview | None] = SimpleQueue()
        """Commands, and the rests of some, for which the core had no room."""
        self._behind = 0
        """How many of these are not sent to their end."""
        # From the start: the system may have no thread left when one is needed, and a program that ends starts none.
        threading.Thread(target=self._send_rest, name="jaxserve-core-send", daemon=True).start()

    def send(self, command: Message) -> None:
        """Gives the core a command. Thread-safe. A command to a core that has ended is dropped: `receive` says so.

        Never waits, since an event loop may call it: where the core does not read, the thread sends the rest.
        """
        rest = framed(encode(command))
        with self._lock:
            if self._ended:
                return
            self._stopping = self._stopping or isinstance(command, Shutdown)
            if not self._behind:
                try:
                    rest = self._connection.send_at_once(rest)
                except (BrokenPipeError, ConnectionResetError):
                    return
            if rest:
                self._behind += 1
                self._unsent.put(rest)

    def _send_rest(self) -> None:
        """Sends what the core had no room for, and what came meanwhile, on a thread of its own."""
        while (rest := self._unsent.get()) is not None:
            with contextlib.suppress(OSError):  # the core is gone, or has been closed, as `receive` says
                self._connection.send_rest(rest)
            with self._lock:
                self._behind -= 1

    def receive(self) -> Message | None:
        """The core's next message; None once it has ended as told, Failed once if it ended by itself."""
        try:
            return decode(self._connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            if self._stopping:
                return None
            self._stopping = True
            return Failed(f"the engine process ended with exit code {self._process.wait()}")

    def join(self) -> None:
        """Waits for the core to end after Shutdown; ends it if it hangs."""
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with self._lock:
            self._ended = True
            self._connection.close()
        self._unsent.put(None)

    def kill(self) -> None:
        """Ends the process."""
        self._stopping = True
        self._process.kill()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid


def start_core(config: EngineConfig) -> Core:
    """Starts the core that a configuration asks for; it then tells of Progress, and of Ready or Failed."""
    return CoreProcess(config) if config.core == "process" else start_threads(config)


def start_threads(config: EngineConfig) -> Core:
    """Starts a core on a thread of this process, or as many as there are replicas, which look like one."""
    if config.replicas == 1:
        return CoreThread(config)
    return ReplicatedCore(config, [CoreThread(config, number) for number in range(config.replicas)])


def end_core(core: Core, seconds: float) -> None:
    """Ends a core that is starting or could not start, as `stop_core` does; one that takes longer than so many seconds
    is given up.

    A thread must not outlive the interpreter: native code that loads, compiles or frees arrays on it crashes then.
    """
    reading = stop_core(core)
    reading.join(seconds)
    if reading.is_alive():
        core.kill()
    core.join()


def stop_core(core: Core) -> threading.Thread:
    """Stops a core that is starting or could not start: a process at once, a thread when it next tells of progress.
    Gives the thread that ends with it."""

    def read_to_end() -> None:  # a core waits while what it has said is unread
        while core.receive() is not None:
            pass

    if isinstance(core, CoreProcess):
        core.kill()
    core.send(Shutdown())
    reading = threading.Thread(target=read_to_end, name="jaxserve-core-end", daemon=True)
    reading.start()
    return reading
