"""What a cut costs by nnscaler's own profiler, that autodist chooses the sequence then, and how long sequences are traced."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import nnscaler_ring
from nnscaler_ring.annotations import policies
from nnscaler_ring.annotations.policies import pas_sequence, write_partition_constraints
from nnscaler_ring.annotations.runtime import nnscaler_runtime
from nnscaler_ring.core import engine, passes
from nnscaler_ring.plugin import summed_cross_entropy
from tests.test_nnscaler_runtime import needs_nnscaler

HEADS, VOCAB = 3, 16  # no number of heads that two devices could share


def test_constraints_name_the_ops_and_their_dims(tmp_path: Path) -> None:
    text = write_partition_constraints(tmp_path / "cuts.yaml", ["sequence", "heads"], "Layer").read_text()
    assert text.count('  parent_module: "Layer"\n  replica_allowed: false\n') == 3
    shuffle = '- allowed_partition_dims: ["0,0"]\n  name: nnscaler_ring.plugin.shuffled_rows\n  parent_module: ""\n'
    assert text.endswith(shuffle + "  replica_allowed: true\n")
    alone = write_partition_constraints(tmp_path / "cuts.yaml").read_text()
    assert alone.endswith(shuffle + "  replica_allowed: false\n"), "rows are put in the order that the attention reads"
    of_rows = write_partition_constraints(tmp_path / "cuts.yaml", ["batch"]).read_text()  # which packed rows do not have
    packed = "- allowed_partition_dims: []\n  name: nnscaler_ring.ops.packed_attention\n"
    assert packed + '  parent_module: ""\n  replica_allowed: true\n' in of_rows
    assert '- allowed_partition_dims: ["0,1", "0,2"]\n  name: nnscaler_ring.ops.dense_attention\n' in text
    assert '- allowed_partition_dims: ["0,0", "0,1"]\n  name: nnscaler_ring.ops.packed_attention\n' in text


@pytest.mark.parametrize(("allowed", "parent"), [(["seq"], ""), (["sequence"], "a: b")])
def test_constraints_of_unknown_dims_or_modules_are_refused(tmp_path: Path, allowed: list[str], parent: str) -> None:
    with pytest.raises(ValueError, match=r"choose from batch, sequence, heads|name of a class"):
        write_partition_constraints(tmp_path / "cuts.yaml", allowed, parent)


def test_stages_that_are_not_are_refused() -> None:
    for options, message in (
        ({"stages": "layers.1"}, "give a list of modules"),
        ({"stages": ["layers.1", "layers.2"], "pipeline_nmicros": 2}, "at most 1 start a stage"),
        ({"stages": ["layers.1"]}, "without pipeline_nmicros"),
    ):
        with pytest.raises(ValueError, match=message):
            pas_sequence(None, SimpleNamespace(plan_ngpus=2, pas_config=options))


class Model(nn.Module):
    """One layer; one row, so that there is no batch to cut."""

    dim = 32

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HEADS * self.dim)
        self.q, self.k, self.v = (nn.Linear(HEADS * self.dim, HEADS * self.dim) for _ in range(3))
        self.head = nn.Linear(HEADS * self.dim, VOCAB)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = (each(x).view(1, -1, HEADS, self.dim) for each in (self.q, self.k, self.v))
        y = nnscaler_ring.wrap_zigzag_attn_func(q, k, v)
        return summed_cross_entropy(self.head(y.reshape(1, -1, HEADS * self.dim)), labels)


def generated(directory: Path, policy: Any, ranks: int, length: int, **options: Any) -> list[str]:
    """The code of every rank, generated in this process."""
    import nnscaler

    logging.getLogger("nnscaler").setLevel(logging.ERROR)
    tokens = torch.randint(0, VOCAB, (1, length))
    with nnscaler_runtime("cpu"):
        config = nnscaler.ComputeConfig(ranks, ranks, trace_strategy="cpu", pas_config=options)
        where = {"gen_savedir": str(directory), "instance_name": directory.name}
        nnscaler.parallelize(Model, {"tokens": tokens, "labels": tokens}, policy, config, load_module=False, **where)
    return [path.read_text() for path in sorted(directory.rglob("gencode*.py"))]


def profiled(directory: Path, front: str, causal: bool, parts: int) -> int:
    """Pairs of a query and a key, over heads, that a piece of one op computes in a pass where nnscaler's profiler measures it."""
    from nnscaler.ir.operator import IRFwOperation
    from nnscaler.profiler.database import ProfileDataBase

    work: dict[bool, set[int]] = {False: set(), True: set()}

    def noted(recipe: Any, total: Any, tables: Any, qkv: Any, *rest: Any, backward: bool = False) -> Any:
        job = passes.job_of(recipe, total, tables, qkv, *rest, backward=backward)
        work[backward].add(qkv[0].shape[2] * sum(plan.pairs for plan in job.plans))
        return job

    def measure(graph: Any, config: Any) -> Any:
        (node,) = [n for n in graph.select(ntype=IRFwOperation) if n.signature == "nnscaler_ring.ops.dense_attention"]
        node.kwargs["op"], node.kwargs["settings"] = front, json.dumps({"causal": causal})
        piece = node.algorithm("dim").instantiate(0, 1, parts)[0] if parts > 1 else node
        with mock.patch.object(engine, "job_of", noted):
            metrics = ProfileDataBase().profile(piece, override=True)
        assert metrics.fw_span > 0 and metrics.bw_span > 0
        return pas_sequence(graph, config)

    generated(directory, measure, 1, 1024)
    (forward,), (backward,) = work.values()
    assert forward == backward
    return forward


class TestCost:
    pytestmark = needs_nnscaler

    @pytest.mark.parametrize(("front", "causal"), [("wrap_zigzag_attn_func", True), ("wrap_ring_attn_func", False)])
    def test_of_a_piece_is_its_share(self, tmp_path: Path, front: str, causal: bool) -> None:
        torch.set_num_threads(1)
        work = {parts: profiled(tmp_path / f"{front}{parts}", front, causal, parts) for parts in (1, 2, 4)}
        whole = HEADS * (1024 * 1025 // 2 if causal else 1024 * 1024)
        assert work == {parts: whole // parts for parts in work}


class TestAutodist:
    pytestmark = needs_nnscaler

    @pytest.mark.parametrize("constrained", [False, True])
    def test_cuts_the_sequence(self, tmp_path: Path, constrained: bool) -> None:
        torch.set_num_threads(1)
        options: dict[str, Any] = {"mem_constraint": 8, "parallel_profile": False, "re_profile": True, "profile_dir": str(tmp_path)}
        if constrained:
            path = write_partition_constraints(tmp_path / "cuts.yaml", ["sequence"])
            options["partition_constraints_path"] = str(path)
        codes = generated(tmp_path / f"auto{constrained}", "autodist", 2, 1024, **options)
        assert len(codes) == 2
        for code in codes:
            assert "process_group=(0, 1))" in code


TRACE = """
import resource, sys, time
from pathlib import Path
from tests.test_nnscaler_autodist import generated, pas_sequence
start = time.process_time()
codes = generated(Path(sys.argv[1]), pas_sequence, 8, 65536)
print(len(codes), time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


class TestTrace:
    pytestmark = needs_nnscaler

    def test_of_65536_tokens_is_quick_and_small(self, tmp_path: Path) -> None:
        done = subprocess.run([sys.executable, "-c", TRACE, str(tmp_path / "long")], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        codes, seconds, gigabytes = done.stdout.split()[-3:]
        assert int(codes) == 8
        assert float(seconds) < 10 and float(gigabytes) < 2, done.stdout


def test_shuffled_rows_are_not_cut_where_attention_is_not(tmp_path: Path) -> None:
    text = write_partition_constraints(tmp_path / "cuts.yaml", ["heads"]).read_text()
    assert "- allowed_partition_dims: []\n  name: nnscaler_ring.plugin.shuffled_rows\n" in text


def test_a_tensor_that_is_cut_on_one_dim_is_not_cut_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "_splits", lambda node, idx, dim, num: [(7, dim)])
    cuts = policies._Cuts(2)
    assert cuts.choose(object(), 0, 1) and not cuts.choose(object(), 0, 2)
