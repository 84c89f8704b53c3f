"""The core of an engine: the step loop, where it runs, and the messages between it and the front."""
