"""
Expressions of a small grammar: whole and decimal numbers, variables of one letter, `+ - * / **`, and named functions.

Python's parser reads them and no code is run. Length, depth and exponents are bounded, so each costs microseconds.
"""

import ast
import cmath
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Generic, TypeVar


MAX_LENGTH = 400
MAX_DEPTH = 60
MAX_POWER = 64
MAX_BITS = 20_000

Value = TypeVar("Value")


class NotInGrammar(ValueError):
    """A text that is no expression of the grammar, or one without a value."""


@dataclass(frozen=True)
class Dual:
    """A complex value and its derivative, for differentiation (forward mode)."""

    value: complex
    slope: complex = 0.0


@dataclass(frozen=True)
class Algebra(Generic[Value]):
    """
    How the operations of an expression are computed.

    Args:
        number (`Callable`):
            From a number in the text to a value.
        operations (`Mapping`):
            From the class of an operator to its function of two values.
        functions (`Mapping`):
            From the name of a function to its function of one value.
        constants (`Mapping`):
            From the name of a constant to its value.
    """

    number: Callable[[int | float], Value]
    operations: Mapping[type[ast.operator], Callable[[Value, Value], Value]]
    functions: Mapping[str, Callable[[Value], Value]]
    constants: Mapping[str, Value]


def parse(text: str) -> ast.expr:
    """
    Parses an expression. `^` is read as `**`.

    Raises:
        [`NotInGrammar`]: If the text is anything else, or longer than 400 characters.
    """
    if len(text) > MAX_LENGTH:
        raise NotInGrammar("too long")
    try:
        return ast.parse(text.strip().replace("^", "**"), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise NotInGrammar("no expression") from error


def evaluate(node: ast.expr, variables: Mapping[str, Value], algebra: Algebra[Value], depth: int = 0) -> Value:
    """
    Evaluates a parsed expression.

    Args:
        node (`ast.expr`):
            What [`parse`] returns.
        variables (`Mapping`):
            Values of the variables.
        algebra ([`Algebra`]):
            How to compute.

    Raises:
        [`NotInGrammar`]: If it holds anything outside the grammar, or has no value.
    """
    if depth > MAX_DEPTH:
        raise NotInGrammar("too deep")
    try:
        match node:
            case ast.Constant(value=int(number) | float(number)) if not isinstance(number, bool):
                return algebra.number(number)
            case ast.Name(id=name) if name in variables:
                return variables[name]
            case ast.Name(id=name) if name in algebra.constants:
                return algebra.constants[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                zero = algebra.number(0)
                return algebra.operations[ast.Sub](zero, evaluate(operand, variables, algebra, depth + 1))
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return evaluate(operand, variables, algebra, depth + 1)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in algebra.operations:
                values = [evaluate(side, variables, algebra, depth + 1) for side in (left, right)]
                return algebra.operations[type(op)](*values)
            case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in algebra.functions:
                return algebra.functions[name](evaluate(argument, variables, algebra, depth + 1))
    except (ArithmeticError, ValueError) as error:
        raise NotInGrammar("no value") from error
    raise NotInGrammar("outside the grammar")


def numbers(node: ast.expr) -> list[int | float]:
    """The numbers that a parsed expression contains."""
    constants = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
    return [value for value in constants if isinstance(value, int | float)]


def is_expanded(node: ast.expr) -> bool:
    """Whether a parsed expression multiplies no sums."""
    operations = [part for part in ast.walk(node) if isinstance(part, ast.BinOp)]
    products = [part for part in operations if isinstance(part.op, ast.Mult | ast.Pow)]
    sums = [part for part in operations if isinstance(part.op, ast.Add | ast.Sub)]
    return not any(below in sums for part in products for below in ast.walk(part))


def _exact(number: int | float) -> Fraction:
    return Fraction(str(number))


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or not 0 <= exponent <= MAX_POWER:
        raise NotInGrammar("exponent")
    if max(base.numerator.bit_length(), base.denominator.bit_length()) * int(exponent) > MAX_BITS:
        raise NotInGrammar("too large")
    return base ** int(exponent)


def _dual_product(left: Dual, right: Dual) -> Dual:
    return Dual(left.value * right.value, left.slope * right.value + left.value * right.slope)


def _dual_quotient(left: Dual, right: Dual) -> Dual:
    value = left.value / right.value
    return Dual(value, (left.slope - value * right.slope) / right.value)


def _dual_power(base: Dual, exponent: Dual) -> Dual:
    if exponent.slope == 0 and exponent.value == int(exponent.value.real):
        power = int(exponent.value.real)
        value = base.value**power
        return Dual(value, power * base.value ** (power - 1) * base.slope if power else 0.0)
    logarithm = cmath.log(base.value)
    value = cmath.exp(exponent.value * logarithm)
    return Dual(value, value * (exponent.slope * logarithm + exponent.value * base.slope / base.value))


def _function(function: Callable[[complex], complex], slope: Callable[[complex], complex]) -> Callable[[Dual], Dual]:
    return lambda argument: Dual(function(argument.value), slope(argument.value) * argument.slope)


def _complex(number: int | float) -> Dual:
    return Dual(complex(number))


EXACT: Algebra[Fraction] = Algebra(
    number=_exact,
    operations={
        ast.Add: lambda left, right: left + right,
        ast.Sub: lambda left, right: left - right,
        ast.Mult: lambda left, right: left * right,
        ast.Div: lambda left, right: left / right,
        ast.Pow: _exact_power,
    },
    functions={},
    constants={},
)
"""Exact values of calculations and polynomials."""

DIFFERENTIABLE: Algebra[Dual] = Algebra(
    number=_complex,
    operations={
        ast.Add: lambda left, right: Dual(left.value + right.value, left.slope + right.slope),
        ast.Sub: lambda left, right: Dual(left.value - right.value, left.slope - right.slope),
        ast.Mult: _dual_product,
        ast.Div: _dual_quotient,
        ast.Pow: _dual_power,
    },
    functions={
        "exp": _function(cmath.exp, cmath.exp),
        "log": _function(cmath.log, lambda x: 1 / x),
        "ln": _function(cmath.log, lambda x: 1 / x),
        "sqrt": _function(cmath.sqrt, lambda x: 0.5 / cmath.sqrt(x)),
        "sin": _function(cmath.sin, cmath.cos),
        "cos": _function(cmath.cos, lambda x: -cmath.sin(x)),
        "tan": _function(cmath.tan, lambda x: 1 / cmath.cos(x) ** 2),
        "sinh": _function(cmath.sinh, cmath.cosh),
        "cosh": _function(cmath.cosh, cmath.sinh),
        "asin": _function(cmath.asin, lambda x: 1 / cmath.sqrt(1 - x * x)),
        "acos": _function(cmath.acos, lambda x: -1 / cmath.sqrt(1 - x * x)),
        "atan": _function(cmath.atan, lambda x: 1 / (1 + x * x)),
    },
    constants={"E": Dual(cmath.e), "e": Dual(cmath.e), "pi": Dual(cmath.pi)},
)
"""Complex values and derivatives."""
