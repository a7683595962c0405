"""How many tokens a request may have, and whether it can run here at all."""

from __future__ import annotations

from jinfer.errors import RequestError
from jinfer.request import Request


def token_limit(request: Request, max_model_len: int, pool_tokens: int) -> int:
    """The most tokens, prompt and output, the request may have. RequestError if it can never run.

    pool_tokens: tokens whose KV fits in all pages together. The last token's KV is never needed, so a request
    may have one more; where nobody wants that token, it may also come after max_model_len of them. Without max_tokens
    a request gets as many as fit; with it, it gets them or is refused.
    """
    prompt, asked = request.num_prompt_tokens, request.params.max_tokens
    longest = max_model_len + request.prompt_only
    most = min(longest, request.max_total_tokens or longest)
    room = pool_tokens + 1
    if prompt == 0:
        raise RequestError("the prompt is empty, expected at least one token: give some text", "prompt")
    if prompt >= most:
        raise RequestError(
            f"the prompt has {prompt} tokens and the limit of prompt and output together is {most}, which "
            "leaves no room for output: shorten the prompt or start with a larger --max-model-len",
            "prompt",
        )
    if prompt >= room:
        raise RequestError(
            f"the prompt has {prompt} tokens and the KV pages hold {pool_tokens}: shorten the prompt or give "
            "the KV cache more memory",
            "prompt",
        )
    if asked is None:
        return min(most, room)
    limit = min(most, prompt + asked)
    if limit > room:
        raise RequestError(
            f"{prompt} prompt tokens and {limit - prompt} output tokens need more KV pages than exist (they "
            f"hold {pool_tokens} tokens): lower max_tokens or give the KV cache more memory",
            "max_tokens",
        )
    return limit
