"""Checkpoints that name or hold their tensors otherwise than the family's usual ones, against transformers."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from jinfer import LLM, RequestError, forward, load_params
from jinfer.errors import ModelError
from tests.support.engines import SMALL as ENGINE
from tests.support.engines import greedy, run_one, small_engine
from tests.support.models import (
    hf_logits,
    make_model,
    random_prompt,
    reference,
    relative_error,
    write_tokenizer,
)
from tools.convert import main
from tools.verify_model.reference import Reference

PROMPT = random_prompt(3, 11)
TOKENS = jnp.asarray(PROMPT)


def rewrite(folder: Path, change: Any) -> Path:
    """Writes the folder's tensors again, as `change` makes them of what they were."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return folder


def check_equal(folder: Path) -> None:
    """The folder's logits are those of transformers."""
    actual = np.asarray(forward(load_params(str(folder), dtype="float32"), TOKENS))
    assert relative_error(actual, hf_logits(folder, PROMPT)) < 1e-4


@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_rotary_frequencies_are_not_read(model_type, tmp_path):
    frequencies = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32) for i in range(2)
    }
    check_equal(rewrite(make_model(model_type, tmp_path), lambda tensors: {**tensors, **frequencies}))


SMALL: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 24}


def head_of(tensors: dict[str, np.ndarray], name: str = "model.embed_tokens.weight") -> dict[str, np.ndarray]:
    return {**tensors, "lm_head.weight": tensors[name].copy()}


def test_a_tied_head_that_differs_is_used(tmp_path, caplog):
    def other_head(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = head_of(tensors)
        tensors["lm_head.weight"][-1, -1] += 50.0  # the last value of all
        return tensors

    folder = rewrite(make_model("qwen3", tmp_path, tie_word_embeddings=True, **SMALL), other_head)
    check_equal(folder)
    output = tmp_path / "converted"
    assert main(["--model", str(folder), "--output", str(output)]) == 0
    assert "head" in load_params(str(output)).arrays
    assert "lm_head.weight differs from them: the head is used as it is" in caplog.text


def test_a_tied_head_that_is_equal_costs_nothing(tmp_path):
    folder = rewrite(make_model("qwen3", tmp_path, tie_word_embeddings=True, **SMALL), head_of)
    assert "head" not in load_params(str(folder)).arrays
    check_equal(folder)


def test_a_tied_model_may_have_the_head_alone(tmp_path):
    def without_table(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        return tensors

    tied = make_model("qwen3", tmp_path / "tied", tie_word_embeddings=True, **SMALL)
    check_equal(rewrite(tied, without_table))
    untied = make_model("qwen3", tmp_path / "untied", **SMALL)
    rewrite(untied, lambda t: {name: t[name] for name in t if "embed_tokens" not in name})
    with pytest.raises(ModelError, match=r"lacks 1 tensor\(s\): model.embed_tokens.weight"):
        load_params(str(untied))


def test_a_tied_model_without_either_is_told_so(tmp_path):
    folder = make_model("qwen3", tmp_path, tie_word_embeddings=True, **SMALL)
    rewrite(folder, lambda t: {name: t[name] for name in t if "embed_tokens" not in name})
    with pytest.raises(ModelError, match=r"lacks 1 tensor\(s\): model.embed_tokens.weight"):
        load_params(str(folder))


def as_base(folder: Path, architecture: str | None) -> Path:
    """The folder as transformers' class without a head saves it; `architecture` is what config.json calls it."""
    model = reference(folder).model.model
    target = folder.parent / f"{folder.name}-base"
    model.save_pretrained(target)
    (target / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    if architecture is not None:
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    return target


def test_a_base_model_that_is_tied_generates(tmp_path):
    folder = make_model("qwen3", tmp_path / "model", tie_word_embeddings=True, **SMALL)
    check_equal(as_base(folder, "Qwen3ForCausalLM"))


@pytest.mark.parametrize(
    ("model_type", "architecture"), [("mistral", None), ("qwen3", "Qwen3ForCausalLM"), ("phi", None)]
)
def test_a_base_model_without_a_head_embeds(model_type, architecture, tmp_path):
    folder = as_base(make_model(model_type, tmp_path / "model", **SMALL), architecture)
    llm = LLM(str(folder), **ENGINE)
    (found,) = llm.embed([PROMPT], pooling="mean", normalize=False)
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder)(torch.tensor([PROMPT])).last_hidden_state[0]
    np.testing.assert_allclose(found.embedding, states.double().numpy().mean(0), atol=1e-5)
    assert main(["--model", str(folder), "--output", str(tmp_path / "converted")]) == 0
    assert not load_params(str(tmp_path / "converted")).spec.config.has_head
    for asked in (llm.generate, llm.score):
        with pytest.raises(
            RequestError, match="no head, so this model embeds and does not generate or score"
        ):
            asked([PROMPT])
    with pytest.raises(ModelError, match="no head, so there are no logits"):
        forward(load_params(str(folder)), TOKENS)


def test_a_head_that_is_lost_is_no_base_model(tmp_path):
    folder = make_model("mistral", tmp_path, **SMALL)
    rewrite(folder, lambda t: {name: t[name] for name in t if name != "lm_head.weight"})
    with pytest.raises(ModelError, match=r"lacks 1 tensor\(s\): lm_head.weight"):
        load_params(str(folder))


SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
GEMMA = {
    **SIZES,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 20,
}


def make_wrapper(model_type: str, folder: Path, **outer: Any) -> Path:
    """A random model of text and images; as transformers saves it, which is as it is published."""
    text, vision = (
        ("gemma3_text", "siglip_vision_model") if model_type == "gemma3" else ("mistral", "pixtral")
    )
    config = AutoConfig.for_model(
        model_type,
        text_config={**(GEMMA if text == "gemma3_text" else SIZES), "model_type": text},
        vision_config={**VISION, "model_type": vision},
        **({"mm_tokens_per_image": 4} if model_type == "gemma3" else {}),
        **outer,
    )
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def as_written_by_transformers_5(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Under the names that its modules have."""

    def name_of(name: str) -> str:
        if name.startswith("language_model.lm_head."):
            return name.removeprefix("language_model.")
        if name.startswith("language_model.model."):
            return f"model.language_model.{name.removeprefix('language_model.model.')}"
        return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"

    return {name_of(name): value for name, value in tensors.items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["gemma3", "mistral3"])
def test_the_text_part_of_a_model_with_images(model_type, tied, tmp_path, caplog):
    folder = make_wrapper(model_type, tmp_path, tie_word_embeddings=tied)
    expected = Reference(folder).logits(PROMPT)
    names = set(load_file(folder / "model.safetensors"))
    assert any(name.startswith("language_model.model.") for name in names)
    assert any(name.startswith("vision_tower.") for name in names)
    for change in (dict, as_written_by_transformers_5):
        rewrite(folder, change)
        params = load_params(str(folder), dtype="float32")
        assert ("head" in params.arrays) is not tied
        assert relative_error(np.asarray(forward(params, TOKENS)), expected) < 1e-4
    assert f"of this {model_type} model the text part is served, and no images" in caplog.text


def test_a_text_part_in_the_engine(tmp_path):
    folder = make_wrapper("gemma3", tmp_path)
    assert (
        run_one(small_engine(folder), PROMPT, greedy(8)).token_ids == Reference(folder).greedy(PROMPT, 8)[0]
    )


def test_a_text_part_that_lacks_a_tensor_or_has_one_more_is_told_so(tmp_path):
    folder = make_wrapper("mistral3", tmp_path, tie_word_embeddings=False)
    rewrite(folder, lambda t: {name: t[name] for name in t if not name.endswith("norm.weight")})
    with pytest.raises(ModelError, match=r"lacks .*: language_model.model."):
        load_params(str(folder))
    folder = make_wrapper("mistral3", tmp_path / "more", tie_word_embeddings=False)
    rewrite(folder, lambda t: {**t, "language_model.model.extra": np.zeros(2, np.float32)})
    with pytest.raises(ModelError, match="does not use: language_model.model.extra"):
        load_params(str(folder))
