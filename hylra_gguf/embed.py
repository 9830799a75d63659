"""`embed-policy MODEL` without a policy: profiles the file and plans from what it finds."""

from __future__ import annotations

import sys

from .plan import plan_options, plan_policy
from .policy import Policy
from .profile import RECENT_TOKENS, SINK_TOKENS, describe, profile_model
from .texts import read_texts


def plan_for_model(args) -> Policy:
    """Profile and plan in one go; the planning flags that shape the measurement reach the profile too."""
    sink = SINK_TOKENS if args.sink is None else args.sink
    recent = RECENT_TOKENS if args.recent is None else args.recent
    profile = profile_model(
        args.model,
        read_texts(args.file or []),
        args.ctx_size,
        top_k=[args.top_k] if args.top_k else None,
        sink_tokens=sink,
        recent_tokens=recent,
        n_threads=args.threads,
        progress=not args.no_progress,
        text_name=", ".join(args.file or []),
    )
    print(describe(profile), file=sys.stderr)
    return plan_policy(profile, **plan_options(args))
