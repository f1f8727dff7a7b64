from __future__ import annotations

from gyrfalcon.http.tgi_render import BODY_ERROR_TYPES
from tools.dialect_page import MARK, PAGE, with_tables


def test_the_page_and_the_code_agree() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert len(MARK.findall(page)) == 4
    assert page == with_tables(page), "run python tools/dialect_page.py"


def test_every_kind_of_refused_body_is_explained() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [kind for status, kind in BODY_ERROR_TYPES.items() if f"| {status} | `{kind}` |" not in page] == []
