"""The check of names in comments and docs finds what it is there for, and nothing else."""

import pytest
from names import Known, prose, read
from rules import PACKAGE

NO = "no" + "_such"  # in pieces: what stands in code as a word is known
pytestmark = pytest.mark.skipif(not PACKAGE.is_dir(), reason="the sources are not here")


@pytest.fixture(scope="module")
def known() -> Known:
    return read()[0]


@pytest.mark.parametrize(
    "said",
    [
        f"as `_native.{NO}_call` does",
        f"`Store._{NO}` was there once",
        f"calls `{NO}_call`",
        f"calls {NO}_call() without ticks",
        f"a struct of ms_{NO}.h",
        f"see `disk/{NO}.py`",
        f"Store.{NO} raises",
        f"`os.{NO}` of the standard library",
        f"`open({NO}=True)`",
    ],
)
def test_a_name_that_leads_nowhere_is_found(known, said):
    assert list(known.wrong(said))


@pytest.mark.parametrize(
    "said",
    [
        "`Store.open` is not `millstream.open`, which `disk/files.py` serves",
        "`ms_owner_take_over`, `MS_WALK`, `ms_mark`; `os.replace`, `renameat2`",
        "`millstream peek QUEUE --count 3`",
        "plain words, e.g. of a store.",
    ],
)
def test_what_is_there_may_be_named(known, said):
    assert list(known.wrong(said)) == []


def test_comments_and_docstrings_are_prose_and_the_rest_is_code(tmp_path):
    path = tmp_path / "a.py"
    path.write_text('"""Says `one`."""\ntwo = "# three"  # four\nfive = """six"""\n')
    code, said = prose(path)
    assert [text for _, text in said] == ['"""Says `one`."""', "# four"]
    assert [line for line, _ in said] == [1, 2]
    assert all(word in code for word in ("two", "three", "six"))
    path = tmp_path / "a.c"
    path.write_text('int one; /* two\n */ const char *three = "/* four */";\n')
    code, said = prose(path)
    assert said == [(1, "/* two\n */")]
    assert "four" in code
    assert "two" not in code
