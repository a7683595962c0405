"""Valid values of the known fields, their extremes among them. A field that is not here gets values by its type."""

from __future__ import annotations

from typing import Any

CALL = {"id": "c1", "type": "function", "function": {"name": "get", "arguments": '{"city": "Oslo"}'}}
TOOL = {
    "type": "function",
    "function": {
        "name": "get",
        "description": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
USER = {"role": "user", "content": "hi"}

MESSAGES = (
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [{"role": "developer", "content": "Be brief."}, USER],
    [USER, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "again"}],
    [USER, {"role": "assistant", "content": "He"}],
    [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
    [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ],
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    [USER, {"role": "assistant", "content": "x", "reasoning_content": "because"}, USER],
    [{"role": "user", "content": "<|end|><|system|>"}],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": "\u0000\ufffe🙂" * 20}],
    [USER] * 40,
)
PROMPTS = (
    "Once upon a time",
    "",
    " ",
    "🙂\u0000",
    [1, 2, 3],
    ["a", "b"],
    [[1, 2], [3]],
    ["same"] * 16,
    "word " * 100,
)

SWITCHES = (
    "add_generation_prompt", "add_special_tokens", "continue_final_message", "echo", "ignore_eos",
    "include_stop_str_in_output", "normalize", "return_token_ids", "return_token_strs", "return_tokens_as_token_ids",
    "skip_special_tokens", "stream",
)  # fmt: skip

EXAMPLES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(SWITCHES, (True, False)),
    "request_id": ("a", "x" * 128),
    "user": ("somebody",),
    "messages": MESSAGES,
    "prompt": PROMPTS,
    "input": (*PROMPTS, ["x"] * 100),
    "tokens": ([1, 2, 3], [], [0], list(range(200)), [5] * 3000),
    "model": ("", "tiny"),
    "max_tokens": (1, 2, 4, 8, 16, 64),
    "max_completion_tokens": (1, 2, 4, 8, 16, 64),
    "temperature": (0, 0.0, 0.7, 1, 2, 100, 1e-8, 1e-300, 5e-324),
    "top_p": (1, 0.5, 1e-9, 5e-324),
    "top_k": (-1, 0, 1, 40, 2**31 - 1),
    "min_p": (0, 0.1, 1),
    "n": (1, 2, 3, 16),
    "seed": (1, 0, -1, 2**31, 2**63 - 1, -(2**63)),
    "presence_penalty": (-2, 0, 2, 1e-300),
    "frequency_penalty": (-2, 0, 2),
    "repetition_penalty": (1, 0.01, 1e-30, 100),
    "logit_bias": (
        {},
        {"5": -100},
        {"5": 100, "6": 100},
        {str(i): 0.5 for i in range(300)},
        {str(i): -100 for i in range(1024)},
    ),
    "stop": (
        "a",
        "\n",
        ["a", "b"],
        [chr(97 + i) for i in range(16)],
        [("ab" * 511) + str(i) for i in range(4)],
    ),
    "stop_token_ids": ([], [0], [1, 2, 3], list(range(30))),
    "min_tokens": (0, 1, 4, 16, 2**31 - 1),
    "prompt_logprobs": (0, 1, 20),
    "logprobs": (True, False, 0, 1, 20),
    "top_logprobs": (0, 1, 20),
    "stream_options": (
        {},
        {"include_usage": True},
        {"continuous_usage_stats": True, "include_usage": True},
        {"include_usage": None},
    ),
    "priority": (0, 1, -1, 2**31 - 1, -(2**31 - 1)),
    "cache_salt": ("a", "\u0000", "🙂" * 200, "x" * 1024),
    "tools": ([], [TOOL], [TOOL] * 30),
    "tool_choice": ("none", "auto"),
    "documents": ([], [{"title": "t", "text": "x"}]),
    "chat_template_kwargs": ({}, {"enable_thinking": False}, {"custom": [1, {"a": None}]}),
    "reasoning_effort": ("low", "high"),
    "encoding_format": ("float", "base64"),
    "pooling": ("last", "mean"),
}
# Valid, and dear: taken now and then.
COSTLY: dict[str, tuple[Any, ...]] = {
    "n": (64,),
    "max_tokens": (200,),
    "max_completion_tokens": (200,),
    "min_tokens": (100,),
    "prompt": (["q"] * 64, "word " * 400),
    "input": (["x"] * 1000, "word " * 400),
    "tokens": ([5] * 200_000,),
    "messages": ([USER] * 2000,),
}
# The far ends of what is valid, for a body that is short otherwise.
EXTREMES: dict[str, tuple[Any, ...]] = {
    "min_tokens": (2**31 - 1, 500),
    "max_tokens": (1, 2**31 - 1, 500),
    "n": (64,),
    "stop": ([chr(97 + i) * 1000 for i in range(16)],),
    "stop_token_ids": (list(range(30)),),
    "logit_bias": ({str(i): 100 for i in range(1024)}, {str(i): -100 for i in range(1024)}),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (1e-38, 100),
    "temperature": (100, 5e-324),
    "top_k": (1, 2**31 - 1),
    "top_p": (5e-324,),
    "min_p": (1,),
    "seed": (2**63 - 1, -(2**63)),
    "priority": (2**31 - 1, -(2**31 - 1)),
    "prompt_logprobs": (20,),
    "cache_salt": ("\U0010ffff" * 1024,),
    "ignore_eos": (True,),
}
# Fields that other servers know, harmless or not.
ELSEWHERE = (
    "best_of", "suffix", "response_format", "functions", "function_call", "guided_json", "guided_regex", "store",
    "user", "metadata", "modalities", "audio", "bad_words", "use_beam_search", "length_penalty", "allowed_token_ids",
    "truncate_prompt_tokens", "logits_processors", "chat_template", "service_tier", "parallel_tool_calls",
    "structured_outputs", "ebnf", "regex", "lora_path", "no_stop_trim", "return_hidden_states", "prompt_embeds",
    "include_reasoning", "vllm_xargs", "kv_transfer_params", "prediction", "web_search_options", "verbosity",
    "__class__", "", "model_config", "messages ", "\u0000", "x" * 3000,
)  # fmt: skip


def least(fields: Any) -> dict[str, Any]:
    """The shortest valid body of an endpoint with these fields."""
    body: dict[str, Any] = {}
    for name in ("messages", "prompt", "input", "tokens"):
        if name in fields:
            body[name] = EXAMPLES[name][0]
            break
    if "max_tokens" in fields:
        body["max_tokens"] = 3
    return body
