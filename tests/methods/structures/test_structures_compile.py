"""Every structure traces to one graph: the same values under torch.compile(fullgraph=True)."""

import pytest
import torch
from structure_checks import attached, gradients, inputs, move, trained

from rankfold.core import Decorator, Offset, SideModule, entries, resolve
from rankfold.methods.structures.bone import Bone
from rankfold.methods.structures.gate import Gate
from rankfold.methods.structures.hra import HRA
from rankfold.methods.structures.lora import LoRA
from rankfold.methods.structures.magnitude import Magnitude
from rankfold.methods.structures.vera import VeRA

LORA = LoRA(rank=3)


def each():
    """One of every registered structure that changes a weight, and chains whose rules are worth tracing."""
    for entry in entries("structure"):
        kind = resolve(entry)
        if not issubclass(kind, SideModule):
            options = {"rank": 2} if "rank" in (o.name for o in entry.options) else {}
            yield kind(**options, **({"inner": LORA} if issubclass(kind, Decorator) else {}))
    yield Bone(rank=4, blocks="in")
    yield from (Gate(per="row", inner=LORA), Gate(per="rank", inner=LORA), Gate(inner=Magnitude(inner=LORA)))
    yield from (Magnitude(inner=HRA(rank=4)), Magnitude(inner=VeRA(rank=4)), Magnitude(inner=Offset(inner=LORA)))


@pytest.mark.parametrize(
    "structure", list(each()), ids=lambda s: "+".join([s.name, *([s.inner.name] if hasattr(s, "inner") else [])])
)
def test_traces_to_one_graph(structure):
    model, store = attached(structure)
    move(store)
    model.eval()
    torch._dynamo.reset()
    x = inputs()
    y, compiled = model(x), torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, y, rtol=1e-11, atol=1e-11)
    for a, b in zip(gradients(compiled, trained(store)), gradients(y, trained(store))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
