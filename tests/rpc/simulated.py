"""What a stream of the engine with a simulated device must be."""

from rpc.client import AsyncClient


def simulated_ids(prompt_tokens: int, count: int) -> list[int]:
    """What the simulated device generates after a prompt of so many tokens: it depends on the position alone."""
    return [260 + (position * 7919) % 1000 for position in range(prompt_tokens, prompt_tokens + count)]


async def exact(client: AsyncClient, prompt_tokens: int, count: int) -> None:
    """Checks every token of a stream."""
    request = {"token_ids": list(range(300, 300 + prompt_tokens)), "max_tokens": count, "ignore_eos": True}
    ids: list[int] = []
    async for delta in client.generate(request, return_text=False):
        ids += delta.token_ids
    assert ids == simulated_ids(prompt_tokens, count)
