"""The trainer: it learns, it repeats itself bit for bit, it goes on where it stopped, and its export is a Llama."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tools.tiny import export, speed
from tools.tiny.model import TinyConfig, count_parameters, forward, init_params
from tools.tiny.pipeline import PackedRows, batches
from tools.tiny.train import Params, Phase, Recipe, phase_of, run


def _quiet(line: str) -> None:
    del line


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, micro: TinyConfig, recipe: Recipe, tokenizer_folder: Path
) -> tuple[Params, list[float]]:
    path = tmp_path_factory.mktemp("run") / "main.npz"
    return run(micro, recipe, tokenizer_folder, path, report=_quiet)


def _equal(left: Params, right: Params) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_twenty_steps_lower_the_loss(trained: tuple[Params, list[float]]) -> None:
    _, losses = trained
    assert len(losses) == 20
    assert np.mean(losses[-4:]) < 0.85 * np.mean(losses[:4])


def test_a_run_repeats_itself_and_an_interruption_changes_nothing(
    trained: tuple[Params, list[float]],
    micro: TinyConfig,
    recipe: Recipe,
    tokenizer_folder: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "main.npz"
    _, first = run(micro, recipe, tokenizer_folder, path, stop_after=13, report=_quiet)
    params, second = run(micro, recipe, tokenizer_folder, path, report=_quiet)
    assert first + second == trained[1]
    assert _equal(params, trained[0])


def test_the_length_can_be_changed_before_the_rate_falls(
    trained: tuple[Params, list[float]],
    micro: TinyConfig,
    recipe: Recipe,
    tokenizer_folder: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "main.npz"
    longer = dataclasses.replace(recipe, steps=40)
    run(micro, longer, tokenizer_folder, path, stop_after=12, report=_quiet)
    params, _ = run(micro, recipe, tokenizer_folder, path, report=_quiet)
    assert _equal(params, trained[0])
    with pytest.raises(ValueError, match="belongs to another run"):
        run(micro, longer, tokenizer_folder, path, report=_quiet)


def test_another_seed_gives_another_run(
    trained: tuple[Params, list[float]],
    micro: TinyConfig,
    recipe: Recipe,
    tokenizer_folder: Path,
    tmp_path: Path,
) -> None:
    other = dataclasses.replace(recipe, seed=1)
    params, _ = run(micro, other, tokenizer_folder, tmp_path / "a.npz", stop_after=1, report=_quiet)
    assert not _equal(params, trained[0])
    with pytest.raises(ValueError, match="belongs to another run"):
        run(micro, recipe, tokenizer_folder, tmp_path / "a.npz", report=_quiet)
    with pytest.raises(ValueError, match="does not fit"):
        run(
            dataclasses.replace(micro, num_layers=2),
            other,
            tokenizer_folder,
            tmp_path / "a.npz",
            report=_quiet,
        )


def test_a_draft_learns_from_its_teacher(
    trained: tuple[Params, list[float]],
    micro: TinyConfig,
    recipe: Recipe,
    tokenizer_folder: Path,
    tmp_path: Path,
) -> None:
    small = dataclasses.replace(micro, hidden_size=16)
    batch = next(batches(tokenizer_folder, 9, 64, 4))
    wanted = jax.nn.softmax(forward(trained[0], batch["inputs"], micro, batch["segments"]))

    def gap(params: Params) -> float:
        logits = forward(params, batch["inputs"], small, batch["segments"])
        return float(-jnp.mean(jnp.sum(wanted * jax.nn.log_softmax(logits), -1)))

    before = gap(init_params(small, 0))
    params, _ = run(small, recipe, tokenizer_folder, tmp_path / "d.npz", (micro, trained[0]), report=_quiet)
    assert gap(params) < before - 0.2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_export_is_transformers_llama(
    trained: tuple[Params, list[float]], micro: TinyConfig, tokenizer_folder: Path, tmp_path: Path, dtype: str
) -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    export.export(tmp_path, micro, trained[0], tokenizer_folder, dtype)
    config, params = export.load(tmp_path)
    assert config == micro
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.num_parameters() == count_parameters(micro)
    tokens = np.random.default_rng(0).integers(0, 512, (2, 100), dtype=np.int32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long()).logits.numpy()
    ours = np.asarray(forward(params, jnp.asarray(tokens), config))
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-4


def test_a_broken_export_is_refused(
    trained: tuple[Params, list[float]], micro: TinyConfig, tokenizer_folder: Path, tmp_path: Path
) -> None:
    export.export(tmp_path, micro, trained[0], tokenizer_folder, "bfloat16")
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "hidden_size": 48}))
    with pytest.raises(ValueError, match="tensors do not fit"):
        export.load(tmp_path)


def test_documents_in_a_row_do_not_see_each_other(micro: TinyConfig) -> None:
    params = init_params(micro, 3)
    tokens = np.random.default_rng(1).integers(6, 512, (1, 24), dtype=np.int32)
    segments = np.asarray([[0] * 10 + [1] * 14], np.int32)
    packed = forward(params, tokens, micro, segments)[0, 10:]
    alone = forward(params, tokens[:, 10:], micro)[0]
    np.testing.assert_allclose(packed, alone, atol=1e-5)


def test_rows_are_full_and_start_anywhere(tokenizer_folder: Path) -> None:
    rows = PackedRows(tokenizer_folder, 0, 128)
    assert {name: value.shape for name, value in rows[7].items()} == dict.fromkeys(rows[7], (128,))
    assert np.array_equal(rows[7]["inputs"][1:], rows[7]["targets"][:-1])
    third = next(batches(tokenizer_folder, 0, 128, 4, start=2))
    assert all(np.array_equal(third[name][1], rows[9][name]) for name in third)
    borders = np.flatnonzero(np.diff(rows[7]["segments"]))
    assert all(rows[7]["weights"][at] == 0 for at in borders), "no document predicts the start of the next"


def test_phases_share_the_steps() -> None:
    recipe = Recipe(steps=10, phases=(Phase(64, 2, 0.6), Phase(128, 1, 0.4)))
    assert [phase_of(recipe, step)[:2] for step in (0, 5, 6, 9)] == [(0, 0), (0, 5), (1, 0), (1, 3)]
    with pytest.raises(ValueError, match="past the last one"):
        phase_of(recipe, 10)


def test_minutes_become_steps(micro: TinyConfig, recipe: Recipe, tokenizer_folder: Path) -> None:
    assert speed.steps_within(micro, recipe, tokenizer_folder, 1e-6) == 1
    assert speed.steps_within(micro, recipe, tokenizer_folder, 100.0) > 20
