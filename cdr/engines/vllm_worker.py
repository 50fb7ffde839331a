"""What runs inside vLLM's own worker processes: it mixes `WorkerExtension` into its worker class.

Named by `worker_extension_cls`, called by `vllm.LLM.collective_rpc`. Imports nothing
before a method is called.
"""

from __future__ import annotations

from typing import Any


class WorkerExtension:
    """Methods that vLLM's worker gets besides its own."""

    model_runner: Any

    def list_unapplied_modules(self, adapter_id: int) -> list[str]:
        """List the modules of a loaded LoRA adapter that this worker's model leaves as they are.

        vLLM drops the part of an adapter that is for a module which it has not wrapped, in some
        versions without a word. By the time an adapter is loaded, parts of a packed module (q, k
        and v) have become one under its name.

        Args:
            adapter_id: number of the adapter, just loaded: others may have left the cache.
        """
        manager = self.model_runner.lora_manager._adapter_manager
        # Of fused experts, `experts.base_layer` is their first matrix and `experts` the second.
        names = {name.removesuffix(".base_layer") for name in manager.get_adapter(adapter_id).loras}
        return sorted(names - set(manager.modules))

    def cast_head_once(self) -> int:
        """Let the float32 head of a model in another dtype multiply from weights cast once.

        For CPUs, where vLLM casts all of them for every request, and multiplies by MKL, which is
        slow on some (`cdr.engines.cpu_math`).

        Returns:
            How many heads do now; none where this vLLM computes logits elsewhere.
        """
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        heads = [
            module
            for module in self.model_runner.get_model().modules()
            if isinstance(module, LogitsProcessor) and hasattr(module, "_apply_head")
        ]
        for head in heads:
            head._apply_head = Float32Head(head._apply_head)
        return len(heads)


class Float32Head:
    """In place of `LogitsProcessor._apply_head`.

    Args:
        original: what it replaces.
    """

    def __init__(self, original: Any) -> None:
        self._original = original
        self._weights: dict[int, Any] = {}

    def __call__(self, lm_head: Any, hidden_states: Any, embedding_bias: Any) -> Any:
        """Give float32 logits, shape [rows, ids]."""
        from torch import float32

        from cdr.engines.cpu_math import multiply

        # Of quantised weights vLLM has to say what can be done.
        is_plain = type(lm_head.quant_method).__name__.startswith("Unquantized")
        if hidden_states.dtype == float32 or not is_plain:
            return self._original(lm_head, hidden_states, embedding_bias)
        if id(lm_head) not in self._weights:
            self._weights[id(lm_head)] = lm_head.weight.detach().to(float32)
        bias = None if embedding_bias is None else embedding_bias.to(float32)
        return multiply(hidden_states.to(float32), self._weights[id(lm_head)], bias)
