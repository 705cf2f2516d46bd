"""Where a block's sub-layers read, end and are added to the stream: told by its structure and its forward's own code.

Two blocks may hold the same modules under the same names and differ in where a norm stands (BART and mBART, or torch's
``norm_first``). Only their code tells, so ``calls`` reads it.
"""

import ast
import functools
import inspect
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_peft import arch, find, hosts, parts
from lightning_peft.attach import modules
from lightning_peft.find import exact

KINDS = ("attention", "cross_attention", "mlp")
_CROSS = re.compile("cross|enc(oder)?_?(dec|attn)", re.IGNORECASE)
_SUM = "+"


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """A sub-layer f of a block, ``x + f(norm(x))`` or ``norm(x + f(x))``, as names of modules.

    Args:
        block: around it.
        kind: one of ``KINDS``.
        width: of the stream.
        reads: its first argument is what f reads.
        last: f's last linear layer.
        ends: its output (the first of several) is f's, with the dropout behind it where that is a module of its own.
        whole: the module that is f and nothing else; "" where f's layers lie in several modules or beside others.
        adds: the module whose code adds f to the stream; "" where that cannot be told, and then what follows is empty.
        closes: ``adds`` holds only the last of f's layers, so that its second argument is what is added (BERT).
        after: the norm of the sum (post-LN), if ``adds`` has it.
        final: after the sum only norms follow in the block.
        before: the norm in front of a final f (pre-LN).
        around: the innermost module that calls both ``before``, or else ``reads``, and f.
    """

    block: str
    kind: str
    width: int
    reads: str
    last: str
    ends: str
    whole: str = ""
    adds: str = ""
    closes: bool = False
    after: str = ""
    final: bool = False
    before: str = ""
    around: str = ""


def sublayers(
    model: nn.Module, kinds: Sequence[str], by: str, *, exclude: Sequence[str] = (), layers: str = ""
) -> list[Sublayer]:
    """The sub-layers of these kinds in the model's blocks, in order.

    Args:
        model: with stacks of blocks (``arch.blocks``).
        kinds: some of ``KINDS``.
        by: name of the method, for messages.
        exclude: patterns of modules in or around a sub-layer's last layer.
        layers: blocks to look at, as in ``find``.

    Raises:
        ValueError: a block without one sub-layer of a kind (a model without any, for cross-attention), or nothing left.
    """
    named, blocks = dict(modules(model)), arch.blocks(model)
    if not blocks:
        raise ValueError(f"{by}: this {type(model).__name__} has no stack of blocks; name modules by targets")
    found = [b for b in _all(model, named, blocks) if b.kind in kinds]
    looked_at = arch.select_layers(model, blocks, layers) if layers else list(blocks)
    for kind in kinds:
        having = Counter(b.block for b in found if b.kind == kind)
        unclear = [b for b in looked_at if having[b] != 1]
        if unclear and (kind != "cross_attention" or not having):
            inside = [n for n in arch.role(model, "all-linear") if n.startswith(f"{unclear[0]}.")]
            linear = [n.removeprefix(f"{unclear[0]}.") for n in inside]
            raise ValueError(
                f"{by}: {having[unclear[0]] or 'no'} {kind} is recognised in {unclear[0]!r} ({len(unclear)} such "
                f"blocks), where one is needed, a {type(named[unclear[0]]).__name__} with the linear layers {linear}; "
                f"leave {kind!r} out of places, choose layers, or name modules by targets"
            )
    types = ("linear", "conv1d")
    kept = {n for n, _ in find(model, [exact(b.last) for b in found], types, exclude=exclude, layers=layers)}
    return [b for b in found if b.last in kept]


def is_norm(module: Any) -> bool:
    return any("Norm" in c.__name__ for c in type(module).__mro__)


def stream_width(module: nn.Module) -> int:
    """Of its widest norm, as those of single heads are narrower than the stream; 0 where none has a weight."""
    norms = [m for _, m in modules(module) if is_norm(m)]
    return max((m.weight.numel() for m in norms if isinstance(getattr(m, "weight", None), nn.Parameter)), default=0)


def _all(model: nn.Module, named: dict[str, Any], blocks: dict[str, int]) -> Iterator[Sublayer]:
    seen = set()
    for a in parts.attentions(model):
        block = next((p for p in arch.parents(a.o) if p in blocks), None)
        if block is not None:
            kind = KINDS[1] if _CROSS.search(a.name.removeprefix(block)) else KINDS[0]
            seen.add((block, kind))
            yield _sublayer(named, block, kind, (a.q, a.k, a.v), a.o, a.name if a.name != block else a.q)
    for m in parts.mlps(model):
        block = next(p for p in arch.parents(m.down) if p in blocks)
        seen.add((block, KINDS[2]))
        yield _sublayer(named, block, KINDS[2], m.rows, m.down, m.rows[0])
    roles = {kind: arch.role(model, kind) for kind in (KINDS[0], KINDS[2])}
    for block, kind in ((b, k) for b in blocks for k in roles if (b, k) not in seen):
        layers = [n for n in roles[kind] if n.startswith(f"{block}.")]
        last = [n for n in layers if hosts.shape(named[n])[0] == stream_width(named[block])]
        if len(last) == 1 and len(layers) > 1:  # layers fused into one (GPT-NeoX, Phi-3), latent attention
            first, owner = [n for n in layers if n != last[0]], last[0].rpartition(".")[0]
            reads = owner if kind == KINDS[0] and owner != block else first[0]
            yield _sublayer(named, block, kind, first, last[0], reads)


def _sublayer(named: dict[str, Any], block: str, kind: str, first: Sequence[str], last: str, reads: str) -> Sublayer:
    width = hosts.shape(named[last])[0]
    plain = Sublayer(block=block, kind=kind, width=width, reads=reads, last=last, ends=last)
    levels = [p for p in arch.parents(last) if p == block or p.startswith(f"{block}.")]  # innermost first
    events = {level: calls(named[level]) for level in levels}
    adds = next((level for level in levels if _sums(named, events[level], level, last)), None)
    if adds is None:
        return plain
    child, own = _child(adds, last), events[adds]
    at = _position(own, adds, last)
    behind, then = own[at + 1], own[own.index(_SUM, at) + 1 :]
    dropped = behind != _SUM and own.count(behind) == 1 and isinstance(named[f"{adds}.{behind}"], nn.Dropout)
    outer = levels[levels.index(adds) :]
    norms = [f"{adds}.{c}" for c in then if c != _SUM and is_norm(named[f"{adds}.{c}"])]
    after = norms[0] if norms and not _linear(named, adds, then) else ""
    final = all(not _linear(named, level, events[level][_after(events[level], level, last) :]) for level in outer)
    pre = ((o, n) for o in outer if final and not after and (n := _norm_before(named, events[o], o, last)))
    around, before = next(pre, (next(o for o in outer if f"{reads}.".startswith(f"{o}.")), ""))
    return Sublayer(
        block=block, kind=kind, width=width, reads=reads, last=last, adds=adds, final=final, after=after,
        ends=f"{adds}.{behind}" if dropped else child,
        whole=child if all(n.startswith(f"{child}.") for n in (*first, last)) else "",
        closes=not any(n.startswith(f"{adds}.") for n in first),
        before=before, around=around,
    )  # fmt: skip


def _child(level: str, name: str) -> str:
    """The direct child of ``level`` that is ``name`` or holds it."""
    return f"{level}.{name.removeprefix(f'{level}.').partition('.')[0]}"


def _position(events: list[str], level: str, name: str) -> int:
    """Of the last call of that child; -1 where the code shows none."""
    child = _child(level, name).removeprefix(f"{level}.")
    return max((i for i, e in enumerate(events) if e == child), default=-1)


def _after(events: list[str], level: str, name: str) -> int:
    """Index behind the sum that follows the child, or behind the child where none does."""
    at = _position(events, level, name)
    return events.index(_SUM, at) + 1 if at >= 0 and _SUM in events[at:] else at + 1


def _linear(named: dict[str, Any], level: str, events: Sequence[str]) -> list[str]:
    """Those of the called children that hold linear layers."""
    called = [e for e in events if e != _SUM]
    return [e for e in called if any(arch.is_linear(m) for m in named[f"{level}.{e}"].modules())]


def _sums(named: dict[str, Any], events: list[str], level: str, last: str) -> bool:
    """The code at this level adds what the child returns, before it calls another child with layers of its own."""
    at = _position(events, level, last)
    return at >= 0 and _SUM in events[at:] and not _linear(named, level, events[at + 1 : events.index(_SUM, at)])


def _norm_before(named: dict[str, Any], events: list[str], level: str, last: str) -> str:
    """The norm called last before the child, with no sum between: in parallel blocks attention may lie between."""
    for event in reversed(events[: max(_position(events, level, last), 0)]):
        if event == _SUM:
            break
        if is_norm(named[f"{level}.{event}"]):
            return f"{level}.{event}"
    return ""


# ---- reading code --------------------------------------------------------------------------------------------------


def calls(module: nn.Module) -> list[str]:
    """Names of the children that ``module``'s forward calls, in order of evaluation, and "+" for every sum.

    Methods of its own are followed; of an ``if`` on a flag of the module (``self.norm_first``) the branch that is
    taken. Empty where there is no source to read.
    """
    forward = getattr(type(module), "unadapted", type(module).forward)
    return list(_walk(module, _body(forward), ()))


@functools.cache
def _body(function: Any) -> tuple[ast.AST, ...]:
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    except OSError:  # code made by exec, or shipped compiled
        return ()
    return tuple(n for f in ast.parse(source).body if isinstance(f, ast.FunctionDef) for n in f.body)


def _walk(module: Any, nodes: Sequence[ast.AST], inside: tuple[str, ...]) -> Iterator[str]:
    for node in nodes:
        yield from _events(module, node, inside)


def _events(module: Any, node: ast.AST, inside: tuple[str, ...]) -> Iterator[str]:
    follow = functools.partial(_walk, module, inside=inside)
    if isinstance(node, ast.If) and (taken := _flag(module, node.test)) is not None:
        yield from follow(node.body if taken else node.orelse)
    elif isinstance(node, ast.Call):
        yield from follow([*node.args, *node.keywords])
        callee = node.func.value if isinstance(node.func, ast.Subscript) else node.func  # self.layer[0](x)
        name = _own(callee)
        yield from [name] if isinstance(getattr(module, name, None), nn.Module) else follow([callee])
    elif isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Add):
        sides = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.value]
        yield from follow(sides)
        yield from [] if any(isinstance(s, ast.Tuple) for s in sides) else [_SUM]
    elif (name := _own(node)) and name not in inside and not hasattr(nn.Module, name):
        method = getattr(type(module), name, None)
        yield from _walk(module, _body(method), (*inside, name)) if inspect.isfunction(method) else []
    else:
        yield from follow(list(ast.iter_child_nodes(node)))


def _own(node: ast.AST) -> str:
    """``name`` of ``self.name``, else ""."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return ""


def _flag(module: Any, test: ast.AST) -> bool | None:
    """The value of a test that is a boolean attribute of the module, or its negation."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value = _flag(module, test.operand)
        return None if value is None else not value
    value = getattr(module, _own(test), None) if _own(test) else None
    return value if isinstance(value, bool) else None
