"""`python -m jinfer.serve` with jinfer's own engine and the bundled model."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from tests.support.server_process import CACHE, ROOT, Process, read_until, serving
from tools.stall_check.__main__ import main as stall_check

SMALL = ["--max-num-seqs", "4", "--max-num-batched-tokens", "16", "--max-model-len", "256"]
JINFER = [sys.executable, "-m", "jinfer.serve", "--port", "0", *SMALL, "--compilation-cache-dir", str(CACHE)]


@pytest.fixture(scope="module")
def jinfer_server() -> Iterator[Process]:
    with serving([*JINFER, "--request-timeout", "60", "--scheduling-policy", "priority"]) as process:
        yield process
        text = httpx.get(process.url + "/metrics").text
        assert re.search(r"^jinfer:recompiles_total\S* 0.0$", text, re.MULTILINE)
        assert re.search(r"^jinfer:kv_cache_usage_perc\S* 0.0$", text, re.MULTILINE)
        assert process.end() == 0


@pytest.fixture
def jinfer_sdk(jinfer_server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=jinfer_server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_an_echo_whose_last_character_the_output_completes(jinfer_server):
    half, rest = [178, 259], 252
    asked = {"prompt": half, "max_tokens": 2, "temperature": 0, "logit_bias": {str(rest): 100}, "logprobs": 0}
    answer = httpx.post(jinfer_server.url + "/v1/completions", json=asked | {"echo": True}).json()["choices"][
        0
    ]
    decoded = httpx.post(jinfer_server.url + "/detokenize", json={"tokens": [*half, rest, rest]}).json()[
        "prompt"
    ]
    assert answer["text"] == decoded
    assert answer["logprobs"]["text_offset"] == [0, 0, 0, 0]


def test_large_requests_and_those_beside_them(jinfer_server, capsys):
    """A short run of the command. The gaps of streams beside them are for a quiet machine to judge."""
    cases = [part for name in ("16 prompts", "350,000 keys") for part in ("--case", name)]
    pid = str(jinfer_server.popen.pid)
    options = ["--url", jinfer_server.url, "--pid", pid, "--seconds", "0.5", "--stream-tokens", "200"]
    assert stall_check([*options, *cases, "--max-ratio", "50", "--max-wait", "3"]) == 0, capsys.readouterr()
    assert "2 of 2 cases within the limits" in capsys.readouterr().out


def test_the_engines_figures_reach_the_metrics(jinfer_server):
    def figure(name: str, labels: str = "") -> float:
        text = httpx.get(jinfer_server.url + "/metrics").text
        (found,) = re.findall(rf"^jinfer:{name}\{{{labels}[^}}]*\}} (\S+)$", text, re.MULTILINE)
        return float(found)

    before = [figure(name) for name in ("request_prompt_tokens_sum", "iteration_tokens_total_sum")]
    body = {"prompt": [5, 6, 7, 8], "max_tokens": 3, "ignore_eos": True, "n": 2}
    httpx.post(jinfer_server.url + "/v1/completions", json=body).raise_for_status()
    httpx.post(jinfer_server.url + "/v1/embeddings", json={"input": [9, 10, 11]}).raise_for_status()
    assert figure("request_prompt_tokens_sum") == before[0] + 4 + 3
    # Two choices share the prompt's step; a step in flight when they end may compute more.
    assert figure("iteration_tokens_total_sum") >= before[1] + 4 + 2 * 2 + 3
    assert figure("cache_config_info", 'block_size="8",') == 1
    assert figure("request_num_preemptions_sum") == figure("request_not_finite_total") == 0


def test_the_bundled_model_answers(jinfer_sdk):
    question: list[Any] = [{"role": "user", "content": "Tell me a story."}]
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": question,
        "temperature": 0,
        "max_completion_tokens": 40,
    }
    whole = jinfer_sdk.chat.completions.create(**asked, logprobs=True)
    text = whole.choices[0].message.content
    assert len(text.split()) > 3
    shown = b"".join(bytes(e.bytes) for e in whole.choices[0].logprobs.content)
    assert shown.decode("utf-8", "replace").startswith(text)
    with jinfer_sdk.chat.completions.create(**asked, stream=True) as stream:
        assert "".join(c.choices[0].delta.content or "" for c in stream) == text
    again = jinfer_sdk.chat.completions.create(**asked, n=2)
    assert [c.message.content for c in again.choices] == [text, text]
    assert again.usage.prompt_tokens_details is None  # it would show what others have sent
    own = jinfer_sdk.chat.completions.create(**asked, extra_body={"cache_salt": "own"})
    assert own.usage.prompt_tokens_details.cached_tokens == 0


def test_the_engine_scores_prompts(jinfer_sdk, jinfer_server):
    ids = httpx.post(jinfer_server.url + "/tokenize", json={"prompt": "Once upon a time"}).json()["tokens"]
    asked: dict[str, Any] = {"model": "tiny", "echo": True, "logprobs": 2, "max_tokens": 3, "temperature": 0}
    by_text = jinfer_sdk.completions.create(prompt="Once upon a time", **asked).choices[0]
    by_ids = jinfer_sdk.completions.create(prompt=ids, **asked).choices[0]
    assert by_text.logprobs == by_ids.logprobs
    assert len(by_text.logprobs.tokens) == len(ids) + 3
    assert by_text.logprobs.token_logprobs[0] is None
    assert all(x < 0 for x in by_text.logprobs.token_logprobs[1:])
    for token, offset in zip(by_text.logprobs.tokens, by_text.logprobs.text_offset, strict=True):
        assert by_text.text[offset:].startswith(token) or token.startswith(("<", "bytes:"))
    none = jinfer_sdk.completions.create(prompt=ids, **(asked | {"max_tokens": 0})).choices[0]
    assert none.logprobs.token_logprobs == by_ids.logprobs.token_logprobs[: len(ids)]


def test_embeddings_are_those_of_transformers(jinfer_sdk):
    """The client asks for base64 by itself, and for lists where it is told to."""
    folder = ROOT / "jinfer" / "assets" / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    texts = ["Once upon a time", "a fox", "What is 27 + 45? " * 8]
    ids = [tokenizer.encode(text) for text in texts]
    with torch.no_grad():
        states = [model(torch.tensor([each])).last_hidden_state[0].double().numpy() for each in ids]
    by_pooling = {"last": [s[-1] for s in states], "mean": [s.mean(0) for s in states]}
    for given in (texts, ids):
        for encoding in (None, "float"):
            for pooling, expected in by_pooling.items():
                options: dict[str, Any] = {"encoding_format": encoding} if encoding else {}
                answer = jinfer_sdk.embeddings.create(
                    model="tiny", input=given, extra_body={"pooling": pooling}, **options
                )
                assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
                assert [d.index for d in answer.data] == [0, 1, 2]
                for entry, vector in zip(answer.data, expected, strict=True):
                    unit = vector / np.linalg.norm(vector)
                    assert np.abs(np.asarray(entry.embedding) - unit).max() < 1e-4 * np.abs(unit).max()
    one = jinfer_sdk.embeddings.create(model="tiny", input="a fox", dimensions=len(unit)).data
    np.testing.assert_allclose(
        one[0].embedding, by_pooling["last"][1] / np.linalg.norm(by_pooling["last"][1]), atol=1e-4
    )
    with pytest.raises(openai.BadRequestError, match="dimensions is 3"):
        jinfer_sdk.embeddings.create(model="tiny", input="a fox", dimensions=3)


def test_many_requests_on_the_real_engine(jinfer_server):
    """More than fit at once, streamed and whole, some leave, some are wrong; the pages all come back."""

    async def run():
        async with httpx.AsyncClient(base_url=jinfer_server.url, timeout=60) as client:

            async def one(i: int) -> int:
                body = {
                    "prompt": f"{i} and so on",
                    "max_tokens": 5 + i % 7,
                    "seed": i,
                    "stream": i % 3 == 0,
                    "priority": -i,
                }
                if i % 8 == 7:
                    body["prompt"] = [10**6]
                if i % 8 == 3:
                    with contextlib.suppress(httpx.TimeoutException):
                        await client.post(
                            "/v1/completions",
                            json=body | {"max_tokens": 200, "ignore_eos": True},
                            timeout=0.05,
                        )
                    return 0
                response = await client.post("/v1/completions", json=body)
                if i % 3 == 0 and i % 8 != 7:
                    assert response.text.endswith("data: [DONE]\n\n")
                return response.status_code

            return await asyncio.gather(*(one(i) for i in range(24)))

    statuses = asyncio.run(run())
    assert [s for i, s in enumerate(statuses) if i % 8 == 7] == [400] * 3
    assert [s for i, s in enumerate(statuses) if i % 8 not in (3, 7)] == [200] * 18
    jinfer_server.until_running(0)


def test_the_engines_own_refusals(jinfer_server):
    def fault(**body: Any) -> dict[str, Any]:
        response = httpx.post(jinfer_server.url + "/v1/completions", json=body)
        assert response.status_code == 400
        return response.json()["error"]

    assert fault(prompt="long " * 1000)["code"] == "context_length_exceeded"
    assert fault(prompt="x", logit_bias={"999999": 1})["param"] == "logit_bias"
    assert fault(prompt="x", stop_token_ids=[999999])["param"] == "stop_token_ids"


def test_sigterm_cuts_the_engines_streams_at_the_limit(jinfer_server):  # whose compiled steps this one finds
    with serving([*JINFER, "--drain-timeout", "0.2"]) as process:
        body = {"prompt": "Once", "n": 64, "max_tokens": 250, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", process.url + "/v1/completions", json=body, timeout=30) as answer:
            parts = answer.iter_bytes()
            data = read_until(parts, b"data: ")
            process.popen.send_signal(signal.SIGTERM)
            data += b"".join(parts)
        assert data.endswith(b"data: [DONE]\n\n")
        assert b'"finish_reason":"abort"' in data
        assert process.leave() == 0
        assert not any("Traceback" in line for line in process.errors)


def test_a_model_that_is_not_there():
    command = [sys.executable, "-m", "jinfer.serve", "--port", "0", "--model", "/nowhere/at/all"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert "/nowhere/at/all" in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "jinfer.serve", "--port", str(taken.getsockname()[1])]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert "cannot listen" in run.stderr


def test_two_servers_started_together_on_one_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jinfer.serve", "--compilation-cache-dir", "off", "--port", str(port)]
    both = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        deadline = time.monotonic() + 60
        while all(process.poll() is None for process in both):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        late = next(process for process in both if process.returncode is not None)
        assert late.returncode == 2
        errors = late.communicate()[1]
        assert f"cannot listen on 127.0.0.1 port {port}" in errors
        assert errors.count("\n") == 1
    finally:
        for process in both:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("seconds", [0.0, 0.5, 2.0])
def test_ctrl_c_while_it_starts(seconds):
    command = [sys.executable, "-m", "jinfer.serve", "--compilation-cache-dir", "off", "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        # Python starts first, with a handler of its own. The package's first imports show that it is past that.
        maps, deadline = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 10
        while "_socket" not in maps.read_text() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode in (0, 130)
    assert errors == ""


def test_sigterm_while_the_model_loads():
    command = [sys.executable, "-m", "jinfer.serve", "--compilation-cache-dir", "off", "--port"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [*command, str(port)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 60
        status = 0
        while not status:
            assert time.monotonic() < deadline
            with contextlib.suppress(httpx.TransportError):
                status = httpx.get(f"http://127.0.0.1:{port}/ready").status_code
        assert status == 503
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0
    assert out == b""
