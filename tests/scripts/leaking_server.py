"""A server with a simulated device, and with faults for a soak to find where the command line says `leaking`.

pages          every 20th release of pages forgets one
descriptors    every 20th request leaves a file open
memory         every request keeps LEAKED_BYTES; the first fit into what loading has left free
"""

import os
import sys
from collections.abc import Iterable
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jaxserve.engine import Engine
from jaxserve.front.admission import Admission
from jaxserve.request import Request
from jaxserve.scheduling.page_allocator import PageAllocator
from rpc.serve import serve
from rpc.server import ServerConfig

EVERY = 20
LEAKED_BYTES = 2 << 20

kept: list[object] = []


def leak_pages() -> None:
    numbers, release = count(1), PageAllocator.release

    def forgetful(self: PageAllocator, pages: Iterable[int]) -> None:
        pages = list(pages)
        release(self, pages[1:] if next(numbers) % EVERY == 0 else pages)

    PageAllocator.release = forgetful


def leak_with_requests() -> None:
    numbers, check = count(1), Admission.check

    def leaking(self: Admission, request: Request) -> None:
        check(self, request)
        kept.append(bytearray(os.urandom(16)) * (LEAKED_BYTES // 16))
        if next(numbers) % EVERY == 0:
            kept.append(open(os.devnull))  # noqa: SIM115 (that is the fault)

    Admission.check = leaking


def main(kind: str) -> int:
    if kind == "leaking":
        leak_pages()
        leak_with_requests()

    def engine() -> Engine:
        # Few pages, so that the soak has used each of them in a moment.
        return Engine(simulated_step_ms=2.0, slots=16, max_context=512, num_pages=257)

    return serve(engine, ServerConfig(grpc_port=0, grace=1.0))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
