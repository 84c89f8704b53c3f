"""The demonstration of a cluster sees what it promises to see."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.mark.slow
def test_of_a_killed_replica_only_the_streams_in_flight_are_touched() -> None:
    command = [sys.executable, str(SCRIPTS / "cluster_demo.py"), "--streams", "4", "--output-len", "32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {name: numbers.split() for name, numbers in re.findall(r"^(\D+?1?\D+?)((?:\s+\d+){4})$", done.stdout, re.M)}
    assert rows["both replicas"] == ["2", "2", "4", "0"]
    assert rows["replica 1 killed in mid-stream"] == ["2", "2", "2", "2"]
    assert rows["the replica that is left"] == ["0", "4", "4", "0"]
