"""Settings of config.json that are absent, null or have another value, against transformers: a sample of what
`python -m tests.support.config_mutations` tries."""

import random

import pytest

from tests.support.config_mutations import FULL, SLIDING, Family, Mutation, Outcome

KNOWN: dict[str, list[Mutation]] = {
    "mistral": [Mutation(("layer_types",), [FULL, SLIDING, FULL])],
    "deepseek_v3": [Mutation(("rope_interleave",), None)],
    "gemma3": [Mutation(("text_config", "final_logit_softcapping"), 0.5)],
}
SAMPLED = ("phi", "qwen2")
EACH = 6


@pytest.mark.parametrize("model_type", KNOWN)
def test_what_was_once_read_otherwise(model_type, tmp_path):
    family = Family(model_type, tmp_path)
    outcomes = {str(mutation): family.check(mutation) for mutation in KNOWN[model_type]}
    assert {name: outcome for name, outcome in outcomes.items() if outcome.kind == "wrong"} == {}
    assert {outcome.kind for outcome in outcomes.values()} <= {"same", "refused"}


@pytest.mark.parametrize("model_type", SAMPLED)
def test_a_sample_of_mutations(model_type, tmp_path):
    family = Family(model_type, tmp_path)
    chosen = random.Random(model_type).sample(family.mutations(), EACH)
    outcomes = {str(mutation): family.check(mutation) for mutation in chosen}
    assert {name: outcome for name, outcome in outcomes.items() if outcome.kind == "wrong"} == {}


def test_a_reader_that_asks_for_too_little_is_found(tmp_path, monkeypatch):
    """The comparison itself: a window that is not read is reported."""
    family = Family("mistral", tmp_path)
    monkeypatch.setattr(family, "_ours", lambda config: family.base)
    assert family.check(Mutation(("sliding_window",), 2)).kind == "wrong"
    assert family.check(Mutation(("initializer_range",), 0.5)) == Outcome("same")
