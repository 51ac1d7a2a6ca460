from __future__ import annotations

from mtmedformer.storage.hashing import source_digest


def test_a_source_digest_depends_on_file_names_but_not_on_docstrings_and_layout(tmp_path):
    def digest(name, text):
        file = tmp_path / name
        file.write_text(text)
        return source_digest([file], tmp_path)

    plain = digest("a.py", "def f(x):\n    return x + 1\n")
    assert digest("a.py", '"""Text."""\n\n\ndef f( x ):\n    """Add."""\n    return (x\n        + 1)\n') == plain
    assert digest("a.py", "# A comment.\ndef f(x):\n    'Sum.'\n    return   x + 1  # so\n") == plain
    assert digest("a.py", "def f(x):\n    return x + 2\n") != plain
    assert digest("a.py", "def f(x):\n    return -x + 1\n") != plain
    assert digest("b.py", "def f(x):\n    return x + 1\n") != plain
