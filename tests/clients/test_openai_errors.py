"""The `openai` package tells what the server refuses by the errors that it has for that."""

import threading

import openai
import pytest
from conftest import KEY, MODEL, QUESTION, shown
from openai import OpenAI


def test_a_value_that_cannot_be_used_is_a_bad_request_that_names_it(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=shown(QUESTION), temperature=-1)
    assert refused.value.param == "temperature"
    assert refused.value.code == "invalid_value"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f", "parameters": {}}}]),
        ("parallel_tool_calls", False),
        ("reasoning_effort", "low"),
        ("service_tier", "auto"),
        ("prediction", {"type": "content", "content": "a"}),
    ],
)
def test_a_parameter_that_is_not_supported_is_refused_by_name(client, name, value):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=shown(QUESTION), **{name: value})
    assert refused.value.param == name
    assert refused.value.code == "unsupported_parameter"


def test_a_model_that_is_not_there_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="another", messages=shown(QUESTION))
    assert refused.value.code == "model_not_found"


def test_a_url_of_another_machine_is_not_fetched(client):
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=messages)
    assert refused.value.param == "messages"


def test_a_chat_that_is_too_long_says_so(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=shown("a red triangle " * 2000))
    assert refused.value.code == "context_length_exceeded"


def test_the_right_key_is_let_in_and_every_other_is_not(guarded):
    assert OpenAI(base_url=f"{guarded}/v1", api_key=KEY).models.list().data[0].id == MODEL
    for wrong in ("another-key", KEY[:-1], f"{KEY}0"):
        client = OpenAI(base_url=f"{guarded}/v1", api_key=wrong, max_retries=0)
        with pytest.raises(openai.AuthenticationError) as refused:
            client.chat.completions.create(model=MODEL, messages=shown(QUESTION))
        assert refused.value.code == "invalid_api_key"
        assert wrong not in str(refused.value)


def test_a_full_server_tells_when_to_come_again_and_the_client_does(narrow):
    client = OpenAI(base_url=f"{narrow}/v1", api_key="unused", max_retries=0)
    messages = shown("Describe the image.", "red-triangle.png")
    # Long enough to be there while the others ask: it may not end before 400 letters.
    long = {"extra_body": {"regex": "[a-z ]{400}"}, "stream": True}
    with client.chat.completions.create(model=MODEL, messages=messages, **long) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model=MODEL, messages=messages)
        assert refused.value.code == "rate_limit_exceeded"
        assert int(refused.value.response.headers["retry-after"]) >= 1
    # The stream was closed before its end, which makes room: whoever tries again gets in.
    patient = client.with_options(max_retries=5)
    answers = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(
                patient.with_options(max_retries=30)
                .chat.completions.create(model=MODEL, messages=messages, max_tokens=2)
                .choices[0]
                .message.content
            )
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(answers) == 3 and len(set(answers)) == 1
