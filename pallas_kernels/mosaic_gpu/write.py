"""Keys and values of a chunk's tokens into their pages, in place. Decode rows write their own (`decode.py`)."""

from collections.abc import Sequence

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from pallas_kernels.mosaic_gpu.products import Ref


def write_tokens(
    tokens: Sequence[Array],
    pages: Sequence[Ref],
    page: Int32[Array, " token"],
    offset: Int32[Array, " token"],
    first: int,
    interpret=None,
) -> None:
    """Writes the tokens from `first` on.

    Args:
        tokens: keys, values and their scales, each [first + token, kv_head, head_dim] or [first + token, kv_head]. They
            are whole: of a slice XLA gives a kernel the address within the whole, which may not be a multiple of 256
            bytes, and then Mosaic refuses to start it.
        pages: references, of each, to [page, kv_head, page_size, head_dim] or [page, kv_head, page_size].
        page: where a token goes; 0 for a token that is not written.
        offset: where in its page.
        first: the index in `tokens` of the first one.
        interpret: parameters of the interpreter, None on a GPU.
    """

    def kernel(*refs):
        sources, targets = refs[: len(tokens)], refs[len(tokens) : 2 * len(tokens)]
        page, offset, staged, barrier = refs[2 * len(tokens) :]
        place = lax.axis_index("token")
        number, position, token = page[place], offset[place], first + place
        pairs = list(zip(sources, targets, strict=True))
        copied, scalars = pairs[: len(staged)], pairs[len(staged) :]

        @pl.when(number > 0)
        def _write():
            for (source, _), buffer in zip(copied, staged, strict=True):
                plgpu.copy_gmem_to_smem(source.at[token], buffer, barrier)
            for source, target in scalars:
                # Less than the copy engine's 16 bytes.
                for head in range(source.shape[1]):
                    target[number, head, position] = source[token, head]
            plgpu.barrier_wait(barrier)
            for (_, target), buffer in zip(copied, staged, strict=True):
                plgpu.copy_smem_to_gmem(buffer, target.at[number, :, position])
            plgpu.wait_smem_to_gmem(0)

    staged = tuple(plgpu.SMEM(array.shape[1:], array.dtype) for array in tokens if array.ndim == 3)
    plgpu.kernel(
        kernel,
        grid=page.shape,
        grid_names=("token",),
        scratch_types=(staged, plgpu.Barrier(num_arrivals=len(staged))),
        interpret=interpret,
    )(*tokens, *pages, page, offset)
