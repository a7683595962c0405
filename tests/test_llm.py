"""`LLM`: what it takes, what it gives back, and that nothing a caller does leaves the engine unusable.

Greedy tokens and log-probabilities are held against `jinfer.forward` on the same weights.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer import LLM, RequestError, SamplingParams, forward, load_params
from tests.support.engines import SMALL, check_idle, collect, greedy
from tests.support.models import make_llama, random_prompt

PROMPT = random_prompt(1, 20)
WIDTH = 64  # `forward` is compiled for this length alone


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("llm")
    return [make_llama(root / f"model{seed}", seed=seed, scale=0.2) for seed in (1, 2)]


@pytest.fixture(scope="module")
def llm(folders):
    return LLM(str(folders[0]), **SMALL)


@pytest.fixture(scope="module")
def params(folders):
    return [load_params(str(folder)) for folder in folders]


@pytest.fixture(autouse=True)
def idle_afterwards(request):
    yield
    if "llm" in request.fixturenames:
        check_idle(request.getfixturevalue("llm").engine)


def timings(output) -> Any:
    return output.outputs[0].timings


_forward = jax.jit(forward)


def log_softmax(params, tokens):
    """float32[S, V]: what follows each prefix of `tokens`."""
    padded = jnp.asarray(list(tokens) + [0] * (WIDTH - len(tokens)))
    return np.asarray(jax.nn.log_softmax(_forward(params, padded)))[: len(tokens)]


def reference(params, prompt, count):
    """Greedy tokens without an engine."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(log_softmax(params, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def expected(params):
    """Eight greedy tokens after PROMPT."""
    return reference(params[0], PROMPT, 8)


# What it takes


def test_greedy_tokens_are_those_of_forward(llm, expected):
    (output,) = llm.generate(PROMPT, greedy(8))
    assert output.token_ids == expected
    assert output.prompt is None
    assert list(output.prompt_token_ids) == PROMPT
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("length", None)
    assert output.text == output.outputs[0].text == llm.tokenizer.decode(expected)


def test_a_text_is_its_token_ids(llm):
    (by_text,) = llm.generate("hello there", greedy(8))
    (by_ids,) = llm.generate(llm.encode("hello there"), greedy(8))
    assert by_text.prompt == "hello there"
    assert by_text.prompt_token_ids == by_ids.prompt_token_ids == llm.encode("hello there")
    assert by_text.token_ids == by_ids.token_ids
    assert len(by_ids.token_ids) == 8


def test_many_prompts_of_all_kinds_keep_their_order(llm, expected):
    prompts = ["first", PROMPT, np.asarray(PROMPT), tuple(random_prompt(2, 9)), "last one", PROMPT[:3], "x"]
    outputs = llm.generate(prompts, greedy(8))
    assert [o.prompt for o in outputs] == ["first", None, None, None, "last one", None, "x"]
    assert [list(o.prompt_token_ids) for o in outputs] == [
        llm.encode(p) if isinstance(p, str) else list(p) for p in prompts
    ]
    assert outputs[1].token_ids == outputs[2].token_ids == expected
    for prompt, output in zip(prompts, outputs, strict=True):
        assert llm.generate([prompt], greedy(8))[0].token_ids == output.token_ids
    assert len({tuple(o.token_ids) for o in outputs}) == 6


def test_an_array_of_ids_is_a_prompt_and_a_matrix_is_several(llm, expected):
    (one,) = llm.generate(np.asarray(PROMPT), greedy(8))
    two = llm.generate(np.asarray([PROMPT, PROMPT[::-1]]), greedy(8))
    assert one.token_ids == two[0].token_ids == expected != two[1].token_ids


def test_an_object_holds_text_or_ids(llm, expected):
    (text,) = llm.generate({"prompt": "hello"}, greedy(8))
    ids, same = llm.generate([{"prompt_token_ids": PROMPT}, {"prompt": "hello"}], greedy(8))
    assert (text.prompt, ids.prompt) == ("hello", None)
    assert ids.token_ids == expected
    assert same.token_ids == text.token_ids == llm.generate("hello", greedy(8))[0].token_ids


def test_each_prompt_has_its_own_parameters(llm, expected):
    many = [greedy(2), greedy(8), greedy(5, logit_bias={65: 100.0}), SamplingParams(max_tokens=3, seed=1)]
    short, whole, biased, sampled = llm.generate([PROMPT] * 4, many)
    assert short.token_ids == expected[:2]
    assert whole.token_ids == expected
    assert biased.token_ids == [65] * 5
    assert sampled.token_ids != expected[:3]
    assert len(llm.generate(PROMPT)[0].token_ids) == 16  # the default's max_tokens


def test_no_prompts_are_no_outputs(llm):
    assert llm.generate([]) == []


def test_more_prompts_than_the_queue_holds(folders, expected):
    llm = LLM(str(folders[0]), **{**SMALL, "max_num_waiting": 2})
    outputs = llm.generate([PROMPT] * 9, [greedy(1 + i % 8) for i in range(9)], use_tqdm=False)
    assert [o.token_ids for o in outputs] == [expected[: 1 + i % 8] for i in range(9)]
    with pytest.raises(RequestError, match="n is 3.*max_num_waiting=2"):
        llm.generate([PROMPT, PROMPT], [greedy(8), greedy(8, n=3)])
    check_idle(llm.engine)


def test_priority_decides_who_goes_first(folders):
    llm = LLM(str(folders[0]), **{**SMALL, "scheduling_policy": "priority"})
    prompts = [random_prompt(50 + i, 16) for i in range(6)]  # one prompt fills a step
    outputs = llm.generate(prompts, greedy(8), priority=[5, 4, 3, 2, 1, 0])
    scheduled = np.asarray([timings(o).scheduled for o in outputs])
    assert (np.diff(scheduled) <= 0).all()
    assert scheduled[0] > scheduled[-1]
    with pytest.raises(RequestError, match="1 priorities for 2 prompts"):
        llm.generate(["a", "b"], greedy(8), priority=[1])
    check_idle(llm.engine)


# Several choices


def test_sampled_forks_differ_and_repeat(llm):
    params = SamplingParams(n=3, temperature=2.0, seed=7, max_tokens=12, ignore_eos=True)
    (first,), (again,) = llm.generate(PROMPT, params), llm.generate(PROMPT, params)
    texts = [tuple(c.token_ids) for c in first.outputs]
    assert [c.index for c in first.outputs] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [tuple(c.token_ids) for c in again.outputs]


def test_greedy_forks_are_equal(llm, expected):
    (output,) = llm.generate(PROMPT, greedy(8, n=4))
    assert [c.token_ids for c in output.outputs] == [expected] * 4
    assert len({c.text for c in output.outputs}) == 1


@pytest.mark.parametrize("caching", [True, False])
def test_forks_share_the_pages_of_their_prompt(folders, caching):
    engine = LLM(str(folders[0]), **SMALL, enable_prefix_caching=caching).engine
    prompt = random_prompt(31, 45)  # five full pages of eight, and a part
    engine.add_request("r", prompt, greedy(40, n=3))
    deltas = []
    while engine.stats().num_running < 3 or len(deltas) < 6:
        deltas += engine.step()
    # Five pages together and one of each fork's own; as strangers they would take 18 at least.
    assert 5 + 3 * 1 <= engine.scheduler.groups[0].pool.num_used <= 5 + 3 * 2
    engine.check_integrity()
    deltas += engine.drain()
    outputs = collect(deltas)
    assert [outputs["r", i].num_cached for i in range(3)] == [0, 40, 40]
    assert outputs["r", 0].token_ids == outputs["r", 1].token_ids == outputs["r", 2].token_ids
    check_idle(engine)


def test_a_repeated_prompt_is_found_in_the_cache(llm):
    prompt = random_prompt(32, 41)
    first, second = (llm.generate(prompt, greedy(4))[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 40)
    assert first.token_ids == second.token_ids


# Log-probabilities


def test_logprobs_are_those_of_forward(llm, params, expected):
    # Penalties and temperature do not change them: they are of the raw distribution.
    given = SamplingParams(
        max_tokens=8, temperature=1.7, seed=3, repetition_penalty=1.5, ignore_eos=True, logprobs=3
    )
    for asked in (given, greedy(8, logprobs=3)):
        (output,) = llm.generate(PROMPT, asked)
        table = log_softmax(params[0], PROMPT + output.token_ids)[len(PROMPT) - 1 :]
        entries = output.outputs[0].logprobs
        assert entries is not None
        assert len(entries) == 8
        for row, token, entry in zip(table[:8], output.token_ids, entries, strict=True):
            _check_entry(entry, row, token, 3)
    assert [e.rank for e in entries] == [1] * 8
    assert output.prompt_logprobs is None


def test_prompt_logprobs_are_those_of_forward(llm, params):
    prompt = random_prompt(33, 43)
    table = log_softmax(params[0], prompt)
    for _ in range(
        2
    ):  # the second time the prompt is in the cache, and its log-probabilities are wanted still
        (output,) = llm.generate(prompt, greedy(2, prompt_logprobs=2))
        entries = output.prompt_logprobs
        assert entries is not None
        assert len(entries) == 43
        assert entries[0] is None
        for i in range(1, 43):
            _check_entry(entries[i], table[i - 1], prompt[i], 2)
        assert output.outputs[0].logprobs is None


def test_no_alternatives_still_tell_of_the_chosen_token(llm, expected):
    (output,) = llm.generate(PROMPT, greedy(8, logprobs=0, n=2))
    for choice in output.outputs:
        assert [(e.token_id, e.rank, e.top) for e in choice.logprobs] == [(t, 1, ()) for t in expected]


def _check_entry(entry, row, token, count):
    assert entry.token_id == token
    assert entry.logprob == pytest.approx(row[token], abs=2e-4)
    assert entry.rank == pytest.approx(1 + (row > row[token]).sum(), abs=1)
    best = np.sort(row)[::-1][:count]
    assert len(entry.top) == count
    np.testing.assert_allclose([p for _, p in entry.top], best, atol=2e-4)
    np.testing.assert_allclose([row[i] for i, _ in entry.top], best, atol=2e-4)


# Refusals


REFUSED = {
    "empty text": (["fine", ""], None, "prompt is empty"),
    "no ids": ([[1, 2], []], None, "prompt is empty"),
    "too long": ([PROMPT, [1] * 256], None, "256 tokens, max_model_len is 256"),
    "beyond the vocabulary": ([PROMPT, [3, 300]], None, "token id 300, expected integers from 0 to 299"),
    "negative": ([PROMPT, [3, -1]], None, "token id -1"),
    "no integers": ([PROMPT, [3, "x"]], None, "token id 'x'"),
    "truth values": ([PROMPT, [3, True]], None, "token id True"),
    "bytes": (b"abc", None, "prompts is a bytes"),
    "another object": ([PROMPT, {"text": "a"}], None, r"prompts\[1\] is an object with 'text'"),
    "too few parameters": ([PROMPT] * 3, [greedy(8)] * 2, "2 sampling_params for 3 prompts"),
    "n beyond the queue": ([PROMPT] * 2, [greedy(8), greedy(8, n=9)], "n is 9 .*max_num_waiting=8"),
    "bias beyond the vocabulary": ([PROMPT], greedy(8, logit_bias={300: 1.0}), "logit_bias has token id 300"),
    "stop beyond the vocabulary": ([PROMPT], greedy(8, stop_token_ids=(300,)), "stop_token_ids .* 300"),
}


@pytest.fixture(scope="module")
def refusing(folders):
    return LLM(str(folders[0]), **SMALL, max_num_waiting=8)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_run_is_refused_before_anything_runs(refusing, expected, case):
    prompts, params, message = REFUSED[case]
    steps = refusing.engine.stats().steps
    with pytest.raises(RequestError, match=message):
        refusing.generate(prompts, params)
    assert refusing.engine.stats().steps == steps
    check_idle(refusing.engine)
    assert refusing.generate(PROMPT, greedy(8))[0].token_ids == expected


# The progress bar


def test_the_progress_bar_shows_on_large_batches_only(llm, capsys):
    llm.generate(["a"] * 8, greedy(1), use_tqdm=False)
    llm.generate(["a"] * 7, greedy(1))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    llm.generate(["a"] * 8, greedy(1, n=2))
    assert "8/8" in capsys.readouterr().err


# Interruptions


def _interrupt(engine, where, at):
    """Makes the at-th call fail as Ctrl-C would."""
    calls = 0
    target, name = {
        "before a step": (engine.scheduler, "schedule"),
        "dispatching": (engine.runner, "dispatch"),
        "after a commit": (engine, "_text_of"),
    }[where]
    real = getattr(target, name)

    def failing(*args):
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return real(*args)

    return target, name, failing


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("where", ["before a step", "dispatching", "after a commit"])
@pytest.mark.parametrize("at", [1, 4, 7])
def test_an_interrupted_batch_leaves_nothing_behind(interruptible, expected, monkeypatch, overlap, where, at):
    llm = interruptible[overlap]
    with monkeypatch.context() as patch:
        patch.setattr(*_interrupt(llm.engine, where, at))
        with pytest.raises(KeyboardInterrupt):
            llm.generate([PROMPT] * 7, [greedy(1 + i) for i in range(7)], use_tqdm=False)
    check_idle(llm.engine)
    assert llm.engine.fail_all("nothing is left that could fail") == []
    # Pages that the lost step was to fill must not be found.
    assert llm.generate(PROMPT, greedy(8))[0].token_ids == expected
    check_idle(llm.engine)


@pytest.fixture(scope="module")
def interruptible(folders):
    return {overlap: LLM(str(folders[0]), **SMALL, async_scheduling=overlap) for overlap in (True, False)}


# Other weights


def test_new_weights_act_at_once_without_recompiling(folders, params, expected):
    # Compiled ahead, so that a step compiled later would be counted.
    llm = LLM(str(folders[0]), **{**SMALL, "warmup": True})
    other = reference(params[1], PROMPT, 8)
    assert llm.generate(PROMPT, greedy(8))[0].token_ids == expected != other
    llm.update_weights(params[1])
    swapped = llm.generate(PROMPT, greedy(8))[0]
    # The prompt was in the cache, with the old weights' keys and values.
    assert swapped.token_ids == other
    assert swapped.num_cached_tokens == 0
    llm.update_weights(params[0])
    assert llm.generate(PROMPT, greedy(8))[0].token_ids == expected
    check_idle(llm.engine)


def test_weights_of_another_shape_change_nothing(llm, params, expected, tmp_path):
    other = load_params(str(make_llama(tmp_path / "other", num_hidden_layers=1)))
    narrow = load_params(str(make_llama(tmp_path / "narrow", intermediate_size=40)))
    for wrong, message in ((other, "missing|shape"), (narrow, "shape")):
        with pytest.raises(ValueError, match=message):
            llm.update_weights(wrong)
        assert llm.generate(PROMPT, greedy(8))[0].token_ids == expected


# Conversations


def test_chat_renders_the_models_template(llm):
    chat = [{"role": "user", "content": "hi"}]
    (answer,) = llm.chat(chat, greedy(6))
    assert answer.prompt == "user: hi\nassistant: "
    assert answer.token_ids == llm.generate("user: hi\nassistant: ", greedy(6))[0].token_ids
    two = llm.chat([chat, [{"role": "user", "content": "you"}]], [greedy(6), greedy(2)])
    assert two[0].token_ids == answer.token_ids
    assert len(two[1].token_ids) == 2
    assert two[1].prompt == "user: you\nassistant: "
    (bare,) = llm.chat(chat, greedy(1), add_generation_prompt=False)
    assert bare.prompt == "user: hi\n"
    for option in ("tools", "documents"):
        with pytest.raises(RequestError, match=f"no place for {option}"):
            llm.chat(chat, **{option: [{"text": "x"}]})
    for given, message in (
        ({"foo": 1}, "chat has no option 'foo', expected one of tools, documents"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs is a list"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs has 'messages'"),
    ):
        with pytest.raises(RequestError, match=message):
            llm.chat(chat, greedy(1), **given)
    for messages in ("hi", None, 5, {"role": "user", "content": "hi"}):
        with pytest.raises(RequestError, match="messages is .*, expected a list"):
            llm.chat(messages, greedy(1))
    with pytest.raises(RequestError, match=r"messages\[0\] is not an object with a role"):
        llm.chat(["hi"], greedy(1))


def test_the_bundled_model_talks():
    llm = LLM(max_num_seqs=1, max_num_batched_tokens=16, block_size=8, max_model_len=64, warmup=False)
    chat = [{"role": "user", "content": "Tell me a story"}]
    (answer,) = llm.chat(chat, SamplingParams(temperature=0.0, max_tokens=12))
    # Special tokens of the template are single ids, and no second begin token is put in front.
    assert answer.prompt == "<|bos|><|user|>Tell me a story<|end|><|assistant|>"
    assert answer.prompt_token_ids == llm.tokenizer.encode(answer.prompt, add_special_tokens=False)
    assert list(answer.prompt_token_ids).count(1) == 1
    assert len(answer.token_ids) == 12
    assert answer.text.isprintable()
    assert " " in answer.text
    with pytest.raises(RequestError, match="unknown role"):
        llm.chat([{"role": "robot", "content": "beep"}])
    check_idle(llm.engine)
