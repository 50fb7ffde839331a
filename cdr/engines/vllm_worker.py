"""What runs inside vLLM's own worker processes: it mixes `WorkerExtension` into its worker class.

Named by `worker_extension_cls`, called by `vllm.LLM.collective_rpc`. Imports nothing.
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
