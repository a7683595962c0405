"""Which fields of a request body act, which are harmless, and which are refused.

A field that would change the output and is not supported is a 400 that names it. One that changes nothing passes:
either it never could (`user`), or it has the value that means "off".
"""

from __future__ import annotations

from typing import Any

from serve.protocol import bad_request

# They say something to the operator, or ask for nothing that shows in the output.
HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "service_tier",
        "safety_identifier",
        "session_id",  # for routers
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "prediction",  # speeds generation up at most; the output is the same
        "parallel_tool_calls",  # about the shape of tool calls, which are refused
    }
)

# Known fields that do not act, with the values besides null that ask for nothing: empty ones where empty means none,
# and what the field's own documentation names as its default.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "audio": (),
    "best_of": (1,),  # equal to n is fine too: see refuse_unsupported
    "function_call": ("none", "auto"),  # there is nothing to call: functions are refused
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "chat_template": ("",),
    "ec_transfer_params": ({},),
    "echo": (False,),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),  # base64 is written with the least significant byte first
    "guided_choice": ([],),
    "guided_decoding_backend": (),
    "guided_grammar": ("",),
    "guided_json": (),  # an empty schema asks for JSON
    "guided_regex": ("",),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True,),
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "padding": ("do_not_pad",),
    "prompt_embeds": ([],),
    "repetition_detection": (),
    "return_mm_kwargs": (True,),
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
    "routed_experts_prompt_start": (0,),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1,),
    "structural_tag": (),
    "structured_outputs": ({},),
    "thinking_token_budget": (-1,),
    "truncate_prompt_tokens": (),
    "truncation_side": ("left", "right"),  # acts with truncate_prompt_tokens, which is refused
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
    # SGLang
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "custom_labels": ({},),
    "custom_logit_processor": (),
    "custom_params": ({},),
    "data_parallel_rank": (),
    "disagg_prefill_dp_rank": (),
    "ebnf": ("",),
    "embed_override_token_id": (),
    "embed_overrides": ([],),
    "extra_key": (),
    "images_config": ({},),
    "input_ids": (),
    "json_schema": ("",),
    "lora_path": ("", []),
    "max_dynamic_patch": (),
    "min_dynamic_patch": (),
    "ngram_corpus_id": (),
    "no_stop_trim": (False,),
    "reasoning": ({},),
    "regex": ("",),
    "return_cached_tokens_details": (False,),
    "return_hidden_states": (False,),
    "return_meta_info": (False,),
    "return_prompt_token_ids": (False,),
    "return_routed_experts": (False,),
    "rid": (),
    "routed_dp_rank": (),
    "routed_experts_start_len": (0,),
    "separate_reasoning": (True,),
    "session_params": ({},),
    "stop_regex": ("", []),
    "stream_reasoning": (True,),
    "task": (),
    "use_audio_in_video": (False,),
}

HINTS = {
    "audio": "only text is served",
    "best_of": "leave it out or make it equal to n",
    "chat_template": "templates come with the model or with the server's --chat-template flag",
    "functions": "use tools with tool_choice 'none'",
    "kv_transfer_params": "prompts are computed where they are continued",
    "lora_path": "adapters are not served",
    "modalities": "only text is served",
    "no_stop_trim": "use include_stop_str_in_output",
    "return_prompt_token_ids": "use return_token_ids",
    "response_format": 'only {"type": "text"} is served',
    "truncate_prompt_tokens": "shorten the prompt before sending it",
}


def is_neutral(name: str, value: Any) -> bool:
    """True if a known, unsupported field has a value that asks for nothing."""
    if isinstance(value, dict):  # a member that is null is left out
        value = {key: member for key, member in value.items() if member is not None}
    # 1 == True and 0 == False in Python; here a wrong type is not neutral, but 1 and 1.0 are the same number.
    return value is None or any(
        value == off and isinstance(value, bool) == isinstance(off, bool) for off in NEUTRAL[name]
    )


def is_off(value: Any) -> bool:
    """True if a value asks for nothing, whatever its field is: null, false, or empty."""
    return value is None or value is False or value in ("", [], {})


def refuse_unsupported(
    body: dict[str, Any], supported: frozenset[str], elsewhere: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """The supported fields of `body`. Raises APIError (400) naming the first field that would be ignored.

    elsewhere: fields of other endpoints, which clients that write out every field send along when they are off.
    """
    taken = {}
    for name, value in body.items():
        if name in supported:
            taken[name] = value
        elif name in HARMLESS or (name in elsewhere and is_off(value)):
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
