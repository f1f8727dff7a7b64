"""Parameters that every dialect has under the same names: beams, rules about single ids, cut-offs.

The names and meanings are those of transformers' `generate`. A dialect's own schema says how strictly types are read.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
)


def _no_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number is expected, not a boolean")
    return value


def _no_booleans(value: object) -> object:
    if isinstance(value, list) and bool in set(map(type, value)):
        raise ValueError("numbers are expected, not a boolean")
    return value


def _listed(value: object) -> object:
    return value if value is None or isinstance(value, list) else [value]


def _boolean_or_never(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    try:
        return handler(value)
    except ValidationError:
        raise ValueError('a boolean or "never" is expected') from None


Integer = Annotated[int, BeforeValidator(_no_boolean)]
Number = Annotated[float, BeforeValidator(_no_boolean), Field(allow_inf_nan=False)]
# Looked at as a whole: a list may be long, and a function for each id would keep the event loop.
Ids = Annotated[list[int], BeforeValidator(_no_booleans)]
# JSON has no pairs: a list of two is one, however strict the dialect.
BiasedPhrase = Annotated[tuple[Ids, Number], Field(strict=False)]
StartAndFactor = Annotated[tuple[Integer, Number], Field(strict=False)]
OneOrMoreIds = Annotated[
    Ids,
    BeforeValidator(_listed),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"items": {"type": "integer"}, "type": "array"}]}),
]
EarlyStopping = Annotated[bool | Literal["never"], WrapValidator(_boolean_or_never)]

SAME_NAMES = (
    "begin_suppress_tokens",
    "diversity_penalty",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "min_p",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "pad_token_id",
    "suppress_tokens",
)


class SearchParameters(BaseModel):
    """All of them off when absent or null."""

    model_config = ConfigDict(frozen=True)

    num_beams: Integer | None = Field(None, description="Above 1: beam search with this many beams. Not with a stream.")
    num_return_sequences: Integer | None = Field(
        None, description="Return this many sequences: independent samples, or the best of the beams."
    )
    num_beam_groups: Integer | None = Field(
        None, description="Above 1: diverse beam search in this many groups, without sampling; divides `num_beams`."
    )
    diversity_penalty: Number | None = Field(
        None, description="Above 0, with groups: subtracted for every earlier group's beam that chose the same token."
    )
    length_penalty: Number | None = Field(
        None, description="-10 to 10: beams are ranked by their score / length ^ this; above 0 favours longer ones."
    )
    early_stopping: EarlyStopping | None = Field(
        None, description='When a beam search ends: true, as soon as enough is finished; "never", when nothing can win.'
    )
    no_repeat_ngram_size: Integer | None = Field(
        None, description="No n-gram of this size comes twice, the prompt's included."
    )
    encoder_no_repeat_ngram_size: Integer | None = Field(
        None, description="No n-gram of this size of the prompt comes again."
    )
    encoder_repetition_penalty: Number | None = Field(
        None, description="Above 0: above 1 favours the tokens of the prompt, below 1 the others."
    )
    bad_words_ids: list[Ids] | None = Field(
        None, description="Words, each a list of token ids, that are not generated; at most 1000 of 64 ids."
    )
    sequence_bias: list[BiasedPhrase] | None = Field(
        None,
        description="Pairs of a list of token ids and a bias, which is added to the last id's logit where the others "
        "come before it; at most 300.",
    )
    suppress_tokens: Ids | None = Field(None, description="Ids that are never generated; at most 1000.")
    begin_suppress_tokens: Ids | None = Field(None, description="Ids that are not generated first; at most 1000.")
    forced_bos_token_id: Integer | None = Field(
        None, description="The first new token, where the prompt is a single token."
    )
    forced_eos_token_id: OneOrMoreIds | None = Field(
        None, description="The last token (one of several) of a text that reaches its greatest length."
    )
    exponential_decay_length_penalty: StartAndFactor | None = Field(
        None, description="Start and factor: after so many new tokens the end becomes likelier by powers of the factor."
    )
    remove_invalid_values: bool | None = Field(None, description="Take scores that are no numbers for ordinary ones.")
    renormalize_logits: bool | None = Field(
        None, description="Make scores log-probabilities again after all processors, which beams see in their sums."
    )
    min_p: Number | None = Field(
        None, description="0 to 1: sample among the tokens that are this times as likely as the likeliest."
    )
    epsilon_cutoff: Number | None = Field(
        None, description="0 to below 1: sample among the tokens that are this likely."
    )
    eta_cutoff: Number | None = Field(
        None, description="0 to below 1: the same by a threshold that falls where the model is uncertain."
    )
    pad_token_id: Integer | None = Field(
        None, description="What finished groups of a diverse beam search go on with; in no answer."
    )


def search_arguments(parameters: SearchParameters) -> dict[str, Any]:
    """The members as a `GenerateCall` takes them."""
    arguments = {name: getattr(parameters, name) for name in SAME_NAMES}
    for name in ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id"):
        arguments[name] = None if arguments[name] is None else tuple(arguments[name])
    words, biases = parameters.bad_words_ids, parameters.sequence_bias
    return arguments | {
        "bad_words_ids": None if words is None else tuple(tuple(word) for word in words),
        "sequence_bias": None if biases is None else tuple((tuple(ids), bias) for ids, bias in biases),
        "remove_invalid_values": bool(parameters.remove_invalid_values),
        "renormalize_logits": bool(parameters.renormalize_logits),
    }
