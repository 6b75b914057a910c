"""Calculations with whole numbers, evaluated by a grammar of `+ - * /` and parentheses only."""

import ast
from fractions import Fraction


MAX_LENGTH = 200


def calculate(text: str) -> tuple[Fraction, list[int]] | None:
    """
    Evaluates a calculation.

    Args:
        text (`str`):
            For example `(10 - 4) * 4`.

    Returns:
        `tuple[Fraction, list[int]]` or `None`: Its value and the whole numbers in it, in order. `None` if the text is
        anything else, longer than 200 characters, or divides by zero.
    """
    if len(text) > MAX_LENGTH:
        return None
    numbers: list[int] = []
    try:
        return _value(ast.parse(text.strip(), mode="eval").body, numbers), numbers
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, numbers: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, numbers)
    if not isinstance(node, ast.BinOp):
        raise ValueError
    left, right = _value(node.left, numbers), _value(node.right, numbers)
    if isinstance(node.op, ast.Add):
        return left + right
    if isinstance(node.op, ast.Sub):
        return left - right
    if isinstance(node.op, ast.Mult):
        return left * right
    if isinstance(node.op, ast.Div):
        return left / right
    raise ValueError
