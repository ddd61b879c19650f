"""docs/promises.md: each promise stands in the README, and is held by tests that are there."""

import promises


def test_page_is_what_the_script_writes():
    assert promises.PAGE.read_text(encoding="utf-8") == promises.page(), "python tests/promises.py"


def test_each_promise_stands_in_the_readme():
    text = promises.readme()
    assert [said for said in promises.PROMISES if said not in text] == []


def test_each_test_that_holds_one_is_there():
    there = set(promises.test_files())
    named = {*promises.PROMISES.values(), *promises.OF_THE_FORMAT.values()}
    assert {name for names in named for name in names} - there == set()


def test_each_way_of_testing_is_told_and_used():
    told = promises.PAGE.with_name("reliability.md").read_text(encoding="utf-8")
    assert [how for how in promises.HOW if f"| {how} |" not in told] == []
    files = promises.test_files()
    for how, parts in promises.HOW.items():
        assert [part for part in parts if not any(part in name for name in files)] == [], how


def test_each_file_says_what_it_holds():
    silent = [name for name in promises.test_files() if not promises.holds(promises.path_of(name))]
    assert silent == []
