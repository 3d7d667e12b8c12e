"""Where the files of an engine's model lie on this host, and what tells its weights from others."""

import hashlib
from pathlib import Path
from typing import Final

from huggingface_hub import snapshot_download

SAMPLES: Final = 16  # of a weight file
SAMPLE_BYTES: Final = 4096
CODE_FILES: Final = "*.py"
WEIGHT_FILES: Final = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")


def snapshot_of(model: str, revision: str | None, cache: str | None = None) -> Path | None:
    """The folder of a model of the Hugging Face hub in `cache`, by default in the usual one; None if it has none."""
    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=cache, local_files_only=True))
    except (OSError, ValueError):
        return None


def weights_mark(folder: Path, code: Path | None = None) -> str:
    """What tells these weights from others: names, sizes, times of change and samples of their files; 64 hex digits.

    Reading all of a large model would take as long as loading it. A model's own code, which computes with them if the
    engine is told to trust it, is read whole, in `code` as well if that is another folder. Empty without a file of
    weights.
    """
    whole = hashlib.sha256()
    files = sorted({path for pattern in WEIGHT_FILES for path in folder.glob(pattern)})
    for path in files:
        state = path.stat()
        whole.update(f"{path.name} {state.st_size} {state.st_mtime_ns} ".encode())
        with path.open("rb") as file:
            for number in range(SAMPLES):
                file.seek(number * max(0, state.st_size - SAMPLE_BYTES) // max(1, SAMPLES - 1))
                whole.update(file.read(SAMPLE_BYTES))
    for each in dict.fromkeys((folder, code or folder)):
        for path in sorted(each.glob(CODE_FILES)):
            whole.update(f"{path.name} ".encode() + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest() if files else ""
