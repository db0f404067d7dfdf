"""Rules of YAML trees that hold for all of them: what is written is read, what is merged, what --set changes."""

import copy
import json

from hypothesis import given
from hypothesis import strategies as st
from properties import NUMBERS, SCALARS, WORDS

from moedistill.recipe.yaml_tree import apply_override, dump_yaml, from_data, merge, read_text

KEYS = st.text(min_size=1)
TREES = st.dictionaries(
    KEYS,
    st.recursive(
        SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
    ),
    min_size=1,
    max_size=4,
)
NAMES = WORDS.filter(lambda word: word not in ("kind", "name"))  # which mean something
PLAIN = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]))
LEAVES = st.none() | st.booleans() | NUMBERS | PLAIN
SIMPLE = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=8
)
ROOTS = st.dictionaries(NAMES, SIMPLE, min_size=1, max_size=4)
TWO_DEEP = st.dictionaries(WORDS, st.dictionaries(NAMES, st.integers(-9, 9), max_size=3), max_size=3)


def same(a, b):
    """Equal, and of the same types: 1, 1.0 and true differ, and so do 0.0 and -0.0."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def tree(data):
    problems = []
    node = from_data(copy.deepcopy(data), problems)
    assert problems == []
    return node


def merged(*data):
    problems = []
    result = tree(data[0])
    for child in data[1:]:
        result = merge(result, tree(child), problems)
    assert problems == []
    return result.plain()


@given(TREES)
def test_what_is_written_is_read(data):
    problems = []
    again = read_text(dump_yaml(data).encode(), "a.yaml", problems)
    assert problems == []
    assert same(again.plain(), data)


@given(ROOTS)
def test_nothing_over_a_tree_and_a_tree_over_itself(data):
    assert same(merged(data, {}), data)
    assert same(merged({}, data), data)
    assert merged({"a": data}, {"a": _without_lists(data)}) == {"a": data}


def _without_lists(data):
    """Lists over lists replace them, which the first two lines have seen; mappings over them would change items."""
    if isinstance(data, dict):
        return {key: _without_lists(value) for key, value in data.items() if not isinstance(value, list)}
    return data


@given(TWO_DEEP, TWO_DEEP, TWO_DEEP)
def test_merging_is_associative_and_the_last_one_wins(a, b, c):
    assert merged(a, b, c) == merged(a, merged(b, c))
    result = merged(a, b)
    for top, keys in {**a, **b}.items():
        assert set(result[top]) == set(a.get(top, {})) | set(b.get(top, {}))
        assert all(result[top][key] == b.get(top, {}).get(key, a.get(top, {}).get(key)) for key in result[top]), keys


@given(ROOTS, st.data())
def test_set_changes_one_value_and_no_other(data, draws):
    path = draws.draw(st.sampled_from(list(_paths(data))))
    value = draws.draw(LEAVES | st.lists(NUMBERS, max_size=3))
    node, problems = tree(data), []
    apply_override(node, f"{'.'.join(map(str, path))}={json.dumps(value, ensure_ascii=False)}", problems)
    assert problems == []
    expected = copy.deepcopy(data)
    parent = expected
    for step in path[:-1]:
        parent = parent[step]
    parent[path[-1]] = value
    assert same(node.plain(), expected)


def _paths(data, path=()):
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _paths(value, (*path, key))
