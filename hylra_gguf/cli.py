"""The command `hylra-gguf`: results go to stdout, progress to stderr, and every expected failure is one line and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
import sys
import traceback
from importlib import metadata
from typing import Any, Callable, Iterator, List, Optional

from tqdm import tqdm

from .errors import HylraError, ModelFileError, PolicyError
from .flags import PLAN_FLAGS, add_plan_flags, add_refine_flags, add_sweep_flags, count, list_of, number, one_of
from .gguf_header import Progress, check_fits, check_target, data_sha256, model_shape, read_header, strip, write_policy
from .policy import Policy, require_policy

PROGRAM = "hylra-gguf"
KV_TYPES = ("f16", "f32", "bf16", "q8_0", "q4_0")
FILLS = ("text", "synthetic")
ARMS = ("stock-fa1", "stock-fa0", "full", "hylra")
EVAL_ARMS = ("dense", "stock-fa1", "stock-fa0", "kv-q8_0", "kv-q4_0", "hylra")
TASKS = ("single", "facts", "multikey", "variables", "multivalue", "multiquery", "copy", "common", "frequent")  # eval_tasks.KINDS
HAYSTACKS = ("prose", "code", "noise")
# flags that only matter when the policy is planned here; none may be given beside --policy
PLANNING = ("file", "ctx_size", "minutes", *PLAN_FLAGS)


def main(argv: Optional[List[str]] = None) -> int:
    verbose = False
    try:
        _tolerate_odd_names()
        args = build_parser().parse_args(argv)
        verbose = args.verbose
        code = args.command(args) or 0
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # --help, --version
        return int(stop.code or 0)
    except BrokenPipeError:
        _silence_stdout()
        return 141
    except KeyboardInterrupt:
        return _fail("interrupted", verbose, 130)
    except (HylraError, OSError) as error:
        return _fail(_one_line(error), verbose, 2)


# ---- commands

def cmd_show(args: argparse.Namespace) -> None:
    policy = Policy.load(args.model)
    print(policy.to_json().rstrip() if args.format == "json" else policy.describe())


def cmd_strip(args: argparse.Namespace) -> None:
    with _progress(args, "strip") as progress:
        count = strip(args.model, args.output, progress, args.force)
    print(f"{args.output or args.model}: {count} hylra.* keys removed" if count else f"{args.model}: no hylra.* keys in it")


def cmd_verify(args: argparse.Namespace) -> None:
    header = read_header(args.model)
    arch, layer_count, head_kv_count = model_shape(header)
    policy = require_policy(args.model)
    check_fits(header, policy)
    data = _verify_data(args, policy)
    print(f"ok  file    {header.tensor_count} tensors, complete")
    print(f"ok  model   {arch}: {layer_count} layers, {head_kv_count} KV heads")
    print(f"ok  policy  version {policy.version}: {policy.one_line()}")
    print(f"ok  data    {data}")


def _verify_data(args: argparse.Namespace, policy: Policy) -> str:
    measured = policy.measured.get("model_sha256")
    if not measured:
        return "nothing was measured on this file, so there is no sha256 to compare"
    with _progress(args, "sha256") as progress:
        found = data_sha256(args.model, progress)
    if found != measured:
        raise ModelFileError(f"{args.model}: the tensor data have sha256 {found}, but the policy was measured on {measured}; "
                             "measure it again")
    return f"sha256 {found}, as measured"


def cmd_embed_policy(args: argparse.Namespace) -> None:
    header = check_target(args.model, args.output, args.force)  # before minutes of profiling
    policy = _given_policy(args) if args.policy else _lazy("embed", "plan_for_model")(args)
    check_fits(header, policy)
    if not args.dry_run:
        with _progress(args, "embed") as progress:
            write_policy(args.model, policy, args.output, progress, args.force)
    print(policy.describe())
    print(f"{args.output or args.model}: {'dry run, nothing written' if args.dry_run else 'policy written'}", file=sys.stderr)


def _given_policy(args: argparse.Namespace) -> Policy:
    idle = [name for name in PLANNING if getattr(args, name) is not None]
    if idle:
        raise PolicyError(f"--{idle[0].replace('_', '-')} has no effect beside --policy; leave one of them out")
    return Policy.load(args.policy)


def _lazy(module: str, function: str) -> Callable[[argparse.Namespace], Any]:
    """A command whose module is imported when it runs, so that `show` needs neither the engine nor a profile."""
    return lambda args: getattr(importlib.import_module(f".{module}", __package__), function)(args)


@contextlib.contextmanager
def _progress(args: argparse.Namespace, label: str) -> Iterator[Progress]:
    """A bar on stderr, if that is a terminal."""
    with tqdm(desc=label, unit="B", unit_scale=True, unit_divisor=1024, leave=False, disable=args.no_progress or None) as bar:
        def progress(done_bytes: int, total_bytes: int) -> None:
            bar.total = total_bytes
            bar.update(done_bytes - bar.n)

        yield progress


# ---- flags

class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise HylraError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, allow_abbrev=False,
                     description="Longer contexts, faster: reuse of selected tokens across layers, for GGUF models.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {_version()}")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command_name")
    for add in (_add_profile, _add_plan, _add_report, _add_embed_policy, _add_show, _add_strip, _add_verify, _add_run, _add_bench, _add_eval, _add_env):
        add(commands)
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], Optional[int]], text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")
    parser.set_defaults(command=run)
    return parser


def _add_profile(commands: Any) -> None:
    parser = _command(commands, "profile", _lazy("profile", "cmd_profile"), "measure which layers look at the same tokens")
    _add_model(parser)
    _add_text_flags(parser)
    types = [name for name in KV_TYPES if name != "f32"]  # see profile.KV_TYPES
    parser.add_argument("-ctk", "--cache-type-k", metavar="TYPE", choices=types, help=f"type of the KV cache: {' '.join(types)}")
    parser.add_argument("-ctv", "--cache-type-v", metavar="TYPE", choices=types, help="type of V, if it is another")
    _add_threads(parser)
    parser.add_argument("--samples", type=count(1), metavar="N", help="query rows to sample")
    parser.add_argument("-k", "--top-k", type=list_of(count(1)), metavar="LIST", help="top_k values to measure, such as 1024,2048")
    parser.add_argument("--block-sizes", type=list_of(count(1)), metavar="LIST", help="cells chosen together (default 1,16,32,64,128)")
    parser.add_argument("--sink", type=count(0), metavar="N", help="first tokens, always kept (default 4)")
    parser.add_argument("--recent", type=count(0), metavar="N", help="latest tokens, always kept (default 256)")
    parser.add_argument("--policy", metavar="FILE", help="measure instead the recall that its reuse layers really have; -o md|csv|json")
    _add_output(parser, "the profile file (default: stdout)", "PROFILE")
    _add_no_progress(parser)


def _add_plan(commands: Any) -> None:
    parser = _command(commands, "plan", _lazy("plan", "cmd_plan"), "decide from a profile which layers select and which reuse")
    parser.add_argument("profile", metavar="PROFILE", help="file that `profile` has written")
    add_plan_flags(parser)
    add_sweep_flags(parser)
    add_refine_flags(parser)
    _add_output(parser, "the policy file (default: stdout)", "POLICY")


def _add_report(commands: Any) -> None:
    parser = _command(commands, "report", _lazy("report", "cmd_report"), "show what a profile or policy says about the layers, with pictures")
    parser.add_argument("file", metavar="FILE", help="a profile, a policy, or a model file that carries a policy")
    parser.add_argument("--policy", metavar="FILE", help="mark this policy's layers in a profile (default: those of the default plan)")
    parser.add_argument("--png", metavar="DIR", help="write every picture as a PNG into this folder")
    parser.add_argument("--format", choices=("md", "json"), default="md", help="of the numbers on stdout (default md)")
    _add_output(parser, "one HTML file with all pictures inside", "REPORT")


def _add_embed_policy(commands: Any) -> None:
    parser = _command(commands, "embed-policy", cmd_embed_policy,
                      "write a policy into a model file; without --policy, profile and plan first")
    _add_model(parser)
    parser.add_argument("--policy", metavar="FILE", help="policy file to write, or a model file that carries one")
    _add_output(parser, "write a copy and leave MODEL as it is", "OUT")
    _add_force(parser)
    parser.add_argument("--dry-run", action="store_true", help="check and print, write nothing")
    _add_text_flags(parser)
    _add_threads(parser)
    add_plan_flags(parser)
    parser.add_argument("--minutes", type=number(0, math.inf, above=True), metavar="M",
                        help="then refine the plan for M minutes, as plan --refine does (default: not)")
    _add_no_progress(parser)


def _add_show(commands: Any) -> None:
    parser = _command(commands, "show", cmd_show, "print the policy of a model file")
    _add_model(parser)
    _add_format(parser, ("md", "json"))


def _add_strip(commands: Any) -> None:
    parser = _command(commands, "strip", cmd_strip, "remove the policy; restores the original file byte for byte")
    _add_model(parser)
    _add_output(parser, "write a copy and leave MODEL as it is", "OUT")
    _add_force(parser)
    _add_no_progress(parser)


def _add_verify(commands: Any) -> None:
    parser = _command(commands, "verify", cmd_verify, "check the policy of a model file against the model itself")
    _add_model(parser)
    _add_no_progress(parser)


def _add_run(commands: Any) -> None:
    parser = _command(commands, "run", _lazy("generate", "cmd_run"), "generate text")
    _add_model(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt")
    prompt.add_argument("-f", "--file", metavar="FILE", help="file with the prompt")
    parser.add_argument("-n", "--n-predict", type=count(1), metavar="N", default=128, help="tokens to generate (default 128)")
    _add_context(parser)
    _add_threads(parser)
    _add_policy_override(parser)
    parser.add_argument("--no-hylra", action="store_true", help="run dense")
    parser.add_argument("--temp", type=number(0, math.inf), metavar="T", default=0.0, help="temperature (default 0)")
    parser.add_argument("--seed", type=count(0), metavar="N", help="seed of the sampler")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")


def _add_bench(commands: Any) -> None:
    parser = _command(commands, "bench", _lazy("bench", "cmd_bench"), "measure decode speed at several depths, stock against HyLRA")
    _add_model(parser)
    parser.add_argument("-d", "--n-depth", type=list_of(count(0)), metavar="LIST", required=True,
                        help="cached tokens, such as 0,4096,8192")
    parser.add_argument("-n", "--n-gen", type=count(1), metavar="N", default=32, help="tokens to generate per run (default 32)")
    parser.add_argument("-r", "--repetitions", type=count(1), metavar="N", default=3, help="runs per depth and arm (default 3)")
    _add_threads(parser)
    types = dict(metavar="TYPE", choices=KV_TYPES, default="f16", help=f"{' '.join(KV_TYPES)} (default f16)")
    parser.add_argument("-ctk", "--cache-type-k", **types)
    parser.add_argument("-ctv", "--cache-type-v", **types)
    parser.add_argument("-np", "--n-seq", type=count(1), metavar="N", default=1,
                        help="sequences decoded in one batch, each as deep as -d says (default 1)")
    parser.add_argument("-ngl", "--n-gpu-layers", type=count(0), metavar="N", default=0, help="layers on the GPU (default 0)")
    parser.add_argument("-nkvo", "--no-kv-offload", action="store_true", help="with -ngl: keep the KV cache in host memory")
    parser.add_argument("--fill", choices=FILLS, help="read text, or copy 256 tokens: seconds, and the rows say so (default: text, but "
                        "synthetic for one sequence beyond 8192 tokens)")
    parser.add_argument("--policy", metavar="FILE", action="append", help="this policy, not the one in MODEL; repeat to compare several")
    parser.add_argument("--arms", type=list_of(one_of(ARMS)), metavar="LIST", default=list(ARMS), help=f"default {','.join(ARMS)}")
    parser.add_argument("--png", metavar="FILE", help="draw tokens/s against depth; needs pip install 'hylra-gguf[report]'")
    _add_format(parser, ("md", "csv", "json"))
    _add_no_progress(parser)


def _add_eval(commands: Any) -> None:
    parser = _command(commands, "eval", _lazy("eval", "cmd_eval"), "measure what a policy loses: predictions and answers, against dense")
    _add_model(parser)
    parser.add_argument("-d", "--n-depth", type=list_of(count(1)), metavar="LIST", default=[8192], help="lengths of documents (default 8192)")
    parser.add_argument("--docs", type=count(1), metavar="N", default=8, help="documents per length (default 8)")
    parser.add_argument("--questions", type=count(0), metavar="N", default=200, help="questions per length (default 200)")
    parser.add_argument("--following", type=count(0), metavar="N", default=256, help="tokens of text predicted per document (default 256)")
    parser.add_argument("--generate", type=count(0), metavar="N", default=0, help="tokens of each free text, four per document (default 0)")
    parser.add_argument("--time", type=count(0), metavar="N", default=8, help="decode steps timed per document and arm (default 8)")
    parser.add_argument("--tasks", type=list_of(one_of(TASKS)), metavar="LIST", default=list(TASKS[:7]),
                        help=f"{','.join(TASKS)} (default all but the last two, which need documents of their own)")
    parser.add_argument("--haystack", type=list_of(one_of(HAYSTACKS)), metavar="LIST",
                        help=f"the documents take turns (default {','.join(HAYSTACKS)}, without code if -f is given)")
    parser.add_argument("-f", "--file", nargs="+", action="extend", metavar="TEXT", help="texts that take the place of the prose")
    parser.add_argument("--arms", type=list_of(one_of(EVAL_ARMS)), metavar="LIST", default=["dense", "stock-fa1", "hylra"],
                        help=f"{','.join(EVAL_ARMS)} (default dense,stock-fa1,hylra); stock-fa0 and kv-* read every document themselves")
    parser.add_argument("--policy", metavar="FILE", action="append", help="this policy, not the one in MODEL; repeat to compare several")
    parser.add_argument("--profile", metavar="PROFILE", help="profile to plan further policies from")
    parser.add_argument("--plan", metavar="FLAGS", action="append", help="flags of `plan`, such as '--theta 0.9 --top-k 1024'; repeat")
    parser.add_argument("--minutes", type=number(0, math.inf, above=True), metavar="M", help="begin no document after M minutes (default: do all)")
    parser.add_argument("--seed", type=count(0), metavar="N", default=1, help="of documents and questions (default 1)")
    parser.add_argument("-ngl", "--n-gpu-layers", type=count(0), metavar="N", default=0, help="layers on the GPU (default 0)")
    parser.add_argument("--prefill-ngl", type=count(0), metavar="N", help="read documents with N layers on the GPU, whatever -ngl says")
    _add_threads(parser)
    parser.add_argument("--save", action="store_true", help="write what was measured into MODEL; `show` prints it")
    parser.add_argument("--png", metavar="DIR", help="write the pictures into this folder; needs pip install 'hylra-gguf[report]'")
    _add_format(parser, ("md", "json"))
    _add_no_progress(parser)


def _add_env(commands: Any) -> None:
    _command(commands, "env", _lazy("engine", "cmd_env"), "print what is installed: versions, engine library, processor")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="GGUF file")


def _add_text_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--file", nargs="+", action="extend", metavar="TEXT",
                        help="calibration texts (default: text that ships with Python)")
    parser.add_argument("-c", "--ctx-size", type=list_of(count(1)), metavar="LIST", help="context lengths in tokens, such as 4096,8192")


def _add_context(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--ctx-size", type=count(1), metavar="CTX", help="context in tokens")


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-t", "--threads", type=count(1), metavar="N", help="processor threads")


def _add_output(parser: argparse.ArgumentParser, text: str, name: str) -> None:
    parser.add_argument("-o", "--output", metavar=name, help=text)


def _add_format(parser: argparse.ArgumentParser, formats: tuple[str, ...]) -> None:
    parser.add_argument("-o", "--output", dest="format", choices=formats, default="md", help=f"{' '.join(formats)} (default md)")


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="overwrite an OUT that exists")


def _add_policy_override(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", metavar="FILE", help="use this policy, not the one in MODEL")


def _add_no_progress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


# ---- the terminal

def _version() -> str:
    try:
        return metadata.version(PROGRAM)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _fail(line: str, verbose: bool, code: int) -> int:
    if verbose:
        traceback.print_exc()
    print(f"{PROGRAM}: error: {line}", file=sys.stderr)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        return code
    _silence_stdout()
    return code


def _one_line(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(text.splitlines())


def _silence_stdout() -> None:
    """What is still buffered cannot be written; without this Python would say so once more at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tolerate_odd_names() -> None:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
