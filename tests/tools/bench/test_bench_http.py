"""tools.bench over HTTP: a fake server whose answers are known, and jinfer's own."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from jinfer import ConfigError
from tools.bench import settings as s
from tools.bench.__main__ import main
from tools.bench.client import HTTPSystem, Server, base_url, find_server
from tools.bench.figures import summarize
from tools.bench.workload import BenchRequest

CACHE = Path(__file__).resolve().parents[3] / ".cache" / "jax-tests"


class FakeServer(ThreadingHTTPServer):
    """Streams a word for each token asked for; what a prompt's first id says may go wrong."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.bodies = []
        self.running = self.most_running = 0
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


FAIL, SHORT, BREAK = 901, 902, 903


class FakeHandler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        known = self.path == "/v1/models"
        self.answer(200 if known else 404, {"data": [{"id": "fake"}]} if known else {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append((self.path, body))
            self.server.running += 1
            self.server.most_running = max(self.server.most_running, self.server.running)
        try:
            self.stream(body)
        finally:
            with self.server.lock:
                self.server.running -= 1

    def answer(self, status, value):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def stream(self, body):
        first = body["prompt"][0] if "prompt" in body else None
        if first == FAIL:
            self.answer(500, {"error": {"message": "no luck"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        time.sleep(0.03)
        count = body["max_tokens"] - (first == SHORT)
        for i in range(count):
            if first == BREAK and i == 1:
                self.event({"error": {"message": "gone"}})
                return
            word = {"text": "w "} if "prompt" in body else {"delta": {"content": "w "}}
            self.event({"choices": [{"index": 0, **word, "finish_reason": None}]})
            time.sleep(0.002)
        self.event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        usage = {
            "prompt_tokens": 5,
            "completion_tokens": count,
            "prompt_tokens_details": {"cached_tokens": 2},
        }
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\r\n\r\n")

    def event(self, value):
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.wfile.flush()


@pytest.fixture
def fake():
    server = FakeServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def http_system(fake, **options):
    return HTTPSystem(Server(fake.url, "fake"), s.Load(url=fake.url, **options), "fake")


def test_a_stream_is_timed_and_counted(fake):
    requests = [BenchRequest(i, (i, 7), 6) for i in range(4)]
    run = http_system(fake, api_key="k").run(requests)
    for found in run.records:
        assert found.error is None
        assert (found.prompt_tokens, found.output_tokens, found.cached_tokens) == (5, 6, 2)
        assert len(found.token_times) == 6
        assert found.ttft >= 0.03
        assert found.end >= found.token_times[-1]
    path, body = fake.bodies[0]
    assert path == "/v1/completions"
    assert (body["temperature"], body["ignore_eos"], body["stream"], body["model"]) == (
        0.0,
        True,
        True,
        "fake",
    )


def test_failures_are_counted_and_not_timed(fake):
    requests = [BenchRequest(0, (1,), 3), *(BenchRequest(x, (x,), 3) for x in (FAIL, SHORT, BREAK))]
    run = http_system(fake).run(requests)
    errors = {r.index: r.error or "none" for r in run.records}
    assert errors[0] == "none"
    assert "status 500" in errors[FAIL]
    assert "no luck" in errors[FAIL]
    assert errors[SHORT] == "ended early: 2 of 3 tokens"
    assert "gone" in errors[BREAK]
    figures = summarize(run)
    assert (figures["errors"], figures["output_tokens"]) == (3, 3)
    with pytest.raises(ConfigError, match="every request failed.*no luck"):
        http_system(fake).run([BenchRequest(0, (FAIL,), 3)])


def test_without_ignore_eos_a_short_answer_is_no_failure(fake):
    run = http_system(fake, ignore_eos=False).run([BenchRequest(0, (SHORT,), 3)])
    assert run.records[0].output_tokens == 2
    assert run.records[0].error is None
    assert "ignore_eos" not in fake.bodies[0][1]


def test_concurrency_bounds_what_is_in_flight(fake):
    run = http_system(fake, concurrency=3).run([BenchRequest(i, (i,), 3) for i in range(9)])
    assert len(run.good) == 9
    assert fake.most_running == 3


def test_arrivals_are_kept_and_latency_counts_from_them(fake):
    run = http_system(fake).run([BenchRequest(i, (i,), 2, arrival=0.1 * i) for i in range(3)])
    starts = [r.start for r in sorted(run.records, key=lambda r: r.index)]
    assert np.diff(starts) == pytest.approx([0.1, 0.1])
    assert fake.most_running >= 1
    assert run.seconds >= 0.2


def test_chat_sends_messages(fake):
    run = http_system(fake, endpoint="chat").run([BenchRequest(0, "the of and", 2)])
    assert run.records[0].error is None
    path, body = fake.bodies[0]
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "the of and"}]


def test_what_is_no_server_is_said(fake):
    assert base_url("http://h:1/v1/") == "http://h:1"
    assert find_server(fake.url + "/v1", None, None).model == "fake"
    with pytest.raises(ConfigError, match="serves 'fake', asked for 'other'"):
        find_server(fake.url, "other", None)
    with pytest.raises(ConfigError, match="no OpenAI-compatible server"):
        find_server("http://127.0.0.1:9", None, None)


def test_serve_compares_two_servers(fake, tmp_path, capsys):
    out = tmp_path / "r.json"
    arguments = ["--num-requests", "4", "--prompt-len", "4", "--output-len", "3", "--repeats", "2"]
    servers = ["--url", fake.url, "--compare", fake.url, "--endpoint", "chat", "--api-key", "secret"]
    assert main(["serve", *servers, *arguments, "--slo", "ttft:10000", "--json", str(out)]) == 0
    assert "goodput" in capsys.readouterr().out
    text = out.read_text()
    assert "secret" not in text
    found = json.loads(text)
    main_name, peer = found["systems"]
    assert peer == f"{main_name} again"
    assert found["systems"][main_name]["median"]["goodput_share"] == 1.0
    assert found["better_by"][peer]["output_tokens_per_second"]["median"] > 0


def test_serve_starts_jinfer_and_stops_it(small_model, capsys, tmp_path, small_engine, small_work):
    out = tmp_path / "r.json"
    server = " ".join([*small_engine, "--compilation-cache-dir", str(CACHE)])
    arguments = ["serve", "--model", str(small_model), "--server-args", server, "--concurrency", "2"]
    assert main([*arguments, *small_work, "--json", str(out)]) == 0
    figures = json.loads(out.read_text())["systems"]["jinfer.serve"]["median"]
    assert (figures["requests"], figures["errors"], figures["cached_prompt_tokens"]) == (6, 0, 0)
    assert f"jinfer.serve serves {small_model}" in capsys.readouterr().out


def test_a_server_that_cannot_start_says_why(small_model, capsys):
    arguments = ["serve", "--model", str(small_model), "--server-args", "--max-model-len 1"]
    assert main(arguments) == 1
    assert "max_model_len is 1" in capsys.readouterr().err
