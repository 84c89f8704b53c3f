"""What is too long is refused for what it is to the model."""

from dataclasses import replace

import pytest

from jaxserve.checkpoints.description import describe_model
from jaxserve.front.admission import Admission
from jaxserve.request import Request
from jaxserve.request_errors import InvalidRequest
from jaxserve.tokenizing.tokenizer import Tokenizer

THOUGHTLESS = "{% for message in messages %}{{ message.content.split('</think>')[-1] }}{% endfor %}"
"""As the templates of models that think leave out what they thought before their earlier answers."""


def test_a_chat_is_as_long_as_its_template_makes_it():
    model, source = describe_model("smollm2-135m")
    tokenizer = Tokenizer.from_source(replace(source, chat_template=THOUGHTLESS))
    admission = Admission("model", model, tokenizer, max_context=64, max_n=1, constraints=None)
    thought = {"role": "assistant", "content": "<think>" + "123" * 100 + "</think>42"}
    assert admission.prepare(Request(messages=(thought,)), 0, 0.0).token_ids == tokenizer.encode("42")
    for content in ("1" * 64, "word " * 100):
        with pytest.raises(InvalidRequest, match=r"^messages: has .* tokens; the limit is 63$"):
            admission.prepare(Request(messages=(thought, {"role": "user", "content": content})), 0, 0.0)
