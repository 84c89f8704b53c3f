"""What `make_fixtures.py` runs."""
