"""A list of prompts is waited for as a whole, whatever else the engine does."""

import pytest

from jaxserve.engine import Engine


@pytest.mark.parametrize("resumable", [False, True])
def test_outputs_longer_than_a_reader_may_leave_unread_are_whole(resumable: bool):
    with Engine(simulated_step_ms=1.0, slots=4, max_context=1024, stream_buffer_tokens=256) as engine:
        completions = engine.generate(["one", "two"], n=2, max_tokens=900, ignore_eos=True, resumable=resumable)
        outputs = [output for completion in completions for output in completion.outputs]
        assert [(output.finish_reason, len(output.token_ids)) for output in outputs] == [("length", 900)] * 4
