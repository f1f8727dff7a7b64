"""Every error Gyrfalcon raises on purpose, grouped by who must act.

    GyrfalconError
    ├── RequestError                  the client must act
    │   ├── InvalidRequest            a value breaks a rule; names the parameter
    │   │   ├── PromptTooLong         more tokens than fit
    │   │   ├── NotSupported          a known parameter this version cannot honour
    │   │   └── TemplateError         the chat template refused the messages, or there is none
    │   └── UnknownModel              the `model` field names no served model
    ├── Overloaded                    nobody: try again later
    │   └── QueueTimeout              the request waited too long before it began
    ├── GenerationFailed              one request failed inside the engine; its neighbours go on
    └── OperatorError                 the person who runs the server must act
        ├── SettingsError             a flag, variable or file entry is wrong
        ├── ModelLoadError            a checkpoint cannot be served
        ├── OutOfCache                the KV cache cannot hold what the settings promise
        └── EngineDead                the engine process ended

Only `gyrfalcon.http` knows status codes. Messages name the value and the limit, never a traceback.
"""

from __future__ import annotations


class GyrfalconError(Exception):
    """Base of every deliberate error; `str(error)` is one sentence fit for the person who must act."""


class RequestError(GyrfalconError):
    """The request is at fault; sending it again unchanged fails again."""


class InvalidRequest(RequestError):
    """A parameter's value breaks a rule.

    parameter: our name of the parameter at fault (`max_new_tokens`); a dialect maps it to its own spelling.
    """

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class PromptTooLong(InvalidRequest):
    """The prompt, or the prompt and the new tokens together, exceed what fits.

    length: of the prompt, in the words of a message ("8210 tokens"; "35000 characters" where counting tokens is not
    worth it). limit: the most tokens allowed for what was counted. max_new_tokens: new tokens counted in the check,
    None when the prompt alone is too long.
    """

    def __init__(self, length: str, limit: int, max_new_tokens: int | None = None) -> None:
        counted = f"`prompt` has {length}"
        if max_new_tokens is not None:
            counted += f" and {max_new_tokens} new tokens are asked for"
        super().__init__("prompt", f"{counted}; at most {limit} tokens fit")
        self.length = length
        self.max_new_tokens = max_new_tokens
        self.limit = limit


class NotSupported(InvalidRequest):
    """A parameter we know but cannot honour yet; refused by name rather than dropped."""


class TemplateError(InvalidRequest):
    """The checkpoint has no chat template, or its template refused the messages."""

    def __init__(self, message: str) -> None:
        super().__init__("messages", message)


class UnknownModel(RequestError):
    """The `model` field names a model that is not served."""

    def __init__(self, model: str, served: tuple[str, ...]) -> None:
        super().__init__(f"model `{model}` is not served; served: {', '.join(f'`{name}`' for name in served)}")
        self.model = model
        self.served = served


class Overloaded(GyrfalconError):
    """No room right now; the same request may succeed later.

    retry_after_s: seconds after which a retry makes sense.
    """

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueTimeout(Overloaded):
    """The request waited for its turn as long as it may; nothing of it was computed."""


class GenerationFailed(GyrfalconError):
    """This request failed while it ran; others were not touched."""


class OperatorError(GyrfalconError):
    """The server's configuration, files or machine are at fault."""


class SettingsError(OperatorError):
    """A setting is wrong.

    setting: its flag (`--max-total-tokens`), so that the message leads to the remedy.
    """

    def __init__(self, setting: str, message: str) -> None:
        super().__init__(f"{setting}: {message}")
        self.setting = setting


class ModelLoadError(OperatorError):
    """A checkpoint cannot be served; the message names the file, the tensor or the key, and what was expected."""


class OutOfCache(OperatorError):
    """The KV cache cannot hold even one sequence of the promised length."""


class EngineDead(OperatorError):
    """The engine process ended; requests it held are lost, new ones wait for its restart."""
