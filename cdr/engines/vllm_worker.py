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

    def pack_float32_head(self) -> None:
        """Let the float32 head of a model in another dtype multiply from weights cast once.

        For CPUs, where vLLM casts all of them for every request, and multiplies by MKL, which is
        slow on some (`cdr.engines.cpu_math`). Where vLLM has no such head, nothing is changed.
        """
        import torch
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        model = self.model_runner.get_model()
        for module in model.modules():
            original = getattr(module, "_apply_head", None)
            if isinstance(module, LogitsProcessor) and original is not None:
                module._apply_head = PackedHead(original, torch)


class PackedHead:
    """In place of `LogitsProcessor._apply_head`.

    Args:
        original: what it replaces.
        torch: the module.
    """

    def __init__(self, original: Any, torch: Any) -> None:
        self._original, self._torch = original, torch
        self._packed: dict[int, Any] = {}

    def __call__(self, lm_head: Any, hidden_states: Any, embedding_bias: Any) -> Any:
        """Give logits, shape [rows, ids]."""
        torch = self._torch
        if hidden_states.dtype == torch.float32 or not hasattr(lm_head, "weight"):
            return self._original(lm_head, hidden_states, embedding_bias)
        if id(lm_head) not in self._packed:
            weight = lm_head.weight.detach().to(torch.float32)
            self._packed[id(lm_head)] = torch.ops.mkldnn._reorder_linear_weight(weight)
        bias = None if embedding_bias is None else embedding_bias.to(torch.float32)
        rows = hidden_states.to(torch.float32)
        packed = self._packed[id(lm_head)]
        return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
