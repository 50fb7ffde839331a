"""A reward as an MLflow model: `mlflow.pyfunc.load_model("models:/NAME@ALIAS").predict(frame)`.

MLflow keeps a copy of this file with each registered version and runs it when the model is loaded
(models from code), so it holds no more than the way from a frame to `cdr.reward_model` and back.
Models are asked through the engine host, also from the workers of `mlflow.pyfunc.spark_udf`: no
weights are loaded in the process that calls `predict`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd

from cdr.reward_files import read_reward
from cdr.reward_model import RewardModel


class RewardPyfunc(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Rows of prompts and completions in, rows of rewards out, in order."""

    def load_context(self, context: Any) -> None:
        """Plan the reward of the version's folder, and see that it is the one registered."""
        folder = Path(context.artifacts["reward"])
        self._model = RewardModel(read_reward(folder, where=str(folder)))

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Score rows.

        Args:
            context: not used.
            model_input: frame with `prompt` (text or messages), `completion`, for a judge
                `num_candidates`, and where they are known `finish_reason` and `domain`.
            params: `placement` and `request_tokens`, see `RewardModel.score`.

        Returns:
            A frame with the same index and the columns of `RewardRow`. Where there is none,
            numbers are NaN, num_tokens is 0 and texts are empty: MLflow casts every column for
            Spark, where an integer that is null would be an error and a text "None".
        """
        given: list[Any] = model_input.to_dict("records")
        rows = self._model.score(given, **(params or {}))
        return pd.DataFrame(
            {
                "reward": pd.Series([row.reward for row in rows], dtype="float64"),
                "domain": [row.domain or "" for row in rows],
                "strong_logprob": pd.Series([row.strong_logprob for row in rows], dtype="float64"),
                "weak_logprob": pd.Series([row.weak_logprob for row in rows], dtype="float64"),
                "num_tokens": pd.Series([row.num_tokens or 0 for row in rows], dtype="int64"),
                "status": [row.status for row in rows],
                "error": [row.error or "" for row in rows],
            }
        ).set_axis(model_input.index)


mlflow.models.set_model(RewardPyfunc())
