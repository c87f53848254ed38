"""The registry that losses, tunings, metrics, data sets and families share."""

import doctest

import pytest

from vptsp.names import registry
from vptsp.names.registry import Registry, near_names, near_values, nearest


def test_examples():
    assert doctest.testmod(registry).failed == 0


def test_names_keep_their_order_and_their_entries():
    letters = Registry("letter", {"b": 2})
    assert letters.register("a", 1) == 1
    assert list(letters) == ["b", "a"] and len(letters) == 2 and "a" in letters and "c" not in letters
    assert dict(letters.items()) == letters == {"b": 2, "a": 1}
    assert letters["b"] == 2
    with pytest.raises(TypeError, match="does not support item assignment"):  # there is one way
        letters["c"] = 3


def test_a_name_is_not_given_twice_but_a_file_may_run_twice():
    losses = Registry("loss")

    def make(value):
        def loss():
            return value

        return loss

    losses.register("ours", make(1))
    losses.register("ours", make(2))  # the same qualified name: run again
    assert losses.find("ours")() == 2
    losses.register("rows", (make(1), "embeddings"))  # of an entry of several fields, the first tells
    losses.register("rows", (make(2), "proxies"))
    assert losses["rows"][0]() == 2 and losses["rows"][1] == "proxies"
    with pytest.raises(ValueError, match="there is a loss 'rows' already"):
        losses.register("rows", (len, "proxies"))
    with pytest.raises(ValueError, match="there is a loss 'ours' already"):
        losses.register("ours", len)


def test_unknown_names_come_with_near_ones():
    losses = Registry("loss", {"proxy_anchor": 1, "proxy_nca": 2})
    with pytest.raises(ValueError, match=r"loss must be one of proxy_anchor, proxy_nca, got 'proxi_anchor'; did you"):
        losses.find("proxi_anchor")
    assert nearest("zzz", losses) == ""
    with pytest.raises(ValueError, match=r"loss must be one of none, got 'x'"):
        Registry("loss").find("x")
    with pytest.raises(ValueError, match=r"loss must be one of a or pml.<Name>, got 'x'$"):
        Registry("loss", {"a": 1}, also="or pml.<Name>").find("x")
    assert near_names("Aple", ["Apple", "Ape", "Pear"], likeness=0.5) == ["Apple", "Ape"]
    assert near_names(3, [30, 4], likeness=0.9) == []
    assert nearest("Aple", ["Ape", "Apple"], most=1) == "; did you mean 'Apple'?"


def test_near_values_are_alike_contain_what_was_asked_or_lie_next_to_it():
    assert near_values("mgu", ["Mug", "cup"]) == ["Mug"]
    assert near_values("7", ["007", "010", "0070"]) == ["007", "0070"]
    assert near_values("", ["a"]) == near_values("zzz", ["a"]) == near_values(1, []) == near_values(1, ["1"]) == []
    assert near_values(7, [9.5, 1, 8, 3, 20]) == [3, 8]
    assert near_values(0, [9.5, 1]) == [1] and near_values(30, [9.5, 1]) == [9.5]
    many = [f"class_{i // 50}/train_{i}.jpg" for i in range(20_000)]  # more than are compared one by one
    for wrong in ("class_7/tran_350.jpg", "clas_7/train_350.jpg", "class_7/train_350"):
        assert "class_7/train_350.jpg" in near_values(wrong, many)
