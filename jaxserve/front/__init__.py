"""The front of an engine: what comes in is admitted, what comes out reaches its own stream."""
