"""Whether two expressions that math-verify has read are equal: its own comparison, with sizes kept apart.

math-verify rounds to 15 places behind the point, so numbers below that are all the same to it, and it
compares few equations in another form. Imported late, for sympy takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator

from latex2sympy2_extended.logic import And
from math_verify import verify
from sympy import (
    Basic,
    Derivative,
    Eq,
    Expr,
    FiniteSet,
    Float,
    Integral,
    Intersection,
    Interval,
    Limit,
    MatrixBase,
    Poly,
    Pow,
    Product,
    Rational,
    Set,
    Sum,
    Symbol,
    Tuple,
    UnevaluatedExpr,
    Union,
    exp,
    factorial,
)
from sympy.core.relational import Relational
from sympy.polys.polyerrors import BasePolynomialError

DIGITS, MOST_DIGITS = 30, 300
"""Digits to which values and differences are computed."""
EXACT, ROUNDED = 1e-20, 1e-5
"""How far equal values may be apart, relative to the larger one: exact ones, and where one is a decimal."""
LARGEST_POWER, MOST_OPERATIONS = 12, 100
"""Limits of the polynomials that are multiplied out."""
LARGEST_EXPONENT, LARGEST_EXPANSION = 1_000_000, 60
"""Largest exponent, and number before a factorial sign, of a number that is computed; largest power of a sum
with variables."""
UNKNOWN = (
    ArithmeticError,
    AttributeError,
    BasePolynomialError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What sympy raises for expressions that it can't compute with."""


def equal(answer: Basic | str, gold: Basic | str) -> bool:
    """Whether an answer equals the gold expression: constants by value, equations of two or more variables up
    to a factor, `x > 3` for the interval (3, oo), and anything else as math-verify has it."""
    if isinstance(answer, str) or isinstance(gold, str):
        return verify([gold], [answer], timeout_seconds=None)
    if _is_huge(answer) or _is_huge(gold):
        return bool(answer == gold)
    if isinstance(answer, Eq) and isinstance(gold, Eq):
        if isinstance(gold.lhs, Symbol) and answer.lhs == gold.lhs:
            return equal(answer.rhs, gold.rhs)
        if (verdict := _same_curve(answer, gold)) is not None:
            return verdict
    if isinstance(gold, Interval | Union):
        answer = _as_interval(answer) or answer
    if (verdict := _same_constant(answer, gold)) is not None:
        return verdict
    return verify([gold], [answer], timeout_seconds=None) and not _differ_in_size(answer, gold)


def _is_huge(expression: Basic) -> bool:
    """Whether an expression has a part that would take minutes to compute, such as a tower of powers."""
    powers = sorted(expression.atoms(Pow, exp, factorial), key=lambda power: power.count_ops())
    for power in powers:  # inner ones first, so that none is computed that is huge
        size = power.exp if isinstance(power, Pow) else power.args[0]
        is_sum = isinstance(power, Pow) and power.base.is_Add and power.free_symbols
        try:
            if size.is_number and abs(size.evalf(5)) > (LARGEST_EXPANSION if is_sum else LARGEST_EXPONENT):
                return True
        except UNKNOWN:
            continue
    return False


def _same_constant(answer: Basic, gold: Basic) -> bool | None:
    """Whether two exact constants are equal; None where that can't be computed, or one is none."""
    sides = answer, gold
    if not all(isinstance(side, Expr) and not side.free_symbols and not side.has(Float) for side in sides):
        return None
    values = [_value(side) for side in sides]
    if None in values or 0 in values:
        return None
    if _apart(*values, EXACT):
        return False
    try:
        if _is_fraction(answer) and _is_fraction(gold):
            return bool(answer.doit() == gold.doit())
        rest = (answer - gold).evalf(2, maxn=MOST_DIGITS)
    except UNKNOWN:
        return None
    return rest == 0 or not (isinstance(rest, Float) and rest._prec > 1)


def _is_fraction(constant: Expr) -> bool:
    """Whether a constant is made of integers by operations that keep it a fraction."""
    return all(isinstance(atom, Rational) for atom in constant.atoms()) and all(
        power.exp.is_Integer for power in constant.atoms(Pow)
    )


def _value(expression: Expr, point: dict[Symbol, Rational] | None = None) -> Expr | None:
    """The value of an expression, complex or real; None where it has none, or none that is certain."""
    if expression.has(UnevaluatedExpr, Integral, Sum, Product, Limit, Derivative):
        return None
    try:
        value = expression.evalf(DIGITS, subs=point)
    except UNKNOWN:
        return None
    if value == 0:
        return value
    parts = value.as_real_imag()
    certain = all(part == 0 or (isinstance(part, Float) and part._prec > 3 * DIGITS) for part in parts)
    return value if certain and value.is_finite else None


def _apart(one: Expr, other: Expr, tolerance: float) -> bool:
    """Whether two values differ by more than the tolerance times the larger one."""
    return bool(abs(one - other) > tolerance * max(abs(one), abs(other)))


def _differ_in_size(answer: Basic, gold: Basic) -> bool:
    """Whether values inside two expressions differ that are equal when rounded; symbols have fixed values."""
    tolerance = ROUNDED if answer.has(Float) or gold.has(Float) else EXACT
    symbols = sorted(answer.free_symbols | gold.free_symbols, key=str)
    point = {symbol: Rational(7 + 4 * index, 5) for index, symbol in enumerate(symbols)}
    sides = [[_value(part, point) for part in _parts(side)] for side in (answer, gold)]
    values, gold_values = sides
    if None in values or None in gold_values or len(values) != len(gold_values):
        return False
    for gold_value in gold_values:
        match = next((value for value in values if not _apart(value, gold_value, tolerance)), None)
        if match is None:
            return True
        values.remove(match)
    return False


def _parts(expression: Basic) -> Iterator[Expr]:
    """The expressions in a set, tuple, interval or matrix; of relations none."""
    if isinstance(expression, Interval):
        yield from (end for end in (expression.start, expression.end) if end.is_finite)
    elif isinstance(expression, MatrixBase):
        yield from expression.flat()
    elif isinstance(expression, FiniteSet | Tuple | Union):
        for part in expression.args:
            yield from _parts(part)
    elif isinstance(expression, Expr):
        yield expression


def _same_curve(answer: Eq, gold: Eq) -> bool | None:
    """Whether two polynomial equations in the same two or more variables are equal up to a factor; None for
    others. An equation of one variable is a solution, and isn't rewritten."""
    variables = sorted(gold.free_symbols, key=str)
    if len(variables) < 2 or answer.free_symbols != gold.free_symbols:
        return None
    try:
        terms, gold_terms = (_coefficients(equation, variables) for equation in (answer, gold))
    except UNKNOWN:
        return None
    if not terms or not gold_terms:
        return None
    if terms.keys() != gold_terms.keys():
        return False
    factors = [_value(terms[monomial] / gold_terms[monomial]) for monomial in terms]
    if None in factors:
        return None
    tolerance = ROUNDED if answer.has(Float) or gold.has(Float) else EXACT
    return not any(_apart(factor, factors[0], tolerance) for factor in factors)


def _coefficients(equation: Eq, variables: list[Symbol]) -> dict[tuple[int, ...], Expr] | None:
    """The coefficients of a polynomial equation by powers of its variables; None where it is none, or a large
    one."""
    difference = equation.lhs - equation.rhs
    powers = [power.exp for power in difference.atoms(Pow) if power.free_symbols]
    small = all(power.is_Integer and 0 < power <= LARGEST_POWER for power in powers)
    if not small or difference.count_ops() > MOST_OPERATIONS:
        return None
    return dict(Poly(difference, *variables).terms())


def _as_interval(answer: Basic) -> Set | None:
    """The interval or intervals of a variable that inequalities describe; None for anything else."""
    if isinstance(answer, Relational) and not isinstance(answer, Eq):
        sides = answer.lhs, answer.rhs
        is_bound = any(isinstance(side, Symbol) for side in sides) and any(side.is_number for side in sides)
        return answer.as_set() if is_bound else None
    if not isinstance(answer, And | FiniteSet) or len(answer.free_symbols) != 1:
        return None
    sets = [_as_interval(part) for part in answer.args]
    if None in sets:
        return None
    return Intersection(*sets) if isinstance(answer, And) else Union(*sets)
