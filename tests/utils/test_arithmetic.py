import pytest

from aqdet.utils.arithmetic import evaluate

ZOO = "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]"  # of Base-RetinaNet.yaml


def same(a, b):
    """Equal with equal types, all the way down."""
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize(
    "text",
    [
        ZOO,
        "1+1",
        " 7 ",
        "-3",
        "+0.5",
        "1/3",
        "4/2",
        "2**10",
        "2**-1",
        "2**0.5",
        "-2**2",
        "(1, 2.0, [3])",
        "[]",
        "[1] * 3",
        "2 * (1, 2)",
        "[1] * -1",
        "[1, 2] + [3.5]",
        "[x for x in (1, 2)]",
        "[[x * y for x in [1, 2]] for y in [3, 4]]",
        "[x for x in [x for x in [1]]]",
        "1e308 * 10",
        "10**300",
        "0.1 + 0.2",
        "0x10 - 1_000",
    ],
)
def test_it_has_evals_value(text):
    assert same(evaluate(text), eval(text.strip()))


@pytest.mark.parametrize(
    "text, words",
    [
        ("__import__('os').system('touch harmed')", "is not arithmetic"),
        ("open('harmed', 'w')", r"\(Call\) is not arithmetic"),
        ("().__class__", r"\(Attribute\) is not arithmetic"),
        ("[1, 2][0]", r"\(Subscript\) is not arithmetic"),
        ("x", r"'x' \(Name\) is not arithmetic"),
        ("[x for x in [1]] + [x]", r"'x' \(Name\) is not arithmetic"),
        ("'a'", r"\(Constant\) is not arithmetic"),
        ("True", r"\(Constant\) is not arithmetic"),
        ("1j", r"\(Constant\) is not arithmetic"),
        ("{1: 2}", r"\(Dict\) is not arithmetic"),
        ("lambda: 1", r"\(Lambda\) is not arithmetic"),
        ("1 if 1 else 2", r"\(IfExp\) is not arithmetic"),
        ("(x := 1)", r"\(NamedExpr\) is not arithmetic"),
        ("1 << 2", r"is not arithmetic"),
        ("7 // 2", r"is not arithmetic"),
        ("~1", r"is not arithmetic"),
        ("[x for x in [1] if x]", r"\(ListComp\) is not arithmetic"),
        ("[x for x in [1] for y in [2]]", r"\(ListComp\) is not arithmetic"),
        ("[x for (x, y) in [(1, 2)]]", r"\(ListComp\) is not arithmetic"),
        ("[x for x in 3]", "a comprehension needs a list, got 3"),
        ("-[1]", r"'\[1\]' is no number"),
        ("[1] - [1]", "has no value"),
        ("[1] + (1,)", "has no value"),
        ("[1] + 1", "has no value"),
        ("[1] * 1.0", "has no value"),
        ("1 / 0", "has no value: division by zero"),
        ("0 ** -1", "has no value"),
        ("2.0 ** 5000", "has no value"),
        ("(-8) ** (1/3)", "is not a real number"),
        ("9 ** 9 ** 9", "is too large"),
        ("10 ** 301", "is too large"),
        ("10 ** 200 * 10 ** 200", "is too large"),
        ("[0] * 10 ** 9", "takes more than 10000 steps"),
        ("[[0] * 4000 for x in [0] * 4000]", "takes more than 10000 steps"),
        ("[[y for y in [0] * 999] for x in [0] * 999]", "takes more than 10000 steps"),
        ("1+" * 3000 + "1", "6001 characters, more than 4096"),
        ("(" * 300 + "1" + ")" * 300, "is not an arithmetic expression"),
        ("-" * 4000 + "1", "is not an arithmetic expression"),
        ("1 +", "is not an arithmetic expression"),
        ("", "is not an arithmetic expression"),
        ("1; 2", "is not an arithmetic expression"),
    ],
)
def test_anything_else_is_refused(text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        evaluate(text)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
