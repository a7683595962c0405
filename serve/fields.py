"""Which fields of a request body act, which are harmless, and which are refused.

A field that would change the output and is not supported is a 400 that names it. One that changes nothing passes:
either it never could (`user`), or it has the value that means "off".
"""

from __future__ import annotations

from typing import Any

from serve.protocol import bad_request

# They tell the operator something, or ask for nothing that shows in the output.
HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prediction",  # speeds generation up at most; the output is the same
        "parallel_tool_calls",  # about the shape of tool calls, which are refused
    }
)

# Known fields that do not act, with the values besides null that mean "off".
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "audio": (),
    "best_of": (),  # equal to n is fine too: see refuse_unsupported
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM
    "allowed_token_ids": (),
    "bad_words": ([],),
    "chat_template": (),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True,),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "mm_processor_kwargs": (),
    "prompt_embeds": (),
    "return_prompt_text": (False,),
    "spaces_between_special_tokens": (True,),
    "structural_tag": (),
    "structured_outputs": (),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}

HINTS = {
    "audio": "only text is served",
    "best_of": "leave it out or make it equal to n",
    "chat_template": "templates come with the model or with the server's --chat-template flag",
    "functions": "use tools with tool_choice 'none'",
    "modalities": "only text is served",
    "response_format": 'only {"type": "text"} is served',
    "truncate_prompt_tokens": "shorten the prompt before sending it",
}


def is_neutral(name: str, value: Any) -> bool:
    """True if a known, unsupported field has a value that asks for nothing."""
    # 1 == True and 0 == False in Python; here a wrong type is not neutral, but 1 and 1.0 are the same number.
    return value is None or any(
        value == off and isinstance(value, bool) == isinstance(off, bool) for off in NEUTRAL[name]
    )


def refuse_unsupported(body: dict[str, Any], supported: frozenset[str]) -> dict[str, Any]:
    """The supported fields of `body`. Raises APIError (400) naming the first field that would be ignored."""
    taken = {}
    for name, value in body.items():
        if name in supported:
            taken[name] = value
        elif name in HARMLESS:
            continue
        elif name not in NEUTRAL:
            raise bad_request(
                f"unknown field {name[:100]!r}: it is not part of this endpoint, remove it",
                name[:100],
                "unknown_field",
            )
        elif not is_neutral(name, value) and not (name == "best_of" and value == (body.get("n") or 1)):
            hint = HINTS.get(name, "remove it")
            raise bad_request(f"{name} is not supported by this server: {hint}", name, "unsupported_field")
    return taken
