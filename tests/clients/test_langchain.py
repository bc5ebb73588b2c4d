"""LangChain's chat model asks the server."""

import asyncio

import pytest
from conftest import MODEL, QUESTION, shown
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from test_openai import ANSWER, Shape


@pytest.fixture(scope="session")
def chat(server):
    return ChatOpenAI(base_url=f"{server}/v1", api_key="unused", model=MODEL, max_retries=0)


def message(text=QUESTION):
    return HumanMessage(content=shown(text, "red-triangle.png")[0]["content"])


def test_a_picture_is_described(chat):
    reply = chat.invoke([SystemMessage("Answer in few words."), message()])
    assert reply.content == ANSWER
    assert reply.usage_metadata["output_tokens"] == 3
    assert reply.response_metadata["finish_reason"] == "stop"


def test_its_own_form_of_an_image_is_read(chat, server):
    import base64

    from conftest import IMAGES

    data = base64.b64encode((IMAGES / "red-triangle.png").read_bytes()).decode()
    image = {"type": "image", "source_type": "base64", "mime_type": "image/png", "data": data}
    reply = chat.invoke([HumanMessage(content=[image, {"type": "text", "text": QUESTION}])])
    assert reply.content == ANSWER


def test_a_stream_joined_is_the_whole(chat):
    pieces = [chunk.content for chunk in chat.stream([message()])]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == ANSWER


def test_a_chat_goes_on(chat):
    reply = chat.invoke([message(), AIMessage(ANSWER), HumanMessage("what color is the shape?")])
    assert reply.content == "red"


def test_several_are_answered_at_once(chat):
    replies = asyncio.run(chat.abatch([[message()]] * 6))
    assert [reply.content for reply in replies] == [ANSWER] * 6


def test_an_answer_is_parsed_into_a_model_of_pydantic(chat):
    assert isinstance(chat.with_structured_output(Shape).invoke([message()]), Shape)
    told = chat.with_structured_output(Shape, method="json_schema", include_raw=True).invoke([message()])
    assert told["parsing_error"] is None and isinstance(told["parsed"], Shape)
