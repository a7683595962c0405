"""POST /tokenize and /detokenize, in vLLM's shapes. Called on a thread: a body may hold megabytes of text."""

from __future__ import annotations

from typing import Any

from serve.chat import prompt_ids
from serve.fields import is_off
from serve.inputs import check_token_ids, read_token_ids, read_tools
from serve.jsonpieces import Long
from serve.protocol import bad_request
from serve.schemas import DetokenizeBody, TokenizeBody
from serve.state import State

MAX_DETOKENIZED = 2**18  # token ids: in one call, which keeps Python's lock for some milliseconds


def tokenize(state: State, fields: dict[str, Any]) -> dict[str, Any]:
    """The token ids of a prompt or of a conversation. Raises APIError or RequestError."""
    body = TokenizeBody.read(fields)
    state.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give either prompt or messages", "prompt")
    if body.prompt is not None:
        for name in (
            "tools",
            "documents",
            "add_generation_prompt",
            "continue_final_message",
            "chat_template_kwargs",
            "reasoning_effort",
        ):
            # add_generation_prompt is true by default, and clients write defaults out.
            if not is_off(getattr(body, name)) and name != "add_generation_prompt":
                raise bad_request(
                    f"{name} goes with messages, and this request has a prompt: remove it", name
                )
        if not isinstance(body.prompt, str):
            raise bad_request("prompt is not a string", "prompt")
        adds = body.add_special_tokens is not False
        ids = state.encode(body.prompt, adds, "prompt")
    else:
        ids = prompt_ids(state, body, read_tools(body.tools, "none"), bool(body.add_special_tokens))

    def spelling(token_id: int) -> str:
        return state.engine.tokenizer.id_to_token(token_id) or ""

    return {
        "count": len(ids),
        "max_model_len": state.engine.max_model_len,
        "tokens": Long(ids),
        "token_strs": Long(map(spelling, ids)) if body.return_token_strs else None,
    }


def detokenize(state: State, fields: dict[str, Any]) -> dict[str, Any]:
    """The text of token ids, special ones included. Raises APIError for an id outside the vocabulary."""
    body = DetokenizeBody.read(fields)
    state.check_model(body.model)
    ids = read_token_ids(body.tokens, "tokens")
    if len(ids) > MAX_DETOKENIZED:
        raise bad_request(
            f"tokens has {len(ids)} ids, at most {MAX_DETOKENIZED} are taken: split it", "tokens"
        )
    check_token_ids(ids, state.engine.vocab_size, "tokens")
    text = state.engine.tokenizer.decode(ids, skip_special_tokens=bool(body.skip_special_tokens))
    return {"prompt": text}


def tokenizer_info(state: State) -> dict[str, Any]:
    """What a client needs to write prompts itself, under the names of tokenizer_config.json.

    The chat template is the model's own. One that the operator brought may be private, so none is shown then.
    """
    tokenizer, template = state.engine.tokenizer, state.engine.chat_template
    sources = {} if template is None or state.config.chat_template is not None else template.sources
    added = {
        str(token_id): {"content": text, "special": token_id in tokenizer.special_ids}
        for text, token_id in sorted(tokenizer.added_tokens.items(), key=lambda pair: pair[1])
    }
    named = {name: tokenizer.special_tokens.get(name) for name in ("bos_token", "eos_token")}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # what reads tokenizer.json as it is
        **named,
        **tokenizer.special_tokens,
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": tokenizer.cleans_up_spaces,
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": state.engine.max_model_len,
        "chat_template": sources.get("default"),
    }
