"""Fields that ask for nothing pass at every endpoint: null, empty, or at the default that their own API documents.

The tables have the request fields of OpenAI, vLLM and SGLang with those defaults; clients that write a whole request
model out send all of them. `ASKING` has a value for each that asks for something, which must act or be refused.
"""

import pytest

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
TALK = [{"role": "user", "content": "hi"}]

SAMPLING = {
    "frequency_penalty": 0.0,
    "ignore_eos": False,
    "include_stop_str_in_output": False,
    "logit_bias": None,
    "max_tokens": None,
    "min_p": 0.0,
    "min_tokens": 0,
    "model": None,
    "n": 1,
    "presence_penalty": 0.0,
    "prompt_logprobs": None,
    "repetition_penalty": 1.0,
    "seed": None,
    "skip_special_tokens": True,
    "stop": [],
    "stop_token_ids": [],
    "stream": False,
    "stream_options": None,
    "temperature": 1.0,
    "top_k": -1,
    "top_p": 1.0,
}
VLLM = {
    "allowed_token_ids": None,
    "bad_words": [],
    "cache_salt": None,
    "ec_transfer_params": None,
    "kv_transfer_params": {},
    "length_penalty": 1.0,
    "logprob_token_ids": None,
    "priority": 0,
    "repetition_detection": None,
    "response_format": {"type": "text"},
    "return_mm_kwargs": True,
    "return_token_ids": None,
    "return_token_offsets": False,
    "return_tokens_as_token_ids": None,
    "routed_experts_prompt_start": 0,
    "session_id": None,
    "spaces_between_special_tokens": True,
    "stream_interval": None,
    "structured_outputs": None,
    "thinking_token_budget": None,
    "truncate_prompt_tokens": None,
    "truncation_side": None,
    "use_beam_search": False,
    "vllm_xargs": {},
    "watermarking": None,
}
SGLANG = {
    "bootstrap_host": None,
    "bootstrap_port": None,
    "bootstrap_room": None,
    "custom_labels": None,
    "custom_logit_processor": None,
    "custom_params": None,
    "data_parallel_rank": None,
    "disagg_prefill_dp_rank": None,
    "ebnf": None,
    "extra_key": None,
    "images_config": None,
    "lora_path": None,
    "ngram_corpus_id": None,
    "no_stop_trim": False,
    "regex": None,
    "return_cached_tokens_details": False,
    "return_hidden_states": False,
    "return_routed_experts": False,
    "rid": None,
    "routed_dp_rank": None,
    "routed_experts_start_len": 0,
    "session_params": None,
    "stop_regex": None,
}
DEFAULTS = {
    CHAT: SAMPLING
    | VLLM
    | SGLANG
    | {
        # OpenAI
        "audio": None,
        "function_call": "none",
        "functions": [],
        "logprobs": False,
        "max_completion_tokens": None,
        "metadata": None,
        "modalities": ["text"],
        "moderation": None,
        "parallel_tool_calls": True,
        "prediction": None,
        "prompt_cache_key": None,
        "prompt_cache_options": {"mode": "implicit", "ttl": "30m"},
        "prompt_cache_retention": None,
        "reasoning_effort": None,
        "safety_identifier": None,
        "service_tier": "auto",
        "store": False,
        "tool_choice": "none",
        "tools": None,
        "top_logprobs": 0,
        "user": None,
        "verbosity": "medium",
        "web_search_options": None,
        # vLLM
        "add_generation_prompt": True,
        "add_special_tokens": False,
        "chat_template": None,
        "chat_template_kwargs": None,
        "continue_final_message": False,
        "documents": None,
        "echo": False,
        "include_reasoning": True,
        "media_io_kwargs": None,
        "mm_processor_kwargs": {},
        "return_prompt_text": None,
        # SGLang
        "input_ids": None,
        "max_dynamic_patch": None,
        "min_dynamic_patch": None,
        "reasoning": None,
        "return_meta_info": False,
        "return_prompt_token_ids": False,
        "separate_reasoning": True,
        "stream_reasoning": True,
        "task": None,
        "use_audio_in_video": False,
    },
    COMPLETIONS: SAMPLING
    | VLLM
    | SGLANG
    | {
        "add_special_tokens": True,
        "best_of": 1,
        "echo": False,
        "json_schema": None,
        "logprobs": None,
        "max_tokens": 16,
        "prompt_embeds": None,
        "suffix": None,
        "user": None,
    },
    EMBEDDINGS: {
        "add_special_tokens": True,
        "cache_salt": None,
        "dimensions": None,
        "embed_dtype": "float32",
        "embed_override_token_id": None,
        "embed_overrides": None,
        "encoding_format": "float",
        "endianness": "native",
        "lora_path": None,
        "mm_processor_kwargs": None,
        "model": None,
        "padding": None,
        "priority": 0,
        "rid": None,
        "truncate_prompt_tokens": None,
        "truncation_side": None,
        "use_activation": None,
        "user": None,
    },
    "/tokenize": {
        "add_generation_prompt": True,
        "chat_template": None,
        "chat_template_kwargs": None,
        "continue_final_message": False,
        "media_io_kwargs": None,
        "messages": None,
        "mm_processor_kwargs": None,
        "model": None,
        "reasoning_effort": None,
        "return_token_strs": False,
        "tool_choice": None,
        "tools": None,
    },
    "/detokenize": {"model": None},
}
NEEDED = {
    CHAT: {"messages": TALK},
    COMPLETIONS: {"prompt": "hi"},
    EMBEDDINGS: {"input": "hi"},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1, 2]},
}
# Values that ask for what no endpoint does.
ASKING = {
    "allowed_token_ids": [1],
    "audio": {"voice": "x"},
    "bad_words": ["x"],
    "best_of": 3,
    "bootstrap_host": "x",
    "bootstrap_port": 1,
    "bootstrap_room": 1,
    "chat_template": "{{ x }}",
    "custom_labels": {"a": "b"},
    "custom_logit_processor": "x",
    "custom_params": {"a": 1},
    "data_parallel_rank": 0,
    "disagg_prefill_dp_rank": 0,
    "ebnf": "root ::= x",
    "ec_transfer_params": {"a": 1},
    "embed_dtype": "float16",
    "embed_override_token_id": 0,
    "embed_overrides": [[[1.0]]],
    "endianness": "big",
    "extra_key": "x",
    "function_call": {"name": "x"},
    "functions": [{"name": "x"}],
    "images_config": {"a": 1},
    "include_reasoning": False,
    "input_ids": [1],
    "json_schema": "{}",
    "kv_transfer_params": {"do_remote_decode": True},
    "length_penalty": 2.0,
    "logprob_token_ids": [1],
    "lora_path": "x",
    "max_dynamic_patch": 1,
    "media_io_kwargs": {"image": {}},
    "min_dynamic_patch": 1,
    "mm_processor_kwargs": {"a": 1},
    "modalities": ["audio"],
    "moderation": {"model": "x"},
    "ngram_corpus_id": "x",
    "no_stop_trim": True,
    "padding": "max_length",
    "prompt_embeds": "x",
    "reasoning": {"effort": "high"},
    "regex": "x",
    "repetition_detection": {"max_pattern_size": 2},
    "response_format": {"type": "json_object"},
    "return_cached_tokens_details": True,
    "return_hidden_states": "last",
    "return_meta_info": True,
    "return_mm_kwargs": False,
    "return_prompt_text": True,
    "return_prompt_token_ids": True,
    "return_routed_experts": True,
    "return_token_offsets": True,
    "rid": "x",
    "routed_dp_rank": 0,
    "routed_experts_prompt_start": 1,
    "routed_experts_start_len": 1,
    "separate_reasoning": False,
    "session_params": {"id": "x"},
    "spaces_between_special_tokens": False,
    "stop_regex": ["x"],
    "store": True,
    "stream_interval": 4,
    "stream_reasoning": False,
    "structured_outputs": {"regex": "x"},
    "suffix": "x",
    "task": "query",
    "thinking_token_budget": 5,
    "tool_choice": "required",
    "truncate_prompt_tokens": 5,
    "truncation_side": "middle",
    "use_audio_in_video": True,
    "use_beam_search": True,
    "verbosity": "low",
    "vllm_xargs": {"a": 1},
    "watermarking": True,
    "web_search_options": {"search_context_size": "low"},
}


@pytest.mark.parametrize("path", DEFAULTS)
def test_documented_defaults_ask_for_nothing(client, path):
    plain = client.post(path, NEEDED[path])
    everything = client.post(path, DEFAULTS[path] | NEEDED[path])
    assert everything.status_code == plain.status_code == 200, everything.text

    def content(answer):
        return {key: value for key, value in answer.json().items() if key not in ("id", "created")}

    assert content(everything) == content(plain)
    for name, value in DEFAULTS[path].items():
        for off in {repr(value): value, "None": None}.values():
            answer = client.post(path, NEEDED[path] | {name: off})
            assert answer.status_code == 200, (name, off, answer.text)


@pytest.mark.parametrize("path", DEFAULTS)
def test_other_values_are_refused_by_name(client, path):
    for name in ASKING.keys() & DEFAULTS[path].keys():
        error = client.fault(client.post(path, NEEDED[path] | {name: ASKING[name]}), 400)
        assert error["param"] == name
        assert error["code"] in ("unsupported_field", "unknown_field") or name == "tool_choice", name


def test_every_field_has_a_value_that_asks():
    """The comparison above leaves no field out that has no part in a request's own parameters."""
    from serve.fields import HARMLESS
    from serve.schemas import every_field

    assert {name for table in DEFAULTS.values() for name in table} - every_field() - HARMLESS <= ASKING.keys()


@pytest.mark.parametrize(
    "fields",
    [
        {"bad_words": [], "documents": [], "functions": [], "stop_token_ids": [], "tools": []},
        {"chat_template_kwargs": {}, "logit_bias": {}, "structured_outputs": {}, "vllm_xargs": {}},
        {"stop": ""},
        {"stream_options": {}},
        {"stream_options": {"include_usage": False, "continuous_usage_stats": None}},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
        {"response_format": {"type": "text", "json_schema": None}},
        {"structured_outputs": {"json": None, "regex": None}},
        {"top_logprobs": 0, "logprobs": None},
        {"reasoning": {"effort": None}},
        {"thinking_token_budget": -1},
        {"truncation_side": "left"},
        {"prompt": None, "input": None, "tokens": []},
    ],
)
def test_other_spellings_of_nothing(client, fields, reply):
    response = client.chat(**fields)
    assert response.status_code == 200, response.text
    if not fields.get("stream"):
        assert response.json()["choices"][0]["message"]["content"] == reply


def test_message_fields_that_ask_for_nothing(client, engine):
    off = {
        "prefix": False,
        "partial": False,
        "thinking_blocks": [],
        "reasoning_details": [],
        "provider_specific_fields": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "name": None,
        "reasoning_content": None,
        "id": "msg_1",
    }
    answered = {"role": "assistant", "content": "yes"}
    client.post(CHAT, {"messages": [*TALK, answered, *TALK]}).raise_for_status()
    client.post(CHAT, {"messages": [*TALK, answered | off, *TALK]}).raise_for_status()
    assert engine.seen[0].ids == engine.seen[1].ids
    for name, value in (("prefix", True), ("thinking_blocks", [{}]), ("provider_specific_fields", {"a": 1})):
        error = client.fault(client.post(CHAT, {"messages": [*TALK, answered | {name: value}]}), 400)
        assert name in error["message"]


def test_embeddings_by_vllms_name_of_normalize(client):
    def vector(**fields):
        return client.post(EMBEDDINGS, {"input": "hi"} | fields).json()["data"][0]["embedding"]

    assert vector(use_activation=True) == vector(normalize=True)
    assert (
        vector(use_activation=False)
        == vector(normalize=False)
        == vector(normalize=False, use_activation=False)
    )
    assert vector(use_activation=True) != vector(use_activation=False)
    both = {"input": "hi", "normalize": True, "use_activation": False}
    assert client.fault(client.post(EMBEDDINGS, both), 400)["param"] == "use_activation"


def test_a_request_may_bring_its_id(client, engine):
    assert client.chat(request_id="abc").json()["id"] == "chatcmpl-abc"
    response = client.complete(["a", "b"], request_id="abc")
    assert response.json()["id"] == "cmpl-abc"
    assert response.headers["x-request-id"] == "cmpl-abc"
    for wrong in ("a b", "a\nb", "é", "x" * 129, 5):
        assert client.fault(client.chat(request_id=wrong), 400)["param"] == "request_id"


def test_two_requests_with_one_id_run_beside_each_other(client, engine):
    import asyncio

    async def both():
        body = {"messages": TALK, "request_id": "twice"}
        return await asyncio.gather(*(client.http.post(CHAT, json=body) for _ in range(2)))

    assert [response.status_code for response in asyncio.run(both())] == [200, 200]
