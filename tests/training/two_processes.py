"""One run over however many processes were started: `python two_processes.py FILE` under torch's launcher, or alone."""

import sys
from pathlib import Path

import torch

import rankfold as rf
from rankfold.adapters.files import write_tensors
from rankfold.training.loop import LoopSettings, train

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import resuming  # noqa: E402  (beside this file)


def main(path: str, grad_accum: int) -> None:
    """Three epochs; the tensors and losses that the first process ends with."""
    module = resuming.model()
    module[1].p = 0.0  # draws differ from process to process, as they should; here the sums are compared
    adaptation = rf.adapt(module, "lora", rank=2, seed=1)
    settings = LoopSettings(lr=0.05, epochs=3, grad_accum=grad_accum, seed=5, progress=False)
    history = train(module, adaptation, resuming.source(), resuming.loss, settings, weigh=lambda batch: len(batch[0]))
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        tensors = {f"t{i}": t.detach() for i, t in enumerate(adaptation.tensors().values())}
        write_tensors(path, {**tensors, "losses": torch.tensor(history.losses, dtype=torch.float64)})
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the loop has seen to it that the group ends with the process


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]))
