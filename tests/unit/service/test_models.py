from __future__ import annotations

from pathlib import Path

import pytest

from gyrfalcon.errors import UnknownModel
from gyrfalcon.service.models import ModelTable, ServedModel, load_served_model
from gyrfalcon.service.validation import resolve_limits
from gyrfalcon.testing.engine import FakeEngine


def served(folder: Path, *names: str) -> list[ServedModel]:
    engine = FakeEngine()
    return [load_served_model(name, folder, engine, resolve_limits(engine.facts)) for name in names]


@pytest.mark.parametrize("name", [None, "one", "tgi", "dummy", "anything/else"])
def test_a_single_model_answers_to_any_name(tokenizer_folder: Path, name: str | None) -> None:
    assert ModelTable(served(tokenizer_folder, "one")).resolve(name).name == "one"


@pytest.mark.parametrize(
    ("asked", "found"), [(None, "one"), ("tgi", "one"), ("dummy", "one"), ("one", "one"), ("two", "two")]
)
def test_of_several_models_the_first_is_the_default(tokenizer_folder: Path, asked: str | None, found: str) -> None:
    assert ModelTable(served(tokenizer_folder, "one", "two")).resolve(asked).name == found


def test_of_several_models_an_unknown_name_is_refused_with_the_names_served(tokenizer_folder: Path) -> None:
    with pytest.raises(UnknownModel, match="`three` is not served; served: `one`, `two`"):
        ModelTable(served(tokenizer_folder, "one", "two")).resolve("three")


@pytest.mark.parametrize("name", ["tgi", "dummy", "other", "ONE"])
def test_strict_names_refuse_whatever_is_not_served(tokenizer_folder: Path, name: str) -> None:
    table = ModelTable(served(tokenizer_folder, "one"), strict_names=True)
    with pytest.raises(UnknownModel):
        table.resolve(name)
    assert table.resolve("one").name == table.resolve(None).name == "one"


@pytest.mark.parametrize("names", [(), ("one", "one")])
def test_models_have_names_of_their_own(tokenizer_folder: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="own name"):
        ModelTable(served(tokenizer_folder, *names))


def test_what_is_served_can_be_asked_for(tokenizer_folder: Path) -> None:
    (model,) = served(tokenizer_folder, "one")
    info = model.info
    assert (info.name, info.max_total_tokens, info.max_input_tokens) == ("one", 256, 255)
    assert info.has_chat_template
