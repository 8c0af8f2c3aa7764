"""Chat templates are programs of others: what they render stays the same, and they end."""

from __future__ import annotations

import resource
import time

import pytest
from jinja2 import TemplateError
from templates_chatml import PLAIN_CHATML
from transformers.utils.chat_template_utils import render_jinja_template as theirs

from adapterlab.foreign.private_transformers import render_jinja_template

TURNS = [{"role": "user", "content": "a & <b>\n"}, {"role": "assistant", "content": "x</think>y"}]

HARMLESS = {
    "chatml": PLAIN_CHATML,
    "loops": "{% for m in messages recursive %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{{ m.role ~ m.content }}"
    "{% if m.children %}{{ loop(m.children) }}{% endif %}{% else %}none{% endfor %}{{ loop is defined }}",
    "sets": "{% set ns = namespace(n=0, seen=['a', 'b'], d={'k': 'v'}) %}{% for m in messages if m.role in ['user'] %}"
    "{% set ns.n = ns.n + 1 %}{% set ns.seen = ns.seen + [m.role] %}{% endfor %}{{ ns.n }}{{ ns.seen }}{{ ns.d }}",
    "macros": "{% macro say(m, x='-' * 3) %}{{ x }}{{ m.content|trim }}{% endmacro %}{% for m in messages %}"
    "{{ say(m) }}{{ m.content.split('</think>')[-1].strip('y') }}{{ m.content.replace('x', 'z') }}{% endfor %}",
    "filters": "{{ messages|tojson(indent=2) }}{{ messages|map(attribute='role')|join(', ') }}{{ 'q'|center(9) }}"
    "{{ messages|length }}{{ '%s-%02d' % ('a', 7) }}{{ '{:>5}'.format('a') }}{{ messages[0].content|indent(4) }}",
    "loops over pairs": "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{{ 2 ** 10 }}{{ 3 * 4 % 5 }}",
    "controls": "{% for i in range(9) %}{% if i == 3 %}{% continue %}"
    "{% elif i > 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
}


@pytest.mark.parametrize("template", HARMLESS.values(), ids=HARMLESS)
def test_templates_render_as_transformers_renders_them(template):
    for add in (False, True):
        options = {"conversations": [TURNS, TURNS[:1]], "chat_template": template, "add_generation_prompt": add}
        assert render_jinja_template(**options) == theirs(**options)


def test_marked_spans_are_the_same():
    template = "{% for m in messages %}[{% generation %}{{ m.content }}{% endgeneration %}]{% endfor %}"
    options = {"conversations": [TURNS], "chat_template": template, "return_assistant_tokens_mask": True}
    assert render_jinja_template(**options) == theirs(**options)


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "calls": "{% for m in messages recursive %}{{ loop([1, 2]) }}{{ loop([1, 2]) }}{% endfor %}",
    "product": "{{ 'x' * 10000000000 }}",
    "product of lists": "{{ ([0] * 1000000000)|length }}",
    "doubling": "{% set ns = namespace(s='xx') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "sums": "{% set ns = namespace(s='xx') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "nested": "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}"
    "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    "nested dicts": "{% set ns = namespace(s={}) %}{% for i in range(60) %}"
    "{% set ns.s = {'a': ns.s, 'b': ns.s} %}{% endfor %}"
    "{{ ns.s|tojson }}",
    "nested by calls": "{% set ns = namespace(s={}) %}{% for i in range(60) %}"
    "{% set ns.s = dict(a=ns.s, b=ns.s) %}{% endfor %}",
    "width": "{{ 'x'|center(5000000000) }}",
    "method": "{{ 'x'.ljust(5000000000) }}",
    "format": "{{ '%05000000000d' % 1 }}",
    "format method": "{{ '{:>5000000000}'.format(1) }}",
    "format filter": "{{ '%5000000000s'|format('x') }}",
    "format by argument": "{{ '{:{}}'.format('x', 5000000000) }}",
    "replace": "{% set s = 'x' * 100000 %}{% for i in range(9) %}{{ s|replace('x', s)|length }}{% endfor %}",
    "join": "{{ range(90000)|list|join('x' * 90000)|length }}",
    "indent": "{{ ('a\n' * 90000)|indent(90000)|length }}",
    "power": "{{ 10 ** 100000000 }}",
    "words": "{{ lipsum(n=100000000) }}",
    "output": "{% for i in range(90000) %}{{ 'x' * 9000 }}{% endfor %}",
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_templates_end(template):
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises((TemplateError, ValueError)):
        render_jinja_template(conversations=[TURNS], chat_template=template)
    assert time.process_time() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
