"""Scoring and sampling with vLLM: the engine for GPU executors; also runs on a CPU.

A **core** is one copy of weights loaded by vLLM in child processes of this one. Engines that differ
by LoRA adapter only share a core (`cdr.engines.adapters.share_weights`); it is shut down, and its
memory back, when the last of them is closed. How a group is scored with the prefix computed once
is the matter of `cdr.engines.vllm_scoring`.

What the spec says is what runs, or the engine does not load: a version that cannot compute the
head in the dtype asked for would put other numbers under the same key.

vLLM 0.13 or newer; what older versions lack is detected. Importing this module does not need vLLM.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib import metadata
from itertools import chain
from typing import Any

import numpy as np
import psutil

from cdr.engines.adapters import find_ignored_keys, make_room, read_adapter_shape
from cdr.engines.base import (
    EngineSpec,
    Sample,
    SamplingRequest,
    ScoringGroup,
    TokenLogprobs,
    check_length,
    check_token_ids,
)
from cdr.engines.hardware import count_cores
from cdr.engines.processes import end_processes, find_engine_processes, is_alive
from cdr.engines.vllm_errors import explain_load, flatten, measure_log
from cdr.engines.vllm_scoring import CoreRequest, Features, score_groups
from cdr.engines.vllm_setup import (
    check_addresses,
    check_devices,
    check_version,
    make_llm_arguments,
    refuse_head,
    set_environment,
)
from cdr.errors import EngineDied, EngineError, ModelError

# Requests handed over at once: enough to keep the device busy, few enough that answers, which hold
# a row per prompt token, do not pile up.
_MAX_REQUESTS = 1024
_WATCH_S = 1.0

_log = logging.getLogger(__name__)


class VllmEngine:
    """A causal language model in vLLM, on the visible GPUs or the CPU.

    One caller at a time for each engine; engines on one core take turns. Sets environment
    variables that vLLM reads (`VLLM_*`, on a CPU also `OMP_NUM_THREADS`) for this process.

    Args:
        spec: what to load; `extra` holds further arguments of `vllm.LLM`.
        num_threads: CPU threads, where the model runs on the CPU; None takes all cores.

    Attributes:
        num_resubmitted: requests so far that had to be sent again without the prefix cache.

    Raises:
        ModelError: vLLM is missing, too old, or cannot load the model as specified.
    """

    is_concurrent = True

    def __init__(self, spec: EngineSpec, num_threads: int | None = None) -> None:
        self.spec = spec
        self.num_resubmitted = 0
        self._core = _borrow_core(spec, num_threads)
        self._is_open = True
        self.engine_version = self._core.version
        try:
            self._adapter = self._core.load_adapter(spec)
        except BaseException:
            self.close()
            raise

    def score(self, groups: Sequence[ScoringGroup]) -> list[list[TokenLogprobs]]:
        """Give the log-prob of every completion token; see `LogprobEngine.score`.

        Raises:
            ModelError: a sequence is empty, longer than `max_length`, or has an id that is not in
                the vocabulary.
            EngineError: vLLM gives no usable answer.
        """
        for group in groups:
            for ids in group.completions_ids:
                check_length(self.spec, len(group.prefix_ids), len(ids))
            all_ids = np.array([*group.prefix_ids, *chain(*group.completions_ids)], np.int64)
            check_token_ids(self.spec, all_ids, self._core.vocab_size)
        scored = score_groups(groups, self.ask, self._core.features)
        if scored.num_resubmitted:
            self.num_resubmitted += scored.num_resubmitted
            _log.info(
                "%d requests sent again without the prefix cache, %d so far",
                scored.num_resubmitted,
                self.num_resubmitted,
            )
        return scored.scores

    def generate(self, requests: Sequence[SamplingRequest]) -> list[list[Sample]]:
        """Sample completions; see `LogprobEngine.generate`. A prompt's samples share its prefill.

        Raises:
            ModelError: as for `score`, `max_new_tokens` being the completion's length.
        """
        asked = []
        for request in requests:
            check_length(self.spec, len(request.prefix_ids), request.max_new_tokens)
            check_token_ids(
                self.spec, np.array(request.prefix_ids, np.int64), self._core.vocab_size
            )
            asked += [_sampling_request(request, seed) for seed in request.seeds]
        answers = iter(self.ask(asked))
        return [
            [_to_sample(next(answers).outputs[0], request.stop_ids) for _ in request.seeds]
            for request in requests
        ]

    def ask(self, requests: Sequence[CoreRequest]) -> list[Any]:
        """Send requests as they are; give one `vllm.RequestOutput` each, in order."""
        return self._core.run(requests, self._adapter)

    def close(self) -> None:
        """Let go of the core; the last engine on it ends its processes."""
        if self._is_open:
            self._is_open = False
            _return_core(self._core)


def _sampling_request(request: SamplingRequest, seed: int) -> CoreRequest:
    params = {
        "max_tokens": request.max_new_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": seed % 2**63,
        "stop_token_ids": list(request.stop_ids),
        "ignore_eos": True,  # what ends a completion is the caller's to say
        "detokenize": False,
    }
    return CoreRequest(list(request.prefix_ids), params)


def _to_sample(output: Any, stop_ids: Sequence[int]) -> Sample:
    ids = tuple(output.token_ids)
    is_stopped = output.finish_reason == "stop"
    if is_stopped and ids and ids[-1] in stop_ids:
        ids = ids[:-1]
    return Sample(ids, "stop" if is_stopped else "length")


class _Core:
    """One copy of weights in vLLM; use `_borrow_core`.

    Args:
        spec: an engine's spec without what engines on one core may differ in.
        num_threads: CPU threads.
    """

    def __init__(self, spec: EngineSpec, num_threads: int | None) -> None:
        version = check_version(spec)
        set_environment(spec, num_threads or count_cores())
        import vllm
        from vllm.platforms import current_platform

        self.spec = spec
        self.num_users = 0
        self._vllm = vllm
        self._turn = threading.Lock()
        self._adapters: dict[str, int] = {}
        self.version = f"vllm {version} / torch {metadata.version('torch')}"
        parameters = vllm.SamplingParams.__struct_fields__
        before, log_begin = find_engine_processes(), measure_log()
        try:
            check_addresses(spec, current_platform)
            check_devices(spec, current_platform)
            arguments = make_llm_arguments(spec, is_cpu=current_platform.is_cpu())
            if not hasattr(vllm.EngineArgs, "lora_target_modules"):
                arguments.pop("lora_target_modules", None)
            if "logprob_token_ids" not in parameters:
                arguments["max_logprobs"] = -1  # primers then ask for the whole vocabulary
            self._llm = vllm.LLM(**arguments)
        except ModelError:
            raise
        except Exception as error:
            # Whatever vLLM raises here (it has no error class for it), the model is not loaded.
            end_processes(find_engine_processes() - before)
            raise explain_load(error, spec, log_begin=log_begin) from error
        self._processes = find_engine_processes() - before
        self._is_closed = threading.Event()
        threading.Thread(target=self._watch, name="vllm-watch", daemon=True).start()
        config = self._llm.llm_engine.vllm_config
        self.vocab_size: int = config.model_config.get_vocab_size()
        self.features = Features(
            block_size=config.cache_config.block_size,
            chooses_logprobs="logprob_token_ids" in parameters,
            scores_token_ids="prompt_logprob_token_ids" in parameters
            and bool(getattr(config, "use_v2_model_runner", False)),
        )
        self._check_head(str(config.model_config.head_dtype).removeprefix("torch."))
        casts_head = current_platform.is_cpu() and spec.head_dtype == "float32" != spec.dtype
        if casts_head and not all(self._llm.collective_rpc("cast_head_once")):
            _log.warning("%s casts the head for every request, which is slow", self.version)

    def load_adapter(self, spec: EngineSpec) -> Any:
        """Load a spec's adapter and give what requests carry for it; None for none.

        Raises:
            ModelError: vLLM cannot apply it, or only a part of it.
        """
        if spec.adapter_path is None:
            return None
        from vllm.lora.peft_helper import PEFTHelper
        from vllm.lora.request import LoRARequest

        known = [field.name for field in fields(PEFTHelper)]
        if ignored := find_ignored_keys(spec.adapter_path, known):
            raise _refuse_adapter(spec, f"{self.version} would ignore its {', '.join(ignored)}")
        number = self._adapters.setdefault(spec.adapter_path, len(self._adapters) + 1)
        request = LoRARequest(spec.name, number, spec.adapter_path)
        try:
            with self._turn:
                self._llm.llm_engine.add_lora(request)
                answers = self._llm.collective_rpc("list_unapplied_modules", args=(number,))
        except Exception as error:
            raise _refuse_adapter(spec, flatten(error)) from error
        if unapplied := sorted({name for names in answers for name in names}):
            raise _refuse_adapter(
                spec, f"it would leave out {len(unapplied)} modules, such as {unapplied[0]}"
            )
        return request

    def run(self, requests: Sequence[CoreRequest], adapter: Any) -> list[Any]:
        """Give one `vllm.RequestOutput` per request, in order.

        Raises:
            EngineDied: a process of vLLM's ended; this core can only be closed.
        """
        outputs: list[Any] = []
        for first in range(0, len(requests), _MAX_REQUESTS):
            part = requests[first : first + _MAX_REQUESTS]
            with self._turn, self._dying_loudly():
                got = self._llm.generate(
                    [{"prompt_token_ids": request.prompt_ids} for request in part],
                    [self._vllm.SamplingParams(**request.params) for request in part],
                    use_tqdm=False,
                    lora_request=adapter,
                )
            if len(got) != len(part):
                raise EngineError(f"vLLM gave {len(got)} answers to {len(part)} requests")
            outputs += got
        return outputs

    def _watch(self) -> None:
        """Wake a request whose core was killed (by the kernel, say): vLLM would wait for ever.

        A core that fails by itself says so; then, and when a worker of its ends, this has nothing
        to do.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        cores = [process for process in psutil.Process().children() if process in self._processes]
        while not self._is_closed.wait(_WATCH_S):
            if not all(map(is_alive, cores)):
                self._llm.llm_engine.engine_core.outputs_queue.put_nowait(EngineDeadError())
                return

    @contextlib.contextmanager
    def _dying_loudly(self) -> Iterator[None]:
        """Make the death of vLLM's processes an error that the host knows how to survive."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            with _cores_lock:  # whoever loads these weights next must not get this core
                if _cores.get(self.spec) is self:
                    del _cores[self.spec]
            end_processes(self._processes)
            raise EngineDied("vLLM's engine core ended in the middle of a request") from error

    def close(self) -> None:
        """End vLLM's processes and wait for their end: only then is the memory back."""
        self._is_closed.set()
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        end_processes(self._processes)

    def _check_head(self, head_dtype: str) -> None:
        if head_dtype != self.spec.head_dtype:
            self.close()
            raise refuse_head(self.spec, f"it computes in {head_dtype}")


_cores: dict[EngineSpec, _Core] = {}
_cores_lock = threading.Lock()


def _borrow_core(spec: EngineSpec, num_threads: int | None) -> _Core:
    """Give the core an engine runs on, loaded unless another engine has it already."""
    own = [read_adapter_shape(spec.adapter_path)] if spec.adapter_path else []
    key = make_room(spec, own).weights()
    with _cores_lock:
        if key not in _cores:
            _cores[key] = _Core(key, num_threads)
        _cores[key].num_users += 1
        return _cores[key]


def _return_core(core: _Core) -> None:
    with _cores_lock:
        core.num_users -= 1
        if core.num_users == 0:
            if _cores.get(core.spec) is core:  # one that died has left already
                del _cores[core.spec]
            core.close()


def _refuse_adapter(spec: EngineSpec, reason: str) -> ModelError:
    return ModelError(
        f"vLLM cannot apply the adapter: {reason}",
        where=f"engine {spec.name} ({spec.adapter_path})",
        fix="use the transformers engine for this model, or merge the adapter into its weights and "
        "give the merged folder as path",
    )
