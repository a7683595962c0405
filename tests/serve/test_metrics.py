"""GET /metrics: what vLLM's dashboards look for, under their names, and no label that a client can choose freely."""

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from jinfer import ConfigError, EngineDeadError, ServerConfig


def metric_values(text):
    return {
        (s.name, tuple(sorted((k, v) for k, v in s.labels.items() if k != "model_name"))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_metrics(client, engine):
    client.chat("hi", n=2, max_tokens=5).raise_for_status()
    client.complete(["a", "b"], max_tokens=3, stream=True).raise_for_status()
    client.complete("a", max_tokens=100).raise_for_status()
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    values = metric_values(response.text)
    for name, value in {
        "num_requests_running": 0,
        "num_requests_waiting": 3,
        "kv_cache_usage_perc": 0.25,
        "kv_cache_full_attention_share": 0.5,
        "prefix_cache_queries_total": 100,
        "prefix_cache_hits_total": 40,
        "prompt_tokens_total": 1234,
        "generation_tokens_total": 567,
        "num_preemptions_total": 2,
        "prompt_tokens_cached_total": 321,
        "request_not_finite_total": 1,
        "recompiles_total": 0,
    }.items():
        assert values["jinfer:" + name, ()] == value, name
    windowed = (("group", "1"), ("window", "16"))
    assert values["jinfer:kv_cache_group_bytes", (("group", "0"), ("window", "none"))] == 4096
    assert values["jinfer:kv_cache_group_bytes", windowed] == 1024
    assert values["jinfer:kv_cache_group_usage_perc", windowed] == 0.125
    done = {
        r: values["jinfer:request_success_total", (("finished_reason", r),)]
        for r in ("stop", "length", "abort")
    }
    assert done == {"stop": 1, "length": 4, "abort": 0}
    # Prompts have a first token each; choices have gaps between tokens, times and an end each.
    assert values["jinfer:time_to_first_token_seconds_count", ()] == 4
    assert values["jinfer:inter_token_latency_seconds_count", ()] == 2 * 4 + 2 * 2 + len(engine.reply)
    assert values["jinfer:e2e_request_latency_seconds_count", ()] == 5
    for span in ("queue", "prefill", "decode", "inference"):
        assert values[f"jinfer:request_{span}_time_seconds_count", ()] == 5, span
    assert values["jinfer:request_time_per_output_token_seconds_count", ()] == 5
    # A prompt's own figures once, whatever number of choices it has; those of a choice for each.
    for name, count, total in (
        ("request_prompt_tokens", 4, sum(len(seen.ids) for seen in engine.seen)),
        ("request_params_n", 4, 2 + 3),
        ("request_params_max_tokens", 4, 5 + 3 + 3 + 100),
        ("request_generation_tokens", 5, 2 * 5 + 2 * 3 + len(engine.reply) + 1),
        ("request_num_preemptions", 5, 0),
    ):
        assert values[f"jinfer:{name}_count", ()] == count, name
        assert values[f"jinfer:{name}_sum", ()] == total, name
    # Steps come from the engine as they are counted there.
    buckets = [values["jinfer:iteration_tokens_total_bucket", (("le", le),)] for le in ("1.0", "8.0", "+Inf")]
    assert buckets == [5, 7, 8]
    assert values["jinfer:iteration_tokens_total_sum", ()] == 35
    assert values["jinfer:cache_config_info", (("block_size", "8"), ("num_gpu_blocks", "64"))] == 1
    assert 'model_name="fake"' in response.text


def test_the_room_is_the_most_that_a_request_may_generate(client, engine):
    client.chat("hi").raise_for_status()
    tokens = len(engine.seen[0].ids)
    values = metric_values(client.get("/metrics").text)
    assert values["jinfer:request_params_max_tokens_sum", ()] == 1000 - tokens


def test_embeddings_ask_for_no_text(client):
    client.post("/v1/embeddings", {"input": ["a", "b"]}).raise_for_status()
    values = metric_values(client.get("/metrics").text)
    assert values["jinfer:request_prompt_tokens_count", ()] == 2
    assert values["jinfer:e2e_request_latency_seconds_count", ()] == 2
    for name in ("request_params_n", "request_params_max_tokens", "request_generation_tokens"):
        assert values[f"jinfer:{name}_count", ()] == 0


def test_http_requests_are_counted_by_route(client):
    client.chat("hi").raise_for_status()
    client.chat("hi", n=0)
    client.get("/v1/models/fake")
    client.get("/v1/models/other/../x")
    for i in range(5):
        client.get(f"/nothing/{i}")
        client.call(f"VERB{i}", "/v1/models")
    client.post("/v1/completions", content=b"{}", headers={"content-length": str(10**9)})
    found = {
        tuple(value for _, value in labels): count
        for (name, labels), count in metric_values(client.get("/metrics").text).items()
        if name == "http_requests_total"
    }
    assert found == {
        ("/v1/chat/completions", "POST", "2xx"): 1,
        ("/v1/chat/completions", "POST", "4xx"): 1,
        ("/v1/models/{name:path}", "GET", "2xx"): 1,
        ("/v1/models/{name:path}", "GET", "4xx"): 1,
        ("none", "GET", "4xx"): 5,
        ("/v1/models", "other", "4xx"): 5,
        ("none", "POST", "4xx"): 1,
    }


def test_an_unexpected_error_is_counted(client, engine):
    def broken(*args, **kwargs):
        raise KeyError("x")

    engine.validate = broken
    client.complete("hi")
    labels = (("handler", "/v1/completions"), ("method", "POST"), ("status", "5xx"))
    assert metric_values(client.get("/metrics").text)["http_requests_total", labels] == 1


def test_the_prefix_of_metrics(make_client):
    client = make_client(metrics_prefix="vllm:")
    client.chat("hi").raise_for_status()
    names = {name for name, _ in metric_values(client.get("/metrics").text)}
    # What dashboards and gateways made for vLLM read.
    for name in (
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total"),
        *("prompt_tokens_total", "generation_tokens_total", "prompt_tokens_cached_total"),
        *(
            "prefix_cache_queries_total",
            "prefix_cache_hits_total",
            "request_success_total",
            "cache_config_info",
        ),
        *("request_prompt_tokens_bucket", "request_generation_tokens_bucket", "request_params_n_bucket"),
        *(
            "request_params_max_tokens_bucket",
            "iteration_tokens_total_bucket",
            "request_num_preemptions_bucket",
        ),
        *("time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket"),
        *("request_time_per_output_token_seconds_bucket", "e2e_request_latency_seconds_bucket"),
        *("request_queue_time_seconds_bucket", "request_inference_time_seconds_bucket"),
        *("request_prefill_time_seconds_bucket", "request_decode_time_seconds_bucket"),
    ):
        assert "vllm:" + name in names, name
    assert "http_requests_total" in names
    assert not any(name.startswith("jinfer:") for name in names)


@pytest.mark.parametrize("prefix", ["", "1x", "a b", "a-b", "é:", 'x"} 1\n', "x" * 65])
def test_a_prefix_that_no_name_may_begin_with(prefix):
    with pytest.raises(ConfigError, match="metrics_prefix"):
        ServerConfig(metrics_prefix=prefix)


@pytest.mark.parametrize("accept", ["application/openmetrics-text", "text/plain"])
@pytest.mark.parametrize("version", ["x", "1.x", "", "-1", "1e9", "9" * 5000, "0.0.1", "1.0.0"])
def test_metrics_in_whatever_version_is_asked_for(client, accept, version):
    response = client.get("/metrics", headers={"accept": f"{accept};version={version};q=0.5, */*;q=0.1"})
    assert response.status_code == 200
    assert "jinfer:num_requests_running" in response.text


def test_times_are_those_of_the_request(client, engine):
    engine.step_seconds = 0.02
    client.complete("a", max_tokens=6)
    values = metric_values(client.get("/metrics").text)
    assert values["jinfer:time_to_first_token_seconds_sum", ()] >= 0.02
    assert values["jinfer:inter_token_latency_seconds_sum", ()] >= 5 * 0.02
    whole = values["jinfer:e2e_request_latency_seconds_sum", ()]
    assert whole >= 6 * 0.02
    assert values["jinfer:inter_token_latency_seconds_sum", ()] < whole


def test_metrics_while_the_model_loads(client, engine):
    def loading():
        raise EngineDeadError("still loading")

    engine.stats = loading
    assert metric_values(client.get("/metrics").text)["jinfer:prompt_tokens_total", ()] == 0


@pytest.mark.parametrize(
    "accept",
    [
        # What versions 2 and 3 of Prometheus send.
        "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
        "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
        "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
        "text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
        "application/openmetrics-text;version=1.0.0;escaping=underscores",
        "application/openmetrics-text",
    ],
)
def test_names_are_the_same_in_openmetrics(make_client, accept):
    client = make_client(metrics_prefix="vllm:")
    client.chat("hi").raise_for_status()
    response = client.get("/metrics", headers={"accept": accept})
    assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = list(openmetrics.text_string_to_metric_families(response.text))
    names = {sample.name for family in families for sample in family.samples}
    assert {family.type for family in families} == {"gauge", "counter", "histogram"}
    plain = {name for name, _ in metric_values(client.get("/metrics").text)}
    assert names == plain
