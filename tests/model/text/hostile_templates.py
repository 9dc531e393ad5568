"""Chat templates that would take hours or many gigabytes, or that the interpreter does not survive."""

from __future__ import annotations

_NESTED_LOOPS = "".join(f"{{% for i{n} in range(99999) %}}" for n in range(3)) + "{% endfor %}" * 3


def _doubled(start: str, twice: str) -> str:
    return (
        f"{{% set n = namespace(v={start}) %}}{{% for i in range(60) %}}{{% set n.v = {twice} %}}{{% endfor %}}"
        "{{ n.v | string | length }}"
    )


TIME = {
    "loops in loops": _NESTED_LOOPS,
    "loops that write": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x",
    "a macro that calls itself twice": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
    "a loop that calls itself twice": (
        "{% for i in [60] recursive %}{% if i %}{{ loop([i - 1, i - 1]) }}{% endif %}{% endfor %}"
    ),
    "a power": "{{ 7 ** 9999999999 % 2 }}",
    "powers of powers": "{{ 9 ** (9 ** 9) }}",
    "a long product": (
        "{% set n = namespace(v=7) %}{% for i in range(60) %}{% set n.v = n.v * n.v %}{% endfor %}{{ n.v % 2 }}"
    ),
    "a long shift": "{{ 3 ** 80000000 }}",
    "a sum": "{% for i in range(9999) %}{{ range(99999) | sum }}{% endfor %}",
    "sorting": "{% for i in range(9999) %}{% set x = range(99999) | sort(reverse=true) %}{% endfor %}",
    "groups": "{% for i in range(9999) %}{% set x = range(99999) | map('string') | groupby('0') %}{% endfor %}",
    "products of lists": (
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% if a == b %}{% endif %}{% endfor %}{% endfor %}"
    ),
    "a search in a long text": (
        "{% set t = 'a' * 9999999 %}{% for i in range(99999) %}{{ (t + 'b') in t }}{% endfor %}"
    ),
    "replacement": "{% set t = 'a' * 9999999 %}{% for i in range(9999) %}{% set x = t.replace('a', 'b') %}{% endfor %}",
    "links in a long text": (
        "{% for i in range(9999) %}{{ ('(' * 9999 ~ 'http://a.b' ~ i) | urlize | length }}{% endfor %}"
    ),
    "wrapped words": "{% for i in range(9999) %}{{ ('a ' * 99999 ~ i) | wordwrap(1) | length }}{% endfor %}",
    "striptags": "{% for i in range(99999) %}{{ ('<' * 99999 ~ i) | striptags | length }}{% endfor %}",
    "titles": "{% for i in range(99999) %}{{ ('a-' * 99999 ~ i) | title | length }}{% endfor %}",
    "the name of a template variable": "{% for i in range(99999) %}{% for m in messages %}{{ i }}{% endfor %}"
    "{% for j in range(9999) %}{% set k = j %}{% endfor %}{% endfor %}",
}
"""Templates that take time."""

MEMORY = {
    "a repeated text": "{{ 'x' * 10 ** 9 }}",
    "a repeated text of six gigabytes": "{{ ('x' * 6 * 10 ** 9) | length }}",
    "a repeated list": "{{ ([0] * 10 ** 9) | length }}",
    "a repeated tuple": "{{ ((0, 1) * 10 ** 9) | length }}",
    "center": "{{ 'x' | center(10 ** 9) }}",
    "ljust": "{{ 'x'.ljust(10 ** 9) | length }}",
    "zfill": "{{ 'x'.zfill(10 ** 9) | length }}",
    "expandtabs": "{{ '\t'.expandtabs(10 ** 9) | length }}",
    "a width in a format": "{{ '%1000000000d' % 1 }}",
    "a width in the filter format": "{{ '%1000000000d' | format(1) }}",
    "a width in the method format": "{{ '{:>1000000000}'.format(1) }}",
    "indent": "{{ ('x\n' * 9999) | indent(10 ** 6) }}",
    "indent of JSON": "{{ [[[1, 2], 3], 4] | tojson(indent=10 ** 8) }}",
    "doubling by joining": _doubled("'x'", "n.v ~ n.v"),
    "doubling by adding": _doubled("'x'", "n.v + n.v"),
    "doubling lists": _doubled("[0]", "n.v + n.v"),
    "doubling by replacement": _doubled("'x'", "n.v.replace('x', 'xx')"),
    "doubling by the filter join": _doubled("'x'", "[n.v, n.v] | join"),
    "doubling by a format": _doubled("'x'", "'%s%s' % (n.v, n.v)"),
    "doubling by a block": (
        "{% set n = namespace(v='x') %}{% for i in range(60) %}{% set b %}{{ n.v }}{{ n.v }}{% endset %}"
        "{% set n.v = b %}{% endfor %}{{ n.v | length }}"
    ),
    "a namespace that grows": (
        "{% set n = namespace(v=[]) %}{% for i in range(99999) %}{% set n.v = [n.v, range(999) | list] %}{% endfor %}"
    ),
    "many lists": (
        "{% set n = namespace(v=[]) %}{% for i in range(9999) %}{% set n.v = [n.v, range(99999) | list] %}{% endfor %}"
    ),
    "batches": "{{ range(9) | batch(10 ** 9, 0) | list | length }}",
    "slices": "{{ range(9) | slice(10 ** 9, 0) | list | length }}",
    "lorem ipsum": "{{ lipsum(n=10 ** 7) }}",
    "characters": "{{ ('x' * 10 ** 8) | list | length }}",
    "a text that is written": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "escapes": "{% for i in range(9) %}{{ ('&' * 10 ** 8) | escape | length }}{% endfor %}",
}
"""Templates that take memory."""

OTHER = {
    "a text of two megabytes": "{{ 'x' * 2 * 10 ** 6 }}",
    "parentheses": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "nested lists": "{{ " + "[" * 99999 + "]" * 99999 + " }}",
    "nested loops of the source": "{% for a in [1] %}" * 9999 + "{% endfor %}" * 9999,
    "a chain of filters": "{{ 1" + " | abs" * 99999 + " }}",
    "a chain of additions": "{{ 1" + " + 1" * 99999 + " }}",
    "a chain of attributes": "{{ messages" + ".a" * 99999 + " }}",
    "a recursive macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a template of three megabytes": "{% if messages %}{{ 1 }}{% endif %}" * 99999,
}
"""Templates that are refused for another reason, or fail."""

HOSTILE = TIME | MEMORY | OTHER
