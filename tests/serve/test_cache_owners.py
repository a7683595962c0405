"""Clients of different keys share no pages of the prefix cache; what was cached is shown to nobody else."""

import pytest

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
BODIES = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    COMPLETIONS: {"prompt": "hello"},
    EMBEDDINGS: {"input": "hello"},
}


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def details(response):
    return response.json()["usage"]["prompt_tokens_details"]


@pytest.mark.parametrize("path", BODIES)
def test_each_key_has_a_salt_of_its_own(make_client, path):
    salts = []
    for key in ("one", "two", "one"):
        client = make_client(api_key=key)
        client.post(path, BODIES[path], headers=bearer(key)).raise_for_status()
        salts.append(client.engine.seen[-1].salt)
    first, second, again = salts
    assert first == again
    assert first != second
    assert first
    assert "one" not in first


def test_no_cache_salt_of_one_key_is_that_of_another(make_client):
    client = make_client(api_key="one")
    client.post(COMPLETIONS, BODIES[COMPLETIONS], headers=bearer("one"))
    theirs = client.engine.seen[-1].salt
    client = make_client(api_key="two")
    for salt in (theirs, theirs.rstrip(":"), "x"):
        body = BODIES[COMPLETIONS] | {"cache_salt": salt}
        client.post(COMPLETIONS, body, headers=bearer("two")).raise_for_status()
        assert client.engine.seen[-1].salt != theirs


def test_without_a_key_pages_are_shared_and_the_count_is_not_shown(client):
    for stream in (False, True):
        options = {"stream_options": {"include_usage": True}} if stream else {}
        response = client.complete("hello", stream=stream, **options)
        assert client.engine.seen[-1].salt == ""
        assert "cached_tokens" not in response.text
    assert details(client.chat()) is None


def test_the_count_is_shown_to_those_who_share_with_nobody(make_client):
    client = make_client()
    assert details(client.complete("hello", cache_salt="own"))["cached_tokens"] == 1
    assert client.engine.seen[-1].salt == "own"
    client = make_client(api_key="two")
    response = client.post(COMPLETIONS, BODIES[COMPLETIONS], headers=bearer("two"))
    assert details(response)["cached_tokens"] == 1
    client = make_client(enable_prompt_tokens_details=True)
    assert details(client.complete("hello"))["cached_tokens"] == 1
