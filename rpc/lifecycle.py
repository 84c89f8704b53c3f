"""The states of a server, from loading its model to stopped, and what health checks say of each."""

import logging
from enum import StrEnum

from jaxserve.request_errors import EngineUnavailable
from rpc.health import HealthServicer
from rpc.served_engine import ServedEngine

logger = logging.getLogger(__name__)


class PortUnavailable(RuntimeError):
    """A port to listen on cannot be had: another process has it, or the address is not this machine's."""


class State(StrEnum):
    """What a server is doing. The values are those of `GetServerInfoResponse.state`."""

    LOADING = "loading"
    """The engine loads its model, compiles and warms up."""
    READY = "ready"
    UNHEALTHY = "unhealthy"
    """The engine reports a failure; it may recover."""
    DRAINING = "draining"
    """In-flight calls finish, new ones are refused."""
    FAILED = "failed"
    """The engine did not start."""
    STOPPED = "stopped"


_REFUSALS = {
    State.LOADING: "the model is still loading",
    State.UNHEALTHY: "the engine failed and may recover",
    State.DRAINING: "the server is draining",
    State.FAILED: "the engine did not start",
    State.STOPPED: "the server has stopped",
}


class Lifecycle:
    """Owns the state of one server and its engine, and keeps `grpc.health.v1` in step with it.

    Lives on the event loop's thread.
    """

    def __init__(self, services: tuple[str, ...]):
        """`services`: full names of the services whose health is reported, besides "" for the whole server."""
        self.health = HealthServicer(("", *services))
        self.state = State.LOADING
        self.engine: ServedEngine | None = None

    def move_to(self, state: State) -> None:
        """Enters a state. Health is SERVING in READY alone."""
        self.state = state
        self.health.set(state is State.READY)

    def ready_engine(self) -> ServedEngine:
        """The engine, if requests may be sent to it. Raises EngineUnavailable with the reason if not."""
        if self.engine is None or self.state is not State.READY:
            raise EngineUnavailable(_REFUSALS[self.state])
        return self.engine

    def loaded_engine(self) -> ServedEngine:
        """The engine, for calls that start no work: while draining or unhealthy, too. Raises EngineUnavailable."""
        if self.engine is None:
            raise EngineUnavailable(_REFUSALS[self.state])
        return self.engine

    def follow_engine_health(self) -> None:
        """Moves between READY and UNHEALTHY as the engine says. Call it a few times a second."""
        if self.engine is None or self.state not in (State.READY, State.UNHEALTHY):
            return
        state = State.READY if self.engine.is_healthy else State.UNHEALTHY
        if state is not self.state:
            logger.warning("engine health changed: %s -> %s", self.state, state)
            self.move_to(state)
