"""Seeded chaos on a server for long, and what must not have changed at its end."""
