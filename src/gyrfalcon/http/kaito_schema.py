"""The types of KAITO's dialect: what `/chat` takes and answers."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gyrfalcon.http.search_parameters import EarlyStopping, Integer, Number, SearchParameters

EXAMPLE = {
    "prompt": "The falcon is",
    "return_full_text": False,
    "generate_kwargs": {"max_length": 60, "do_sample": True, "top_k": 10},
}


class GenerateKwargs(SearchParameters):
    """How to generate. `max_length` and `min_length` count the prompt."""

    model_config = ConfigDict(extra="allow", frozen=True)

    max_length: Integer = Field(200, description="Most tokens of prompt and new text together")
    min_length: Integer = Field(0, description="Fewest tokens of prompt and new text together")
    max_new_tokens: Integer | None = Field(None, description="Most new tokens; wins over `max_length`")
    min_new_tokens: Integer | None = Field(None, description="Fewest new tokens; wins over `min_length`")
    do_sample: bool = Field(True, description="Sample; false takes the likeliest token each time")
    temperature: Number = Field(1.0, description="Above 0; divides the logits")
    top_k: Integer = Field(10, description="Sample among this many likeliest tokens; 0 is off")
    top_p: Number = Field(1.0, description="Sample among the likeliest tokens that hold this share; 1 is off")
    typical_p: Number = Field(1.0, description="Sample among the most typical tokens that hold this share; 1 is off")
    repetition_penalty: Number = Field(1.0, description="Above 0; 1 is off")
    frequency_penalty: Number | None = Field(None, description="-2 to 2; lowers tokens by their share of the text")
    seed: Integer | None = Field(None, description="Makes sampling repeatable; null draws one")
    watermark: bool | None = Field(None, description="Mark the text statistically (arXiv 2301.10226)")
    eos_token_id: Integer | None = Field(None, description="Id that ends a text, in place of the model's own")
    output_scores: bool = Field(False, description="With `details`: the tokens and their scores as well")
    return_dict_in_generate: bool = Field(False, description="With `details`: as `output_scores`")
    # Null is no value of these, as in the service behind this dialect.
    num_beams: Integer = Field(1, description="Above 1: beam search with this many beams. Not with a stream.")
    num_return_sequences: Integer = Field(
        1, description="Number of sequences, of beams the best; `Result` joins their texts"
    )
    num_beam_groups: Integer = Field(
        1, description="Above 1: diverse beam search in this many groups, without sampling; divides `num_beams`."
    )
    diversity_penalty: Number = Field(
        0.0, description="Above 0, with groups: subtracted for every earlier group's beam that chose the same token."
    )
    length_penalty: Number = Field(
        1.0, description="-10 to 10: beams are ranked by their score / length ^ this; above 0 favours longer ones."
    )
    early_stopping: EarlyStopping = Field(
        False,
        description='When a beam search ends: true, as soon as enough is finished; "never", when nothing can win.',
    )
    no_repeat_ngram_size: Integer = Field(0, description="No n-gram of this size comes twice; 0 is off")
    encoder_no_repeat_ngram_size: Integer = Field(
        0, description="No n-gram of this size of the prompt comes again; 0 is off"
    )


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True)

    role: str
    content: str


class ChatRequest(BaseModel):
    """A prompt, or a conversation where `prompt` is absent, and how to continue it.

    Without `generate_kwargs` its members may stand here, beside the prompt, as the first release took them.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    prompt: str | None = Field(None, examples=["YOUR_PROMPT_HERE"])
    return_full_text: bool | None = Field(True, description="Put the prompt in front of the new text")
    clean_up_tokenization_spaces: bool | None = Field(False, description="Remove spaces before punctuation")
    prefix: str | None = Field(None, description="Put in front of the prompt, never returned")
    handle_long_generation: str | None = Field(
        None, description="`hole` drops the prompt's start where prompt and new text exceed the context"
    )
    generate_kwargs: GenerateKwargs | None = None
    messages: list[Message] | None = Field(None, description="Used when there is no prompt")
    details: bool | None = Field(
        None, description="Answer besides `Result` how each sequence was generated. An extension of ours."
    )
    stream: bool | None = Field(
        None, description="Answer with a stream of events, one a token. Not with beams. An extension of ours."
    )

    @model_validator(mode="before")
    @classmethod
    def _gather_flat_members(cls, body: Any) -> Any:
        if not isinstance(body, dict) or body.get("generate_kwargs") is not None:
            return body
        flat = {name: value for name, value in body.items() if name in GenerateKwargs.model_fields}
        return body | {"generate_kwargs": flat}


class SequenceDetails(BaseModel):
    """How one sequence was generated. The last four only with `output_scores` or `return_dict_in_generate`."""

    generated_text: str = Field(description="The new text")
    generated_tokens: int
    finish_reason: str = Field(description="`length` or `eos_token`")
    seed: int | None = Field(description="The seed, when the sequence was sampled")
    sequence: list[int] | None = Field(None, description="The ids of the generated tokens")
    scores: list[float | None] | None = Field(
        None,
        description="For each step the log-probability of the token chosen, after all processors; of beams what it "
        "added to the sum that ranks them",
    )
    sequences_scores: float | None = Field(
        None, description="Of beams what ranks the sequence: its scores' sum / length ^ `length_penalty`"
    )
    beam_indices: list[int] | None = Field(None, description="Of beams the one that each token was appended to")


class Details(BaseModel):
    """How the answer was generated."""

    prompt_tokens: int
    sequences: list[SequenceDetails] = Field(description="In the order of their texts, of beams the best first")


class ChatResponse(BaseModel):
    """The text; of several sequences, all of them one after the other."""

    Result: str
    details: Details | None = Field(None, description="Only with `details`")


class ChatEvent(BaseModel):
    """One event of a stream: a token, at the end the whole result, or what went wrong."""

    Delta: str | None = Field(None, description="The text that a token adds, perhaps none")
    sequence: int | None = Field(None, description="Which sequence the token belongs to")
    Result: str | None = Field(None, description="Only in the last event")
    details: Details | None = Field(None, description="Only in the last event, with `details`")
    detail: Any = Field(None, description="Only in the last event, where the generation failed")


class DetailResponse(BaseModel):
    """What was wrong."""

    detail: Any


class Healthy(BaseModel):
    """The model serves requests."""

    status: str = "Healthy"
