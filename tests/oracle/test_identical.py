"""A request's tokens depend on the request alone: not on chunks, cache, company, overlap, preemption or devices.

Half of the 32 requests are greedy and must give what transformers gives; the other half are drawn with a seed and
every kind of parameter, and must give what they give alone. They are compiled as a server compiles them;
what runs on several devices, by scanned layers or by another attention is compiled at level 0, which changes no token.
"""

import pytest

from jinfer import SamplingParams
from tests.support.engines import (
    Output,
    check_idle,
    collect,
    greedy,
    run,
    run_one,
    served_engine,
    small_engine,
)
from tests.support.models import hf_greedy, make_llama, margin, random_prompt

COUNT = 32
LENGTHS = [1 + (i * 37) % 90 for i in range(COUNT)]
PROMPTS = [random_prompt(500 + i, length) for i, length in enumerate(LENGTHS)]
KINDS = [
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 20, "repetition_penalty": 1.3},
    {"temperature": 1.0, "min_p": 0.05, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    {
        "temperature": 0.7,
        "logit_bias": {7: 4.0, 9: -100.0},
        "min_tokens": 12,
        "stop_token_ids": tuple(range(20, 52)),
    },
    {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 0.2, "logprobs": 3},
]


def request(i: int) -> tuple[list[int], SamplingParams]:
    if i % 2 == 0:
        return PROMPTS[i], greedy(64)
    kind = {"max_tokens": 30 + i, "ignore_eos": True, "seed": 1000 + i, **KINDS[i // 2 % len(KINDS)]}
    return PROMPTS[i], SamplingParams(**kind)


def some(*indices: int) -> dict[str, tuple[list[int], SamplingParams]]:
    return {str(i): request(i) for i in indices}


@pytest.fixture(scope="module")
def folder(tiny_llama):
    return tiny_llama


@pytest.fixture(scope="module")
def uneven_folder(tmp_path_factory):
    """As many KV heads as query heads; a vocabulary and a feed-forward width that eight devices do not divide."""
    return make_llama(
        tmp_path_factory.mktemp("identical") / "uneven",
        seed=14,
        hidden_size=64,
        intermediate_size=84,
        num_attention_heads=8,
        num_key_value_heads=8,
    )


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, Output]:
    """Every request on its own; the greedy ones are checked against transformers."""
    engine = served_engine(folder)
    outputs = {str(i): run_one(engine, *request(i)) for i in range(COUNT)}
    for i in range(0, COUNT, 2):
        tokens, logits = hf_greedy(folder, PROMPTS[i], 64)
        assert margin(logits) > 1.5e-4, "a near tie: choose another seed"
        assert outputs[str(i)].token_ids == tokens
    assert outputs["7"].finish_reason == "stop", "one of them should end early"
    return outputs


@pytest.fixture(scope="module")
def crowd_options():
    return {"max_num_seqs": COUNT, "max_num_batched_tokens": 48, "warmup": True}


def assert_same(actual: dict[str, Output], expected: dict[str, Output]) -> None:
    for name, output in actual.items():
        assert output.token_ids == expected[name].token_ids, f"request {name}"
        assert output.text == expected[name].text
        assert (output.finish_reason, output.stop_reason) == (
            expected[name].finish_reason,
            expected[name].stop_reason,
        )
        for one, other in zip(output.logprobs, expected[name].logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=2e-5)


def test_among_31_others(folder, alone, crowd_options):
    engine = served_engine(folder, **crowd_options)
    assert_same(run(engine, some(*range(COUNT))), alone)
    # In another order, so that slots and pages have had other owners.
    assert_same(run(engine, some(*reversed(range(COUNT)))), alone)


def test_without_overlap(folder, alone, crowd_options):
    engine = served_engine(folder, **crowd_options, async_scheduling=False)
    assert_same(run(engine, some(*range(COUNT))), alone)


def test_arriving_while_others_run(folder, alone, crowd_options):
    engine = served_engine(folder, **crowd_options)
    waiting, deltas, step = list(range(COUNT)), [], 0
    while waiting or engine.has_unfinished:
        if waiting and step % 3 == 0:
            i = waiting.pop()
            engine.add_request(str(i), *request(i))
        deltas += engine.step()
        step += 1
    check_idle(engine)
    assert_same({name: output for (name, _), output in collect(deltas).items()}, alone)


@pytest.mark.parametrize("overlap", [True, False])
def test_preempted(folder, alone, overlap):
    """The pool holds one long request and a half, so requests push each other out again and again."""
    engine = served_engine(folder, num_gpu_blocks_override=33, async_scheduling=overlap)
    outputs = run(engine, some(*range(COUNT)))
    assert engine.stats().num_preemptions > 10
    assert_same(outputs, alone)


def test_prefill_in_one_piece(folder, alone):
    """`alone` computes prompts in chunks of at most 16 tokens; here they fit into one step, or nearly."""
    engine = served_engine(folder, max_num_seqs=2, max_num_batched_tokens=128)
    assert_same(run(engine, some(17, 9, 4, 28)), alone)


def test_cached_prefix(folder, alone):
    engine = served_engine(folder)
    cold = run(engine, some(17, 16, 31, 7))
    assert all(output.num_cached == 0 for output in cold.values())
    warm = run(engine, some(17, 16, 31, 7))
    for name, output in warm.items():
        # All full pages but the one with the last token, whose logits are needed.
        assert output.num_cached == (LENGTHS[int(name)] - 1) // 8 * 8
    assert_same(cold, alone)
    assert_same(warm, alone)


def test_cached_output_of_another_request(folder):
    """A conversation goes on: the next prompt is the last one with its answer and something new."""
    engine = served_engine(folder)
    first = run_one(engine, PROMPTS[16], greedy(40))
    longer = [*PROMPTS[16], *first.token_ids, *random_prompt(9, 11)]
    warm = run_one(engine, longer, greedy(40))
    assert warm.num_cached >= (len(PROMPTS[16]) + 39) // 8 * 8
    expected, logits = hf_greedy(engine.folder, longer, 40)
    assert margin(logits) > 1.5e-4
    assert warm.token_ids == expected


def test_a_long_cached_prefix_brings_more_pages_than_a_small_step_has_room_for(folder):
    """The packed array of a 16-token step carries a few page ids; the rest takes another way to the device."""
    engine = served_engine(folder, max_model_len=512)
    prompt = random_prompt(77, 400)
    cold, warm = run_one(engine, prompt, greedy(12)), run_one(engine, prompt, greedy(12))
    assert warm.num_cached == 392
    assert cold.token_ids == warm.token_ids == hf_greedy(engine.folder, prompt, 12)[0]


def test_scanned_layers(folder, alone):
    assert_same(run(small_engine(folder, layer_loop="scan"), some(17, 9, 4, 7)), alone)


@pytest.mark.parametrize("backend", ["reference", "xla"])  # the default is the native one
def test_attention_implementations(folder, alone, backend):
    engine = small_engine(folder, max_num_seqs=2, attention_backend=backend)
    assert_same(run(engine, some(5, 4)), alone)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_devices(folder, alone, devices):
    engine = small_engine(folder, max_num_seqs=2, tensor_parallel_size=devices)
    assert len(engine.runner.mesh.devices.flat) == devices
    assert_same(run(engine, some(16, 9, 7)), alone)


@pytest.mark.parametrize(("devices", "loop"), [(4, "scan"), (8, "unroll")])
def test_devices_that_divide_neither_vocabulary_nor_feed_forward(uneven_folder, devices, loop):
    engine = small_engine(uneven_folder, max_num_seqs=1, tensor_parallel_size=devices, layer_loop=loop)
    outputs = run(engine, some(0, 4))
    for i in (0, 4):
        tokens, logits = hf_greedy(uneven_folder, PROMPTS[i], 64)
        assert margin(logits) > 1.5e-4
        assert outputs[str(i)].token_ids == tokens


def test_dynamic_scaling_and_the_prefix_cache(tmp_path):
    """Beyond the original length the angles of a prompt depend on all of it, so its pages must not be shared."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    folder = make_llama(tmp_path, seed=12, max_position_embeddings=64, rope_parameters=rope)
    engine = served_engine(folder, max_model_len=256)
    grown = run_one(engine, PROMPTS[6], greedy(40))  # passes the original length
    prompts = [
        PROMPTS[6],
        [*PROMPTS[6], *grown.token_ids],
        [*PROMPTS[6], *grown.token_ids, *PROMPTS[17]],
        [*PROMPTS[6], *grown.token_ids, *PROMPTS[3]],
    ]
    assert len(PROMPTS[6]) < 64 < len(prompts[1])
    for prompt in [*prompts, *prompts]:
        tokens, logits = hf_greedy(folder, prompt, 20)
        assert margin(logits) > 1.5e-4
        output = run_one(engine, prompt, greedy(20))
        assert output.token_ids == tokens
        assert (output.num_cached > 0) == (len(prompt) <= 64)
    # Preempted beyond it, a request is computed again with the angles that each token had.
    pushed = served_engine(folder, max_model_len=256, num_gpu_blocks_override=33)
    outputs = run(pushed, {str(i): (prompt, greedy(100)) for i, prompt in enumerate(prompts[:2])})
    assert pushed.stats().num_preemptions > 0
    for i, prompt in enumerate(prompts[:2]):
        tokens, logits = hf_greedy(folder, prompt, 100)
        assert margin(logits) > 1.5e-4
        assert outputs[str(i)].token_ids == tokens
