"""What the command line does, one module a command. JAX is imported when a command runs, not when help is shown."""
