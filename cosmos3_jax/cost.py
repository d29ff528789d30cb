"""What a program costs, read off without running it: FLOPs from its jaxpr, collectives from its compiled text."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

KINDS = ("all-reduce", "all-gather", "collective-permute", "all-to-all", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of a compiled program."""

    kind: str  # "fusion", "copy", "while", or one of KINDS, in which devices talk to each other
    shape: str  # of its result on one device, as HLO writes it: "f32[2,48,45,80,48]"
    count: int  # times that one run of the program performs it
    computation: str  # where it stands in the program: a loop's body, or the entry

    @property
    def nbytes(self) -> int:
        """Bytes of the results on one device, of one run of the program."""
        return self.count * sum(_nbytes(dtype, sizes) for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", self.shape))


def operations(hlo: str) -> list[Operation]:
    """The operations of a compiled program (`compiled.as_text()`), those in loops counted as often as the loop runs.

    Of programs compiled for CPUs: GPUs write collectives as pairs of start and done. Of a loop whose length XLA does not know,
    one run is counted; of branches (`lax.cond`), each.
    """
    bodies = dict(_computations(hlo))
    runs = Counter({name: 1 for name in bodies if name.startswith("ENTRY")})
    found = []
    for name, lines in reversed(bodies.items()):  # callers stand below what they call
        for line in lines:
            trips = int(match[1]) if (match := re.search(r'"known_trip_count":\{"n":"(\d+)"', line)) else 1
            callees = re.findall(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)", line)
            if match := re.search(r"branch_computations=\{(.*?)\}", line):
                callees += re.findall(r"[\w.-]+", match[1])
            for callee in callees:
                runs[callee] += runs[name] * trips
            if match := re.search(r" = (\(.*?\)|\S+) ([\w-]+)\(", line):
                found.append(Operation(match[2], re.sub(r"\{[\d,]*\}", "", match[1]), runs[name], name.removeprefix("ENTRY ")))
    return found


def collectives(hlo: str) -> list[Operation]:
    """Those of the `operations` in which devices talk to each other."""
    return [operation for operation in operations(hlo) if operation.kind in KINDS]


def _computations(hlo: str) -> Iterator[tuple[str, list[str]]]:
    """The name of every computation, "ENTRY " before the program's own, and its lines."""
    for name, body in re.findall(r"^((?:ENTRY )?%?[\w.-]+) \(.*\{\n((?:.*\n)*?)\}", hlo, re.MULTILINE):
        yield name.replace("%", ""), body.splitlines()


def _nbytes(dtype: str, sizes: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"\D*(\d+).*", r"\1", dtype))
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8


def flops(jaxpr: Any) -> int:
    """Floating-point operations of all matrix products and convolutions in a jaxpr, on all devices together.

    Of branches (`lax.cond`), the one with the most; a `shard_map` is taken to divide its work over the whole mesh.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, outputs = equation.primitive.name, [variable.aval for variable in equation.outvars]
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(outputs[0].shape) * math.prod(left[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel, channels = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec[0]
            total += 2 * math.prod(outputs[0].shape) * math.prod(kernel) // kernel[channels]
        elif name == "cond":
            total += max(flops(branch.jaxpr) for branch in equation.params["branches"])
        times = 1
        if name == "scan":
            times = equation.params["length"]
        elif name == "shard_map":
            times = equation.params["mesh"].size
        total += times * sum(flops(inner) for inner in _inner(equation.params))
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs that an equation runs."""
    for value in params.values():
        jaxpr = getattr(value, "jaxpr", value)
        if hasattr(jaxpr, "eqns"):
            yield jaxpr
