"""The decoder inside a model of several kinds of input, whose config.json holds one config per part."""

from __future__ import annotations

from jinfer.models.fields import Fields

SECTION = "text_config"
# Stated outside for the whole model, these go before what the part's own config says.
OUTER = ("architectures", "bos_token_id", "eos_token_id", "is_causal", "quantization_config")
DTYPES = ("dtype", "torch_dtype")
# What the part's own class in transformers reads, and the whole model's passes over.
CONTRADICTED = {"gemma3": ("final_logit_softcapping",)}


def read_text_part(fields: Fields) -> Fields:
    """The decoder's config. Its head is tied unless config.json says otherwise outside, as transformers has it.

    Raises:
      ModelError: there is no such section.
    """
    section = fields.section(SECTION)
    if section is None:
        raise fields.error(SECTION, "an object that describes the text model")
    for key in CONTRADICTED.get(fields.string("model_type"), ()):
        section.refuse(key)
    values = dict(section.values)
    if any(fields.has(key) for key in DTYPES):
        values = {key: value for key, value in values.items() if key not in DTYPES}
    outside = {key: fields.values[key] for key in (*OUTER, *DTYPES) if key in fields.values}
    fields.idle(*OUTER)  # read with the part's own
    tied = {"tie_word_embeddings": fields.boolean("tie_word_embeddings", default=True)}
    return Fields({**values, **outside, **tied}, section.where)
