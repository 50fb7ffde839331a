"""A causal model of the transformers library, reduced to what engines ask of it.

`Decoder` hides what differs between architectures: how masks are passed, sliding windows and the
cache classes. `CausalLm` loads weights (and a LoRA adapter) and adds the LM head, with what happens
to logits after it. Anything that cannot be reproduced is refused when it loads, never scored
wrongly.

Out of scope: quantised weights, and one model spread over several devices.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import model_type_to_module_name

from cdr.engines import block_attention
from cdr.engines.base import EngineSpec
from cdr.engines.cpu_math import exact_products, multiply, speed_up_linear_layers
from cdr.engines.hardware import DTYPES
from cdr.errors import ModelError

KeysValues = list[tuple[torch.Tensor, torch.Tensor]]
"""Per layer: keys and values, each of shape [batch, heads, tokens, head_dim]; never mutated."""

_LAYER_TYPES = {"full_attention", "sliding_attention"}
# RoPE variants whose frequencies depend on the longest position of a call, beyond a limit.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


class Decoder:
    """The layers of a loaded model below its head.

    Args:
        model: a model of transformers, in evaluation mode.
        spec: what it was loaded by.
        device: where it is.

    Attributes:
        vocab_size: ids that the model knows.

    Raises:
        ModelError: spec or architecture ask for something that is not supported.
    """

    def __init__(self, model: Any, spec: EngineSpec, device: torch.device) -> None:
        self._model, self._device = model, device
        self._decoder = model.base_model
        self.vocab_size: int = model.get_input_embeddings().num_embeddings
        self._layer_types = _resolve_layer_types(model.config, spec)
        if device.type == "cpu":
            speed_up_linear_layers(self._decoder)
            # Not on GPUs, where small kernels would cost more than masked keys.
            if model.config._attn_implementation == "sdpa":
                model.set_attn_implementation(block_attention.NAME)
        self._window: int = getattr(model.config, "sliding_window", None) or 0

    def read(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        key_positions: torch.Tensor,
        visible: torch.Tensor,
        layers: KeysValues,
    ) -> tuple[torch.Tensor, KeysValues]:
        """Run the decoder on new tokens, given the keys and values of earlier ones.

        Args:
            token_ids: shape [batch, rows].
            positions: shape [batch, rows].
            key_positions: shape [batch, keys]; the last `rows` keys are the rows themselves.
            visible: which keys a row may see, itself among them, shape [batch, rows, keys].
            layers: keys and values of the first `keys − rows` keys; empty for none.

        Returns:
            Hidden states after the final norm, shape [batch, rows, hidden], and the keys and
            values of all keys.
        """
        seen = {"full_attention": visible}
        if "sliding_attention" in self._layer_types:
            near = positions[:, :, None] - key_positions[:, None, :] < self._window
            seen["sliding_attention"] = visible & near
        masks = {kind: self._make_mask(mask) for kind, mask in seen.items()}
        # Made without a config: sliding layers would drop keys that other branches still need.
        cache = DynamicCache()
        for index, (keys, values) in enumerate(layers):
            cache.update(keys, values, index)
        output = self._decoder(
            input_ids=token_ids,
            position_ids=positions,
            attention_mask=masks if len(self._layer_types) > 1 else masks[self._layer_types[0]],
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state, [(layer.keys, layer.values) for layer in cache.layers]

    def _make_mask(self, visible: torch.Tensor) -> torch.Tensor:
        """Make a mask, shape [batch, 1, rows, keys], in the form that the attention takes."""
        attention = self._model.config._attn_implementation
        if attention == "eager":  # it adds the mask to the scores
            dtype = self._model.dtype
            bias = torch.zeros(visible.shape, dtype=dtype, device=self._device)
            return bias.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]
        # Rows of one sequence; a single one, in sampling, is on one branch.
        if attention == block_attention.NAME and len(visible) == 1 < visible.shape[1]:
            return block_attention.make_block_mask(visible[0])
        return visible[:, None]


class CausalLm(Decoder):
    """Decoder and LM head, loaded as a spec says.

    Args:
        spec: what to load.
        device: where to put it.

    Attributes:
        vocab_size: ids that have both an embedding and a logit.

    Raises:
        ModelError: weights are missing or not safetensors, or spec or architecture ask for
            something that is not supported.
    """

    def __init__(self, spec: EngineSpec, device: torch.device) -> None:
        super().__init__(load_model(AutoModelForCausalLM, spec, device), spec, device)
        self._head = self._model.get_output_embeddings()
        self._head_dtype: torch.dtype = getattr(torch, spec.head_dtype)
        self.vocab_size = min(len(self._head.weight), self.vocab_size)
        config = self._model.config
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)  # Gemma
        self._scale: float = getattr(config, "logit_scale", None) or 1.0  # Cohere
        self._scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite

    def compute_logits(
        self, states: torch.Tensor, first: int = 0, last: int | None = None
    ) -> torch.Tensor:
        """Run the LM head for the ids [first, last) of the vocabulary.

        Args:
            states: hidden states after the final norm, shape [rows, hidden].
            first: first id.
            last: one past the last id; None for the end of the vocabulary.

        Returns:
            Float32 logits, shape [rows, ids].
        """
        last = self.vocab_size if last is None else min(last, self.vocab_size)
        weight = self._head.weight[first:last]
        with exact_products(torch.promote_types(states.dtype, weight.dtype)):
            logits = multiply(states.to(self._head_dtype), weight.to(self._head_dtype)).float()
        if self._head.bias is not None:
            logits += self._head.bias[first:last]
        if self._scale != 1.0:
            logits *= self._scale
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return logits

    def compute_plain_logprobs(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Score one sequence with the architecture's own forward, masks and head.

        Args:
            token_ids: shape [tokens].

        Returns:
            log p(token | earlier tokens) of all tokens but the first, shape [tokens − 1].
        """
        logits = self._model(input_ids=token_ids[None], use_cache=False).logits[0, :-1]
        logprobs = logits[:, : self.vocab_size].float().log_softmax(-1)
        result: torch.Tensor = logprobs.gather(-1, token_ids[1:, None])[:, 0]
        return result


def check_spec(spec: EngineSpec) -> None:
    """Refuse a spec that asks for what engines of this library have not.

    Raises:
        ModelError: says what.
    """
    problem = None
    if spec.dtype not in DTYPES:
        problem = f"dtype must be one of {', '.join(DTYPES)}, got {spec.dtype!r}"
    elif spec.head_dtype not in DTYPES:
        problem = f"head_dtype must be one of {', '.join(DTYPES)}, got {spec.head_dtype!r}"
    elif json.loads(spec.extra):
        problem = f"the {spec.engine} engine takes no extra arguments, got {spec.extra}"
    if problem:
        fix = "correct the model in the reward's config"
        raise ModelError(problem, where=f"engine {spec.name}", fix=fix)


def load_model(kind: Any, spec: EngineSpec, device: torch.device) -> Any:
    """Load weights in the spec's dtype; with an adapter, merged in float32 before the cast.

    Args:
        kind: one of transformers' auto classes.
        spec: what to load.
        device: where to put it.

    Raises:
        ModelError: weights are missing or not safetensors, parts of the model are not in them, or
            its own code cannot be imported.
    """
    source = {"revision": spec.revision, "trust_remote_code": spec.custom_code}
    dtype: torch.dtype = getattr(torch, spec.dtype)
    try:
        config = AutoConfig.from_pretrained(spec.path, **source)
        lent = _lend_docstrings(config) if spec.custom_code else contextlib.nullcontext()
        with lent:
            model, found = kind.from_pretrained(
                spec.path,
                **source,
                config=config,
                use_safetensors=True,
                # sdpa leaves a softcap on attention scores out.
                attn_implementation="eager"
                if getattr(config, "attn_logit_softcapping", None)
                else "sdpa",
                dtype=torch.float32 if spec.adapter_path else dtype,
                device_map={"": "cpu" if spec.adapter_path else device},
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        if spec.custom_code and isinstance(error, ImportError):
            raise ModelError(
                f"the Python code that comes with the model cannot be imported: {error}",
                where=f"engine {spec.name} ({spec.path})",
                fix="install the package it names on every node; or, where the name is gone from "
                f"the transformers here ({transformers.__version__}), mend that import in a copy "
                "of the model's folder and pin the copy by its checksum",
            ) from error
        raise ModelError(
            f"cannot load the model: {error}",
            where=f"engine {spec.name} ({spec.path})",
            fix="path must be a folder or hub id with a config.json that transformers knows "
            "and weights as safetensors",
        ) from error
    if missing := sorted(found["missing_keys"]):
        # transformers would go on with random numbers in their place.
        raise ModelError(
            f"the weights lack {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}",
            where=f"engine {spec.name} ({spec.path})",
            fix="name a model that was saved with this head"
            if spec.engine == "classifier"
            else "name a complete model",
        )
    if spec.adapter_path:
        model = _merge_adapter(model, Path(spec.adapter_path))
        # Parameters only: `model.to(dtype)` would round the float32 RoPE frequencies too.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.to(device)
    return model.eval()


@contextlib.contextmanager
def _lend_docstrings(config: Any) -> Iterator[None]:
    """Put back, while a model's own code is imported, docstring constants it may import.

    Modules of transformers 4 had `LLAMA_START_DOCSTRING` and `LLAMA_INPUTS_DOCSTRING`, likewise for
    every family, and code that subclasses their models imports them to decorate its own `forward`
    (ArmoRM's does). 5 has none. They are text for readers and change no number.

    Args:
        config: the model's; its type is the family.
    """
    family = model_type_to_module_name(config.model_type)
    names = [f"{family.upper()}_{part}_DOCSTRING" for part in ("START", "INPUTS")]
    lent: list[str] = []
    with contextlib.suppress(ImportError):  # a family of the code's own has no such module
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        lent = [name for name in names if not hasattr(module, name)]
    for name in lent:
        setattr(module, name, "")
    try:
        yield
    finally:
        for name in lent:
            delattr(module, name)


def _merge_adapter(model: Any, folder: Path) -> Any:
    """Add a LoRA adapter to float32 weights: merged in bfloat16, small updates would round off."""
    from peft import PeftModel

    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(
            "a LoRA adapter must be a folder with adapter_config.json and "
            "adapter_model.safetensors",
            where=str(folder),
            fix="name the folder that PEFT's save_pretrained wrote",
        )
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload(safe_merge=True)


def _resolve_layer_types(config: Any, spec: EngineSpec) -> tuple[str, ...]:
    """Give the distinct attention types that matter below `max_length`, or refuse the model."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and spec.max_length > limit:
        raise ModelError(
            f"max_length must be at most the model's {limit} positions, got {spec.max_length}",
            where=f"engine {spec.name}",
            fix=f"set the model's max_length to {limit} or less",
        )
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    original = rope.get("original_max_position_embeddings") or limit
    if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE and spec.max_length > (original or 0):
        raise ModelError(
            f"with {rope['rope_type']} RoPE max_length must be at most {original}, "
            f"got {spec.max_length}: log-probs would depend on the batch",
            where=f"engine {spec.name}",
            fix=f"set the model's max_length to {original} or less",
        )
    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if unknown := types - _LAYER_TYPES:
        raise ModelError(
            f"layers of type {', '.join(sorted(unknown))} keep no keys and values per token",
            where=f"engine {spec.name}",
            fix="use a model whose layers are full or sliding-window attention",
        )
    if window is None or spec.max_length <= window:
        return ("full_attention",)
    return tuple(sorted(types))
