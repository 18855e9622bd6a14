"""Sentences out of docstrings."""

from __future__ import annotations

from fffconvert import python_docs

MODULE = '''"""One two three four five. Six seven eight nine ten! Too short.

One two three four five.

>>> example() # Not a sentence of prose at all
"""

class Documented:
    """A class that says in one sentence
    over two lines what it is."""

def bare(): ...
'''


def test_sentences_are_prose_and_come_once(tmp_path, monkeypatch):
    (tmp_path / "test").mkdir()
    (tmp_path / "a.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "test" / "b.py").write_text('"""Six words that nobody shall find."""', encoding="utf-8")
    (tmp_path / "c.py").write_text("no python(", encoding="utf-8")
    (tmp_path / "d.py").write_bytes(b'"""\xff\xfe"""')
    (tmp_path / "e.py").symlink_to("nowhere.py")
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda _: str(tmp_path))
    assert list(python_docs.standard_library_sentences()) == [
        "One two three four five.",
        "Six seven eight nine ten!",
        "A class that says in one sentence over two lines what it is.",
    ]
