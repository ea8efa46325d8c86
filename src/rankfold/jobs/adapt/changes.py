"""How far each site moved: ‖ΔW‖ / ‖W‖."""

from __future__ import annotations

import torch

from rankfold.core.host import site_program
from rankfold.linalg import difference
from rankfold.training.adaptation import Adaptation

__all__ = ["relative_changes"]


def relative_changes(adaptation: Adaptation, name: str | None = None) -> dict[str, float]:
    """{site: ‖ΔW‖_F / ‖W‖_F}; sites whose change is no fixed matrix (side modules, gates on the input) are left out.

    >>> import rankfold as rf
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
    >>> _ = model[0].weight.data.fill_(1.0)
    >>> adaptation = rf.adapt(model, "lora", rank=1)
    >>> for p in adaptation.parameters():
    ...     _ = p.data.fill_(0.5)
    >>> relative_changes(adaptation)
    {'0': 0.25}
    """
    found = {}
    with torch.no_grad():
        for slot in adaptation.slots(name):
            if slot.base is None:
                continue
            program = site_program(adaptation.store, [slot], training=False, outside=True)
            if not program.dense_ok:
                continue
            change = difference(program.expression(), program.base).row_sqnorm().double().sum()
            size = program.base.row_sqnorm().double().sum()
            found[slot.site.key] = float((change / size).sqrt()) if size > 0 else float(change.sqrt())
    return found
