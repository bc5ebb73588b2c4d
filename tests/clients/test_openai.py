"""The `openai` package, as it is installed, asks the chat endpoint."""

import asyncio
import json
import math
from typing import Literal

import pytest
from conftest import MODEL, QUESTION, ROOT, data_uri, shown
from openai import AsyncOpenAI
from pydantic import BaseModel

ANSWER = "a red triangle"


def ask(client, messages, **more):
    return client.chat.completions.create(model=MODEL, messages=messages, **more)


def test_a_picture_is_described(client):
    reply = ask(client, shown(QUESTION, "red-triangle.png"))
    assert reply.choices[0].message.content == ANSWER
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens == 3
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 3
    assert reply.model == MODEL


def test_a_stream_joined_is_the_whole_and_tells_what_it_cost(client):
    with ask(
        client, shown(QUESTION, "red-triangle.png"), stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    deltas = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
    assert len(deltas) > 1
    assert "".join(deltas) == ANSWER
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 3
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_streaming_helper_of_the_package_reads_it(client):
    with client.chat.completions.stream(model=MODEL, messages=shown(QUESTION, "red-triangle.png")) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in kinds and "content.done" in kinds
    assert final.choices[0].message.content == ANSWER


def test_many_ask_at_once_and_each_gets_its_own_answer(server):
    async def all_of_them():
        async with AsyncOpenAI(base_url=f"{server}/v1", api_key="unused", max_retries=0) as client:

            async def one(text, stream):
                messages = shown(text, "red-triangle.png")
                reply = await client.chat.completions.create(model=MODEL, messages=messages, stream=stream)
                if not stream:
                    return text, reply.choices[0].message.content
                deltas = [choice.delta.content or "" async for chunk in reply for choice in chunk.choices]
                return text, "".join(deltas)

            alone = dict(
                [await one(text, False) for text in (QUESTION, "what color is the shape?", "Describe the image.")]
            )
            return alone, await asyncio.gather(*(one(text, index % 2 == 0) for index in range(8) for text in alone))

    alone, together = asyncio.run(all_of_them())
    assert alone[QUESTION] == ANSWER and len(together) == 24
    for text, answer in together:
        assert answer == alone[text]


def test_a_chat_goes_on_about_its_picture(client):
    messages = [{"role": "system", "content": "Answer in few words."}, *shown(QUESTION, "red-triangle.png")]
    messages.append({"role": "assistant", "content": ANSWER})
    messages.append({"role": "user", "content": "what color is the shape?"})
    assert ask(client, messages).choices[0].message.content == "red"


def test_several_pictures_are_read(client):
    reply = ask(client, shown("what color is the shape?", "red-triangle.png", "red-triangle.png"))
    assert reply.choices[0].message.content
    assert reply.usage.prompt_tokens > 2 * 64


class Shape(BaseModel):
    color: Literal["red", "green", "blue"]
    shape: Literal["circle", "rectangle", "triangle"]


def test_an_answer_is_parsed_into_a_model_of_pydantic(client):
    reply = client.chat.completions.parse(
        model=MODEL, messages=shown(QUESTION, "red-triangle.png"), response_format=Shape, max_tokens=200
    )
    assert isinstance(reply.choices[0].message.parsed, Shape)
    Shape.model_validate_json(reply.choices[0].message.content)


def test_a_json_object_is_one(client):
    messages = shown("Describe the image.", "red-triangle.png")
    reply = ask(client, messages, response_format={"type": "json_object"}, max_tokens=60)
    choice = reply.choices[0]
    # One that ran out of tokens is the beginning of an object.
    assert choice.message.content.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


def test_a_choice_comes_with_the_probability_of_each(client):
    messages = shown("what color is the shape?", "red-triangle.png")
    reply = ask(client, messages, extra_body={"choice": ["red", "green", "blue"]})
    choice = reply.choices[0]
    assert choice.message.content == "red"
    chances = {one["choice"]: one["probability"] for one in choice.model_extra["choice_probabilities"]}
    assert set(chances) == {"red", "green", "blue"}
    assert math.isclose(sum(chances.values()), 1.0, rel_tol=1e-6)
    assert max(chances, key=chances.get) == "red"


def test_a_regular_expression_matches_the_answer(client):
    reply = ask(client, shown("How many?", "red-triangle.png"), extra_body={"regex": "[0-9]{3}"})
    assert len(reply.choices[0].message.content) == 3
    assert reply.choices[0].message.content.isdigit()


def test_the_likelihood_of_each_token_is_told(client):
    reply = ask(client, shown(QUESTION, "red-triangle.png"), logprobs=True, top_logprobs=3)
    tokens = reply.choices[0].logprobs.content
    assert "".join(token.token for token in tokens).strip() == ANSWER
    for token in tokens:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob  # Greedy: the likeliest was taken.


def test_a_stop_string_ends_the_answer_and_is_not_in_it(client):
    reply = ask(client, shown(QUESTION, "red-triangle.png"), stop=" triangle")
    assert reply.choices[0].message.content == "a red"
    assert reply.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_has_no_more_tokens_than_were_asked_for(client, name):
    reply = ask(client, shown(QUESTION, "red-triangle.png"), **{name: 2})
    assert reply.choices[0].message.content == "a red"
    assert reply.choices[0].finish_reason == "length"


def test_a_seed_repeats_its_answers_and_n_gives_several(client):
    asked = {"temperature": 2.0, "n": 4, "max_tokens": 12}
    messages = shown("Describe the image.", "red-triangle.png")

    def texts(seed):
        return [choice.message.content for choice in ask(client, messages, seed=seed, **asked).choices]

    first = texts(1)
    assert len(first) == 4 and len(set(first)) > 1
    assert texts(1) == first
    assert texts(1000) != first


def test_a_token_that_is_weighed_down_is_not_said(client):
    words = json.loads((ROOT / "models/tiny/package/tokenizer.json").read_text())["model"]["vocab"]
    reply = ask(client, shown(QUESTION, "red-triangle.png"), logit_bias={str(words["\u0120red"]): -100})
    assert "red" not in reply.choices[0].message.content.split()


def test_a_data_uri_may_say_how_closely_it_is_looked_at(client):
    messages = shown(QUESTION, "red-triangle.png")
    messages[0]["content"][0] = {
        "type": "image_url",
        "image_url": {"url": data_uri("red-triangle.png"), "detail": "high"},
    }
    assert ask(client, messages).choices[0].message.content == ANSWER


def test_text_is_gone_on_with(client):
    reply = client.completions.create(model=MODEL, prompt="USER: hello ASSISTANT:", max_tokens=4)
    assert reply.usage.completion_tokens <= 4
    assert reply.choices[0].finish_reason in ("stop", "length")
    stream = client.completions.create(model=MODEL, prompt="USER: hello ASSISTANT:", max_tokens=4, stream=True)
    assert "".join(choice.text for chunk in stream for choice in chunk.choices) == reply.choices[0].text


def test_the_models_are_listed(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
