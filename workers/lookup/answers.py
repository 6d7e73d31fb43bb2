"""A log of answers: for disks that cannot hold hidden states.

Each time the teacher runs on a sequence, its logits at the ids the student asked for, and at those the student ranks
highest at every position, are written back. What is not among them costs another teacher forward of the sequence.

Shape suffixes: N = positions, Q = missing pairs, L = logged ids per position (padded), F = ids fetched ahead.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cache_schema.lookup_files import LoggedLogits
from cache_schema.lookups import LookupLog, LookupWriter
from cache_schema.reader import CacheReader
from workers.lookup.batch import TeacherPositions
from workers.ordering import find_ids
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

    def find(self, positions: TeacherPositions, rows_Q: Tensor, ids_Q: Tensor) -> tuple[Tensor, Tensor]:
        """What the log answers of the pairs: which, bool [Q], and all their logits, 0 where it does not. float32 [Q]"""
        table = self._table(positions)
        if table is None:
            return torch.zeros_like(rows_Q, dtype=torch.bool), torch.zeros(len(rows_Q), device=rows_Q.device)
        ids_NL, logits_NL = table
        found_Q1, logits_Q1 = find_ids(ids_NL[rows_Q], logits_NL[rows_Q], ids_Q.unsqueeze(1))
        return found_Q1.squeeze(1), logits_Q1.squeeze(1)

    def _table(self, positions: TeacherPositions) -> tuple[Tensor, Tensor] | None:
        """Logged ids and logits by position, padded with -1: its rows are those of ``positions``. [N, L] each"""
        ids, logits, counts = [], [], []
        for member in positions.members:
            logged = self._log.logits(member.index)
            if logged is None:
                counts.append(np.zeros(len(member.stored_rows), dtype=np.int64))
                continue
            ends = np.cumsum(logged.counts)
            for row in member.stored_rows.tolist():
                part = slice(ends[row] - logged.counts[row], ends[row])
                ids.append(logged.token_ids[part])
                logits.append(logged.logits[part])
            counts.append(logged.counts[member.stored_rows.numpy()].astype(np.int64))
        counts_N = np.concatenate(counts)
        if not counts_N.any():
            return None
        place = np.arange(counts_N.max()) < counts_N[:, None]
        ids_NL = np.full(place.shape, -1, dtype=np.int64)
        logits_NL = np.zeros(place.shape, dtype=np.float32)
        ids_NL[place], logits_NL[place] = np.concatenate(ids), np.concatenate(logits)
        device = positions.token_ids_NK.device
        return torch.from_numpy(ids_NL).to(device), torch.from_numpy(logits_NL).to(device)

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
            hidden_ND: its hidden states there; other rows are not read.
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
