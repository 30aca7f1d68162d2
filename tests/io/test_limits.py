"""Chat templates that never end, and operations that would need all memory."""

from __future__ import annotations

import threading
import time

import psutil
import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from launcher.io import limits, sandbox
from launcher.io.limits import LimitExceeded

USER = [{"role": "user", "content": "hello"}]
TWICE = "{% for a in range(99999) %}{% for b in range(99999) %}%s{% endfor %}{% endfor %}"
NESTED = (
    "{% set n = namespace(l=['x']) %}{% for i in range(80) %}{% set n.l = [n.l, n.l] %}{% endfor %}"
)
ENDLESS = {
    "double loop": TWICE.replace("%s", ""),
    "recursive macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "filters in a loop": "{% for i in range(99999) %}{{ range(99999)|map('string')|list|length }}"
    "{% endfor %}",
    "text in a set block": "{% set a %}" + TWICE.replace("%s", "{{ a }}") + "{% endset %}",
}
HUGE = {
    "constant": "{{ 'x' * 10**9 }}",
    "list": "{{ ([1] * 10**9)|length }}",
    "power": "{{ 10**(10**10) }}",
    "squares": "{% set n = namespace(v=7) %}{% for i in range(60) %}{% set n.v = n.v * n.v %}"
    "{% endfor %}",
    "doubled": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}"
    "{% endfor %}",
    "sum": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = 'a' + (n.s + n.s) %}"
    "{% endfor %}",
    "format": "{{ '%01000000000d' % 1 }}",
    "format filter": "{{ '%*d'|format(1000000000, 1) }}",
    "format method": "{{ '{:>{}}'.format(1, 1000000000) }}",
    "center": "{{ 'x'|center(10**9) }}",
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "indent": "{{ ('x\n' * 1000000)|indent(1000000) }}",
    "replace": "{{ ('x' * 1000000)|replace('x', 'y' * 1000000) }}",
    "replace method": "{{ ('x' * 1000000).replace('', 'y' * 1000000) }}",
    "join": "{{ range(99999)|join('y' * 1000000) }}",
    "join method": "{{ ('y' * 1000000).join(['a'] * 100000) }}",
    "bytes": "{{ (5).to_bytes(10**10, 'big') }}",
    "words": "{{ lipsum(1000000) }}",
    "json indent": "{{ [[1]]|tojson(indent=10**9) }}",
    "nested": NESTED + "{{ n.l }}",
    "nested in a text": NESTED + "{{ 'a' ~ n.l }}",
    "nested as JSON": NESTED + "{{ n.l|tojson }}",
    "nested format": NESTED + "{{ '%s' % n.l }}",
    "pieces": "{% set s = 'x' * 1000000 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
}


def render(template: str, seconds: float) -> str:
    sandbox.install()
    ((text,), _) = limits.within(
        seconds, lambda: render_jinja_template([USER], chat_template=template)
    )
    return str(text)


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_never_ends_is_ended(name: str) -> None:
    with pytest.raises(LimitExceeded, match=r"takes more than 0.3 s"):
        render(ENDLESS[name], 0.3)


@pytest.mark.parametrize("name", HUGE)
def test_an_operation_that_needs_all_memory_is_refused_before_it_runs(name: str) -> None:
    before = psutil.Process().memory_info().rss
    with pytest.raises(TemplateError):
        render(HUGE[name], 60)
    assert psutil.Process().memory_info().rss - before < 1e9


def test_a_row_that_collects_memory_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GROWTH_BYTES", 200_000_000)
    collects = (
        "{% set n = namespace(l=[]) %}{% for i in range(99999) %}"
        "{% set n.l = n.l + ['x' * 1000000 ~ i] %}{{ range(9999)|sum and '' }}{% endfor %}"
    )
    with pytest.raises(LimitExceeded, match=r"needs more than 0.2 GB of memory"):
        render(collects, 60)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ 'a' + 'b' + messages[0].role ~ 1 }}", "abuser1"),
        ("{{ [1, 2] + [3] }}{{ 1 + 2 * 3 ** 2 % 5 }}", f"{[1, 2, 3]}{1 + 2 * 3**2 % 5}"),
        ("{{ '-' * 3 }}{{ '%s %d' % ('a', 2) }}{{ '{0}{x}'.format(1, x=2) }}", "---a 212"),
        ("{{ [1, 2]|sum }}{{ [[1], [2]]|sum(start=[]) }}", "3[1, 2]"),
        ("{{ messages|sum('role', '') }}", "user"),
        ("{{ {'a': [1]}|tojson(indent=1) }}", '{\n "a": [\n  1\n ]\n}'),
        ("{{ range(3)|map('string')|join('-') }}{{ 'a b'.replace('a', 'c')|title }}", "0-1-2C B"),
        ("{{ 'a\nb'|indent(2) }}{{ 'x'|center(3) }}|", "a\n  b x |"),
    ],
)  # fmt: skip
def test_what_templates_do_stays_as_it_was(template: str, text: str) -> None:
    assert render(template, 60) == text


def test_each_thread_has_its_own_limit_and_goes_on_after_it() -> None:
    """As in the page, which works in threads."""
    found: list[str] = []

    def work(template: str) -> None:
        for _ in range(2):
            try:
                found.append(render(template, 0.3))
            except LimitExceeded:
                found.append("ended")

    threads = [threading.Thread(target=work, args=(t,)) for t in (ENDLESS["double loop"], "a")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(found) == ["a", "a", "ended", "ended"]


def test_work_that_ends_in_time_is_never_hit_by_a_late_exception() -> None:
    """Work that ends about when the watchdog sees that it is too long: the result or the error,
    nothing afterward."""
    ended = 0
    for number in range(20):
        stop = time.thread_time() + 0.1 + 0.01 * number

        def work(stop: float = stop) -> str:
            while time.thread_time() < stop:
                pass
            return "done"

        try:
            assert limits.within(0.02, work) == "done"
        except LimitExceeded:
            ended += 1
        sum(range(100_000))
    assert ended


def test_a_large_row_may_take_longer() -> None:
    def work() -> str:
        stop = time.thread_time() + 0.6
        while time.thread_time() < stop:
            pass
        return "done"

    assert limits.within(0.2, work, lambda: 10.0) == "done"
    with pytest.raises(LimitExceeded, match=r"more than 0.2 s"):
        limits.within(0.2, work)
