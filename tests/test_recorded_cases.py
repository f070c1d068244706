"""Every trajectory that was recorded from another framework, step by step through the public API."""

import pytest

import recorded
import recorded_table
from replay import NOT_RUN, replay

CASES = recorded.cases()
RUN = [case for case in CASES if case.id not in NOT_RUN]
# mx.compile takes no row-sparse arguments, and freezes what a callable without arguments returns.
PLAIN_ONLY = {"keras_callable_lr"} | {case.id for case in RUN if case.sparse}
COMPILED = [case for case in RUN if case.framework in ("keras", "torch") and case.id not in PLAIN_ONLY]


@pytest.mark.parametrize("case", RUN, ids=str)
def test_goes_the_recorded_way(case):
    replay(case)


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_goes_the_recorded_way_compiled(case):
    traces = replay(case, compiled=True)
    # a tree of another shape, or a group more, is another trace
    assert traces == 1 or case.problem == "none" or "late_group" in case.hp


def test_every_case_is_run_or_has_a_reason():
    assert len(CASES) == 127
    assert {case.id for case in CASES} == {case.id for case in RUN} | set(NOT_RUN)
    assert all(len(reason) > 20 for reason in NOT_RUN.values())


def test_the_table_in_the_docs_is_of_this_run():
    # each case of RUN has its own test above; written by: python tests/recorded_table.py
    assert recorded_table.PAGE.read_text(encoding="utf-8") == recorded_table.page({case.id for case in RUN})


def test_the_table_says_no_where_nothing_agreed():
    page = recorded_table.page({case.id for case in RUN} - {"torch_maximize"})
    assert "| torch | `maximize` | yes | `torch_max_wd_lrd`, `torch_sparse_max` |" in page
    assert "| optax | `multi_steps` | yes | `optax_multisteps3` |" in page
    nothing = recorded_table.page(set())
    assert "| yes |" not in nothing and "| optax | `multi_steps` | no | `optax_multisteps3` |" in nothing
