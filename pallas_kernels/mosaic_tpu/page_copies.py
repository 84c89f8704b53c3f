"""Copies between the cache's pages and VMEM that go on while the attention kernel computes."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu.layout import PageLayout
from pallas_kernels.mosaic_tpu.select import select
from pallas_kernels.mosaic_tpu.work import AttendUnits


class Scalars:
    """The operands in scalar memory."""

    def __init__(self, refs):
        *units, self.live_ahead, self.table = refs
        self.units = AttendUnits(*units)


class Ring:
    """Blocks of pages on their way from the cache into VMEM, in the order in which the units use them."""

    def __init__(self, scalars: Scalars, layout: PageLayout, max_pages: int, pages, buffers, arrived, cursor):
        self.scalars, self.layout, self.max_pages = scalars, layout, max_pages
        self.pages, self.buffers, self.arrived = pages, buffers, arrived
        self.count = scalars.units.tile.shape[0]
        self.cursor = cursor
        """0 and 1: the unit and the block to fetch next; 2 and 3: how many were fetched and how many were used."""

    def begin(self):
        """Fetches the first blocks, one less than there are buffers."""
        self.cursor[2], self.cursor[3] = 0, 0
        self._aim_from(0)

        def fetch(_, carry):
            self._fetch_next()
            return carry

        lax.fori_loop(0, self.layout.buffers - 1, fetch, 0)

    def take(self, unit, number):
        """The buffer with block `number` of the unit, arrived; fetches one more into the buffer that was used last."""
        self._fetch_next()
        used = self.cursor[3]
        slot = lax.rem(used, self.layout.buffers)
        self._await(unit, number, slot)
        self.cursor[3] = used + 1
        return slot

    def _await(self, unit, number, slot):
        self._each_page(unit, number, slot, lambda copy: copy.wait())

    def _aim_from(self, unit):
        """What is fetched next is the first block of the first unit from this one on that has work."""
        live = self.scalars.live_ahead[unit]
        self.cursor[0] = live
        first_key = self.scalars.units.first_key[jnp.minimum(live, self.count - 1)]
        self.cursor[1] = first_key // self.layout.block

    def _fetch_next(self):
        unit, number, fetched = self.cursor[0], self.cursor[1], self.cursor[2]

        @pl.when(unit < self.count)
        def _():
            self._each_page(unit, number, lax.rem(fetched, self.layout.buffers), lambda copy: copy.start())
            self.cursor[1], self.cursor[2] = number + 1, fetched + 1

            @pl.when(number == self.scalars.units.last_key[unit] // self.layout.block)
            def _():
                self._aim_from(unit + 1)

    def _each_page(self, unit, number, slot, act):
        """Applies `act` to the copies of a block's pages, those alone that the unit sees a token of."""
        units, layout = self.scalars.units, self.layout
        start = number * layout.block_pages
        begin = jnp.maximum(units.first_key[unit] // layout.page_size - start, 0)
        end = jnp.minimum(units.last_key[unit] // layout.page_size - start + 1, layout.block_pages)
        columns = units.row[unit] * self.max_pages + start

        def each(index, _):
            page = self.scalars.table[columns + index]
            for array, buffer in zip(self.pages, self.buffers, strict=True):
                act(pltpu.make_async_copy(array.at[page], buffer.at[slot, index], self.arrived.at[slot]))
            return 0

        lax.fori_loop(begin, end, each, 0)


class Writer:
    """New tokens on their way into their pages, one at a time."""

    def __init__(
        self, scalars: Scalars, layout: PageLayout, max_pages: int, new, pages, buffers, parts, semaphores, cursor
    ):
        self.scalars, self.layout, self.max_pages = scalars, layout, max_pages
        self.new, self.pages, self.buffers = new, pages, buffers
        self.parts = parts
        """The parts of pages that are written: the least around a token that a DMA can write."""
        self.semaphore = semaphores.at[layout.buffers]
        self.cursor = cursor
        """4: whether a part is on its way."""

    def begin(self):
        """Nothing is on its way."""
        self.cursor[4] = 0

    def write(self, unit, number, slot):
        """Lays the unit's token into the block that has its page, if this is it, and starts to write it."""
        layout, last = self.layout, self.scalars.units.last_key[unit]
        column = last // layout.page_size
        page = self.scalars.table[self.scalars.units.row[unit] * self.max_pages + column]

        @pl.when((number == last // layout.block) & (page > 0))
        def _():
            self.end()
            index, offset = column - number * layout.block_pages, lax.rem(last, layout.page_size)
            for new, buffer, part in zip(self.new, self.buffers, self.parts, strict=True):
                where = self._where(part, offset)
                at = where[1].start + lax.broadcasted_iota(jnp.int32, part.shape, 1)
                token = jnp.broadcast_to(new[0], part.shape)
                part[...] = select(at == offset, token, buffer[(slot, index, *where)])
                buffer[(slot, index, *where)] = part[...]
            for copy in self._copies(page, offset):
                copy.start()
            self.cursor[4] = 1

    def end(self):
        """Waits for what is on its way."""

        @pl.when(self.cursor[4] == 1)
        def _():
            self._await()
            self.cursor[4] = 0

    def _await(self):
        for copy in self._copies(0, 0):
            copy.wait()

    def _copies(self, page, offset):
        return [
            pltpu.make_async_copy(part, pages.at[(page, *self._where(part, offset))], self.semaphore)
            for part, pages in zip(self.parts, self.pages, strict=True)
        ]

    def _where(self, part, offset):
        """The part's place in a page; axis 1 counts tokens."""
        size = part.shape[1]
        whole = size >= self.layout.page_size
        start = 0 if whole else pl.multiple_of(offset // size * size, size)
        return (slice(None), pl.ds(start, size), *[slice(None)] * (len(part.shape) - 2))
