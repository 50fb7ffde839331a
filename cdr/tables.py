"""Every table's schema: what a row stands for, its key, and its columns with a comment each.

A schema is declared once, here. Delta stores the comments, and `docs/reference/tables.md` is
generated from them (`python -m cdr.tables`). `cdr.warehouse` reads and writes the tables.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyspark.sql import types as T

SCHEMA_VERSION = 1
VERSION_PROPERTY = "cdr.schemaVersion"
"""Property of a Delta table that holds its `SCHEMA_VERSION`."""

INDEXED = ("prompt_hash", "run_id")
"""Columns of which Delta's log keeps the least and greatest value of every file: to skip files by.

Hashes and run ids alone: a log outlives the rows that it speaks of by a month (`cdr.forgetting`).
"""

MESSAGES = T.ArrayType(
    T.StructType([T.StructField("role", T.StringType()), T.StructField("content", T.StringType())])
)


@dataclass(frozen=True)
class Table:
    """A table's contract.

    Args:
        name: plural noun; also the folder.
        grain: what one row stands for.
        key: columns that identify a row.
        columns: name, Spark type (DDL) and comment, in order.
        partitioned_by: columns the files are split by.
    """

    name: str
    grain: str
    key: tuple[str, ...]
    columns: tuple[tuple[str, str, str], ...]
    partitioned_by: tuple[str, ...] = ()

    def schema(self) -> T.StructType:
        """Give the Spark schema, comments in the field metadata."""
        return T.StructType(
            [
                T.StructField(name, T._parse_datatype_string(ddl), True, {"comment": comment})
                for name, ddl, comment in self.columns
            ]
        )

    def names(self) -> list[str]:
        """Give the column names in order."""
        return [name for name, _, _ in self.columns]

    def indexed(self) -> list[str]:
        """Give the columns that files are skipped by."""
        return [name for name in INDEXED if name in self.names()]


_DDL_MESSAGES = "array<struct<role: string, content: string>>"

ROUTES = Table(
    "routes",
    "prompt × router",
    ("prompt_hash", "router_key"),
    (
        ("prompt_hash", "string", "sha256 hex of the prompt's messages"),
        ("router_key", "string", "Hash of router model, prompt, labels, threshold"),
        ("domain", "string", "Domain the prompt was given"),
        ("confidence", "double", "Softmax share of the likeliest label, 0 to 1; null: no scores"),
        ("label_logprobs", "map<string, double>", "Log-prob per domain label, nats"),
        ("domain_source", "string", "router, or fallback (not sure, or prompt too long)"),
        ("run_id", "string", "Run that wrote the row"),
    ),
)

LOGPROBS = Table(
    "logprobs",
    "model × prefix × completion; only scored rows, appended once and never changed",
    ("model_key", "prefix_hash", "completion_hash"),
    (
        (
            "model_key",
            "string",
            "Hash of weights, adapter, quantisation, dtype, head dtype, engine and its `extra`",
        ),
        ("prefix_hash", "binary", "First 16 bytes of the sha256 of the prefix's int32 token ids"),
        ("completion_hash", "binary", "The same of the completion's token ids"),
        (
            "logprob_sum",
            "double",
            "Sum of the completion's token log-probs, nats; of a classifier, its score",
        ),
        ("num_tokens", "int", "Tokens of the completion, end-of-turn token included"),
        ("num_prefix_tokens", "int", "Tokens of the prefix"),
        ("token_logprobs", "array<float>", "Log-prob per token, nats; null unless asked for"),
        ("engine_version", "string", "Versions of the engine's packages"),
        ("run_id", "string", "Run that wrote the row"),
    ),
    ("model_key",),
)

VERDICTS = Table(
    "verdicts",
    "judge behind an API × question; only questions with an answer, appended once, never changed",
    ("model_key", "prefix_hash"),
    (
        ("model_key", "string", "Hash of endpoint, model's name and what is asked for"),
        ("prefix_hash", "binary", "First 16 bytes of the sha256 of the question's messages"),
        ("verdict", "string", "A or B, the place of the better answer; null: neither"),
        ("reason", "string", "judge_refused or judge_unclear; null: there is a verdict"),
        ("prompt_tokens", "int", "Tokens read, as the endpoint counts them; null: not told"),
        ("answer_tokens", "int", "Tokens written, likewise"),
        ("cost_usd", "double", "Price of both by the config's prices; null: not known"),
        ("answered_by", "string", "What the endpoint calls the model that answered"),
        ("run_id", "string", "Run that wrote the row"),
    ),
    ("model_key",),
)

REWARDS = Table(
    "rewards",
    "completion × reward × dataset",
    ("dataset", "reward_key", "prompt_id", "completion_id"),
    (
        ("dataset", "string", "Name of the set of completions"),
        ("reward_key", "string", "Hash of all that decides the reward's numbers"),
        ("prompt_id", "string", "The input's id, or derived from the prompt's content"),
        ("completion_id", "string", "The input's id, or derived from the completion's content"),
        ("reward_name", "string", "Name of the reward configuration"),
        ("prompt_hash", "string", "sha256 hex of the prompt's messages"),
        ("prompt", _DDL_MESSAGES, "Messages as given"),
        ("completion", "string", "The candidate's text"),
        ("finish_reason", "string", "As given; `length` means it was cut; null: not given"),
        ("domain", "string", "Domain whose instruction conditioned the prompt"),
        ("domain_source", "string", "router, column, fixed, fallback or none"),
        ("domain_confidence", "double", "Router's confidence, 0 to 1; null without a router"),
        ("instruction_id", "string", "Instruction drawn from the pack; null: prompt untouched"),
        ("exemplar_id", "string", "Exemplar drawn from the pack; null: none"),
        ("exemplar_dropped", "boolean", "The exemplar was left out because the prompt was long"),
        (
            "reward",
            "double",
            "Weighted sum of the terms, nats; a judge's: see `cdr.judge`; null unless status is ok",
        ),
        (
            "strong_logprob",
            "double",
            "First positive term's log-prob sum, nats; of a classifier its score; null: a judge",
        ),
        ("weak_logprob", "double", "First negative term's log-prob sum, nats; null: none"),
        ("num_tokens", "int", "Completion tokens of the first term's model, or of the judge"),
        ("rank", "int", "1 for the prompt's highest reward; ties share a rank; null: no reward"),
        ("boundary_merged", "boolean", "The tokenizer would merge text across the boundary"),
        (
            "terms",
            "map<string, struct<model_key: string, prefix_hash: binary, completion_hash: binary, "
            "logprob_sum: double, num_tokens: int>>",
            "Every term by `model/condition`, with the key of its row in logprobs; of a judge, the "
            "completion's letter by `model/compared/prefix_hash`, one per question",
        ),
        ("passthrough", "string", "The input's other columns as JSON; null: none"),
        ("status", "string", "ok, or failed (tried again by the next run)"),
        ("error", "string", "Why it failed; null when ok"),
        ("run_id", "string", "Run that wrote the row"),
    ),
    ("dataset", "reward_key"),
)

PREFERENCES = Table(
    "preferences",
    "pair",
    ("dataset", "reward_key", "selection_key", "prompt_id"),
    (
        ("dataset", "string", "Name of the set of completions"),
        ("reward_key", "string", "Hash of all that decides the reward's numbers"),
        ("selection_key", "string", "Hash of the rule that chose the pair"),
        ("prompt_id", "string", "The prompt's id"),
        ("prompt_hash", "string", "sha256 hex of the prompt's messages"),
        ("prompt", _DDL_MESSAGES, "Messages as given"),
        ("chosen", _DDL_MESSAGES, "Exactly one assistant message"),
        ("rejected", _DDL_MESSAGES, "Exactly one assistant message"),
        ("chosen_id", "string", "completion_id of the chosen candidate"),
        ("rejected_id", "string", "completion_id of the rejected candidate"),
        ("chosen_reward", "double", "Reward of the chosen candidate, nats"),
        ("rejected_reward", "double", "Reward of the rejected candidate, nats"),
        ("margin", "double", "chosen_reward − rejected_reward, nats, > 0"),
        ("chosen_strong_logprob", "double", "First positive term's sum for chosen, nats"),
        ("chosen_weak_logprob", "double", "First negative term's sum for chosen, nats"),
        ("rejected_strong_logprob", "double", "First positive term's sum for rejected, nats"),
        ("rejected_weak_logprob", "double", "First negative term's sum for rejected, nats"),
        ("chosen_num_tokens", "int", "Tokens of the chosen candidate"),
        ("rejected_num_tokens", "int", "Tokens of the rejected candidate"),
        ("num_candidates", "int", "Distinct usable candidates of the prompt"),
        ("length_fallback", "boolean", "No candidate lay in the length window; nearest was taken"),
        ("domain", "string", "Domain of the prompt"),
        ("split", "string", "train or validation, by hash of the prompt alone"),
        ("reward_name", "string", "Name of the reward configuration"),
        (
            "reward_version",
            "string",
            "Registered model and version in MLflow, `NAME/3`; null: the reward came from a file",
        ),
        ("mlflow_run_id", "string", "MLflow run of the annotation; null: tracking was off"),
        ("run_id", "string", "Run that wrote the row"),
    ),
    ("dataset", "reward_key", "selection_key"),
)

UNPAIRED = Table(
    "unpaired",
    "prompt without a pair",
    ("dataset", "reward_key", "selection_key", "prompt_id"),
    (
        ("dataset", "string", "Name of the set of completions"),
        ("reward_key", "string", "Hash of all that decides the reward's numbers"),
        ("selection_key", "string", "Hash of the rule that chose the pairs"),
        ("prompt_id", "string", "The prompt's id"),
        ("prompt_hash", "string", "sha256 hex of the prompt's messages"),
        ("domain", "string", "Domain of the prompt"),
        ("num_candidates", "int", "Distinct usable candidates of the prompt"),
        (
            "reason",
            "string",
            "one_candidate, tie, below_min_margin or outside_length_window",
        ),
        ("run_id", "string", "Run that wrote the row"),
    ),
    ("dataset", "reward_key", "selection_key"),
)

REJECTS = Table(
    "rejects",
    "rejected input row",
    ("dataset", "source_row"),
    (
        ("dataset", "string", "Name of the set of completions"),
        (
            "source_row",
            "string",
            "sha256 hex of the completion_id, where given, and `row`; `-2`, `-3`, … behind it for "
            "equal rows",
        ),
        ("stage", "string", "validate, encode or judge"),
        ("reason", "string", "One of the enumerated reasons"),
        ("detail", "string", "What exactly, without the text itself"),
        ("prompt_id", "string", "The prompt's id; null when there is none"),
        ("completion_id", "string", "The completion's id; null when there is none"),
        ("row", "string", "The input row as JSON, with this one of its completions"),
        ("run_id", "string", "Run that wrote the row"),
    ),
    ("dataset",),
)

RUNS = Table(
    "runs",
    "job run",
    ("run_id",),
    (
        ("run_id", "string", "Identifier of the run"),
        ("job", "string", "annotate, generate, evaluate, ..."),
        ("dataset", "string", "Name of the set of completions"),
        ("reward_name", "string", "Name of the reward configuration"),
        ("reward_key", "string", "Hash of all that decides the reward's numbers"),
        ("config_hash", "string", "Hash of the resolved config"),
        ("config", "string", "The resolved config as JSON"),
        ("input_versions", "map<string, bigint>", "Delta version read per input; empty: not Delta"),
        ("outcome", "string", "running, done, stopped, over_threshold or failed"),
        ("error", "string", "Why it failed; null otherwise"),
        ("counts", "map<string, bigint>", "Prompts, candidates, rows per status, tokens, pairs"),
        ("waves_done", "int", "Waves committed"),
        ("waves_total", "int", "Waves planned"),
        ("mlflow_run_id", "string", "MLflow run; null: tracking was off"),
        ("started_at", "timestamp", "Start, UTC"),
        ("ended_at", "timestamp", "End, UTC; null while running, or when the run was killed"),
    ),
)

COMPLETIONS = Table(
    "completions",
    "sampled candidate (written by jobs/generate.py; any table of the user's may take its place)",
    ("dataset", "prompt_id", "completion_id"),
    (
        ("dataset", "string", "Name of this set of completions"),
        ("prompt_id", "string", "The prompt's id"),
        ("completion_id", "string", "The prompt's id and the number of the sample"),
        ("domain", "string", "The input's domain column; null: none"),
        ("prompt", _DDL_MESSAGES, "Messages as given"),
        ("completion", "string", "The sampled text"),
        ("finish_reason", "string", "stop (ended by itself) or length (cut)"),
        ("num_tokens", "int", "Tokens of the completion"),
        ("seed", "bigint", "Seed of this sample"),
        ("sampling_key", "string", "Hash of model, template and sampling parameters"),
        ("run_id", "string", "Run that wrote the row"),
    ),
    ("dataset",),
)

BENCHMARK_PAIRS = Table(
    "benchmark_pairs",
    "labelled pair × reward × benchmark",
    ("dataset", "reward_key", "prompt_id"),
    (
        ("dataset", "string", "Name of the benchmark"),
        ("reward_key", "string", "Hash of all that decides the reward's numbers, domains included"),
        (
            "prompt_id",
            "string",
            "Pair: its subset and id, or derived from its content; as in rewards",
        ),
        ("reward_name", "string", "Name of the reward configuration, or of its row in a table"),
        ("section", "string", "Section of the benchmark; `unknown` where it has none"),
        ("subset", "string", "Subset in the section"),
        ("prompt_hash", "string", "sha256 hex of the prompt's messages; null when left out"),
        ("domain", "string", "Domain whose instruction conditioned the prompt; null: none"),
        ("domain_source", "string", "router, column, fixed, fallback or none"),
        ("chosen_reward", "double", "Reward of the chosen answer, nats; null: not scored"),
        ("rejected_reward", "double", "Reward of the rejected answer, nats; null: not scored"),
        ("margin", "double", "chosen_reward − rejected_reward, nats; null unless status is ok"),
        ("outcome", "string", "win (margin > 0), tie or loss; null unless status is ok"),
        ("chosen_num_tokens", "int", "Tokens of the chosen answer, of the first term's model"),
        ("rejected_num_tokens", "int", "Tokens of the rejected answer, likewise"),
        ("status", "string", "ok, rejected (for good) or failed (tried again by the next run)"),
        ("reason", "string", "Why the pair is left out; null when ok"),
        ("run_id", "string", "Run that wrote the row"),
    ),
    ("dataset", "reward_key"),
)

BENCHMARK_RESULTS = Table(
    "benchmark_results",
    "score × reward × benchmark",
    ("dataset", "reward_key", "level", "section", "name"),
    (
        ("dataset", "string", "Name of the benchmark"),
        ("reward_key", "string", "Hash of all that decides the reward's numbers, domains included"),
        ("level", "string", "subset, section, overall, domain, length or length_prior"),
        ("section", "string", "Section of the subset; `all` for scores over sections"),
        ("name", "string", "What is scored: a subset, section, kind of mean, domain or length"),
        ("reward_name", "string", "Name of the reward configuration, or of its row in a table"),
        ("accuracy", "double", "Share of wins, weighted over subsets, 0 to 1; null: absent"),
        ("ci_low", "double", "Lower bound of its 95 % interval; null: absent"),
        ("ci_high", "double", "Upper bound of its 95 % interval; null: absent"),
        ("weight", "double", "Weight in its section's score; null: not a subset"),
        ("pairs", "bigint", "Pairs that were judged"),
        ("wins", "bigint", "Pairs whose chosen answer has the strictly higher reward"),
        ("ties", "bigint", "Pairs with equal rewards; they count as losses"),
        ("left_out", "bigint", "Pairs rejected or failed"),
        ("longer_wins", "double", "Accuracy of `the longer answer is better`, weighted alike"),
        ("run_id", "string", "Run that wrote the row"),
    ),
    ("dataset", "reward_key"),
)

_DDL_SCORE = (
    "accuracy: double, ci_low: double, ci_high: double, pairs: bigint, wins: bigint, ties: bigint"
)

STUDY_PAIRS = Table(
    "study_pairs",
    "ordered pair of models × study × benchmark",
    ("dataset", "study", "numerator", "denominator"),
    (
        ("dataset", "string", "Name of the benchmark"),
        ("study", "string", "Name of the study"),
        ("numerator", "string", "Model whose log-probs count, by its name in the study"),
        ("denominator", "string", "Model whose log-probs are taken off"),
        ("numerator_key", "string", "Its model_key in logprobs"),
        ("denominator_key", "string", "Its model_key in logprobs"),
        ("score_name", "string", "What the alignment scores are, for example Arena-Hard"),
        ("numerator_score", "double", "The numerator's alignment score"),
        ("denominator_score", "double", "The denominator's alignment score"),
        ("gap", "double", "numerator_score − denominator_score"),
        ("overall", "string", "What accuracy is over: `mean of sections` or `all pairs`"),
        ("accuracy", "double", "Share of wins, 0 to 1; null: a model over itself, or no pairs"),
        ("ci_low", "double", "Lower bound of its 95 % interval; null: absent"),
        ("ci_high", "double", "Upper bound of its 95 % interval; null: absent"),
        ("pairs", "bigint", "Labelled pairs judged, the same ones in every cell; null: absent"),
        ("wins", "bigint", "Those whose chosen answer has the strictly higher reward"),
        ("ties", "bigint", "Those with equal rewards; they count as losses"),
        ("sections", f"map<string, struct<{_DDL_SCORE}>>", "The same by section; null: absent"),
        ("study_key", "string", "Hash of models, template and reduction"),
        ("run_id", "string", "Run that wrote the row"),
    ),
    ("dataset", "study"),
)

POLICY_RESULTS = Table(
    "policy_results",
    "value × benchmark × policy of a study",
    ("study", "row", "benchmark", "metric"),
    (
        ("study", "string", "Name of the study"),
        ("row", "string", "The policy, by its row; `start` is the one before training"),
        ("benchmark", "string", "Name of the benchmark in the study"),
        (
            "metric",
            "string",
            "win_rate, length_controlled_win_rate, score, turn_1, turn_2 (a tool's judge); "
            "reward_win_rate, held_out_win_rate (over the start policy); length_chars, "
            "length_tokens (means)",
        ),
        ("title", "string", "How tables name the row"),
        ("value", "double", "Percent for rates, 1 to 10 for scores; null: nothing was judged"),
        ("ci_low", "double", "Lower bound of its 95 % interval; null: a length"),
        ("ci_high", "double", "Upper bound of its 95 % interval; null: a length"),
        ("questions", "bigint", "Questions it is a mean over"),
        ("printed", "double", "Published value; null: none"),
        ("judge", "string", "Who judged: a model, or the reward's name; null: a length"),
        ("reward_key", "string", "Of the reward that chose the policy's pairs; null for start"),
        ("learning_rate", "double", "Of the search's best policy; null for start"),
        ("beta", "double", "Likewise"),
        ("validation_accuracy", "double", "Likewise, on its own pairs' validation split, 0 to 1"),
        ("policy", "string", "Folder of the policy, or id of the start policy"),
        ("answers", "string", "Name of its answers in `completions` and in the tools' files"),
        ("mlflow_run_id", "string", "MLflow run of the answers; null: tracking was off"),
        ("run_id", "string", "Run that wrote the row"),
    ),
)

TABLES: tuple[Table, ...] = (
    COMPLETIONS, ROUTES, LOGPROBS, VERDICTS, REWARDS, PREFERENCES, UNPAIRED, REJECTS, RUNS,
    BENCHMARK_PAIRS, BENCHMARK_RESULTS, STUDY_PAIRS, POLICY_RESULTS,
)  # fmt: skip


def render_reference() -> str:
    """Render `docs/reference/tables.md` from the schemas."""
    lines = [
        "# Tables",
        "",
        "Generated from `cdr/tables.py` by `python -m cdr.tables`; do not edit.",
        "",
        f"Schema version {SCHEMA_VERSION}, kept in each table's property `{VERSION_PROPERTY}`.",
    ]
    for table in TABLES:
        lines += ["", f"## `{table.name}`", "", f"One row per {table.grain}.", ""]
        lines += [f"Key: {', '.join(f'`{column}`' for column in table.key)}."]
        if table.partitioned_by:
            lines[-1] += f" Partitioned by {', '.join(f'`{c}`' for c in table.partitioned_by)}."
        lines += ["", "| column | type | meaning |", "|---|---|---|"]
        lines += [f"| `{name}` | `{ddl}` | {comment} |" for name, ddl, comment in table.columns]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render_reference(), end="")
