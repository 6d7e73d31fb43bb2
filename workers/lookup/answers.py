"""A log of answers: for disks that cannot hold hidden states.

Each time the teacher runs on a sequence, its logits at the ids the student asked for, and at those the student ranks
highest at every position, are written back. What is not among them costs another teacher forward of the sequence.

Shape suffixes: N = positions, Q = missing pairs, L = logged pairs, F = ids fetched ahead, D = hidden size.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cache_schema.lookup_files import LoggedLogits
from cache_schema.lookup_writer import LookupWriter
from cache_schema.lookups import LookupLog
from cache_schema.reader import CacheReader
from workers.lookup.batch import TeacherPositions
from workers.teacher.lm_head import LMHead


class AnswerLog:
    """Looks answers up, and adds to them what a live teacher says.

    Args:
        writer: None where nothing may be added.
        fetch_ahead: ids of the student's top that are answered at every position of a sequence the teacher runs on.
    """

    def __init__(self, reader: CacheReader, log: LookupLog, writer: LookupWriter | None, fetch_ahead: int) -> None:
        self._reader = reader
        self._log = log
        self._writer = writer
        self.fetch_ahead = fetch_ahead

    @property
    def is_written(self) -> bool:
        return self._writer is not None

    def refresh(self) -> None:
        """See what other runs have logged since."""
        self._log.refresh()

    def find(self, positions: TeacherPositions, rows_Q: Tensor, ids_Q: Tensor) -> tuple[Tensor, Tensor]:
        """What the log answers of the pairs: logits, any where it does not, float32 [Q]; and where it does, bool [Q]"""
        keys_L, logits_L = self._logged(positions)
        if len(keys_L) == 0:
            return torch.zeros(len(rows_Q), device=rows_Q.device), torch.zeros_like(rows_Q, dtype=torch.bool)
        wanted_Q = rows_Q * self._reader.plan.tokenizer.vocab_size + ids_Q
        place_Q = torch.searchsorted(keys_L, wanted_Q).clamp_(max=len(keys_L) - 1)
        return logits_L[place_Q], keys_L[place_Q] == wanted_Q

    def _logged(self, positions: TeacherPositions) -> tuple[Tensor, Tensor]:
        """All that is logged of the positions: row * V + id, ascending, and the logit. [L] each"""
        keys, logits, first = [np.empty(0, np.int64)], [np.empty(0, np.float32)], 0
        for member in positions.members:
            logged = self._log.logits(member.index)
            if logged is not None:
                row_of_P = np.full(len(logged.counts), -1)
                row_of_P[member.stored_rows.numpy()] = first + np.arange(len(member.stored_rows))
                rows = np.repeat(row_of_P, logged.counts).astype(np.int64)
                keys.append((rows * self._reader.plan.tokenizer.vocab_size + logged.token_ids)[rows >= 0])
                logits.append(logged.logits[rows >= 0])
            first += len(member.stored_rows)
        device = positions.token_ids_NK.device
        return torch.from_numpy(np.concatenate(keys)).to(device), torch.from_numpy(np.concatenate(logits)).to(device)

    def keep(
        self,
        positions: TeacherPositions,
        sequences: Sequence[int],
        rows_Q: Tensor,
        ids_Q: Tensor,
        ahead_NF: Tensor | None,
        hidden_ND: Tensor,
        head: LMHead,
    ) -> None:
        """Write back what the teacher says at asked and fetched ids of some of the batch's sequences.

        Args:
            sequences: rows of the batch the teacher has just run on.
            hidden_ND: its hidden states there; what other rows hold does not matter.
        """
        assert self._writer is not None
        device = hidden_ND.device
        rows, ids = rows_Q.to(device), ids_Q.to(device)
        if ahead_NF is not None:
            chosen = torch.isin(positions.sequence_of_N, torch.tensor(sequences, device=positions.sequence_of_N.device))
            fetched_N = chosen.nonzero().squeeze(1).to(device)
            rows = torch.cat([rows, fetched_N.repeat_interleave(ahead_NF.shape[1])])
            ids = torch.cat([ids, ahead_NF.to(device)[fetched_N].flatten()])
        with torch.no_grad():
            logits = head.logits_of_pairs(hidden_ND, rows, ids)
        rows_np, ids_np, logits_np = rows.cpu().numpy(), ids.cpu().numpy(), logits.float().cpu().numpy()
        owner = positions.sequence_of_N.cpu().numpy()
        first_row = np.searchsorted(owner, np.arange(len(positions.members)))
        entries = []
        for sequence in sorted(sequences, key=lambda row: positions.members[row].index):
            member = positions.members[sequence]
            mine = owner[rows_np] == sequence
            stored = member.stored_rows.numpy()[rows_np[mine] - first_row[sequence]]
            num_positions = self._reader[member.index].rows.num_positions
            answers = LoggedLogits.of_pairs(num_positions, stored, ids_np[mine], logits_np[mine])
            sequence_id = self._reader[member.index].sequence.sequence_id
            entries.append((member.index, sequence_id, answers))
        self._writer.write("logits", entries)
        self._log.refresh()
