"""Load a tokenizer, give it an identity, and refuse a student whose token ids mean something else.

A cache stores token ids. They mean the same to teacher and student only if both name every id alike, so identity
here is content (vocabulary, merges, normaliser, pre-tokeniser, post-processor), never a path or a model's name.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_schema.errors import CacheMismatchError
from workers.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    """Return the fast tokenizer of a model folder or Hugging Face model name; no code of the model's is run.

    Raises InputError if there is no such folder, no tokenizer in it, or none that the ``tokenizers`` library can run.
    """
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_file():
        raise InputError(f"{path} is a file: give the model folder that holds tokenizer.json")
    if not folder.is_dir() and (folder.is_absolute() or path.startswith((".", "~"))):
        raise InputError(f"there is no model folder {path}: give a folder that holds tokenizer.json")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        problem = "holds no tokenizer that can be loaded" if folder.is_dir() else "is no folder and no model to be had"
        raise InputError(
            f"{path} {problem} ({_first_line(error)}): give a folder that holds tokenizer.json and "
            f"tokenizer_config.json, for instance by `tokenizer.save_pretrained({path!r})`"
        ) from error
    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer of {path} ({type(tokenizer).__name__}) has no fast version: "
            "convert it to a tokenizer.json with the tokenizers library first"
        )
    # transformers answers a folder without tokenizer files with an empty tokenizer of the model's class.
    if tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys():
        raise InputError(
            f"{path} holds no tokenizer files: copy tokenizer.json and tokenizer_config.json from the model they "
            "belong to"
        )
    # How it was found is no part of it, and would be saved with it: a cache's bytes must not depend on HF_HUB_OFFLINE.
    for key in ("local_files_only", "is_local"):
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the sha256, in hex, of everything that turns text into token ids, and of the special tokens' roles.

    Padding and truncation are left out: they are settings of the last call, not of the tokenizer.
    """
    backend = _backend(tokenizer)
    del backend["padding"], backend["truncation"]
    return _sha256({"backend": backend, "special_tokens": tokenizer.special_tokens_map})


def chat_template_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return the sha256, in hex, of the chat template's text (of all of them by name, if it has several), or None."""
    template: str | dict[str, str] | None = tokenizer.chat_template
    if template is None:
        return None
    if isinstance(template, str):
        return hashlib.sha256(template.encode()).hexdigest()
    return _sha256(template)


def vocab_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the highest token id, added tokens included, plus one: where every softmax of the project ends."""
    return max(tokenizer.get_vocab().values()) + 1


def check_same_vocabulary(
    cache_tokenizer: "PreTrainedTokenizerBase", student_tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Return if every token id names the same token in both and text is merged alike.

    The roles of special tokens, the chat template and the padding may differ: a base model is a legitimate student
    of its instruct version. Raises CacheMismatchError with the first id that differs.
    """
    cache_tokens = {token_id: token for token, token_id in cache_tokenizer.get_vocab().items()}
    student_tokens = {token_id: token for token, token_id in student_tokenizer.get_vocab().items()}
    for token_id in sorted(cache_tokens.keys() | student_tokens.keys()):
        cache_token, student_token = cache_tokens.get(token_id), student_tokens.get(token_id)
        if cache_token != student_token:
            raise CacheMismatchError(
                f"token id {token_id} is {_quoted(cache_token)} in the cache's tokenizer and {_quoted(student_token)} "
                "in the student's: top-k token ids would name other tokens. Use a student with the cache's tokenizer."
            )
    cache_model, student_model = _segmentation(cache_tokenizer), _segmentation(student_tokenizer)
    for part, value in cache_model.items():
        if student_model[part] != value:
            raise CacheMismatchError(
                "the student's tokenizer has the cache's tokens but splits text into them otherwise (its model's "
                f"{part} differs): it would never be given the sequences the teacher saw. "
                "Use a student with the cache's tokenizer."
            )


def _backend(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return backend


def _segmentation(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Return what decides how text is split, apart from which tokens there are.

    A vocabulary is compared here only where it is a list of scores (Unigram). As a table it says nothing new, and
    one tokenizer may keep in it what another lists under added tokens.
    """
    model = _backend(tokenizer)["model"]
    scores = model["vocab"] if isinstance(model["vocab"], list) else None
    return {"type": model["type"], "merges": model.get("merges"), "scores": scores}


def _sha256(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _quoted(token: str | None) -> str:
    return "nothing" if token is None else repr(token)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
