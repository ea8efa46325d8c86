"""Task sft: the completion of a prompt; only the completion is learnt."""

from __future__ import annotations

from collections.abc import Sequence

from rankfold.errors import DataError
from rankfold.jobs.data import Table

from .lm import IGNORED, CausalTask
from .task import Row

__all__ = ["THIS", "Sft"]


class Sft(CausalTask):
    """Prompt and completion as one text, closed by the end token; the labels of the prompt are masked.

    A model with a chat template gets the prompt as the user's turn. Where both do not fit, the beginning of the prompt goes
    first: what stands next to the answer stays.
    """

    name = "sft"

    def rows(self, table: Table) -> list[Row]:
        """Rows with `input_ids` and `labels`.

        Raises:
            DataError: no row keeps a token to learn.
        """
        prompts = self._prompts(table["prompt"])
        completions = self._tokens(table["completion"])
        rows = []
        for prompt, completion in zip(prompts, completions):
            answer = [*completion, self.tokenizer.eos_token_id]
            self.cut += len(prompt) + len(answer) > self.max_length
            answer = answer[: self.max_length - 1]  # at least one token of the prompt: something must predict the first
            prompt = prompt[-(self.max_length - len(answer)) :] if prompt else [self.tokenizer.eos_token_id]
            rows.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
        if not rows:
            raise DataError(f"{table.source}: no row to learn from")
        return rows

    def prompts(self, table: Table) -> list[Row]:
        """One row a prompt, to be answered."""
        ids = self._prompts(table["prompt"])
        self.cut += sum(len(row) > self.max_length for row in ids)
        return [{"input_ids": row[-self.max_length :]} for row in ids]

    def _prompts(self, texts: Sequence[str]) -> list[list[int]]:
        if getattr(self.tokenizer, "chat_template", None):
            turns = [[{"role": "user", "content": text}] for text in texts]
            found = [self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True) for turn in turns]
            return [list(one["input_ids"]) for one in found]
        # without a template a line break parts the two, where the texts do not part themselves
        parted = [text if text[-1:].isspace() else text + "\n" for text in texts]
        return self._tokens(parted)

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        from rankfold.jobs.models import quiet_loading

        with quiet_loading():
            encoded: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return encoded


THIS = Sft
