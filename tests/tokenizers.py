"""Real and small tokenizers for tests, built from installed packages; nothing is downloaded.

Packages that carry tokenizer files are found by their spec and never imported: their own
dependencies are not installed. Each builder returns a new object, since encoders and transformers
change a tokenizer's state; the files behind it are read once per process.
"""

from __future__ import annotations

import base64
import importlib.util
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast
