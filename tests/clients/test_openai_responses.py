"""The `openai` package asks the newer endpoint."""

from conftest import MODEL, QUESTION, data_uri
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
