"""Load tests of a running server: what is planned, sent, checked and drawn."""
