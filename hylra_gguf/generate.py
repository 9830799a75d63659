"""`hylra-gguf run`: generates text with or without the policy; the text goes to stdout, speed and "is it on" to stderr."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from .errors import HylraError, ModelFileError


def read_prompt(args) -> str:
    if args.file is None:
        return args.prompt
    try:
        return Path(args.file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise HylraError(f"{args.file}: cannot read the prompt: {reason}") from None


def open_llama(args, n_ctx: int, **kwargs):
    """A Llama that fails with one line instead of llama.cpp's log."""
    from .llama import Llama
    from .policy import Policy

    policy = False if args.no_hylra else Policy.load(args.policy) if args.policy else None
    try:
        return Llama(args.model, n_ctx=n_ctx, n_threads=args.threads, n_threads_batch=args.threads, hylra=policy,
                     seed=args.seed if args.seed is not None else 0xFFFFFFFF, verbose=False, **kwargs)
    except HylraError:
        raise
    except ValueError as error:
        raise ModelFileError(f"{args.model}: llama.cpp cannot load this model with {n_ctx} tokens of context: {error}") from None


def context_for(args, prompt: str) -> int:
    """-c, or what the prompt and the answer need; the prompt alone must fit."""
    vocab = open_llama(args, 512, vocab_only=True) if args.ctx_size is None else None
    if vocab is None:
        return args.ctx_size
    n_prompt = len(vocab.tokenize(prompt.encode()))
    vocab.close()
    return n_prompt + args.n_predict + 256  # room for the chat template


def pieces(llama, args, prompt: str):
    """The generated text, piece by piece."""
    options = dict(max_tokens=args.n_predict, temperature=args.temp, stream=True)
    if args.chat:
        for part in llama.create_chat_completion([{"role": "user", "content": prompt}], **options):
            yield part["choices"][0]["delta"].get("content") or ""
    else:
        for part in llama.create_completion(prompt, **options):
            yield part["choices"][0]["text"]


def status_line(llama, n_tokens: int, seconds: float) -> str:
    status = llama.hylra
    state = f"on, {status['sparse_steps']} of {status['steps']} steps sparse" if status["on"] else f"off: {status['reason']}"
    return f"{n_tokens / seconds:.1f} tokens/s, {n_tokens} tokens; HyLRA {state}" if n_tokens else f"no tokens; HyLRA {state}"


def cmd_run(args) -> None:
    prompt = read_prompt(args)
    llama = open_llama(args, context_for(args, prompt))
    n_tokens, start = 0, None
    try:
        for piece in pieces(llama, args, prompt):
            print(piece, end="", flush=True)
            n_tokens += start is not None  # the first token belongs to the prompt's time
            start = start or time.perf_counter()
    except ValueError as error:
        raise HylraError(f"{args.model}: {error}; raise -c") from None
    print()
    print(status_line(llama, n_tokens, time.perf_counter() - (start or 0)), file=sys.stderr)
