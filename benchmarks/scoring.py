"""How much the prefix tree gains over reading the prefix again for every completion.

    python benchmarks/scoring.py                      # the demo model, about a minute when idle
    python benchmarks/scoring.py --completions 4 --prefix-tokens 200 --completion-tokens 40
    python benchmarks/scoring.py --through-host       # and what the engine host costs on top

Compares, in one run and on real text (after random token ids a model is so unsteady that even
float32 rounding shows):

    loop    padded batches of prefix + completion through the model's own forward, with all logits
            and a float32 log-softmax: what most scripts do
    engine  `TransformersEngine.score` on one group
    host    the same request through an engine host of its own process

Useful FLOPs count what must be computed at least: the decoder's matmuls and attention with the
prefix once, the LM head on completion rows only. Their rate is set against the matmul peak measured
in the same run. Other work on the machine slows all ways, so read the ratios, not the seconds.
"""

from __future__ import annotations

import os

# Threads that spin while they wait ruin each other's timing as soon as a core is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cdr.demo_model import resolve_demo_model_dir
from cdr.engines.base import EngineSpec, ScoringGroup, TokenLogprobs
from cdr.engines.hardware import count_cores, matmul_flops, resolve_dtype
from cdr.engines.transformers import TransformersEngine

TEXT = Path(__file__).resolve().parents[1] / "conf" / "demo" / "completions.jsonl"

Scores = list[TokenLogprobs]


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    spec = EngineSpec(
        name="benchmark",
        engine="transformers",
        path=args.model,
        dtype=resolve_dtype(args.dtype),
        max_length=args.prefix_tokens + args.completion_tokens,
    )
    group, flops, loop = time_loop(spec, args)
    runs = {"loop": loop}
    engine = TransformersEngine(spec, num_threads=args.threads)
    warm_up = ScoringGroup(group.prefix_ids[-8:], (group.completions_ids[0][:8],))
    engine.score([warm_up])
    runs["engine"] = timed(lambda: engine.score([group])[0])
    engine.close()
    if args.through_host:
        runs["host"] = time_through_host(spec, args.threads, warm_up, group)
    print_table(spec, args, group, runs, flops, matmul_flops(spec.dtype))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(resolve_demo_model_dir()), help="folder or hub id")
    parser.add_argument("--text", type=Path, default=TEXT, help="JSON lines with `completion`")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prefix-tokens", type=int, default=800)
    parser.add_argument("--completions", type=int, default=16)
    parser.add_argument("--completion-tokens", type=int, default=120)
    parser.add_argument("--loop-batch", type=int, default=8, help="completions per forward")
    parser.add_argument("--threads", type=int, default=count_cores())
    parser.add_argument("--through-host", action="store_true")
    return parser.parse_args()


def time_loop(
    spec: EngineSpec, args: argparse.Namespace
) -> tuple[ScoringGroup, float, tuple[float, Scores]]:
    """Give the group to score, its useful FLOPs, and the loop's time and scores."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        spec.path, dtype=getattr(torch, spec.dtype), device_map={"": device}
    ).eval()
    group = make_group(args)
    score_in_loop(model, ScoringGroup(group.prefix_ids[:8], ((1,),)), 1)
    run = timed(lambda: score_in_loop(model, group, args.loop_batch))
    return group, count_useful_flops(model, group), run


def make_group(args: argparse.Namespace) -> ScoringGroup:
    """Cut prefix and completions out of the demo's text, over again where it is too short."""
    lines = args.text.read_text(encoding="utf-8").splitlines()
    text = "\n".join(json.loads(line)["completion"] for line in lines)
    tokens = itertools.cycle(AutoTokenizer.from_pretrained(args.model).encode(text))
    prefix = tuple(itertools.islice(tokens, args.prefix_tokens))
    completions = tuple(
        tuple(itertools.islice(tokens, args.completion_tokens)) for _ in range(args.completions)
    )
    return ScoringGroup(prefix, completions)


@torch.inference_mode()
def score_in_loop(model: Any, group: ScoringGroup, batch_size: int) -> Scores:
    """Read prefix and completion of every row, right-padded, and keep the completion's targets."""
    scores: Scores = []
    start = len(group.prefix_ids)
    for first in range(0, len(group.completions_ids), batch_size):
        rows = [
            torch.tensor(group.prefix_ids + completion)
            for completion in group.completions_ids[first : first + batch_size]
        ]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logprobs = logits[:, :-1].float().log_softmax(-1)
        targets = logprobs.gather(-1, ids[:, 1:, None])[..., 0].cpu().numpy()
        scores += [
            row[start - 1 : length - 1]
            for row, length in zip(targets, lengths.tolist(), strict=True)
        ]
    return scores


def time_through_host(
    spec: EngineSpec, threads: int, warm_up: ScoringGroup, group: ScoringGroup
) -> tuple[float, Scores]:
    """Score through a host of its own process, loaded and warm."""
    from cdr.engines.client import connect
    from cdr.engines.device import Device
    from cdr.engines.launch import HostOptions

    device = Device("cuda", ("0",)) if torch.cuda.is_available() else Device("cpu")
    with connect(device, HostOptions(num_threads=threads)) as client:
        client.set_engines([spec])
        client.score(spec.name, [warm_up])
        wall_s, outcomes = timed(lambda: client.score(spec.name, [group])[0])
        client.shutdown()
    return wall_s, [np.asarray(outcome.value, np.float32) for outcome in outcomes]


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def count_useful_flops(model: Any, group: ScoringGroup) -> float:
    """Count multiplies and adds that scoring a group takes at least."""
    body = sum(
        parameter.numel()
        for name, parameter in model.base_model.named_parameters()
        if parameter.ndim == 2 and "embed" not in name
    )
    head = model.get_output_embeddings().weight.numel()
    config = model.config
    prefix = len(group.prefix_ids)
    lengths = [len(completion) for completion in group.completions_ids]
    read = prefix + sum(length - 1 for length in lengths)
    # Each row attends to what is before it; scores and weighted values are two products.
    pairs = prefix**2 / 2 + sum((n - 1) * (prefix + n / 2) for n in lengths)
    attention = 4 * config.num_hidden_layers * config.hidden_size * pairs
    return float(2 * body * read + 2 * head * sum(lengths) + attention)


def print_table(
    spec: EngineSpec,
    args: argparse.Namespace,
    group: ScoringGroup,
    runs: dict[str, tuple[float, Scores]],
    flops: float,
    peak: float,
) -> None:
    tokens = sum(map(len, group.completions_ids))
    loop_s, loop_scores = runs["loop"]
    print(
        f"\n{spec.path}, {spec.dtype}, {args.threads} threads: prefix {len(group.prefix_ids)}, "
        f"{len(group.completions_ids)} completions of {args.completion_tokens} tokens\n"
        f"useful {flops / 1e9:.0f} GFLOP, matmul peak {peak / 1e12:.3f} TFLOP/s\n"
    )
    print(f"{'way':<8}{'wall s':>9}{'tokens/s':>10}{'gain':>7}{'of peak':>9}{'max |Δ| nats':>14}")
    for way, (wall_s, scores) in runs.items():
        largest = max(
            float(np.abs(one - other).max()) for one, other in zip(scores, loop_scores, strict=True)
        )
        print(
            f"{way:<8}{wall_s:>9.2f}{tokens / wall_s:>10.0f}{loop_s / wall_s:>6.1f}×"
            f"{flops / wall_s / peak:>9.0%}{largest:>14.1e}"
        )


if __name__ == "__main__":
    main()
