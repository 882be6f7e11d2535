"""The mutation operators: each takes a place in a syntax tree and yields what may wrongly stand there."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

_AXIS_CALLS = """
all amax amin any argmax argmin argsort cat cumsum diff expand flip gather index_add index_select log_softmax
logcumsumexp logsumexp max mean min narrow new_zeros permute prod repeat reshape roll select size softmax sort split
squeeze stack std sum transpose unbind unsqueeze var view zeros
"""
AXIS_CALLS = frozenset(_AXIS_CALLS.split())
"""Calls whose plain integers are axes or sizes, not constants of a formula."""

LINKS = {"exp", "expm1", "hinge", "log_sigmoid", "logistic", "logsigmoid", "relu", "sigmoid", "softplus", "tanh"}
SIDES = {
    "chosen": "rejected",
    "better": "worse",
    "winner": "loser",
    "win": "lose",
    "desirable": "undesirable",
    "logp": "ref_logp",
    "sum_logp": "sum_ref_logp",
}
SIDES |= {right: left for left, right in SIDES.items()}
MEANS = {"sum_logp": "mean_logp", "sum_log_ratio": "mean_log_ratio"}
MEANS |= {right: left for left, right in MEANS.items()}
REDUCTIONS = {
    "amax": "amin",
    "max": "min",
    "argmax": "argmin",
    "maximum": "minimum",
    "logsumexp": "sum",
    "log_softmax": "softmax",
    "prod": "sum",
}
REDUCTIONS |= {right: left for left, right in REDUCTIONS.items() if right not in ("sum", "softmax")}
OPPOSITE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Gt: ast.Lt,
    ast.GtE: ast.LtE,
    ast.Eq: ast.NotEq,
    ast.Is: ast.IsNot,
    ast.In: ast.NotIn,
}
OPPOSITE |= {right: left for left, right in OPPOSITE.items()}
BOUNDARY: dict[type[ast.cmpop], type[ast.cmpop]] = {ast.Gt: ast.GtE, ast.Lt: ast.LtE}
BOUNDARY |= {right: left for left, right in BOUNDARY.items()}
BOUNDS = {"above": "at_least", "below": "at_most", "at_least": "above", "at_most": "below"}


@dataclass(frozen=True)
class Place:
    """An expression or statement, the nodes above it (nearest last), and the numeric options of its file."""

    node: ast.AST
    above: tuple[ast.AST, ...]
    name: str
    function: bool
    options: frozenset[str]

    @property
    def parent(self) -> ast.AST:
        return self.above[-1]

    @property
    def line(self) -> int:
        return getattr(self.node, "lineno", 0)


def flip_sign(at: Place) -> Iterator[ast.AST]:
    """-a for a, a - b for a + b, f(-a) for f(a) of a link, -a for a returned tensor."""
    match at.node:
        case ast.UnaryOp(op=ast.USub(), operand=operand) if not _is_axis(at):
            yield operand
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            yield ast.BinOp(left, ast.Sub(), right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            yield ast.BinOp(left, ast.Add(), right)
        case ast.AugAssign(target=target, op=ast.Add(), value=value):
            yield ast.AugAssign(target, ast.Sub(), value)
        case ast.AugAssign(target=target, op=ast.Sub(), value=value):
            yield ast.AugAssign(target, ast.Add(), value)
        case ast.Call(args=[first, *others]) if _called(at.node) in LINKS and not _is_negative(first):
            yield _with(at.node, args=[_minus(first), *others])
        case ast.Call(func=ast.Attribute(value=value) as func, args=[]) if func.attr in LINKS:
            yield _with(at.node, func=_with(func, value=_minus(value)))
        case ast.Return(value=ast.expr() as value) if _returns(at, "Tensor") and not _is_negative(value):
            if "zeros" not in _called(value):
                yield ast.Return(_minus(value))


def swap_sides(at: Place) -> Iterator[ast.AST]:
    """The other response, the other policy, the other arm, b - a for a - b; one by one and in a whole statement."""
    match at.node:
        case ast.Attribute(value=value, attr=attr, ctx=ast.Load()) if attr in SIDES and not _is_called(at):
            yield ast.Attribute(value, SIDES[attr], ast.Load())
        case ast.Name(id=name, ctx=ast.Load()) if SIDES.get(name) in _bound(at):
            yield ast.Name(SIDES[name], ast.Load())
        case ast.Call(args=[condition, yes, no]) if _called(at.node) == "where":
            yield _with(at.node, args=[condition, no, yes])
        case ast.BinOp(left=left, op=ast.Sub(), right=right) if not _is_even(at):
            yield ast.BinOp(right, ast.Sub(), left)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.Assign() | ast.Return() | ast.AugAssign() if at.function:
            swapped = _Swap(_bound(at))
            new = swapped.visit(copy.deepcopy(at.node))
            if len(swapped.met) > 1 and _sorted(new) != _sorted(at.node):
                yield new


def sum_for_mean(at: Place) -> Iterator[ast.AST]:
    """A mean over tokens or units for a sum, and a sum for a mean."""
    node = at.node
    match node:
        case ast.Attribute(value=value, attr=attr, ctx=ast.Load()) if attr in MEANS:
            yield ast.Attribute(value, MEANS[attr], ast.Load())
        case ast.Attribute(value=value, attr="delta", ctx=ast.Load()):
            text = ast.unparse(value)
            yield _expression(f"{text}.chosen.mean_log_ratio - {text}.rejected.mean_log_ratio")
        case ast.Call(func=ast.Attribute(value=value, attr="sum"), args=[summed]) if not _is_integer(summed):
            yield _expression(f"{ast.unparse(node)} / {ast.unparse(value)}.length.clamp(min=1)")
        case ast.Call(func=ast.Attribute(attr="sum" | "mean") as func) if not ast.unparse(func.value).endswith("mask"):
            yield _with(node, func=_with(func, attr="mean" if func.attr == "sum" else "sum"))
        case ast.Call(func=ast.Name(id="sum_by"), args=[summed, *others]):
            owner = ", ".join(ast.unparse(other) for other in others)
            yield _expression(f"{ast.unparse(node)} / sum_by({ast.unparse(summed)} * 0 + 1, {owner}).clamp(min=1)")
        case ast.Constant(value="sum" | "token_mean" as how) if isinstance(at.parent, ast.Call) and at.function:
            yield ast.Constant("token_mean" if how == "sum" else "sum")


def wrong_reduction(at: Place) -> Iterator[ast.AST]:
    """The largest for the smallest, all axes for one, no running sum, one more unit, another unit of a term."""
    match at.node:
        case ast.Call(func=ast.Attribute(value=value, attr=attr) as func) if at.function:
            if attr in REDUCTIONS:
                yield _with(at.node, func=_with(func, attr=REDUCTIONS[attr]))
            if attr in ("sum", "mean", "amax", "amin") and at.node.args and _is_integer(at.node.args[0]):
                yield _with(at.node, args=at.node.args[1:])
            if attr in ("cumsum", "square", "abs", "exp", "sqrt", "flip", "log", "double"):
                yield at.node.args[0] if _is_module(value) else value
        case ast.Call(func=ast.Name(id=name) as func) if name in ("max", "min") and at.function:
            yield _with(at.node, func=ast.Name(REDUCTIONS[name], ast.Load()))
        case ast.Constant(value="token" | "completion" | "pair" | "group" as unit) if at.function:
            # Beside a mask of its own a unit's name only picks weights, which are the same.
            if _called(at.parent) == "Term" or (_called(at.parent) == "Unit" and len(_arguments(at.parent)) == 1):
                yield ast.Constant("completion" if unit == "token" else "token")


def drop_stop(at: Place) -> Iterator[ast.AST]:
    """A gradient that the method stops, not stopped."""
    match at.node:
        case ast.Call(func=ast.Attribute(value=value, attr="detach"), args=[]):
            # A comparison has no gradient to stop.
            if not isinstance(at.parent, ast.Compare):
                yield value
        case ast.Call(args=[only]) if _called(at.node) in ("stop", "stop_gradient", "frozen"):
            yield only
        case ast.With(items=[item], body=body) if "no_grad" in ast.unparse(item):
            yield ast.If(ast.Constant(True), body, [])


def wrong_constant(at: Place) -> Iterator[ast.AST]:
    """A number or an option doubled, a factor or a divisor left out, a bound of an option left out."""
    match at.node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool) and not _is_axis(at):
            if not isinstance(at.parent, ast.UnaryOp) or not _is_axis(_up(at)):
                yield ast.Constant(2 * number if number else 1)
        case ast.Attribute(value=ast.Name(id="self"), attr=attr, ctx=ast.Load()) if attr in at.options:
            if not _is_truth(at):
                yield ast.BinOp(ast.Constant(2), ast.Mult(), at.node)
        case ast.BinOp(left=left, op=ast.Mult() | ast.Div() | ast.Pow() as op, right=right):
            if not _is_plain(left) or _is_plain(right):
                yield left
            if isinstance(op, ast.Mult) and (not _is_plain(right) or _is_plain(left)):
                yield right
        case ast.Call(keywords=keywords) if _called(at.node) == "option":
            for word in keywords:
                if word.arg in BOUNDS:
                    yield _with(at.node, keywords=[other for other in keywords if other is not word])


def drop_term(at: Place) -> Iterator[ast.AST]:
    """A summand, an additive part of the loss, its scale or weight, or an update left out."""
    match at.node:
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as op, right=right):
            if not _is_plain(left) or _is_plain(right):
                yield left
            if not _is_plain(right) or _is_plain(left):
                yield right if isinstance(op, ast.Add) else _minus(right)
        case ast.Dict(keys=keys, values=values) if at.function and len(keys) > 1:
            for i in range(len(keys)):
                yield ast.Dict(keys[:i] + keys[i + 1 :], values[:i] + values[i + 1 :])
        case ast.Call(args=[values, unit, *scale], keywords=keywords) if _called(at.node) == "Term":
            if scale:
                yield _with(at.node, args=[values, unit])
            for word in keywords:
                yield _with(at.node, keywords=[other for other in keywords if other is not word])
        case ast.Assign(targets=[ast.Subscript()]) | ast.AugAssign():
            yield ast.Pass()


def drop_declaration(at: Place) -> Iterator[ast.AST]:
    """A column that a method declares as read, or its coupling, not declared."""
    match at.node:
        case ast.Set(elts=elements) if _called(at.above[-2]) == "method" and len(elements) > 1:
            for i in range(len(elements)):
                yield ast.Set(elements[:i] + elements[i + 1 :])
        case ast.Call(keywords=keywords) if _called(at.node) == "method":
            rest = [word for word in keywords if word.arg != "coupling"]
            if len(rest) < len(keywords):
                yield _with(at.node, keywords=rest)


def off_by_one(at: Place) -> Iterator[ast.AST]:
    """A slice, an index, a mask, a length moved by one place."""
    match at.node:
        case ast.Slice(lower=lower, upper=upper, step=step):
            for end in (lower, upper):
                number = _integer(end)
                for moved in () if number is None else (number + 1, number - 1):
                    # 0 is "from the start" below and "nothing" above: the bound is left out instead.
                    bound = ast.Constant(moved) if moved else None
                    yield ast.Slice(bound if end is lower else lower, bound if end is upper else upper, step)
        case ast.Constant(value=int() as index) if _is_index(at) and not isinstance(index, bool):
            yield ast.Constant(index + 1)
        case ast.Attribute(attr="mask", ctx=ast.Load()) if at.function and not _is_called(at):
            yield _expression(f"{ast.unparse(at.node)}.roll(1, -1)")
        case ast.Attribute(attr="length", ctx=ast.Load()) if at.function:
            yield _expression(f"{ast.unparse(at.node)} + 1")
        case ast.Call(func=ast.Name(id="len")) if at.function and not _is_room(at):
            yield _expression(f"{ast.unparse(at.node)} + 1")


def wrong_condition(at: Place) -> Iterator[ast.AST]:
    """A comparison the other way round, and or, not, a condition negated."""
    match at.node:
        case ast.Compare(left=left, ops=[op], comparators=others) if type(op) in OPPOSITE:
            yield ast.Compare(left, [OPPOSITE[type(op)]()], others)
        case ast.Compare(left=left, ops=ops, comparators=others) if len(ops) > 1:
            for i, op in enumerate(ops):
                if type(op) in OPPOSITE:
                    yield ast.Compare(left, [*ops[:i], OPPOSITE[type(op)](), *ops[i + 1 :]], others)
        case ast.BoolOp(op=op, values=values):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.BinOp(left=left, op=ast.BitAnd(), right=right) if at.function:
            yield ast.BinOp(left, ast.BitOr(), right)
            yield left
            yield right
        case ast.BinOp(left=left, op=ast.BitOr(), right=right) if at.function and not isinstance(left, ast.Dict):
            yield ast.BinOp(left, ast.BitAnd(), right)
        case ast.UnaryOp(op=ast.Not() | ast.Invert(), operand=operand):
            yield operand
        case ast.Attribute() | ast.Name() | ast.Call() if _is_test(at):
            yield ast.UnaryOp(ast.Not(), at.node)


def boundary(at: Place) -> Iterator[ast.AST]:
    """A bound that belongs to a range where it did not, or the other way round."""
    match at.node:
        case ast.Compare(left=left, ops=ops, comparators=others):
            for i, op in enumerate(ops):
                if type(op) in BOUNDARY:
                    yield ast.Compare(left, [*ops[:i], BOUNDARY[type(op)](), *ops[i + 1 :]], others)
        case ast.Call(keywords=keywords) if _called(at.node) == "option":
            for i, word in enumerate(keywords):
                if word.arg in BOUNDS:
                    other = ast.keyword(BOUNDS[word.arg], word.value)
                    yield _with(at.node, keywords=[*keywords[:i], other, *keywords[i + 1 :]])


def drop_clamp(at: Place) -> Iterator[ast.AST]:
    """Something cut off, not cut off."""
    match at.node:
        case ast.Call(func=ast.Attribute(value=value, attr="clamp" | "clamp_min" | "clamp_max" | "clip"), args=args):
            yield args[0] if _is_module(value) else value
            if len(at.node.keywords) > 1:
                for word in at.node.keywords:
                    yield _with(at.node, keywords=[other for other in at.node.keywords if other is not word])
        case ast.Call(args=[only]) if _called(at.node) == "relu":
            yield only
        case ast.Call(args=[left, right]) if _called(at.node) in ("maximum", "minimum", "max", "min") and at.function:
            if not _is_integer(right):
                yield left
            yield right
        case ast.Call(args=[_, yes, no]) if _called(at.node) == "where":
            yield yes
            yield no


OPERATORS: Mapping[str, Callable[[Place], Iterator[ast.AST]]] = {
    "flip_sign": flip_sign,
    "swap_sides": swap_sides,
    "sum_for_mean": sum_for_mean,
    "wrong_reduction": wrong_reduction,
    "drop_stop": drop_stop,
    "wrong_constant": wrong_constant,
    "drop_term": drop_term,
    "drop_declaration": drop_declaration,
    "off_by_one": off_by_one,
    "wrong_condition": wrong_condition,
    "boundary": boundary,
    "drop_clamp": drop_clamp,
}


class _Swap(ast.NodeTransformer):
    """Both responses (or policies, arms) exchanged in everything below a node; `met` are the names it found."""

    def __init__(self, bound: frozenset[str]) -> None:
        self.bound, self.met = bound, set[str]()

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr in ("chosen", "rejected"):
            self.met.add(node.attr)
            return ast.Attribute(node.value, SIDES[node.attr], node.ctx)
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        other = SIDES.get(node.id)
        if other in self.bound and isinstance(node.ctx, ast.Load):
            self.met.add(node.id)
            return ast.Name(str(other), node.ctx)
        return node


def _called(node: ast.AST | None) -> str:
    """The last name of what a call calls; empty for anything else."""
    match node:
        case ast.Call(func=ast.Name(id=name)) | ast.Call(func=ast.Attribute(attr=name)):
            return name
    return ""


def _is_module(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("torch", "math", "functional")


def _up(at: Place) -> Place:
    return Place(at.above[-1], at.above[:-1], at.name, at.function, at.options)


def _is_called(at: Place) -> bool:
    return isinstance(at.parent, ast.Call) and at.parent.func is at.node


def _with(node: ast.AST, **changes: object) -> ast.AST:
    new = copy.copy(node)
    for name, value in changes.items():
        setattr(new, name, value)
    return new


def _minus(node: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.USub(), node)


def _is_negative(node: ast.AST) -> bool:
    """Whether `flip_sign` of what is inside says the same."""
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)


def _expression(text: str) -> ast.expr:
    return ast.parse(f"({text})", mode="eval").body


def _integer(node: ast.AST | None) -> int | None:
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as value)):
            return -value
    return None


def _is_integer(node: ast.AST) -> bool:
    return _integer(node) is not None


def _is_plain(node: ast.AST) -> bool:
    """Whether a factor or summand is a number or an option: what is left without the other one is no tensor."""
    match node:
        case ast.Constant() | ast.Attribute(value=ast.Name(id="self")):
            return True
        case ast.UnaryOp(operand=operand):
            return _is_plain(operand)
        case ast.BinOp(left=left, right=right):
            return _is_plain(left) and _is_plain(right)
    return False


def _is_axis(at: Place) -> bool:
    """Whether an integer is an axis, a size or an index; `-1` is a minus and a 1, so both are asked."""
    node, parent = at.node, at.parent
    if isinstance(parent, ast.UnaryOp):
        return _is_axis(_up(at))
    if _is_index(at) or isinstance(parent, ast.Slice):
        return True
    if isinstance(parent, ast.keyword):
        return parent.arg in ("dim", "dims", "axis")
    if isinstance(parent, ast.Tuple):
        return isinstance(at.above[-2], ast.Subscript)
    return _is_integer(node) and isinstance(parent, ast.Call) and node in parent.args and _called(parent) in AXIS_CALLS


def _is_index(at: Place) -> bool:
    """Whether a node is an index of a subscript: alone, or beside slices."""
    parent = at.parent
    if isinstance(parent, ast.Tuple):
        above = at.above[-2]
        return isinstance(above, ast.Subscript) and above.slice is parent
    return isinstance(parent, ast.Subscript) and parent.slice is at.node


def _is_test(at: Place) -> bool:
    return isinstance(at.parent, ast.If | ast.IfExp) and at.parent.test is at.node


def _is_truth(at: Place) -> bool:
    """Whether only the truth of a value is asked, which doubling cannot change."""
    return _is_test(at) or (
        isinstance(at.parent, ast.BoolOp | ast.UnaryOp) and not isinstance(getattr(at.parent, "op", None), ast.USub)
    )


def _is_room(at: Place) -> bool:
    """Whether a number says how many sums are made room for: one more stays empty."""
    called = _called(at.parent)
    return called.endswith("_by") or called in ("new_zeros", "zeros")


def _arguments(call: ast.AST) -> list[ast.AST]:
    return [*call.args, *call.keywords] if isinstance(call, ast.Call) else []


def _sorted(node: ast.AST) -> str:
    """Source in which the order of summands, factors and alternatives does not matter."""

    class Sorted(ast.NodeTransformer):
        def visit_BinOp(self, found: ast.BinOp) -> ast.AST:
            self.generic_visit(found)
            if isinstance(found.op, ast.Add | ast.Mult | ast.BitOr | ast.BitAnd):
                found.left, found.right = sorted((found.left, found.right), key=ast.unparse)
            return found

    return ast.unparse(Sorted().visit(copy.deepcopy(node)))


def _is_even(at: Place) -> bool:
    """Whether only the size of a value counts: it is squared, or its absolute value is taken."""
    parent = at.parent
    if isinstance(parent, ast.Attribute):
        return parent.attr in ("square", "abs")
    if isinstance(parent, ast.Call):
        return _called(parent) in ("square", "abs")
    return isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.Pow) and _integer(parent.right) == 2


def _enclosing(at: Place) -> ast.FunctionDef | None:
    return next((node for node in reversed(at.above) if isinstance(node, ast.FunctionDef)), None)


def _returns(at: Place, name: str) -> bool:
    function = _enclosing(at)
    return function is not None and function.returns is not None and ast.unparse(function.returns) == name


def _bound(at: Place) -> frozenset[str]:
    """Names that the enclosing function binds."""
    function = _enclosing(at)
    if function is None:
        return frozenset()
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return frozenset(names | {arg.arg for arg in function.args.args})
