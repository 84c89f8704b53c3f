"""The threads that help a caller of the native kernels: any number of callers, and never in the caller's way."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native_build
from pallas_kernels.linear import linear, pack

pytestmark = pytest.mark.skipif(not native_build.available(), reason="the native kernels cannot be built here")


def test_calls_at_the_same_time_have_the_bits_of_calls_alone():
    """More callers than there are teams of helping threads: the last of them work alone."""
    random = np.random.default_rng(0)
    packed = pack(jnp.asarray(random.standard_normal((640, 320)), jnp.bfloat16))
    product = jax.jit(lambda x: linear(x, packed, 640))
    inputs = [jnp.asarray(random.standard_normal((count, 320)), jnp.bfloat16) for count in range(1, 13)]
    alone = [np.asarray(product(x)) for x in inputs]

    def repeated(index: int) -> bool:
        return all(np.array_equal(product(inputs[index]), alone[index]) for _ in range(100))

    with ThreadPoolExecutor(len(inputs)) as callers:
        assert all(callers.map(repeated, range(len(inputs))))


SCRIPT = """
import os, sys, time
here, other = map(int, sys.argv[1:])
os.sched_setaffinity(0, {here, other})
import jax, jax.numpy as jnp
from pallas_kernels.linear import linear, pack

threads = lambda: {int(name) for name in os.listdir("/proc/self/task")}
weight = jnp.ones((2048, 2048), jnp.bfloat16)
x = jnp.ones((8, 2048), jnp.bfloat16)
before = threads()
packed = pack(weight).block_until_ready()
(helper,) = threads() - before
product = jax.jit(lambda x: linear(x, packed, 2048))
expected = product(x)
os.sched_setaffinity(helper, {here})
deadline = time.monotonic() + 60
while os.sched_getaffinity(helper) == {here} and time.monotonic() < deadline:
    assert (product(x) == expected).all()
print(sorted(os.sched_getaffinity(helper)))
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="takes two processors, and threads that can be bound to one",
)
def test_a_helper_that_waits_for_the_callers_processor_goes_to_another():
    """Rivals on the other processor send the caller to the helper's, again and again."""
    here, other = sorted(os.sched_getaffinity(0))[:2]
    spin = f"import os; os.sched_setaffinity(0, {{{other}}})\nwhile True: pass"
    rivals = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(2)]
    try:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", SCRIPT, str(here), str(other)]
        printed = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout
    finally:
        for rival in rivals:
            rival.kill()
            rival.wait()
    assert printed.strip() == str([here, other])  # moved, and bound no more
