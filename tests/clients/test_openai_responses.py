"""The `openai` package asks the newer endpoint."""

import pytest
from conftest import MODEL, QUESTION, data_uri
from pydantic import BaseModel, Field, ValidationError
from test_openai import ANSWER, Shape


def shown(text):
    image = {"type": "input_image", "image_url": data_uri("red-triangle.png"), "detail": "auto"}
    return [{"role": "user", "content": [image, {"type": "input_text", "text": text}]}]


def test_text_is_answered(client):
    reply = client.responses.create(model=MODEL, input="Hello", max_output_tokens=4)
    assert reply.object == "response"
    assert reply.usage.output_tokens <= 4


def test_a_picture_is_described(client):
    reply = client.responses.create(model=MODEL, input=shown(QUESTION))
    assert reply.output_text == ANSWER
    assert reply.status == "completed"


def test_a_stream_joined_is_the_whole(client):
    events = list(client.responses.create(model=MODEL, input=shown(QUESTION), stream=True))
    assert events[0].type == "response.created"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == ANSWER
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_the_streaming_helper_of_the_package_reads_it(client):
    with client.responses.stream(model=MODEL, input=shown(QUESTION)) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == ANSWER


def test_an_answer_is_parsed_into_a_model_of_pydantic(client):
    reply = client.responses.parse(model=MODEL, input=shown(QUESTION), text_format=Shape, max_output_tokens=200)
    assert isinstance(reply.output_parsed, Shape)


class Part(BaseModel):
    sure: bool


class Seen(BaseModel):
    color: str = Field(max_length=20)
    count: int
    size: float | None = Field(default=None, ge=0, le=9)
    parts: list[Part] = Field(max_length=2)


def test_text_numbers_lists_and_models_in_models_are_parsed_too(client):
    reply = client.responses.parse(model=MODEL, input=shown(QUESTION), text_format=Seen, max_output_tokens=300)
    assert reply.status == "completed"
    assert isinstance(reply.output_parsed, Seen)
    assert len(reply.output_parsed.color) <= 20


class Endless(BaseModel):
    text: str = Field(min_length=1000)


def test_an_answer_that_the_limit_cuts_off_is_no_json_and_says_that_it_is_incomplete(client):
    asked = {"model": MODEL, "input": shown(QUESTION), "max_output_tokens": 20}
    # The package reads it regardless.
    with pytest.raises(ValidationError):
        client.responses.parse(text_format=Endless, **asked)
    schema = {"type": "json_schema", "name": "endless", "schema": Endless.model_json_schema()}
    reply = client.responses.create(text={"format": schema}, **asked)
    assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "max_output_tokens")
