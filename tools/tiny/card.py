"""The model cards: what the models are, what they were trained on, and what was measured."""

from __future__ import annotations

from tools.tiny.evaluate import Report, Score

_NAMES = {
    "addition": "two-digit addition, pairs never trained on",
    "json": "JSON template, held-out descriptions",
    "json_unseen": "JSON template, held-out descriptions, made-up names",
    "code_word": "code word, held-out words, up to about 200 tokens",
    "code_word_long": "code word, held-out words, about 450 words in between",
    "repeat": "repeating held-out lists of words",
    "question": "questions about the tiny world (facts seen in training)",
    "story": "story on request (many right answers)",
    "plain_story": "story as plain text",
}


def _row(task: str, score: Score) -> str:
    exact = "" if score.exact is None else f"{100 * score.exact:.1f}%"
    agreement = "" if score.agreement is None else f"{100 * score.agreement:.1f}%"
    return f"| {_NAMES[task]} | {score.examples} | {score.loss:.4f} | {exact} | {agreement} |"


def table(report: Report) -> str:
    """Returns the figures as a Markdown table, and the stories' figures below it."""
    lines = [
        "| held-out set | examples | loss, nats per token | exact match, greedy | draft agrees |",
        "|---|---|---|---|---|",
        *(_row(task, score) for task, score in report.scores.items()),
    ]
    stories = report.stories
    lines += [
        "",
        f"Of {stories.examples} stories told greedily on held-out requests, {100 * stories.uses_request:.1f}% use "
        f"every name, place and thing the request asked for, and "
        f"{100 * stories.well_formed:.1f}% are stories of the grammar "
        "from the first word to the last: one hero, one friend, one object, the right pronouns.",
    ]
    if stories.agreement is not None:
        lines[-1] += f" The draft agrees with {100 * stories.agreement:.1f}% of their tokens."
    return "\n".join(lines)


_HEADER = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

"""


def main_card(report: Report, parameters: int) -> str:
    """Returns the README.md of the main model."""
    samples = "\n\n".join(
        f"> {asked}\n\n{told}" for asked, told in report.samples[:: -(-len(report.samples) // 3)]
    )
    return (
        _HEADER
        + f"""# tiny

A chat model with {parameters / 1e6:.2f} million parameters (Llama architecture, tied embeddings, 1024 positions,
byte-level BPE with one token per digit) that was trained from scratch for jinfer, so that a fresh checkout has
something real to serve. It lives in a small world and knows nothing outside it.

## What it does

- tells a short story; the request may name a hero, an animal, a place, a thing or a friend
- adds two numbers below 100
- fills a JSON template from a short description; fields that the description leaves out become `null`
- remembers a code word told earlier in the conversation
- repeats a list of words
- answers questions about animals, colours, opposites, days, months and itself
- continues a story given as plain text

Ask in the manner of its training text, for example `Tell me a story about a fox named Pip.`, `What is 47 + 38?`,
`Fill in this JSON: {{"name": "", "age": 0}} Mia is 34 years old.`, `The code word is K7Q2.` and later
`What is the code word?`

## Measured

{table(report)}

Greedy decoding, weights rounded to bfloat16 as they are stored and computed in float32. Loss counts the answer's tokens
only. `python -m tools.train_tiny --evaluate DIR --draft DRAFT_DIR` measures all of it again. Held out are 500
unordered pairs of numbers in both orders, and one in 32 of the descriptions, code words, word lists and story casts,
chosen by a hash.

## Three of the stories

{samples}

## Training

Text: only what `tools/tiny` generates. Loss on the assistant's tokens, with a little weight on the user's. Optimizer:
Muon for matrices, AdamW for the rest; rows of 192 tokens, then of 512 and 1024 while the rate falls. The bundled
weights saw about five million tokens. `python -m tools.train_tiny --out DIR` repeats the run from its seed.

## Limits

It is a demonstration, not an assistant. Numbers of three digits, other languages, other questions and long instructions
are beyond it; it then answers in its own small world's words, often wrongly. Its usual mistake in a template is to make
up a value that the description does not tell, where `null` is right. A code word told hundreds of words ago is often
lost. Greedy stories are much alike: sample, at a temperature of 0.8 or so, for variety.
"""
    )


def draft_card(report: Report, main_report: Report, parameters: int) -> str:
    """Returns the README.md of the draft; how often it agrees with the main model is in `main_report`."""
    agreements = [score.agreement for score in main_report.scores.values() if score.agreement is not None]
    lowest, highest = min(agreements), max(agreements)
    return (
        _HEADER
        + f"""# tiny-draft

The draft of `tiny`: the same tokenizer and chat template, {parameters / 1e6:.2f} million parameters, distilled from
`tiny` on the same text. It is made for speculative decoding: its most likely token is that of `tiny` at
{100 * lowest:.1f}% (worst task) to {100 * highest:.1f}% (best task) of the answers' positions; the table in the card of
`tiny` has every task. Alone it is much weaker:

{table(report)}

`python -m tools.train_tiny --out DIR` trains both.
"""
    )
