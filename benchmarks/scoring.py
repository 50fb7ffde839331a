"""What scoring costs, side by side: our engines, and what others do, on the same rows in one run.

    make bench-scoring                                # the demo model; twenty minutes
    make bench-scoring ARGS=--quick                   # fewer and smaller cases, for a slow CPU
    python benchmarks/scoring.py --prefixes 800 --completions 16

Ways to score N completions after one prefix (real text: after random token ids a model is so
unsteady that even float32 rounding shows):

    loop          padded batches of prefix + completion through the model's own forward, with all
                  logits and a float32 log-softmax: what most scripts do
    transformers  our engine on transformers
    vllm default  one request with `prompt_logprobs` per completion, as vLLM's documentation has it
    vllm          our engine on vLLM

The case "domain" is one of two candidates per prompt: 600 tokens that all prompts share, 100 of the
prompt's own. Useful FLOPs count what must be computed at least: matmuls and attention with every
shared token once, the LM head on completion rows only. Their rate is set against the matmul peak
measured in the same run.

Ratios count, not seconds. The ways take turns at every case, so that a machine that changes its
speed does so for all of them, and cases with a goal are measured three times, each time with other
text: theirs are medians.

Agreement is told on the demo's real rows: mean |Δ| per token between our two engines, rank
correlation of a prompt's candidates, and how often both find the same candidate likeliest.
"""

from __future__ import annotations

import os

# Threads that spin while they wait ruin each other's timing as soon as a core is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cdr.demo_model import resolve_demo_model_dir
from cdr.engines.base import EngineSpec, ScoringGroup, TokenLogprobs, make_engine
from cdr.engines.hardware import count_cores, matmul_flops, resolve_dtype
from cdr.engines.prefix_tree import build_prefix_tree
from cdr.engines.vllm_scoring import CoreRequest
from cdr.engines.vllm_setup import find_vllm_version

TEXT = Path(__file__).resolve().parents[1] / "conf" / "demo" / "completions.jsonl"
LOOP, TRANSFORMERS, DEFAULT, VLLM = "loop", "transformers", "vllm default", "vllm"
MANY, DOMAIN = "800 × 16", "domain"
DOMAIN_TOKENS, OWN_TOKENS, DOMAIN_PROMPTS = 600, 100, 8

Scores = list[list[TokenLogprobs]]
Way = Callable[[Sequence[ScoringGroup]], Scores]


@dataclass
class Round:
    """Groups to score, and what each way took and gave."""

    groups: Sequence[ScoringGroup]
    wall_s: dict[str, float] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)

    def run(self, ways: Mapping[str, Way]) -> None:
        """Let each way score the groups."""
        for way, score in ways.items():
            begin = time.perf_counter()
            self.scores[way] = score(self.groups)
            self.wall_s[way] = time.perf_counter() - begin

    def difference(self, way: str, other: str) -> float:
        """Give the mean |Δ| of two ways, in nats per token."""
        pairs = zip(chain(*self.scores[way]), chain(*self.scores[other]), strict=True)
        return float(np.concatenate([np.abs(one - two) for one, two in pairs]).mean())


@dataclass
class Case:
    """Rounds of one shape: as many tokens, other text."""

    name: str
    rounds: list[Round]

    @property
    def tokens(self) -> int:
        """Completion tokens."""
        return sum(len(ids) for group in self.rounds[0].groups for ids in group.completions_ids)

    def wall_s(self, way: str) -> float:
        """Give the median of a way's seconds."""
        return statistics.median(one.wall_s[way] for one in self.rounds)

    def gain(self, way: str, over: str) -> float:
        """How many times faster one way was than another."""
        return statistics.median(one.wall_s[over] / one.wall_s[way] for one in self.rounds)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    cases = list(make_cases(tokenizer, args))
    demo = Round(make_demo_groups(tokenizer, args.demo_prompts))
    groups = [*demo.groups, *(g for case in cases for one in case.rounds for g in one.groups)]
    spec = EngineSpec(
        name="benchmark",
        engine="transformers",
        path=args.model,
        dtype=resolve_dtype(args.dtype),
        max_length=max(len(group.prefix_ids) for group in groups) + 256,
    )
    peak = matmul_flops(spec.dtype)
    with contextlib.ExitStack() as stack:
        loop = load_loop(spec)
        ways: dict[str, Way] = {
            LOOP: lambda groups: [score_in_loop(loop, g, args.loop_batch) for g in groups],
            **dict(load_engines(spec, args.threads, stack)),
        }
        # Warms all of them up: kernels are compiled on first use.
        demo.run(ways)
        for number in range(max(len(case.rounds) for case in cases)):
            for case in cases:
                if number < len(case.rounds):
                    case.rounds[number].run(ways)
        flops = [count_useful_flops(loop, case.rounds[0].groups) for case in cases]
    print(
        f"\n{spec.path}, {spec.dtype}, {args.threads} threads, "
        f"matmul peak {peak / 1e12:.3f} TFLOP/s; cases are prefix tokens × completions\n"
    )
    print_table(cases, [one / peak for one in flops])
    if VLLM in demo.scores:
        rows = sum(len(group.completions_ids) for group in demo.groups)
        print(
            f"\nagreement of vllm with transformers on {rows} real rows of {len(demo.groups)} "
            f"prompts, {spec.dtype}: mean |Δ| {demo.difference(VLLM, TRANSFORMERS):.1e} nats "
            f"per token, {describe_ranks(demo)}"
        )
    print(f"\n{describe_goals(cases)}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(resolve_demo_model_dir()), help="folder or hub id")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prefixes", type=int, nargs="+", default=[64, 800, 1600])
    parser.add_argument("--completions", type=int, nargs="+", default=[1, 2, 8, 16, 32])
    parser.add_argument("--completion-tokens", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3, help="of the cases that have a goal")
    parser.add_argument("--demo-prompts", type=int, default=56, help="of four candidates each")
    parser.add_argument("--loop-batch", type=int, default=8, help="completions per forward")
    parser.add_argument("--threads", type=int, default=count_cores())
    parser.add_argument("--quick", action="store_true", help="few, small cases")
    args = parser.parse_args()
    if args.quick:
        args.prefixes, args.completions, args.demo_prompts = [64, 800], [1, 16], 8
    return args


def make_cases(tokenizer: Any, args: argparse.Namespace) -> Iterator[Case]:
    """Cut prefixes and completions out of the demo's text, over again where it is too short."""
    rows = map(json.loads, TEXT.read_text(encoding="utf-8").splitlines())
    text = tokenizer.encode("\n".join(row["completion"] for row in rows))

    def cut(start: int, size: int) -> tuple[int, ...]:
        return tuple(itertools.islice(itertools.cycle(text), start, start + size))

    def group(prefix: tuple[int, ...], count: int, start: int) -> ScoringGroup:
        size = args.completion_tokens
        return ScoringGroup(prefix, tuple(cut(start + i * size, size) for i in range(count)))

    # Other text for every round: no engine may profit from the one before.
    starts = itertools.count(0, 97)

    def plain(length: int, count: int) -> Round:
        start = next(starts)
        return Round([group(cut(start, length), count, start + length)])

    def domain() -> Round:
        start = next(starts)
        shared = cut(start, DOMAIN_TOKENS)
        step = OWN_TOKENS + 2 * args.completion_tokens
        own = [start + DOMAIN_TOKENS + i * step for i in range(DOMAIN_PROMPTS)]
        return Round(
            [group(shared + cut(begin, OWN_TOKENS), 2, begin + OWN_TOKENS) for begin in own]
        )

    for length, count in itertools.product(args.prefixes, args.completions):
        name = f"{length} × {count}"
        rounds = args.rounds if count == 1 or name == MANY else 1
        yield Case(name, [plain(length, count) for _ in range(rounds)])
    yield Case(DOMAIN, [domain() for _ in range(args.rounds)])


def make_demo_groups(tokenizer: Any, num_prompts: int) -> list[ScoringGroup]:
    """Give the demo's own completions, by prompt."""
    rows = map(json.loads, TEXT.read_text(encoding="utf-8").splitlines())
    groups = []
    for _, of_prompt in groupby(rows, key=lambda row: row["prompt_id"]):
        candidates = list(of_prompt)
        prompt = tokenizer.apply_chat_template(
            candidates[0]["prompt"], add_generation_prompt=True, tokenize=False
        )
        texts = [prompt, *(candidate["completion"] for candidate in candidates)]
        prefix, *completions = (
            tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts
        )
        groups.append(ScoringGroup(prefix, tuple(completions)))
    return groups[:num_prompts]


def load_loop(spec: EngineSpec) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(
        spec.path, dtype=getattr(torch, spec.dtype), device_map={"": device}
    ).eval()


@torch.inference_mode()
def score_in_loop(model: Any, group: ScoringGroup, batch_size: int) -> list[TokenLogprobs]:
    """Read prefix and completion of every row, right-padded, and keep the completion's targets."""
    scores: list[TokenLogprobs] = []
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


def load_engines(
    spec: EngineSpec, threads: int, stack: contextlib.ExitStack
) -> Iterator[tuple[str, Way]]:
    transformers = make_engine(spec, num_threads=threads)
    stack.callback(transformers.close)
    yield TRANSFORMERS, transformers.score
    if find_vllm_version() is None:
        print("vLLM is not installed, its columns are left out: make setup-vllm")
        return
    from cdr.engines.vllm import VllmEngine

    begin = time.perf_counter()
    # Half of a GPU: the other ways have their weights there too.
    share = 0.5 if torch.cuda.is_available() else None
    vllm = VllmEngine(replace(spec, engine="vllm", memory_fraction=share), num_threads=threads)
    stack.callback(vllm.close)
    print(f"vLLM loaded in {time.perf_counter() - begin:.0f} s: {vllm.engine_version}")
    stack.callback(
        lambda: print(f"requests sent again without the prefix cache: {vllm.num_resubmitted}")
    )
    yield VLLM, vllm.score
    # After ours: the default does not read the cache, but what it leaves there would help ours.
    yield DEFAULT, lambda groups: score_by_default(vllm, groups)


def score_by_default(engine: Any, groups: Sequence[ScoringGroup]) -> Scores:
    """Ask vLLM for the prompt's log-probs of every row, with the defaults of its API."""
    params = {"max_tokens": 1, "prompt_logprobs": 0}
    params |= {"detokenize": False}  # the engine has no tokenizer; sparing it only helps
    rows = [(g.prefix_ids, ids) for g in groups for ids in g.completions_ids]
    answers = engine.ask([CoreRequest([*prefix, *ids], params) for prefix, ids in rows])
    found = iter(
        np.array([e[t].logprob for e, t in zip(a.prompt_logprobs[-len(ids) :], ids, strict=True)])
        for a, (_, ids) in zip(answers, rows, strict=True)
    )
    return [[next(found) for _ in group.completions_ids] for group in groups]


def count_useful_flops(model: Any, groups: Sequence[ScoringGroup]) -> float:
    """Count multiplies and adds that scoring groups takes at least."""
    body = sum(
        parameter.numel()
        for name, parameter in model.base_model.named_parameters()
        if parameter.ndim == 2 and "embed" not in name
    )
    head = model.get_output_embeddings().weight.numel()
    tree = build_prefix_tree(groups)
    # Each row attends to what is before it; scores and weighted values are two products.
    pairs = float((tree.depths + 1).sum())
    attention = 4 * model.config.num_hidden_layers * model.config.hidden_size * pairs
    return float(2 * body * len(tree) + 2 * head * len(tree.target_ids) + attention)


def print_table(cases: Sequence[Case], ideal_s: Sequence[float]) -> None:
    """Print a row per case and way.

    Args:
        cases: measured.
        ideal_s: what each would take at the matmul peak.
    """
    head = f"{'case':<11}{'way':<14}{'wall s':>8}{'tokens/s':>10}{'× loop':>8}{'× default':>11}"
    print(f"{head}{'of peak':>9}{'mean |Δ|':>10}")
    for case, ideal in zip(cases, ideal_s, strict=True):
        first = case.rounds[0]
        for way in first.wall_s:
            wall_s = case.wall_s(way)
            gains = [
                f"{case.gain(way, other):.2f}" if other in first.wall_s else "-"
                for other in (LOOP, DEFAULT)
            ]
            print(
                f"{case.name:<11}{way:<14}{wall_s:>8.2f}{case.tokens / wall_s:>10.0f}"
                f"{gains[0]:>8}{gains[1]:>11}{ideal / wall_s:>9.0%}"
                f"{first.difference(way, LOOP):>10.1e}"
            )


def describe_ranks(demo: Round) -> str:
    """Compare the order of each prompt's candidates by log-prob sum."""
    ranks, same = [], 0
    for one, other in zip(demo.scores[VLLM], demo.scores[TRANSFORMERS], strict=True):
        sums = [[float(s.sum(dtype=np.float64)) for s in scores] for scores in (one, other)]
        places = [np.argsort(np.argsort(one)).astype(float) for one in sums]
        ranks.append(np.corrcoef(places[0], places[1])[0, 1])
        same += int(np.argmax(sums[0]) == np.argmax(sums[1]))
    return (
        f"rank correlation within a prompt {np.mean(ranks):.4f}, same likeliest candidate "
        f"{same} of {len(ranks)}"
    )


def describe_goals(cases: Sequence[Case]) -> str:
    """Tell which goals of this benchmark are met, on the cases that were run."""
    by_name = {case.name: case for case in cases}
    # Gains over the loop, and over vLLM's default.
    goals = {MANY: (4.0, 5.0), DOMAIN: (3.0, 3.0)}
    goals |= {name: (0.95, 0.95) for name in by_name if name.endswith("× 1")}
    asked = [
        (name, way, other, goal)
        for name in by_name
        for other, goal in zip((LOOP, DEFAULT), goals.get(name, ()), strict=False)
        for way in (TRANSFORMERS, VLLM)
    ]
    told = []
    for name, way, other, goal in asked:
        case = by_name[name]
        if not {way, other} <= case.rounds[0].wall_s.keys():
            continue
        gain = case.gain(way, other)
        verdict = "met" if gain >= goal else "MISSED"
        told.append(f"{name} {way} {gain:.2f}× {other} (≥ {goal:g}) {verdict}")
    return "goals: " + "; ".join(told)


if __name__ == "__main__":
    main()
