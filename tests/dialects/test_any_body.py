"""Whatever a body holds, it is answered, or refused as the client's mistake: never a failure of the server."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from gyrfalcon.http.kaito import GenerateKwargs
from gyrfalcon.http.tgi_schema import GenerateParameters

HEADERS = {"Authorization": "Bearer KEY", "Content-Type": "application/json"}

NUMBERS = (
    st.sampled_from(
        [0, 1, -1, 2, 10, 200, 256, 2**31, 2**32, 2**63, 2**64, 10**30, 0.0, 1.0, 0.5, 1e-45, 1e-300, 1e300]
    )
    | st.integers(-5, 40)
    | st.floats(-3, 3)
)
VALUES = (
    st.none()
    | st.booleans()
    | NUMBERS
    | st.text(max_size=5)
    | st.lists(st.text(max_size=3) | NUMBERS, max_size=3)
    | st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2)
)


def members(names: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(sorted(names)), VALUES, max_size=4)


anything = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(inputs=st.text(max_size=20), parameters=members(GenerateParameters.model_fields), stream=st.booleans())
@anything
def test_generate(client: TestClient, inputs: str, parameters: dict[str, Any], stream: bool) -> None:
    body = json.dumps({"inputs": inputs, "parameters": parameters, "stream": stream})
    answer = client.post("/", content=body, headers=HEADERS)
    assert answer.status_code in {200, 422}
    if stream and answer.status_code == 200:
        events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line]
        assert ("generated_text" in events[-1] and events[-1]["generated_text"] is not None) or (
            events[-1]["error_type"] == "validation"
        )
    else:
        answer.json()


@given(prompt=st.text(max_size=20), kwargs=members([*GenerateKwargs.model_fields, "unknown"]))
@anything
def test_chat(client: TestClient, prompt: str, kwargs: dict[str, Any]) -> None:
    body = json.dumps({"prompt": prompt, "generate_kwargs": kwargs})
    answer = client.post("/chat", content=body, headers=HEADERS)
    assert answer.status_code in {200, 400, 422}
    assert list(answer.json()) == (["Result"] if answer.status_code == 200 else ["detail"])
