"""The FastAPI app: which path does what."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from jinfer import AsyncEngine, ServerConfig, __version__
from serve.answer import JSONAnswer, Plan, StreamedAnswer, WholeAnswer
from serve.body import prepare_body
from serve.chat import plan_chat
from serve.completions import is_quick_completion, plan_completion
from serve.embeddings import plan_embeddings
from serve.generation import owned
from serve.middleware import Access, Gate
from serve.openapi import install_openapi
from serve.protocol import APIError, install_handlers, unavailable
from serve.requestlog import logger_for
from serve.state import State
from serve.tokens import detokenize, tokenize, tokenizer_info

PAGE = Path(__file__).parent / "static" / "index.html"

T = TypeVar("T")


def create_app(
    engine: AsyncEngine,
    config: ServerConfig,
    make_chat_template: Callable[[AsyncEngine], Any] | None = None,
) -> tuple[ASGIApp, State]:
    """The ASGI app of a started engine, and its state for whoever runs and drains it.

    make_chat_template: makes the chat template once the engine is ready, in place of the model's own.
    """
    state = State(engine, config, make_chat_template)
    app = FastAPI(
        title="jinfer",
        version=__version__,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    install_handlers(app)
    _add_model_routes(app, state)
    _add_generation_routes(app, state)
    _add_operation_routes(app, state)
    install_openapi(app, has_key=bool(config.api_key))
    return Gate(_with_cors(Access(app, state), config), state), state


def _with_cors(app: ASGIApp, config: ServerConfig) -> ASGIApp:
    if not config.allowed_origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=config.allowed_origins,
        allow_methods=config.allowed_methods or ("*",),
        allow_headers=config.allowed_headers or ("*",),
        allow_credentials=config.allow_credentials,
        expose_headers=("x-request-id", "retry-after", "x-should-retry"),
    )


def _add_generation_routes(app: FastAPI, state: State) -> None:
    async def prepared(
        request: Request, prepare: Callable[[State, dict[str, Any]], T], **quick: Any
    ) -> tuple[T, float]:
        state.check_accepting()
        deadline = time.monotonic() + state.config.request_timeout
        return await prepare_body(state, request, deadline, prepare, **quick), deadline

    async def answer(
        request: Request, prepare: Callable[[State, dict[str, Any]], Plan], **quick: Any
    ) -> Response:
        plan, deadline = await prepared(request, prepare, **quick)
        job = owned(plan.job, request.scope["jinfer.key"], state.config.enable_prompt_tokens_details)
        kind = StreamedAnswer if plan.streams else WholeAnswer
        return kind(state, job, plan.form, deadline, logger_for(state, job, plan.kind))

    async def chat_completions(request: Request) -> Response:
        return await answer(request, plan_chat)

    async def completions(request: Request) -> Response:
        return await answer(request, plan_completion, is_quick=is_quick_completion)

    async def embeddings(request: Request) -> Response:
        return await answer(request, plan_embeddings)

    async def tokenize_text(request: Request) -> Response:
        return JSONAnswer(state, (await prepared(request, tokenize))[0])

    async def detokenize_ids(request: Request) -> Response:
        return JSONAnswer(state, (await prepared(request, detokenize))[0])

    for path, endpoint in (
        ("/v1/chat/completions", chat_completions),
        ("/v1/completions", completions),
        ("/v1/embeddings", embeddings),
        ("/tokenize", tokenize_text),
        ("/detokenize", detokenize_ids),
    ):
        app.add_api_route(path, endpoint, methods=["POST"], response_model=None)


def _add_model_routes(app: FastAPI, state: State) -> None:
    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": state.created,
            "owned_by": "jinfer",
            "root": state.model_root,
            "parent": None,
            "max_model_len": state.engine.max_model_len if state.engine.is_ready else None,
        }

    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card(name) for name in state.model_names]})

    async def model(name: str) -> Response:
        state.check_model(name or "/")
        return JSONResponse(card(name or state.model_name))

    async def tokenizer() -> Response:
        """The tokenizer's settings: special tokens, added tokens, chat template."""
        state.check_accepting()
        return JSONResponse(await state.in_thread(tokenizer_info, state))

    app.add_api_route("/tokenizer_info", tokenizer, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models", models, methods=["GET"], response_model=None)
    # A model's name may have slashes: organisation/name.
    app.add_api_route("/v1/models/{name:path}", model, methods=["GET"], response_model=None)


def _add_operation_routes(app: FastAPI, state: State) -> None:
    page, policy = _load_page()

    async def health(request: Request) -> Response:
        """200 while requests can be served or finished; 503 while the model loads, after the engine failed, and while it
        has work and no step ends."""
        return _status(state, request, accepts_while_draining=True)

    async def ready(request: Request) -> Response:
        """200 if a request sent now would be taken; 503 while loading, draining or failed."""
        return _status(state, request, accepts_while_draining=False)

    async def metrics(request: Request) -> Response:
        body, content_type = state.metrics.exposition(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    async def version() -> Response:
        return JSONResponse({"version": __version__})

    async def web_page() -> Response:
        headers = {
            "content-security-policy": policy,
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        }
        return Response(page, media_type="text/html", headers=headers)

    for path, endpoint in (("/health", health), ("/ready", ready), ("/", web_page)):
        app.add_api_route(path, endpoint, response_model=None, include_in_schema=path != "/")
    app.add_api_route("/metrics", metrics, methods=["GET"], response_model=None)
    app.add_api_route("/version", version, methods=["GET"], response_model=None)


def _status(state: State, request: Request, accepts_while_draining: bool) -> Response:
    stalled = state.engine.stalled_seconds
    if stalled > state.config.health_timeout:
        return unavailable(
            f"no step has ended for {stalled:.0f} s while requests wait: restart the server",
            "engine_stalled",
            30,
        ).response()
    has_key = not state.config.api_key or bool(request.scope["jinfer.key"])
    try:
        state.check_accepting(shows_error=has_key)
    except APIError as error:
        if not (accepts_while_draining and error.code == "shutting_down"):
            return error.response()
        return JSONResponse({"status": "draining"})
    return JSONResponse({"status": "ok", "model": state.model_name})


def _load_page() -> tuple[bytes, str]:
    """The page and a policy that runs its own script and style and nothing else."""
    page = PAGE.read_bytes()

    def sources(tag: str) -> str:
        blocks = re.findall(rb"<%b>(.*?)</%b>" % (tag.encode(), tag.encode()), page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(b).digest()).decode()}'" for b in blocks)

    policy = (
        f"default-src 'none'; script-src {sources('script')}; style-src {sources('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy
