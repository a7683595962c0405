"""tools.bench: requests, arithmetic, systems and the report. Speeds themselves are not tested."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jinfer import ConfigError, EngineConfig
from tools.bench import machine, models
from tools.bench import settings as s
from tools.bench.__main__ import main
from tools.bench.alternate import alternate
from tools.bench.figures import RequestRecord, RunResult, agreement, medians, ratio, summarize
from tools.bench.report import Report
from tools.bench.workload import BenchRequest, Vocabulary, make_requests, shortened

# Settings


@pytest.mark.parametrize("text", ["", "0", "5:2", "a", "1:b", "-3", "4:"])
def test_what_is_no_span_is_refused(text):
    with pytest.raises(ConfigError, match="prompt_len"):
        s.Workload(prompt_len=text)


def test_limits_are_read_as_seconds():
    assert s.parse_slo("ttft:500, tpot:50") == {"ttft": 0.5, "tpot": 0.05}
    for wrong in ("", "ttft", "ttft:0", "itl:5", "ttft:1,ttft:2", "ttft:nan", "ttft:inf"):
        with pytest.raises(ConfigError, match="slo"):
            s.parse_slo(wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "url"),
        ({"request_rate": 1.0, "concurrency": 2}, "choose one"),
        ({"url": "http://x", "server_args": "--seed 1"}, "server_args"),
        ({"prompt_kind": "tokens", "endpoint": "chat"}, "chat"),
        ({"prompt_kind": "tokens", "url": "http://x"}, "model"),
        ({"compare_model_name": "m"}, "compare"),
    ],
)
def test_contradicting_load_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        s.Load(**options)


def test_every_preset_fits_its_command():
    from jinfer.cli import parse_args
    from tools.bench.__main__ import PARTS

    folder = Path(__file__).resolve().parents[3] / "configs" / "bench"
    presets = sorted(folder.glob("*.yaml"))
    assert presets
    for preset in presets:
        command = preset.stem.split("-")[0]
        parts = parse_args(PARTS[command if command in PARTS else "offline"], ["--config", str(preset)])
        assert f"--config configs/bench/{preset.name}" in preset.read_text()
        assert parts["workload"].num_requests > 0


# Requests


def test_requests_follow_from_the_seed_and_repeats_differ_in_content_only():
    workload = s.Workload(num_requests=50, shared_prefix_len=7)
    vocabulary = Vocabulary(100, special=(0, 1, 99))
    first, again = (make_requests(workload, vocabulary, variant=1, request_rate=5) for _ in range(2))
    other = make_requests(workload, vocabulary, variant=2, request_rate=5)
    assert first == again
    assert [r.prompt for r in first] != [r.prompt for r in other]
    for a, b in zip(first, other, strict=True):
        assert (len(a.prompt), a.max_tokens, a.arrival) == (len(b.prompt), b.max_tokens, b.arrival)
    assert len({r.prompt[:7] for r in first}) == 1
    assert len({r.prompt[7:12] for r in first}) == 50
    assert {token for r in first for token in r.prompt} == set(range(2, 99))
    assert min(len(r.prompt) for r in first) >= 16 + 7
    assert max(len(r.prompt) + r.max_tokens for r in first) <= workload.longest == 7 + 256 + 128


def test_poisson_arrivals_have_the_rate_and_the_spread_of_the_exponential():
    requests = make_requests(
        s.Workload(num_requests=4000, prompt_len="1", output_len="1"), None, request_rate=8
    )
    gaps = np.diff([r.arrival for r in requests])
    assert requests[0].arrival == 0
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.06)
    assert gaps.std() == pytest.approx(1 / 8, rel=0.08)


def test_text_prompts_have_a_word_for_each_token():
    request = make_requests(s.Workload(num_requests=1, prompt_len="12"), None)[0]
    assert isinstance(request.prompt, str)
    assert len(request.prompt.split()) == 12


def test_a_warm_up_is_short_and_at_once():
    requests = make_requests(s.Workload(num_requests=3), None, request_rate=1)
    for short, whole in zip(shortened(requests), requests, strict=True):
        assert (short.prompt, short.max_tokens, short.arrival) == (whole.prompt, 4, 0.0)


# Arithmetic


def record(index=0, start=0.0, times=(1.0, 1.5, 3.0), tokens=None, **rest):
    tokens = list(range(len(times))) if tokens is None else tokens
    return RequestRecord(index, start, 10, len(times), 0, list(times), times[-1], tokens, **rest)


def test_figures_of_a_run():
    failed = RequestRecord(2, 0.0, error="status 500")
    run = RunResult([record(), record(1, 1.0, (2.0, 6.0)), failed], {"kv_waste": 0.01}, others_cpu=0.5)
    figures = summarize(run, {"ttft": 1.0, "tpot": 1.5})
    assert (figures["requests"], figures["errors"], figures["seconds"]) == (3, 1, 6.0)
    assert figures["output_tokens_per_second"] == pytest.approx(5 / 6)
    assert figures["total_tokens_per_second"] == pytest.approx(25 / 6)
    assert figures["ttft_ms.mean"] == 1000
    assert figures["tpot_ms.mean"] == (1000 + 4000) / 2
    assert figures["itl_ms.p50"] == 1500  # of 0.5, 1.5 and 4 s
    assert figures["itl_ms.p95"] == pytest.approx(np.percentile([500, 1500, 4000], 95))
    assert figures["e2e_ms.mean"] == (3000 + 5000) / 2
    # The second is too slow per token, the third failed.
    assert figures["goodput_share"] == pytest.approx(1 / 3)
    assert figures["goodput_requests_per_second"] == pytest.approx(1 / 6)
    assert (figures["kv_waste"], figures["others_cpu_share"]) == (0.01, 0.5)


def test_a_single_token_has_no_tpot_and_a_run_of_failures_no_rate():
    figures = summarize(RunResult([record(times=(1.0,))]), {"tpot": 0.001})
    assert "tpot_ms.mean" not in figures
    assert figures["goodput_share"] == 1.0
    assert "output_tokens_per_second" not in summarize(RunResult([RequestRecord(0, 0.0, error="x")]))


def test_ratios_are_of_neighbouring_runs():
    a, b = [{"x": 10.0}, {"x": 30.0}, {"x": 40.0}], [{"x": 5.0}, {"x": 10.0}, {"x": 40.0}]
    found = ratio(a, b, "x")
    assert found is not None
    assert (found.median, found.low, found.high) == (2.0, 1.0, 3.0)
    assert ratio(a, [{}, {}, {}], "x") is None
    assert medians([*a, {"y": 1.0}]) == {"x": 30.0, "y": 1.0}


def test_agreement_counts_tokens_before_the_first_difference():
    a = RunResult([record(0, tokens=[1, 2, 3]), record(1, tokens=[4, 5, 6])])
    b = RunResult([record(1, tokens=[4, 9, 6]), record(0, tokens=[1, 2, 3])])
    found = agreement(a, b)
    assert found.requests == 0.5
    assert found.tokens == pytest.approx(4 / 6)


def test_systems_alternate_and_get_the_same_requests():
    seen = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def warm_up(self, requests):
            seen.append(("warm", self.name, requests[0].index))

        def run(self, requests):
            seen.append(("run", self.name, requests[0].index))
            return RunResult([record()])

    results = alternate([Fake("a"), Fake("b")], lambda n: [BenchRequest(n, "x", 1)], 2)
    assert seen[:2] == [("warm", "a", 0), ("warm", "b", 0)]
    assert seen[2:] == [("run", "a", 1), ("run", "b", 1), ("run", "a", 2), ("run", "b", 2)]
    assert {name: len(runs) for name, runs in results.items()} == {"a": 2, "b": 2}


def make_report(load=0.0, others=0.0, **options):
    def run(step):
        times = tuple(step * (i + 1) for i in range(8))
        extra = {"host_ms_per_step_at_peak_rows": 0.5, "peak_rows": 32.0, "kv_waste": 0.03}
        return RunResult([record(i, times=times) for i in range(4)], extra, others_cpu=others)

    host = replace(machine.look(), load=load, cores=2)
    runs = {"jinfer": [run(0.1)] * 2, "slow": [run(0.4)] * 2, "peer": [run(0.2)] * 2}
    return Report("offline throughput", host, {"shared_prefix_len": 0}, runs, **options)


def test_the_best_peer_is_the_one_that_counts():
    report = make_report()
    report.add_goals(min_ratio=1.9, min_tokens_per_second=1e6, max_host_ms=0.6, max_kv_waste=0.02)
    assert report.best_peer == "peer"
    assert [(goal.is_met, round(goal.found, 2)) for goal in report.goals] == [
        (True, 2.0),
        (False, 40.0),
        (True, 0.5),
        (False, 0.03),
    ]
    faster = report.better_by("slow", "ttft_ms.p50")
    assert faster is not None
    assert faster.median == pytest.approx(4.0)
    text = report.text()
    assert "2.00 times the output tokens/s of peer, the best of 2" in text
    assert "goal reached: output tokens/s against peer" in text
    assert "goal MISSED: KV waste" in text
    assert "100.00% (100% of outputs)" in text
    assert "warning" not in text


def test_doubtful_figures_are_called_so():
    assert "busy at the start" in " ".join(make_report(load=3.0).warnings)
    disturbed = make_report(others=0.4)
    assert "other processes used 40%" in " ".join(disturbed.warnings)
    assert "the best of 2, on a machine busy with other work" in disturbed.text()
    report = make_report()
    report.runs["peer"][0].records[0].error = "status 500"
    report = Report(report.title, report.machine, report.settings, report.runs)
    assert "peer: 2 requests failed" in " ".join(report.warnings)


def test_a_ratio_without_a_peer_is_refused():
    report = make_report()
    alone = Report("stream", report.machine, {}, {"jinfer": report.runs["jinfer"]})
    with pytest.raises(ConfigError, match="compare"):
        alone.add_goals(min_ratio=2)


def test_the_machine_is_named():
    host = machine.look()
    assert host.cpu
    assert host.cores >= 1
    assert host.versions["jax"]
    assert f"{host.cores} core" in host.line
    watch = machine.CpuWatch()
    end = time.process_time() + 0.15
    while time.process_time() < end:
        pass
    share = watch.others()
    assert share is None or 0 <= share <= 1
    assert machine.CpuWatch([2**30]).others() is None


# Random models


def test_random_models_have_the_sizes_they_are_named_for():
    assert models.SIZES["9m"].num_parameters == pytest.approx(8.7e6, rel=0.01)
    assert models.SIZES["100m"].num_parameters == pytest.approx(100.7e6, rel=0.001)


def test_a_random_model_is_whole(small_model, small_shape):
    from safetensors.numpy import load_file
    from transformers import AutoTokenizer

    from jinfer.text import Tokenizer

    tensors = load_file(small_model / "model.safetensors")
    assert sum(t.size for t in tensors.values()) == small_shape.num_parameters
    assert tensors["model.layers.0.mlp.up_proj.weight"].std() == pytest.approx(32**-0.5, rel=0.1)
    ours, theirs = Tokenizer.from_folder(small_model), AutoTokenizer.from_pretrained(small_model)
    assert ours.vocab_size == len(theirs) == small_shape.vocab_size
    text = "Grüße, 東京! the quick brown fox\n"
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.decode(ours.encode(text)) == text
    # Every token beyond the bytes is text by itself: a server streams something at each.
    assert all(
        ours.decode([i]).isascii() and ours.decode([i]) for i in range(3 + 256, small_shape.vocab_size)
    )


def test_a_full_folder_and_an_impossible_vocabulary_are_refused(small_model, tmp_path, small_shape):
    with pytest.raises(ConfigError, match="not empty"):
        models.write_model(small_shape, small_model)
    with pytest.raises(ConfigError, match="vocab_size"):
        models.write_model(replace(small_shape, vocab_size=200), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_random_model_is_made_once(tmp_path, monkeypatch, small_shape):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(models.SIZES, "small", small_shape)
    folder = models.resolve_random("random:small")
    before = (Path(folder) / "model.safetensors").stat().st_mtime_ns
    assert models.resolve_random("random:small") == folder
    assert (Path(folder) / "model.safetensors").stat().st_mtime_ns == before
    assert models.resolve_random("some/hub-id") == "some/hub-id"
    with pytest.raises(ConfigError, match="9m, 100m"):
        models.resolve_random("random:7t")


# In this process


def test_offline_against_transformers(small_model, tmp_path, capsys, small_engine, small_work):
    out, picture = tmp_path / "out" / "r.json", tmp_path / "r.png"
    files = ["--json", str(out), "--plot", str(picture)]
    compare = ["--compare", "hf", "--hf-batch-sizes", "2,4", "--hf-threads", "1", "--min-ratio", "0"]
    status = main(["offline", "--model", str(small_model), *small_engine, *small_work, *compare, *files])
    text = capsys.readouterr().out
    assert status == 0
    assert "identical greedy tokens" in text
    found = json.loads(out.read_text())
    assert list(found["systems"]) == ["jinfer", "transformers, batch 2", "transformers, batch 4"]
    counts = {(s["median"]["output_tokens"], s["median"]["errors"]) for s in found["systems"].values()}
    assert len(counts) == 1
    assert next(iter(counts))[1] == 0
    ours = found["systems"]["jinfer"]["median"]
    assert ours["recompiles"] == 0
    assert ours["cached_prompt_tokens"] == 0
    assert ours["peak_rows"] == 2
    assert 0 < ours["kv_waste"] < 1
    assert ours["host_ms_per_step"] > 0
    assert set(ours["ttft_ms"]) == {"mean", "p50", "p95", "p99"}
    # Float32 on both sides, but sums run in another order: two equal logits may fall either way.
    for peer in found["identical_greedy_tokens"].values():
        assert peer["tokens"] > 0.9
    assert found["goals"][0]["is_met"]
    shares = colour_shares(picture)
    # Bars fill an area, and each system's is there; lines alone would be far less.
    assert min(shares) > 0.004


def colour_shares(path):
    """The share of the left quarter, where the bars are, that has each of the first three systems' colours."""
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    from tools.bench.plot import COLOURS

    pixels = imread(path)[..., :3]
    pixels = pixels[:, : pixels.shape[1] // 4]
    return [float(np.isclose(pixels, to_rgb(c), atol=0.01).all(-1).mean()) for c in COLOURS[:3]]


def test_single_stream_runs_one_request_at_a_time(small_model, capsys):
    from tools.bench.inprocess import EngineSystem

    config = EngineConfig(
        model=str(small_model), max_model_len=64, max_num_seqs=2, max_num_batched_tokens=16, warmup=False
    )
    system = EngineSystem(config, longest=40, concurrency=1)
    requests = make_requests(
        s.StreamWorkload(num_requests=3, prompt_len="20", output_len="5"), system.vocabulary
    )
    run = system.run(requests)
    assert run.figures["peak_rows"] == 1
    assert [r.output_tokens for r in run.records] == [5, 5, 5]
    for before, after in zip(run.records, run.records[1:]):
        assert after.start >= before.end
    # The same prompts again: a run never finds another's pages.
    assert all(r.cached_tokens == 0 for r in system.run(requests).records)
    with pytest.raises(ConfigError, match="up to 100 tokens"):
        EngineSystem(config, longest=100, concurrency=None)


def test_a_missed_goal_and_a_wrong_setting_show_in_the_exit_status(
    small_model, capsys, small_engine, small_work
):
    arguments = ["stream", "--model", str(small_model), *small_engine, *small_work]
    assert main([*arguments, "--min-tokens-per-second", "1e9"]) == 1
    assert "goal MISSED" in capsys.readouterr().out
    assert main(["sprint"]) == 2
    assert main([]) == 2
    for wrong, words in (
        (["offline", "--compare", "http://localhost:1"], "serve --compare URL"),
        (["offline", "--min-ratio", "2"], "give compare too"),
        (["offline", "--hf-batch-sizes", "8,8"], "hf_batch_sizes"),
        (["serve", "--url", "nowhere"], "expected the URL"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
    assert main(["serve", "--min-ratio", "2"]) == 1
    assert "give compare too" in capsys.readouterr().err
