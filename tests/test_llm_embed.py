"""`LLM.embed` and `LLM.score`: vectors and log-likelihoods are those of transformers, whatever shares the steps."""

import json

import numpy as np
import pytest
import torch

from jinfer import LLM, PoolingParams, RequestError
from jinfer.pooling import EMBED, OwnPooling, default_pooling
from tests.support.engines import SMALL, check_idle, collect, greedy
from tests.support.models import GROUPED, load_hf, make_llama, random_prompt

LENGTHS = (1, 7, 16, 17, 60, 200)  # a step has room for 16 tokens
PROMPTS = [random_prompt(n, n) for n in LENGTHS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("embed") / "model", seed=3, **GROUPED)


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(str(folder), **SMALL)


@pytest.fixture(autouse=True)
def idle_afterwards(request):
    yield
    if "llm" in request.fixturenames:
        check_idle(request.getfixturevalue("llm").engine)


def hidden_states(folder, tokens):
    """float64[S, E]: transformers' last hidden layer, behind the final norm."""
    with torch.no_grad():
        output = load_hf(folder)(torch.tensor([tokens]), output_hidden_states=True)
    return output.hidden_states[-1][0].double().numpy()


def hf_vector(folder, tokens, pooling, normalize):
    states = hidden_states(folder, tokens)
    vector = states[-1] if pooling == "last" else states.mean(0)
    return vector / np.linalg.norm(vector) if normalize else vector


def hf_logprobs(folder, tokens):
    """float32[S - 1]: of each token after the first."""
    with torch.no_grad():
        table = load_hf(folder)(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return table[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()


# Embeddings


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_vectors_are_those_of_transformers(llm, folder, pooling, normalize):
    outputs = llm.embed(PROMPTS, pooling=pooling, normalize=normalize)
    assert len(outputs) == len(PROMPTS)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = hf_vector(folder, prompt, pooling, normalize)
        assert output.embedding.dtype == np.float32
        assert output.embedding.shape == expected.shape
        assert np.abs(output.embedding - expected).max() < 1e-4 * np.abs(expected).max()
        assert list(output.prompt_token_ids) == prompt


@pytest.mark.parametrize("devices", [2, 4])
def test_vectors_are_the_same_on_a_sharded_mesh(folder, devices):
    llm = LLM(str(folder), **SMALL, tensor_parallel_size=devices)
    for pooling in ("last", "mean"):
        for prompt, output in zip(PROMPTS, llm.embed(PROMPTS, pooling=pooling), strict=True):
            np.testing.assert_allclose(output.embedding, hf_vector(folder, prompt, pooling, True), atol=1e-5)
    check_idle(llm.engine)


def test_a_cached_prefix_changes_nothing(llm, folder):
    prompt = random_prompt(77, 50)
    llm.generate(prompt, greedy(1))
    (last,), (mean,) = (llm.embed(prompt, pooling=kind) for kind in ("last", "mean"))
    # The mean needs hidden states that no page keeps, so it computes the prompt anew.
    assert (last.num_cached_tokens, mean.num_cached_tokens) == (48, 0)
    for kind, output in (("last", last), ("mean", mean)):
        np.testing.assert_allclose(output.embedding, hf_vector(folder, prompt, kind, True), atol=1e-5)


def test_text_and_one_prompt(llm):
    (by_text,), (by_ids,) = llm.embed("hello there"), llm.embed(llm.encode("hello there"))
    assert (by_text.prompt, by_ids.prompt) == ("hello there", None)
    np.testing.assert_array_equal(by_text.embedding, by_ids.embedding)
    assert np.linalg.norm(by_text.embedding) == pytest.approx(1, abs=1e-6)
    assert llm.embed([]) == []


def test_text_goes_on_while_a_long_prompt_is_embedded(llm):
    engine = llm.engine
    engine.add_request("text", random_prompt(5, 6), greedy(40))
    while not engine.step():
        pass
    engine.add_request("e", random_prompt(92, 200), EMBED, pooling=PoolingParams())
    steps = []
    while not (steps and any(d.request_id == "e" for d in steps[-1])):
        steps.append(engine.step())
    # 15 of a step's 16 tokens are the prompt's, and one is the text's, in every single step.
    assert 14 <= len(steps) <= 17
    assert all(any(d.request_id == "text" for d in deltas) for deltas in steps)
    list(engine.drain())


@pytest.mark.parametrize("overlap", [True, False])
def test_beside_running_text_and_when_pages_run_out(folder, overlap):
    # Seven pages of 8 tokens for 30 tokens of text and three prompts of 40: somebody is preempted.
    options = {**SMALL, "max_model_len": 48, "num_gpu_blocks_override": 8, "async_scheduling": overlap}
    engine = LLM(str(folder), **options).engine
    text = random_prompt(5, 6)
    alone = LLM(str(folder), **SMALL).generate(text, greedy(24))[0].token_ids
    engine.add_request("text", text, greedy(24))
    prompts = [random_prompt(90 + i, 40) for i in range(3)]
    for i, prompt in enumerate(prompts):
        engine.add_request(f"e{i}", prompt, EMBED, pooling=PoolingParams(("last", "mean")[i % 2]))
    deltas = list(engine.drain())
    assert collect(deltas)["text", 0].token_ids == alone
    for i, prompt in enumerate(prompts):
        (delta,) = [d for d in deltas if d.request_id == f"e{i}"]
        assert (delta.token_ids, delta.text, delta.num_prompt_tokens) == ([], "", 40)
        assert delta.embedding is not None
        expected = hf_vector(folder, prompt, ("last", "mean")[i % 2], True)
        np.testing.assert_allclose(delta.embedding, expected, atol=1e-5)
    assert engine.stats().generation_tokens == 24
    check_idle(engine)


def test_a_preempted_mean_begins_again(folder):
    engine = LLM(str(folder), **SMALL).engine
    prompt = random_prompt(91, 40)
    engine.add_request("e", prompt, EMBED, pooling=PoolingParams("mean"))
    engine.step()
    engine.step()  # two of three chunks are dispatched
    (entry,) = engine.scheduler.entries.values()
    engine.scheduler._preempt(entry)
    (delta,) = engine.drain()
    assert delta.embedding is not None
    np.testing.assert_allclose(delta.embedding, hf_vector(folder, prompt, "mean", True), atol=1e-5)
    check_idle(engine)


def test_nothing_compiles_for_an_embedding(folder):
    llm = LLM(str(folder), **{**SMALL, "warmup": True})
    llm.embed(PROMPTS)
    check_idle(llm.engine)  # its recompiles are 0


def test_refusals_of_embed(llm):
    with pytest.raises(RequestError, match="pooling is 'cls', expected one of last, mean"):
        llm.embed("x", pooling="cls")
    with pytest.raises(RequestError, match="prompt is empty"):
        llm.embed(["x", ""])
    with pytest.raises(RequestError, match="257 tokens, max_model_len is 256"):
        llm.embed([[1] * 257])
    with pytest.raises(RequestError, match="prompts is None"):
        llm.embed(None)


def write_modules(folder, kinds, pooling):
    modules = [
        {"idx": i, "type": f"sentence_transformers.models.{k}", "path": f"{i}_{k}"}
        for i, k in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for i, kind in enumerate(kinds):
        if kind == "Pooling":
            (folder / f"{i}_Pooling").mkdir(exist_ok=True)
            (folder / f"{i}_Pooling" / "config.json").write_text(json.dumps(pooling))


def test_a_sentence_transformers_folder_says_how_to_pool(tmp_path):
    assert default_pooling(tmp_path) == PoolingParams("last", True)
    mean = {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False, "word_embedding_dimension": 8}
    write_modules(tmp_path, ["Transformer", "Pooling"], mean)
    assert default_pooling(tmp_path) == PoolingParams("mean", False)
    write_modules(tmp_path, ["Transformer", "Pooling", "Normalize"], {"pooling_mode_lasttoken": True})
    assert default_pooling(tmp_path) == PoolingParams("last", True)
    write_modules(tmp_path, ["Transformer", "Pooling"], {"pooling_mode_cls_token": True})
    with pytest.raises(RequestError, match="pooling_mode_cls_token.* name the pooling"):
        default_pooling(tmp_path)
    write_modules(tmp_path, ["Transformer", "Pooling", "Dense"], mean)
    with pytest.raises(RequestError, match="Dense"):
        default_pooling(tmp_path)


BROKEN = {
    "modules.json is not a list": ("modules.json", "{}"),
    "modules.json cannot be read as JSON": ("modules.json", "[1"),
    "1_Pooling/config.json cannot be read as JSON": ("1_Pooling/config.json", "{"),
    "1_Pooling/config.json is not an object": ("1_Pooling/config.json", "[]"),
    "modules.json asks for pooling, and .*1_Pooling/config.json is missing": ("1_Pooling/config.json", None),
    "not in the model's folder": ("modules.json", '[{"type": "x.Pooling", "path": "../other"}]'),
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_cannot_be_read_of_it_is_named(tmp_path, message):
    name, content = BROKEN[message]
    write_modules(tmp_path, ["Transformer", "Pooling"], {"pooling_mode_mean_tokens": True})
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(RequestError, match=f"{message}.*name the pooling .* in the request") as told:
        default_pooling(tmp_path)
    assert told.value.param == "pooling"


def test_the_folder_is_read_once(tmp_path, caplog):
    write_modules(tmp_path, ["Transformer", "Pooling"], {"pooling_mode_mean_tokens": True})
    own = OwnPooling(tmp_path)
    (tmp_path / "modules.json").write_text("{}")
    assert own.params() == PoolingParams("mean", False)
    assert not caplog.records
    broken = OwnPooling(tmp_path)
    assert "modules.json is not a list" in caplog.text  # at the start, not with the first request
    (tmp_path / "modules.json").unlink()
    with pytest.raises(RequestError, match="modules.json is not a list"):
        broken.params()


def test_a_file_linked_into_a_cache_is_read(tmp_path):
    folder = tmp_path / "snapshot"
    folder.mkdir()
    write_modules(folder, ["Transformer", "Pooling"], {"pooling_mode_mean_tokens": True})
    (folder / "1_Pooling" / "config.json").rename(tmp_path / "blob")
    (folder / "1_Pooling" / "config.json").symlink_to(tmp_path / "blob")
    assert default_pooling(folder) == PoolingParams("mean", False)


# Scores


def test_scores_of_continuations_are_those_of_transformers(llm, folder):
    heads = [random_prompt(200 + i, n) for i, n in enumerate((1, 9, 40))]
    tails = [random_prompt(300 + i, n) for i, n in enumerate((5, 1, 33))]
    for head, tail, score in zip(heads, tails, llm.score(heads, tails), strict=True):
        expected = hf_logprobs(folder, head + tail)[len(head) - 1 :]
        assert (score.prompt_token_ids, score.token_ids) == (head, tail)
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-4)
        assert score.logprob == pytest.approx(float(expected.sum()), abs=1e-3)
        assert not score.is_greedy


def test_one_prompt_for_many_continuations(llm):
    head, tails = random_prompt(201, 20), [[7], [9, 11], [7]]
    scores = llm.score(head, tails)
    assert [s.token_ids for s in scores] == tails
    assert scores[0].logprobs == pytest.approx(scores[2].logprobs, abs=1e-5)
    assert llm.score(head, tails[1])[0].logprob == pytest.approx(scores[1].logprob, abs=1e-5)


def test_a_prompt_may_fill_the_models_length(llm, folder):
    full = random_prompt(400, 256)
    beside = llm.embed([full, random_prompt(401, 255), full], pooling="mean")
    np.testing.assert_allclose(beside[0].embedding, hf_vector(folder, full, "mean", True), atol=1e-5)
    np.testing.assert_allclose(beside[2].embedding, beside[0].embedding, atol=1e-5)
    (last,) = llm.embed([full])
    np.testing.assert_allclose(last.embedding, hf_vector(folder, full, "last", True), atol=1e-5)
    (score,) = llm.score([full[:250]], [full[250:]])
    np.testing.assert_allclose(score.logprobs, hf_logprobs(folder, full)[249:], atol=1e-4)
    # Text needs a place for what it generates.
    with pytest.raises(RequestError, match="256 tokens, max_model_len is 256"):
        llm.generate(full, greedy(1))


@pytest.mark.parametrize("overlap", [True, False])
def test_it_may_where_no_more_pages_exist(folder, overlap):
    options = {**SMALL, "max_model_len": 48, "num_gpu_blocks_override": 7, "async_scheduling": overlap}
    llm = LLM(str(folder), **options)
    full = [random_prompt(402 + i, 48) for i in range(3)]
    for prompt, output in zip(full, llm.embed(full), strict=True):
        np.testing.assert_allclose(output.embedding, hf_vector(folder, prompt, "last", True), atol=1e-5)
    check_idle(llm.engine)


def test_prompts_may_be_objects(llm):
    (text,), (ids,) = llm.embed({"prompt": "hello"}), llm.embed([{"prompt_token_ids": llm.encode("hello")}])
    assert (text.prompt, ids.prompt) == ("hello", None)
    np.testing.assert_array_equal(text.embedding, ids.embedding)
    (scored,) = llm.score({"prompt": "hello"}, [{"prompt_token_ids": [7, 8]}])
    assert scored.token_ids == [7, 8]
    assert scored.prompt_token_ids == llm.encode("hello")


def test_greedy_continuations_are_known_as_such(llm):
    head = random_prompt(202, 20)
    tail = llm.generate(head, greedy(6))[0].token_ids
    right, wrong = llm.score(head, [tail, [*tail[:5], (tail[5] + 1) % 256]])
    assert (right.is_greedy, wrong.is_greedy) == (True, False)
    assert right.logprob > wrong.logprob


def test_whole_texts_are_scored_from_their_second_token_on(llm, folder):
    for prompt, score in zip(PROMPTS[1:], llm.score(PROMPTS[1:]), strict=True):
        np.testing.assert_allclose(score.logprobs, hf_logprobs(folder, prompt), atol=1e-4)
        assert score.prompt_token_ids == prompt[:1]


def test_two_texts_are_tokenized_as_one():
    llm = LLM(max_num_seqs=1, max_num_batched_tokens=16, block_size=8, max_model_len=64, warmup=False)
    whole = llm.encode("The fox ran home")
    alone = llm.encode("The fox ran ")
    (score,) = llm.score("The fox ran ", "home")
    # The space belongs to the word that follows it, as the model has learned to see it.
    assert [*score.prompt_token_ids, *score.token_ids] == whole
    assert score.prompt_token_ids == whole[: len(score.prompt_token_ids)]
    assert len(score.prompt_token_ids) < len(alone)
    assert "home" in llm.tokenizer.decode(score.token_ids)
    (mixed,) = llm.score("The fox", whole[-2:])
    assert mixed.prompt_token_ids == llm.encode("The fox")
    check_idle(llm.engine)


REFUSED = {
    "different numbers": ((["a", "b"], ["c", "d", "e"]), "2 prompts for 3 continuations"),
    "nothing to score": ((["a"], [""]), "adds no token"),
    "too long": (([1] * 200, [[2] * 57]), "257 tokens, max_model_len is 256"),
    "nothing before": (([[]], [[5]]), "no token stands before"),
    "one token": ((["a"],), "fewer than two tokens"),
    "nothing": ((None, ["a"]), "prompts is None"),
    "a number": (("a", 5), "continuations is a int"),
    "no ids": (("a", [1.5]), r"continuations\[0\] is a float"),
    "another object": (("a", {"text": "b"}), "continuations is an object with 'text'"),
    "beyond the vocabulary": (([[5]], [[9999]]), "token id 9999"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_of_score(llm, case):
    given, message = REFUSED[case]
    with pytest.raises(RequestError, match=message):
        llm.score(*given)
