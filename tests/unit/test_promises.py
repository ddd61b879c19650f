"""docs/promises.md: each promise stands in the README, and is held by tests that are there."""

import promises


def test_page_is_what_the_script_writes():
    assert promises.PAGE.read_text(encoding="utf-8") == promises.page(), "python tests/promises.py"


def test_each_promise_stands_in_the_readme():
    text = promises.readme()
    assert [said for said in promises.PROMISES if said not in text] == []


def test_each_test_that_holds_one_is_there():
    there = set(promises.test_files())
    named = {name for names in promises.PROMISES.values() for name in names}
    assert named - there == set()


def test_each_file_says_what_it_holds():
    silent = [name for name in promises.test_files() if not promises.holds(promises.path_of(name))]
    assert silent == []
