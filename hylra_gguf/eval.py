"""`hylra-gguf eval`: what a policy loses on this file, measured in decode: predictions of text and answers to questions, against dense.

One dense prefill per document serves all arms and questions. Models whose cache cannot be rewound are refused.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shlex
import sys
import time
from dataclasses import dataclass, replace
from typing import Callable, Iterator

from tqdm import tqdm

from . import engine, eval_arms, eval_documents, eval_report, eval_tasks
from .bench import check_policies, facts_of_machine, facts_of_model, gpu_info, policies_of
from .errors import HylraError, PolicyError
from .eval_arms import DENSE, MAX_ANSWER_TOKENS, Arm, Reference, Sitting
from .eval_documents import Document
from .flags import add_plan_flags
from .forward import cpu_count
from .gguf_header import data_sha256, write_policy
from .plan import plan_options, plan_policy
from .policy import Policy, read_policy
from .profile_data import Profile
from .session import Model

PROMPT_ROOM_TOKENS = 160  # a question with its chat tokens; more than any of eval_tasks has
LONG_REQUESTS = (
    "Summarise the text above in detail, topic by topic.",
    "Explain to a friend what the text above is about.",
    "List the most important points of the text above, one sentence each.",
    "Write a letter to the author of the text above and say what you think of it.",
)


@dataclass(frozen=True)
class Record:
    """All sittings with one document; scores: arm -> one per question"""

    depth: int
    document: Document
    sittings: dict[str, Sitting]
    scores: dict[str, list[float]]


# -- arms -------------------------------------------------------------------------------------------------------------


def policies_for(args) -> dict[str, Policy]:
    """Those of --policy or of the file, and those that --plan makes from --profile."""
    if bool(args.plan) != bool(args.profile):
        raise PolicyError("--plan and --profile need each other: the flags of `hylra-gguf plan`, and the profile to plan from")
    if not args.plan:
        return policies_of(args)
    profile = Profile.load(args.profile)
    given = policies_of(args) if args.policy else {}
    return {**given, **{flags.replace("--", "").strip() or "default": planned(profile, flags) for flags in args.plan}}


def planned(profile: Profile, flags: str) -> Policy:
    """flags: as for `hylra-gguf plan`, such as "--theta 0.9 --top-k 1024" """
    class Parser(argparse.ArgumentParser):
        def error(self, message: str):
            raise PolicyError(f"--plan {flags!r}: {message}")

    parser = Parser(prog="--plan", add_help=False, allow_abbrev=False)
    add_plan_flags(parser)
    try:
        return plan_policy(profile, **plan_options(parser.parse_args(shlex.split(flags))))
    except PolicyError as error:
        raise PolicyError(f"--plan {flags!r}: {error}") from None


# -- measuring --------------------------------------------------------------------------------------------------------


class Examiner:
    """Contexts for all arms, one per kind of cache, and one more to read documents in, if that is done elsewhere."""

    def __init__(self, model: Model, arms: list[Arm], args, stack: contextlib.ExitStack):
        self.model, self.arms, self.args = model, arms, args
        self.n_ctx = max(args.n_depth) + max(args.following, PROMPT_ROOM_TOKENS + max(MAX_ANSWER_TOKENS, args.generate)) + 1
        threads = args.threads or cpu_count()
        caches = {arm.cache: arm for arm in arms}
        self.contexts = {cache: stack.enter_context(eval_arms.open_context(model, arm, self.n_ctx, threads)) for cache, arm in caches.items()}
        check_policies(arms, lambda arm: self.contexts[arm.cache])
        self.reader = None
        if args.prefill_ngl is not None:
            reader_model = stack.enter_context(Model(args.model, args.prefill_ngl))
            self.reader = stack.enter_context(eval_arms.open_context(reader_model, arms[0], self.n_ctx, threads))
            engine.set_policy(self.reader.ctx, None)
        self.chat = eval_documents.chat_of(model)

    def examine(self, depth: int, document: Document, progress: Callable[[int], object]) -> Record:
        self.read(document, progress)
        tokenize = eval_documents.plain(self.model)
        prompts = [self.chat.ask(tokenize, question.text) for question in document.questions]
        taught = [tokenize(question.reference) for question in document.questions]
        long_prompts = [self.chat.ask(tokenize, request) for request in LONG_REQUESTS if self.args.generate]
        reference = Reference(len(document.following), self.model.n_vocab)
        sittings: dict[str, Sitting] = {}
        for arm in self.arms:
            dense = sittings.get(DENSE)  # what the dense arm has answered is the best guess for the others
            sittings[arm.name] = eval_arms.sit(
                arm, self.contexts[arm.cache], document, prompts, dense.answers if dense else taught, long_prompts,
                dense.long if dense else [[] for _ in long_prompts], reference, n_long=self.args.generate, n_timed=self.args.time)
        reference.close()
        return Record(depth, document, sittings, self.score(document, sittings))

    def read(self, document: Document, progress: Callable[[int], object]) -> None:
        """One dense prefill per kind of cache."""
        for cache, context in self.contexts.items():
            engine.set_policy(context.ctx, None)
            context.rewind(0)
            if self.reader is not None and cache == self.arms[0].cache:
                self.reader.rewind(0)
                self.reader.prefill(document.tokens, progress=progress)
                eval_arms.move_state(self.reader, context)
            else:
                context.prefill(document.tokens, progress=progress)

    def score(self, document: Document, sittings: dict[str, Sitting]) -> dict[str, list[float]]:
        return {name: [eval_tasks.score(question, self.model.detokenize(answer)) for question, answer in zip(document.questions, one.answers)]
                for name, one in sittings.items()}


@contextlib.contextmanager
def sparse_on_any_device(name: str = "HYLRA_DEVICE_MIN_CONTEXT") -> Iterator[None]:
    """What a policy loses is asked, also where a GPU would not gain; a wish of the user stays."""
    given = os.environ.get(name)
    os.environ[name] = given or "0"
    try:
        yield
    finally:
        os.environ.pop(name) if given is None else os.environ.update({name: given})


def records(args, arms: list[Arm], report: Callable[[str], None]) -> Iterator[Record]:
    """The facts of the model, then one record per document as soon as it is done; no document begins when the time is over."""
    end = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    with sparse_on_any_device(), Model(args.model, args.n_gpu_layers) as model, contextlib.ExitStack() as stack:
        examiner = Examiner(model, arms, args, stack)
        yield facts_of_model(model)
        for depth in sorted(set(args.n_depth)):
            hays = eval_documents.haystacks(model, args.haystack, args.file or [])
            made = list(eval_documents.documents(model, hays, depth=depth, count=args.docs, questions=args.questions,
                                                 kinds=tuple(args.tasks), following=args.following, seed=args.seed))
            total = depth * len(made) * len(examiner.contexts)
            with tqdm(total=total, unit="tok", desc=f"{depth} tokens", disable=True if args.no_progress else None) as bar:
                for number, document in enumerate(made, 1):
                    if time.monotonic() > end:
                        report(f"depth {depth}: time is over after {number - 1} of {len(made)} documents")
                        break
                    report(f"depth {depth}, document {number} of {len(made)} ({document.haystack}), {len(document.questions)} questions")
                    yield examiner.examine(depth, document, bar.update)


def evaluate(args, report: Callable[[str], None]) -> dict:
    """The result as `-o json` prints it."""
    policies = policies_for(args)
    arms = eval_arms.make_arms(args.arms, policies, args.model)
    stream = records(args, arms, report)
    model_facts = next(stream)
    facts = {**facts_of_machine(argparse.Namespace(threads=args.threads, cache_type_k="f16", cache_type_v="f16")), **model_facts,
             **facts_of_gpu(args), "seed": args.seed}
    found: list[Record] = []
    try:
        found.extend(stream)
    except KeyboardInterrupt:
        if not found:
            raise
        report(f"interrupted: the result is of the {len(found)} documents that were done")
    if not found:
        raise HylraError(f"--minutes {args.minutes}: no document was done in that time; allow more")
    return eval_report.result(facts, arms, found, args)


def facts_of_gpu(args) -> dict:
    """gpu_info: empty where no layer was on a GPU, neither in decode nor in the prefill"""
    used = bool(args.n_gpu_layers or args.prefill_ngl)
    names = gpu_info() if used else ""
    return {"n_gpu_layers": args.n_gpu_layers, "prefill_ngl": args.prefill_ngl, "gpu_info": names,
            "backends": ("CUDA, CPU" if names else "GPU, CPU") if used else "CPU", "system": engine.activate().llama_print_system_info().decode()}


# -- command ----------------------------------------------------------------------------------------------------------


def cmd_eval(args) -> None:
    if args.png:
        from .report import load_plots

        load_plots()  # refused before minutes of measuring
    if args.save and read_policy(args.model) is None:
        raise PolicyError(f"{args.model}: --save has no policy to write to; embed one with hylra-gguf embed-policy")
    if args.save and (args.policy or args.plan):
        raise PolicyError("--save writes what the file's own policy was measured to lose; leave out --policy and --plan")
    if not args.n_depth or min(args.n_depth) < 512:
        raise HylraError("-d: documents of fewer than 512 tokens hold no questions; give for example -d 8192")
    report = (lambda line: None) if args.no_progress else (lambda line: print(line, file=sys.stderr))
    result = evaluate(args, report)
    print(eval_report.to_json(result) if args.format == "json" else eval_report.to_md(result))
    if args.png:
        eval_report.save_pictures(result, args.png)
    if args.save:
        save(args.model, result)


def save(path: str, result: dict) -> None:
    """hylra.measured.* of the file's own policy."""
    policy = read_policy(path)
    measured = {**policy.measured, **eval_report.measured(result), "model_sha256": data_sha256(path)}
    write_policy(path, replace(policy, measured=measured))
    print(f"{path}: {len(measured)} measured values written; see hylra-gguf show", file=sys.stderr)
