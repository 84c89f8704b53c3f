"""What shapes a server: one frozen dataclass, each field with its unit. Imports no gRPC: command lines are quick."""

from dataclasses import dataclass, field

from rpc.security.config import SecurityConfig

LAST_PORT = 65535
"""Of TCP."""
MOST_CONNECTIONS = 2**31 - 1
"""What gRPC takes as their bound."""


@dataclass(frozen=True)
class ServerConfig:
    """Everything that shapes a server, but for its engine."""

    host: str = "127.0.0.1"
    """Address to bind. Anything but loopback lets others in, and needs keys and TLS, or --allow-open."""
    grpc_port: int = 50051
    """Port of gRPC; 0 takes a free one, named in the report."""
    http_port: int | None = None
    """Port of the OpenAI API over HTTP; 0 takes a free one, named in the report. None serves gRPC alone."""
    metrics_port: int | None = None
    """Port of /metrics and /health alone; 0 takes a free one, named in the report. `http_port` has them as well."""
    otlp_endpoint: str | None = None
    """URL of a collector that OpenTelemetry spans and histograms are sent to by OTLP over HTTP, as
    http://127.0.0.1:4318. None sends none; needs the extra `otel`."""
    grace: float = 30.0
    """Seconds that requests in flight have to finish once a signal asks the server to stop."""
    longest_context: int = 8192
    """Tokens of the longest prompt to expect; bounds the size of a request message."""
    max_concurrent_streams: int = 4096
    """Calls at once on one connection; further ones wait in the client. Above the engine's queue, so that the queue's
    bound answers and a health check never waits."""
    keepalive_interval: float = 20.0
    """Seconds of silence after which the server pings a client with open calls."""
    keepalive_timeout: float = 10.0
    """Seconds without an answer to that ping after which the client is gone and its calls are cancelled."""
    stall_limit: float = 60.0
    """Seconds a client may leave a message unread before its request is aborted."""
    max_connections: int = 4096
    """Connections at once of each listener; a further one is closed as it comes."""
    handshake_timeout: float = 10.0
    """Seconds in which a new connection must have shaken hands (TLS and HTTP/2), and in HTTP/1.1 the head of a request
    have come."""
    message_timeout: float = 60.0
    """Seconds in which the message of a call, or the body of a request, must have come."""
    max_connection_idle: float = 3600.0
    """Seconds after which a connection without a call is closed."""
    max_header_bytes: int = 16384
    """Bytes of the headers of one call; refused above."""
    security: SecurityConfig = field(default_factory=SecurityConfig)
    """Keys and certificates."""

    def __post_init__(self) -> None:
        """Raises ValueError for a port, number or endpoint that is none, and where others are let in without keys or
        TLS."""
        for name in ("grpc_port", "http_port", "metrics_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port <= LAST_PORT:  # gRPC would listen on another one
                raise ValueError(f"{name}: must be in [0, {LAST_PORT}], got {port}")
        if not self.grace >= 0:  # nor a NaN, with which no wait can be begun
            raise ValueError(f"grace: must be at least 0, got {self.grace}")
        if not 1 <= self.max_connections <= MOST_CONNECTIONS:
            raise ValueError(f"max_connections: must be in [1, {MOST_CONNECTIONS}], got {self.max_connections}")
        if self.otlp_endpoint is not None and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ValueError(f"otlp_endpoint: must be a URL, as http://127.0.0.1:4318, got {self.otlp_endpoint!r}")
        self.security.check_host(self.host)

    @property
    def max_request_bytes(self) -> int:
        """Bytes of one request message: 64 a token, for text of long tokens, and 1 MiB for all else."""
        return (1 << 20) + 64 * self.longest_context

    def channel_options(self) -> list[tuple[str, int]]:
        """The options of the gRPC server."""
        return [
            ("grpc.max_receive_message_length", self.max_request_bytes),
            ("grpc.max_concurrent_streams", self.max_concurrent_streams),
            ("grpc.max_metadata_size", self.max_header_bytes),
            ("grpc.absolute_max_metadata_size", self.max_header_bytes),
            # Of one connection; unbounded, gRPC takes all that the kernel holds of it, 32 MiB by Linux's defaults.
            ("grpc.experimental.tcp_max_read_buffer_size", 1 << 16),
            ("grpc.max_allowed_incoming_connections", self.max_connections),
            ("grpc.server_handshake_timeout_ms", round(self.handshake_timeout * 1000)),
            # The bound of the headers holds only once the client has acknowledged it.
            ("grpc.http2.settings_timeout", round(self.handshake_timeout * 1000)),
            ("grpc.max_connection_idle_ms", round(self.max_connection_idle * 1000)),
            # A second server on the port must fail to bind, not share its connections.
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_time_ms", round(self.keepalive_interval * 1000)),
            ("grpc.keepalive_timeout_ms", round(self.keepalive_timeout * 1000)),
            # Of every ping; gRPC waits a minute else, and then closes the connection.
            ("grpc.http2.ping_timeout_ms", round(self.keepalive_timeout * 1000)),
            ("grpc.http2.max_pings_without_data", 0),
            # What clients may send: a ping every 10 s, and only while a call is open.
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 0),
        ]
