"""overlap@k, KL, agreement and loss on a held-out cache are what their definitions say."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from cache_schema import CacheReader
from tests.command_line import pipeline
from tests.conftest import dump
from tests.tiny import CHATML, tiny_tokenizer
from tests.tiny_models import save_tiny_llama
from workers.evaluate.overlap import overlap_at
from workers.ordering import exact_top_k

ORACLES = json.loads((Path(__file__).parent / "oracles" / "losses.json").read_text())


@pytest.mark.parametrize("case", ORACLES["metrics"], ids=lambda case: f"{case['dataset']}-{case['params']['k']}")
def test_overlap_is_the_oracles(case):
    rows = {name: torch.tensor(ORACLES["datasets"][case["dataset"]][name]) for name in ("teacher", "student")}
    k = min(case["params"]["k"], rows["teacher"].shape[1])
    ids = {name: exact_top_k(logits.double(), k)[1] for name, logits in rows.items()}
    found = overlap_at(k, ids["teacher"], ids["student"])
    found *= torch.tensor(ORACLES["datasets"][case["dataset"]]["mask"])
    torch.testing.assert_close(found, torch.tensor(case["per_position"], dtype=torch.float64))


def test_every_number_is_its_definition_on_dense_logits(teacher_dir: Path, cache_dir: Path, tmp_path: Path) -> None:
    student_dir = save_tiny_llama(tmp_path / "student", tiny_tokenizer(chat_template=CHATML), seed=3)
    measured = pipeline("evaluate", student_dir, "--cache", cache_dir, "--json").json
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (student_dir, teacher_dir))
    overlaps, kls, losses, agreements = [], [], [], []
    for scored in CacheReader(cache_dir):
        input_ids = torch.tensor(scored.sequence.input_ids).long()[None]
        rows = torch.tensor(scored.sequence.loss_mask[1:]).nonzero().squeeze(1)
        with torch.no_grad():
            s, t = student(input_ids).logits[0, rows], teacher(input_ids).logits[0, rows]
        best = [set(row.topk(8).indices.tolist()) for row in s], [set(row.topk(8).indices.tolist()) for row in t]
        overlaps.append(torch.tensor([len(a & b) / 8 for a, b in zip(*best, strict=True)]))
        agreements.append((s.argmax(1) == t.argmax(1)).float())
        kls.append(F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="none", log_target=True).sum(1))
        losses.append(F.cross_entropy(s, input_ids[0, rows + 1], reduction="none"))
    assert measured["positions"] == sum(map(len, overlaps))
    assert measured["overlap"]["8"] == pytest.approx(torch.cat(overlaps).mean().item())
    assert measured["overlap_macro"]["8"] == pytest.approx(
        torch.stack([part.mean() for part in overlaps]).mean().item()
    )
    assert measured["top1_agreement"] == measured["overlap"]["1"] == pytest.approx(torch.cat(agreements).mean().item())
    assert measured["kl"] == pytest.approx(torch.cat(kls).mean().item(), rel=1e-5)
    assert measured["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert measured["overlap"]["32"] is None  # the cache stores the top 16


def test_a_teacher_agrees_with_itself(teacher_dir: Path, cache_dir: Path) -> None:
    measured = pipeline("evaluate", teacher_dir, "--cache", cache_dir, "--json").json
    assert measured["overlap"]["1"] == measured["overlap"]["8"] == 1.0
    assert measured["kl"] == pytest.approx(0, abs=1e-5)


def test_without_hidden_states_the_kl_is_null(teacher_dir: Path, data_file: Path, tmp_path: Path) -> None:
    bare = dump(teacher_dir, data_file, tmp_path / "bare", "--no-hidden-states", "--limit", "3")
    measured = pipeline("evaluate", teacher_dir, "--cache", bare, "--json").json
    assert measured["kl"] is None
    assert measured["overlap"]["8"] == 1.0
